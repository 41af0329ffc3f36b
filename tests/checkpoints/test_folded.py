"""Models with adapters folded into them, as one model to merge."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.folded import open_folded
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import UsageError


def folded_by_peft(model, *adapters):
    """The weights of a model with adapters merged into it, as PEFT does."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for adapter in adapters:
        loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return loaded.state_dict()


def assert_verified(merged, files):
    verdict = sm.verify(merged.path, repeat="all")
    assert verdict.is_right
    assert len(verdict.inputs) == files
    assert set(verdict.inputs.values()) == {"same"}


def alone(base, reference, output):
    """The weights of a merge of one model: those of the model itself."""
    merged = sm.merge(base, {"it": reference}, "average", output=output, any_base=True)
    return load_file(merged.path / "model.safetensors"), merged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
    ],
    ids=["plain", "rsLoRA", "DoRA", "whole modules", "embeddings"],
)
def test_a_fine_tune_with_an_adapter_is_what_peft_makes_of_it(
    options, tiny_base, make_adapter, make_finetune, tmp_path
):
    tuned = make_finetune("tuned", scale=0.05)
    adapter = make_adapter("adapter", base=tuned, **options)
    found, merged = alone(tiny_base, f"{tuned}+{adapter}", tmp_path / "out")
    expected = folded_by_peft(tuned, adapter)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)
    inputs = merged.report.content["inputs"]
    assert [entry["kind"] for entry in inputs] == ["base", "full fine-tune", "LoRA adapter"]
    assert [entry["name"] for entry in inputs] == ["base", f"it, {tuned}", f"it, {adapter}"]
    assert_verified(merged, files=4)


def test_adapters_on_the_base_are_no_more_than_themselves(tiny_base, make_adapter, tmp_path):
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    base = open_base(resolve(tiny_base))
    assert (
        open_folded("it", [str(tiny_base), str(one)], base).rank(
            "model.layers.0.self_attn.q_proj.weight"
        )
        == 4
    )
    both = open_folded("it", [str(one), str(two)], base)
    assert both.kind == "LoRA adapter + LoRA adapter"
    assert {both.rank(name) for name in both.tensors} == {8}
    found, _ = alone(tiny_base, f"{tiny_base}+{one}+{two}", tmp_path / "out")
    expected = folded_by_peft(tiny_base, one, two)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)


def test_a_model_is_not_folded_into_another(tiny_base, make_finetune, tmp_path):
    one, two = make_finetune("one"), make_finetune("two")
    with pytest.raises(UsageError, match="two is a full model, and stands where an adapter"):
        sm.merge(tiny_base, [f"{one}+{two}"], output=tmp_path / "out")
    with pytest.raises(UsageError, match="the base is a model with an adapter"):
        sm.merge(f"{one}+{two}", [two], output=tmp_path / "out")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        sm.merge(tiny_base, [f"{one}+nowhere"], output=tmp_path / "out")
