"""Merges that are killed go on where they were, and give the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import starmerge_models as sm
from starmerge_models.merging import journal as journals
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.journal import JOURNAL, fingerprint
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.storage.local_folder import LocalFile, LocalFolder
from tests.checkpoints.quantised.stored import gptq_model
from tests.conftest import MakeAdapter, MakeFinetune
from tests.forks import Forks

MOMENTS = int(os.environ.get("KILL_MOMENTS", "0"))
"""Random moments at which each merge is killed, and before every operation; 0: a few."""


@pytest.mark.parametrize(
    ("kind", "method", "overwrite", "stride", "moments"),
    [
        ("model", "star", False, 13, 2),
        ("model", "ties", True, 13, 2),
        ("adapter", "star", False, 13, 1),
        ("adapter", "average", True, 11, 2),
        ("unified", "emr", False, 13, 2),
        ("file", "average", False, 23, 1),
        ("gguf", "star", True, 3, 2),
        ("quantised", "average", False, 37, 1),
        ("experts", "star", True, 37, 1),
    ],
)
def test_a_merge_killed_before_any_operation_on_files_is_whole_or_goes_on(
    loaded: Forks,
    make_adapter: MakeAdapter,
    tiny_base: Path,
    tmp_path: Path,
    kind: str,
    method: str,
    overwrite: bool,
    stride: int,
    moments: int,
) -> None:
    base, options = tiny_base, dict[str, Any]()
    if kind == "quantised":
        base = tmp_path / "base"
        gptq_model(tiny_base, base)
    elif kind == "experts":
        base = _with_experts(tmp_path / "base")
        options = {"base": base, "target_parameters": ["mlp.experts.down_proj"]}
    models = [make_adapter(name, seed=n, **options) for n, name in enumerate("abc")]
    if kind == "file":
        models = [_single_file(tmp_path / f"{name}.safetensors", n) for n, name in enumerate("abc")]
    outputs = {"adapter": "adapter", "file": "adapter", "gguf": "gguf", "unified": "unified"}
    endings = {"file": ".safetensors", "gguf": ".gguf"}
    task = {
        "base": None if kind in ("adapter", "file") else str(base),
        "models": list(map(str, models)),
        "method": method,
        "kind": outputs.get(kind, "model"),
        "dtype": "bfloat16" if kind == "quantised" else "keep",
        "output": str(tmp_path / f"out{endings.get(kind, '')}"),
        "overwrite": overwrite,
        "stride": 1 if MOMENTS else stride,
        "moments": MOMENTS or moments,
    }
    ended = loaded.run(
        [json.dumps(task)], module="tests.merging.killed", kill_after=300 + 30 * MOMENTS
    )
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    print(f"{kind}: {found}")
    assert found["wrong"] == []
    assert found["operations"] > 20
    assert found["resumed"] > 3


def _with_experts(folder: Path) -> Path:
    """Make a model whose files hold the experts of a layer in one tensor."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder, save_original_format=False)
    return folder


def _single_file(file: Path, seed: int) -> Path:
    """Make an adapter in kohya's layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(6):
        stem = f"lora_unet_mid_block_attentions_{number}_proj_in"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, 24, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
    save_file(tensors, file)
    return file


def _plan(base: Path, models: list[Path], output: Path, **options: Any) -> Any:
    content = {"base": str(base), "models": list(map(str, models)), "method": "star"}
    return make_plan(make_recipe(content | options), output)


class _StoppedError(Exception):
    pass


def _interrupted(plan: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Run a merge up to some tensors, as if it was killed; return the folder that it leaves."""
    kept = plan.path.with_name("kept")
    noted: list[str] = []
    add = journals.Journal.add

    def stop(self: Any, tensor: Any, *rest: Any) -> None:
        add(self, tensor, *rest)
        noted.append(tensor.source.name)
        if len(noted) == after:
            self._flush()
            (partial,) = plan.path.parent.glob(f".{plan.path.name}.partial-*")
            subprocess.run(["cp", "-r", partial, kept], check=True)
            raise _StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "add", stop)
        with pytest.raises(_StoppedError):
            run(plan, Threads(1))
    partial = plan.path.with_name(f".{plan.path.name}.partial-{fingerprint(plan)}")
    kept.rename(partial)
    return partial


