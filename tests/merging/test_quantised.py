"""Merges into quantised bases, and of quantised fine-tunes."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import starmerge_models as sm
from starmerge_models.errors import UsageError
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe import Recipe
from tests.checkpoints.quantised.stored import gptq_model
from tests.conftest import MakeAdapter, MakeFinetune, edit_json


def _update(adapter: Path, name: str) -> np.ndarray:
    """Return 2 B A of a tensor, alpha being twice the rank; zero where it has none."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{stem}.lora_A.weight" not in tensors:
        return np.zeros(())
    A, B = (tensors[f"{stem}.lora_{which}.weight"].double().numpy() for which in "AB")
    return 2 * B @ A


def test_an_adapter_is_merged_into_a_quantised_base(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    weights = gptq_model(tiny_base, tmp_path / "quantised")
    adapter = make_adapter("adapter")
    result = sm.merge(
        tmp_path / "quantised", [adapter], "average", output=tmp_path / "out", dtype="float32"
    )
    merged = load_file(result.path / "model.safetensors")
    assert merged.keys() == weights.keys()
    for name, W in weights.items():
        expected = W + _update(adapter, name)
        scale = np.abs(W).max() + np.abs(_update(adapter, name)).max()
        # Roundings to float32: of the codes' weight, the update and the sum.
        assert np.abs(merged[name].double().numpy() - expected).max() <= 4 * 2**-24 * scale

    config = json.loads((result.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (result.path / "quantize_config.json").exists()
    (note,) = result.report.content["notes"]
    assert "is quantised (GPTQ, 4 bits)" in note
    model = AutoModelForCausalLM.from_pretrained(result.path)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())

    # The hashes are those of the stored tensors, and the merge can be repeated from the files.
    verdict = sm.verify(result.path, repeat="all")
    assert verdict.is_right, verdict
    assert set(verdict.inputs.values()) == {"same"}
    assert verdict.repeated == len(merged)
    # What the codes stand for depends on the config.
    settings = json.loads((tmp_path / "quantised/config.json").read_text())["quantization_config"]
    edit_json(
        tmp_path / "quantised/config.json",
        quantization_config=settings | {"checkpoint_format": "gptq_v2"},
    )
    assert sm.verify(result.path).inputs["base: config.json"] == "changed"


def test_weights_that_no_model_changes_are_dequantised_too(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    weights = gptq_model(tiny_base, tmp_path / "quantised")
    adapter = make_adapter("adapter")
    name = "model.layers.0.mlp.down_proj.weight"
    for dtype in ("float32", "bfloat16"):
        result = sm.merge(
            tmp_path / "quantised", [adapter], "average", output=tmp_path / dtype, dtype=dtype
        )
        merged = load_file(result.path / "model.safetensors")[name]
        expected = torch.from_numpy(weights[name]).float().to(getattr(torch, dtype))
        assert torch.equal(merged, expected)


def test_a_quantised_base_wants_a_dtype(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    gptq_model(tiny_base, tmp_path / "quantised")
    adapter = make_adapter("adapter")
    with pytest.raises(UsageError, match=r"quantised \(GPTQ, 4 bits\).*--dtype float32, in which"):
        sm.merge(tmp_path / "quantised", [adapter], "average", output=tmp_path / "out")
    # An adapter has no weights of the base's.
    result = sm.merge(
        tmp_path / "quantised",
        [adapter],
        "average",
        output=tmp_path / "out",
        output_kind="adapter",
    )
    assert (result.path / "adapter_model.safetensors").is_file()


def test_a_quantised_fine_tune_is_merged_into_a_plain_base(
    tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    tuned = make_finetune("tuned")
    weights = gptq_model(tuned, tmp_path / "quantised")
    result = sm.merge(tiny_base, [tmp_path / "quantised"], "average", output=tmp_path / "out")
    merged = load_file(result.path / "model.safetensors")
    for name, W in weights.items():
        assert np.allclose(merged[name].double().numpy(), W, rtol=0, atol=1e-6)
    (note,) = result.report.content["notes"]
    assert "quantised is quantised" in note


def test_memory_counts_the_weight_that_is_computed(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    gptq_model(tiny_base, tmp_path / "quantised")
    adapter = make_adapter("adapter")

    def plan(base: Path) -> dict[str, int]:
        recipe = Recipe.model_validate(
            {"base": str(base), "models": [str(adapter)], "method": "average", "dtype": "float32"}
        )
        made = make_plan(recipe, tmp_path / "out")
        return {tensor.source.name: made.memory_of(tensor) for tensor in made.tensors}

    quantised, plain = plan(tmp_path / "quantised"), plan(tiny_base)
    for name, tensor in load_file(tiny_base / "model.safetensors").items():
        computed = 4 * tensor.numel() if name.endswith("_proj.weight") else 0
        assert quantised[name] - plain[name] == computed


def test_the_command_line_says_that_a_base_is_quantised(
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    starmerge: Callable[..., CompletedProcess[str]],
) -> None:
    gptq_model(tiny_base, tmp_path / "quantised")
    arguments = ("merge", tmp_path / "quantised", make_adapter("adapter"), "-o", tmp_path / "out")
    refused = starmerge(*arguments)
    assert refused.returncode == 2
    assert "--dtype float32" in refused.stderr
    planned = starmerge(*arguments, "--dtype", "bfloat16", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "is quantised (GPTQ, 4 bits)" in " ".join(planned.stdout.split())
