"""Adapters: the same update as PEFT folds in, and a refusal of whatever is more than s·B·A."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from starmerge.checkpoints.adapter import Adapter, open_adapter
from starmerge.checkpoints.base import open_base
from starmerge.checkpoints.source import resolve
from starmerge.errors import StarmergeError, UsageError
from tests.conftest import MakeAdapter, edit_json


def _open(path: Path, base: Path, **options: Any) -> Adapter:
    return open_adapter("a", resolve(path), open_base(resolve(base)), **options)


def _folded_by_peft(path: Path, base: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, path).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"v_proj": 5}, "rank_pattern": {"layers.0.self_attn.q_proj": 7}},
        {"alpha_pattern": {"proj": 3, "q_proj": 5, "self_attn.q_proj": 7, ".*v_proj": 9}},
        {"target_modules": ["q_proj", "gate_proj", "down_proj", "lm_head"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_gives_the_update_that_peft_folds_in(
    make_adapter: MakeAdapter, tiny_base: Path, options: dict[str, Any]
) -> None:
    path = make_adapter("adapter", **options)
    expected = _folded_by_peft(path, tiny_base)
    base = open_base(resolve(tiny_base))
    adapter = _open(path, tiny_base)
    assert adapter.tensors
    for name, weight in expected.items():
        before = base.checkpoint.read(name)
        update = adapter.delta(name, before).to_dense() if name in adapter.tensors else 0.0
        # PEFT adds in float32: a few units in the last place of the weights and of the update.
        assert torch.allclose(before + update, weight, rtol=1e-6, atol=1e-6), name


def test_transposes_the_update_of_layers_stored_input_first(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(base)
    path = make_adapter("adapter", base=base, target_modules=["c_attn"], fan_in_fan_out=True)
    expected = _folded_by_peft(path, base)["transformer.h.0.attn.c_attn.weight"]
    opened = open_base(resolve(base))
    adapter = _open(path, base)
    (name,) = adapter.tensors
    edit_json(path / "adapter_config.json", fan_in_fan_out=False)
    assert _open(path, base).factors == adapter.factors, "the shape of c_attn tells"
    before = opened.checkpoint.read(name)
    assert torch.allclose(before + adapter.delta(name, before).to_dense(), expected, atol=1e-6)


def test_square_weights_need_a_flag_that_agrees_with_the_base(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """PEFT keeps one flag for all layers, so a linear head makes it wrong for GPT-2's others."""
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(base)
    path = make_adapter("adapter", base=base, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    expected = _folded_by_peft(path, base)["transformer.h.0.attn.c_proj.weight"]
    adapter = _open(path, base)
    (name,) = adapter.tensors
    before = open_base(resolve(base)).checkpoint.read(name)
    assert torch.allclose(before + adapter.delta(name, before).to_dense(), expected, atol=1e-6)
    edit_json(path / "adapter_config.json", fan_in_fan_out=False)
    with pytest.raises(UsageError, match=r"the square transformer\.h\.0\.attn\.c_proj\.weight"):
        _open(path, base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type", "IA3"]),
        ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
        ({"bias": "all"}, ["bias", "none"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"target_parameters": ["x"]}, ["target_parameters"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights", "olora"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"brand_new_key": 3}, ["brand_new_key", "unknown"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern", "q_proj", "'x'"]),
        ({"alpha_pattern": {"(": 3}}, ["alpha_pattern"]),
        ({"alpha_pattern": [3]}, ["alpha_pattern"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out", "q_proj.weight"]),
    ],
)
def test_refuses_what_it_does_not_merge_and_names_the_key(
    make_adapter: MakeAdapter, tiny_base: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = make_adapter("adapter")
    edit_json(path / "adapter_config.json", **changes)
    with pytest.raises(StarmergeError) as error:
        _open(path, tiny_base)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_accepts_unset_keys_of_a_newer_peft(make_adapter: MakeAdapter, tiny_base: Path) -> None:
    path = make_adapter("adapter")
    edit_json(path / "adapter_config.json", key_of_the_future=None, another=False)
    assert _open(path, tiny_base).tensors


def _change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    file = path / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(file) | changes
    save_file({k: t for k, t in tensors.items() if t is not None}, file)


_Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{_Q0}.lora_B.weight": None}, r"layers\.0\.self_attn\.q_proj has lora_A but no lora_B"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, r"lm_head\.weight is no LoRA"),
        ({f"{_Q0}.lora_B.weight": torch.ones(30, 4)}, r"q_proj\.weight has the shape \[30, 32\]"),
        ({f"{_Q0}.lora_B.weight": torch.ones(32, 3)}, "do not fit together"),
        (
            {f"{_Q0}.lora_B.weight": torch.ones(32, 2), f"{_Q0}.lora_A.weight": torch.ones(2, 32)},
            "the rank of .*q_proj is 4 here and 2 in the tensors",
        ),
        ({f"{_Q0[17:]}.lora_B.weight": torch.ones(32, 4)}, "but no lora_A"),
        (
            {f"{_Q0}.lora_B.weight": torch.ones(32, 4).char()},
            r"lora_B\.weight is stored in torch\.int8",
        ),
        (
            {
                "base_model.model.model.layers.7.x.lora_A.weight": torch.ones(4, 32),
                "base_model.model.model.layers.7.x.lora_B.weight": torch.ones(32, 4),
            },
            r"adapts model\.layers\.7\.x, but the base .* has no tensor",
        ),
    ],
)
def test_refuses_tensors_that_do_not_fit_and_names_them(
    make_adapter: MakeAdapter, tiny_base: Path, changes: dict[str, Any], message: str
) -> None:
    path = make_adapter("adapter")
    _change_tensors(path, **changes)
    with pytest.raises(StarmergeError, match=message):
        _open(path, tiny_base)


def test_refuses_an_adapter_of_another_base_unless_told(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    path = make_adapter("adapter")
    base = tmp_path / "named"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).symlink_to(file)
    (base / "config.json").unlink()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    edit_json(base / "config.json", _name_or_path="someone/else")
    with pytest.raises(UsageError, match=r"tests/tiny, but the base is someone/else.*--any-base"):
        _open(path, base)
    assert _open(path, base, any_base=True).tensors
    edit_json(base / "config.json", _name_or_path="Tests/Tiny")
    assert _open(path, base).tensors
