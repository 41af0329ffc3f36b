"""What verify finds in a merge that was changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from starmerge_models.checkpoints.hashing import blake3_of_contents
from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.merging.verify import verify
from tests.conftest import MakeAdapter

_KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "model": ("average", {}, "model.safetensors"),
    "adapter": ("star", {"output_kind": "adapter"}, "adapter_model.safetensors"),
    "unified": ("emr", {}, "unified/model.safetensors"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_merge_is_right_until_its_bytes_are_changed(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    method, options, weights = _KINDS[kind]
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    path = sm.merge(tiny_base, models, method, output=tmp_path / "out", **options).path
    for repeat in ("sample", "all"):
        verdict = verify(path, repeat=repeat)
        assert verdict.is_right and verdict.repeated
    (path / "README.md").write_text("My model.")
    assert verify(path).is_right

    tensors = load_file(path / weights)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path / weights, metadata={"format": "pt"})
    verdict = verify(path)
    assert not verdict.is_right
    assert verdict.wrong == [f"{weights}: the bytes of {name} are not those that were written."]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_bytes_that_were_given_another_dtype_or_shape_are_wrong(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, kind: str, change: str
) -> None:
    method, options, weights = _KINDS[kind]
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    path = sm.merge(tiny_base, models, method, output=tmp_path / "out", **options).path
    tensors = load_file(path / weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name].view(torch.int32) if change == "dtype" else tensors[name].view(-1)
    save_file(tensors, path / weights, metadata={"format": "pt"})
    verdict = verify(path)
    assert not verdict.is_right
    assert verdict.wrong == [f"{weights}: the dtypes or shapes are not those that were written."]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_tensor_that_the_merge_does_not_make_is_different(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    method, options, weights = _KINDS[kind]
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    path = sm.merge(tiny_base, models, method, output=tmp_path / "out", **options).path
    tensors = load_file(path / weights) | {"added": torch.ones(3)}
    save_file(tensors, path / weights, metadata={"format": "pt"})
    report = json.loads((path / "merge_report.json").read_text())
    report["digests"][weights]["added"] = blake3(bytes(tensors["added"].numpy())).hexdigest()
    stored = open_safetensors(path / weights)
    report["contents"][weights] = blake3_of_contents(
        (stored[name], report["digests"][weights][name]) for name in stored
    )
    (path / "merge_report.json").write_text(json.dumps(report))
    assert verify(path).is_right
    verdict = verify(path, repeat="all")
    assert not verdict.is_right
    assert verdict.different == ["added"]


def test_a_merge_has_the_hash_that_a_merge_of_it_says(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    model = make_adapter("a")
    first = sm.merge(tiny_base, [model], "average", output=tmp_path / "first")
    second = sm.merge(first.path, [model], "average", output=tmp_path / "second")
    assert second.report.content["inputs"][0]["tensors"] == first.report.content["contents"]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_config_that_was_changed_is_wrong(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    method, options, _ = _KINDS[kind]
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    path = sm.merge(tiny_base, models, method, output=tmp_path / "out", **options).path
    (config,) = [
        name
        for name in json.loads((path / "merge_report.json").read_text())["blake3"]
        if name in ("config.json", "adapter_config.json", "a/emr.json")
    ]
    (path / config).write_text((path / config).read_text() + " ")
    assert verify(path).wrong == [f"{config}: the bytes are not those that were written."]


@pytest.mark.parametrize(
    "edit",
    [
        {"digests": {"model.safetensors": "x"}},
        {"files": None},
        {"inputs": [{}]},
        {"recipe": 3},
        {"blake3": []},
    ],
)
def test_a_broken_report_is_an_error(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, edit: dict[str, Any]
) -> None:
    path = sm.merge(tiny_base, [make_adapter("a")], "average", output=tmp_path / "out").path
    report = path / "merge_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | edit))
    with pytest.raises(sm.StarmergeError, match=f"is broken at {next(iter(edit))}"):
        verify(path)


def test_adapters_that_are_one_file_are_found_again(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    """With the config beside it, and pickled under any ending."""
    given = make_adapter("a") / "adapter_model.safetensors"
    name, size = "lora_te_model_layers_0_self_attn_q_proj", (32, 32)
    pickled = tmp_path / "b.ckpt"
    torch.save(
        {
            f"{name}.lora_down.weight": torch.ones(1, size[1]),
            f"{name}.lora_up.weight": torch.ones(size[0], 1),
        },
        pickled,
    )
    path = sm.merge(tiny_base, [given, pickled], "average", output=tmp_path / "out").path
    verdict = verify(path, repeat="all")
    assert verdict.is_right
    assert verdict.inputs == {
        "base: model.safetensors": "same",
        "adapter_model: adapter_config.json": "same",
        "adapter_model: adapter_model.safetensors": "same",
        "b: b.ckpt": "same",
    }
    (given.parent / "adapter_config.json").write_text("{}")
    assert verify(path).inputs["adapter_model: adapter_config.json"] == "changed"
