"""Models of every kind merge, because tensors are tensors; transformers loads what comes out."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

import starmerge_models as sm

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_CASES = {
    "mistral": (AutoModelForCausalLM, MistralConfig(**_DECODER), "q_proj"),
    "qwen": (AutoModelForCausalLM, Qwen3Config(**_DECODER), "q_proj"),
    "gemma": (AutoModelForCausalLM, Gemma2Config(**_DECODER), "q_proj"),
    "experts": (
        AutoModelForCausalLM,
        MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
        "q_proj",
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4),
        "q",
    ),
    "vit": (
        AutoModel,
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        None,
    ),
    "resnet": (
        AutoModel,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        None,
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_model_of_every_kind_is_merged_and_loaded(name: str, tmp_path: Path) -> None:
    auto, config, target = _CASES[name]
    base = _base(auto, config, tmp_path / "base")
    models = {f"tuned{seed}": _tuned(base, tmp_path, seed) for seed in (1, 2)}
    if target is not None:
        models["adapter"] = _adapter(auto, base, target, tmp_path / "adapter")
    result = sm.merge(base, models, "star+task_arithmetic", output=tmp_path / "star")
    assert len(result.report.tensors) > 10
    assert auto.from_pretrained(result.path)

    full = {key: path for key, path in models.items() if key != "adapter"}
    averaged = sm.merge(base, full, "average", output=tmp_path / "average").path
    merged, weights = (load_file(folder / "model.safetensors") for folder in (averaged, base))
    tuned = [load_file(path / "model.safetensors") for path in full.values()]
    for key, weight in weights.items():
        if not weight.is_floating_point():
            assert torch.equal(merged[key], weight)
            continue
        expected = (tuned[0][key].double() + tuned[1][key].double()) / 2
        error = (merged[key].double() - expected).abs().max()
        assert float(error) <= 3 * 2.0**-24 * float(weight.abs().max() + 0.1), key


def _base(auto: type, config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return folder


def _tuned(base: Path, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for key, tensor in load_file(base / "model.safetensors").items()
    }
    tuned = folder / f"tuned{seed}"
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    (tuned / "config.json").write_text((base / "config.json").read_text())
    return tuned


def _adapter(auto: type, base: Path, target: str, folder: Path) -> Path:
    torch.manual_seed(3)
    options = LoraConfig(r=4, lora_alpha=8, target_modules=[target], init_lora_weights=False)
    get_peft_model(auto.from_pretrained(base), options).save_pretrained(folder)
    return folder