def test_what_lies_on_the_disk_otherwise_is_merged_again(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    whole = sm.merge(tiny_base, models, output=tmp_path / "whole")
    plan = _plan(tiny_base, models, tmp_path / "out")
    partial = _interrupted(plan, monkeypatch, after=12)
    file = partial / "model.safetensors"
    content = bytearray(file.read_bytes())
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines() if line]
    assert len(lines) == 12
    header = int.from_bytes(content[:8], "little")
    places = json.loads(content[8 : 8 + header])
    content[8 + header + places[lines[3]["tensor"]]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(content)
    result = run(plan, Threads(1))
    assert result.resumed == 11
    assert (result.path / "model.safetensors").read_bytes() == (
        whole.path / "model.safetensors"
    ).read_bytes()
    same = ("tensors", "digests", "unchanged", "findings")
    for key in same:
        assert result.report.content[key] == whole.report.content[key]
    assert not (result.path / JOURNAL).exists()


def test_another_merge_does_not_take_it_up(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = _plan(tiny_base, models, tmp_path / "out")
    _interrupted(plan, monkeypatch, after=9)
    assert fingerprint(_plan(tiny_base, models, tmp_path / "out")) == fingerprint(plan)
    other = _plan(tiny_base, models, tmp_path / "out", parameters={"eta": 50})
    assert fingerprint(other) != fingerprint(plan)
    assert run(other, Threads(1)).resumed == 0
    file = models[0] / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert fingerprint(_plan(tiny_base, models, tmp_path / "new")) != fingerprint(plan)


def test_what_an_earlier_run_wrote_is_no_space_that_is_still_needed(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    output = tmp_path / "out"
    plan = _plan(tiny_base, models, output)
    free = shutil.disk_usage(tmp_path)._replace(free=plan.bytes_to_write // 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: free)
        with pytest.raises(sm.StarmergeError, match="its disk has"):
            _plan(tiny_base, models, output)
    _interrupted(plan, monkeypatch, after=len(plan.tensors) - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: free)
        assert run(_plan(tiny_base, models, output), Threads(1)).resumed > 0


def test_fresh_begins_anew(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = _plan(tiny_base, models, tmp_path / "out")
    partial = _interrupted(plan, monkeypatch, after=9)
    others = [tmp_path / ".out.partial-of_another", tmp_path / ".out.replaced-only_copy"]
    for other in others:
        other.mkdir()
    assert run(plan, Threads(1), fresh=True).resumed == 0
    assert not partial.exists()
    assert all(other.exists() for other in others)


def test_an_input_that_changes_during_the_merge_is_an_error(
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    models = [make_adapter("a"), make_finetune("b")]
    plan = _plan(tiny_base, models, tmp_path / "out")
    file = models[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(sm.StarmergeError, match=r"b/model.safetensors was changed while"):
        run(plan, Threads(1))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "line",
    [
        '{"tensor": "lm_head.weight", "digests": null, "record": null, "changing": []}',
        "[",
        "",
        "[" * 10**6,
    ],
)
def test_a_damaged_line_does_not_count(
    make_adapter: MakeAdapter,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = _plan(tiny_base, models, tmp_path / "out")
    partial = _interrupted(plan, monkeypatch, after=9)
    lines = [text for text in (partial / JOURNAL).read_text().splitlines() if text]
    (partial / JOURNAL).write_text("\n".join([line, *lines[1:]]) + "\n")
    assert run(plan, Threads(1)).resumed == 8


@pytest.mark.parametrize(
    "damage",
    [
        {"inputs": []},
        {"inputs": ["0" * 64] * 9},
        {"digests": []},
        {"record": None},
        {"changing": [2]},
        {"changing": [-1]},
    ],
)
def test_a_line_that_cannot_be_of_its_tensor_does_not_count(
    make_adapter: MakeAdapter,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: dict[str, Any],
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    whole = sm.merge(tiny_base, models, output=tmp_path / "whole")
    plan = _plan(tiny_base, models, tmp_path / "out")
    merged = [number for number, tensor in enumerate(plan.tensors) if tensor.models]
    partial = _interrupted(plan, monkeypatch, after=merged[0] + 1)
    lines = [text for text in (partial / JOURNAL).read_text().splitlines() if text]
    (partial / JOURNAL).write_text(
        "\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | damage)])
    )
    result = run(plan, Threads(1))
    assert result.resumed == merged[0]
    assert result.report.content == whole.report.content


def test_a_journal_of_one_line_that_was_cut_off_is_gone_on_with(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = _plan(tiny_base, models, tmp_path / "out")
    partial = _interrupted(plan, monkeypatch, after=1)
    journal = partial / JOURNAL
    journal.write_text(journal.read_text().strip()[:-9])
    again = _interrupted(plan, monkeypatch, after=3)
    assert again == partial
    assert run(plan, Threads(1)).resumed == 3


def test_a_line_is_written_after_what_it_tells_of_has_reached_the_disk(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, append = LocalFile.sync, LocalFolder.append

    def syncing(self: LocalFile) -> None:
        sync(self)
        events.append("sync")

    def appending(self: LocalFolder, name: str, content: bytes) -> None:
        events.append("line")
        append(self, name, content)

    monkeypatch.setattr(journals, "_SECONDS", -1.0)  # a line after each tensor
    monkeypatch.setattr(LocalFile, "sync", syncing)
    monkeypatch.setattr(LocalFolder, "append", appending)
    plan = _plan(tiny_base, [make_adapter("a")], tmp_path / "out")
    run(plan, Threads(1))
    assert events.count("line") == len(plan.tensors)
    assert all(events[n - 1] == "sync" for n, event in enumerate(events) if event == "line")


def test_what_another_merge_has_left_is_no_room(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    left = _plan(tiny_base, models, tmp_path / "out")
    _interrupted(left, monkeypatch, after=12)
    other = _plan(tiny_base, models[:1], tmp_path / "out")
    free = shutil.disk_usage(tmp_path)._replace(free=left.bytes_to_write // 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: free)
        with pytest.raises(sm.StarmergeError, match="GB free"):
            run(other, Threads(1))
        assert run(left, Threads(1)).resumed == 12
