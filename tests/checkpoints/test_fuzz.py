"""Spoilt files, at random but from seeds: each merges, or is refused with an error of ours.

FUZZ_EXAMPLES=100000 tries more of them than the suite does; ``make fuzz`` tries these kinds too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from starmerge_models.checkpoints import isolated
from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.errors import StarmergeError
from tests.checkpoints.bad_files import (
    KINDS,
    World,
    as_json,
    mutate,
    spoil_and_merge,
    time_limit,
    write_safetensors,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_merges_or_is_refused(
    world: World, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To ask transformers takes seconds. Of a base without its names it would say nothing.
    monkeypatch.setattr(isolated, "find_spec", lambda _: None)
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(EXAMPLES):
        copy = world.copy(tmp_path / "copy")
        seed = f"{kind} {SEED} {number}"
        try:
            outcome = spoil_and_merge(copy, kind, random.Random(seed))
        except BaseException as error:
            raise AssertionError(f"seed {seed!r}: {type(error).__name__}: {error}") from error
        outcomes["merged" if outcome == "merged" else "refused"] += 1
        assert (copy.folder / "merged").exists() == (outcome == "merged"), seed
        assert outcome == "merged" or len(outcome) > 20, seed
        shutil.rmtree(copy.folder)
    print(f"\n{kind}: {EXAMPLES} files, {dict(outcomes)}, {time.monotonic() - started:.0f} s")
    assert outcomes["refused"]


def _safetensors_takes(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def test_takes_the_headers_that_safetensors_takes(tmp_path: Path) -> None:
    """A header is refused where safetensors refuses it; and where we say that we are stricter."""
    stricter = ("occurs twice", "has the dtype", "is longer than", "a layer's number of", "2⁶³",
                "strange shape", "digits", "half a character", "levels deep")  # fmt: skip
    header = {
        "__metadata__": {"format": "pt", "note": "é"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c.0": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "d": {"dtype": "F16", "shape": [0, 3], "data_offsets": [40, 40]},
    }
    file = tmp_path / "x.safetensors"
    verdicts: Counter[bool] = Counter()
    for number in range(EXAMPLES * 25):
        rng = random.Random(f"header {SEED} {number}")
        content = header
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            content = mutate(content, rng)
        write_safetensors(file, as_json(content, rng), bytes(40))
        taken = _safetensors_takes(file)
        try:
            with time_limit():
                checkpoint = open_safetensors(file)
                for name in checkpoint:
                    assert isinstance(checkpoint.read(name), torch.Tensor)
        except StarmergeError as error:
            is_stricter = any(reason in str(error) for reason in stricter)
            assert not taken or is_stricter, f"seed {number}: only we refuse it: {error}"
        else:
            assert taken, f"seed {number}: only we take {json.dumps(content)}"
        verdicts[taken] += 1
    print(f"\nheaders: {dict(verdicts)} taken by safetensors or not")
    assert min(verdicts[True], verdicts[False]) > EXAMPLES
