"""Spoilt files of every kind: each is used, or refused with an error of ours; nothing else.

FUZZ_MINUTES=60 (``make fuzz``) tries for so long in all, and others with FUZZ_SEED=N; the suite
tries a few of each kind, and the seeds that have found a fault before.
"""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

import starmerge_models
from starmerge_models.checkpoints import isolated
from tests.checkpoints import bad_files
from tests.soak.spoilt import KINDS

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
"""For all kinds together; 0: a few files of each."""
EXAMPLES = 4
SEED = int(os.environ.get("FUZZ_SEED", "0"))

NEW = [name for name in KINDS if name not in bad_files.KINDS]
"""Kinds of which tests/checkpoints/test_fuzz.py does not try a few files."""

GROWTH = 2**30
"""Bytes of memory that a kind may take more than those before it."""

FOUND: dict[str, list[str]] = {
    "results": ["results 0 49", "results 0 58", "results 0 59", "results 0 118", "results 0 134",
                "results 0 163", "results 0 173"],
    "partial output": ["partial output 0 19"],
    "suite file": ["suite file 1 327"],
    "study file": ["study file 1 719"],
    "study store": ["study store 1 421"],
}  # fmt: skip
"""Seeds that have found a fault, which has been mended, by kind."""


def _place(error: BaseException) -> str:
    """Return which error was raised where in the package."""
    package = str(Path(starmerge_models.__file__).parent)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(package)
    ]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the test"
    return f"{type(error).__name__} at {last}"


# The others of a few files are those of tests/checkpoints/test_fuzz.py.
@pytest.mark.parametrize(
    "name", KINDS if MINUTES else [n for n in KINDS if n not in bad_files.KINDS]
)
def test_a_spoilt_file_is_used_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To ask transformers takes seconds. Of a base without its names it would say nothing.
    monkeypatch.setattr(isolated, "find_spec", lambda _: None)
    kind = KINDS[name](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    faults: dict[str, str] = {}
    begun, number = time.monotonic(), 0
    seeds = list(FOUND.get(name, []))
    while seeds or _goes_on(number, begun):
        seed = seeds.pop() if seeds else f"{name} {SEED} {number}"
        number += 1
        try:
            refused = kind.attempt(seed)
        except Exception as error:
            outcomes["faults"] += 1
            faults.setdefault(_place(error), f"seed {seed!r}: {str(error)[:300]}")
        else:
            outcomes["used" if refused is None else "refused"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    took = time.monotonic() - begun
    print(f"\n{name}: {number} files, {dict(outcomes)}, {took:.0f} s, {grown / 1e6:.0f} MB more")
    for place, said in faults.items():
        print(f"  FAULT {place}: {said}")
    assert faults == {}
    assert grown < GROWTH


def _goes_on(number: int, begun: float) -> bool:
    if MINUTES:
        return time.monotonic() - begun < MINUTES * 60 / len(KINDS)
    return number < EXAMPLES
