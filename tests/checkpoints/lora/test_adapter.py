"""Adapters: the same update as PEFT folds in, and a refusal of whatever is more than s·B·A."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from starmerge_models import merge
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.source import resolve
from starmerge_models.deltas import LowRank
from starmerge_models.errors import StarmergeError, UsageError
from tests.conftest import MakeAdapter, edit_json
from tests.oracles import adapters as oracle
from tests.oracles.bounds import U32, gamma
from tests.oracles.deltas import exact


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
    assert _open(path, base).updates == adapter.updates, "the shape of c_attn tells"
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
        ({"peft_type": "IA3"}, ["peft_type", "IA3", "merge_and_unload"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"use_dora": True}, ["use_dora", "no lora_magnitude_vector"]),
        ({"bias": "all"}, ["bias", "none", "merge_and_unload"]),
        ({"bias": "lora_only"}, ["bias", "lora_only"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "holds no tensor"]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save", "no list"]),
        ({"target_parameters": ["x"]}, ["target_parameters", "holds no factors"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices", "merge_and_unload"]),
        ({"trainable_token_indices": {"x": [1]}}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication", "as the base"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "Train a plain LoRA"]),
        ({"use_qalora": True}, ["use_qalora", "merge_and_unload"]),
        ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora", "merge_and_unload"]),
        ({"monteclora_config": {"num_samples": 2}}, ["monteclora_config", "merge_and_unload"]),
        ({"kasa_config": {"beta": 0.1}}, ["kasa_config", "merge_and_unload"]),
        ({"velora_config": {"num_groups": 2}}, ["velora_config", "merge_and_unload"]),
        ({"arrow_config": {"top_k": 2}}, ["arrow_config", "routes"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa", "conversion"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "pissa_niter_4"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights", "olora", "conversion"]),
        ({"init_lora_weights": "corda"}, ["init_lora_weights", "corda", "conversion"]),
        ({"init_lora_weights": "lora_ga"}, ["init_lora_weights", "lora_ga", "conversion"]),
        ({"init_lora_weights": "loftq"}, ["init_lora_weights", "loftq", "that LoftQ made"]),
        ({"init_lora_weights": "of_the_future"}, ["init_lora_weights", "of_the_future"]),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"key_of_the_future": None, "another": False},
        {"ensure_weight_tying": True},
        {"init_lora_weights": True, "corda_config": {"x": 1}, "lora_ga_config": {"x": 1}},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_accepts_keys_that_change_nothing(
    make_adapter: MakeAdapter, tiny_base: Path, changes: dict[str, Any]
) -> None:
    path = make_adapter("adapter")
    expected = _open(path, tiny_base).updates
    edit_json(path / "adapter_config.json", **changes)
    assert _open(path, tiny_base).updates == expected


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_is_merged_once_converted(
    tiny_base: Path, tmp_path: Path, start: str
) -> None:
    """PEFT's conversion saves the difference to the first state, at twice the rank."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "raw")
    with pytest.raises(UsageError, match=f"init_lora_weights is '{start}'"):
        _open(tmp_path / "raw", tiny_base)
    adapted.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    adapter = _open(tmp_path / "converted", tiny_base)
    base = open_base(resolve(tiny_base)).checkpoint
    folded = adapted.merge_and_unload().state_dict()
    assert len(adapter.tensors) == 4
    for name in adapter.tensors:
        before = base.read(name)
        assert adapter.rank(name) == 6
        update = adapter.delta(name, before)
        assert isinstance(update, LowRank)
        expected, bound = oracle.plain(before, update.B, update.A, update.scale, transposed=False)
        size = oracle.product(abs(update.B), abs(update.A), update.scale) + abs(exact(before))
        # PEFT's base is W - s·B·A of the start, rounded; then it adds the trained product.
        assert np.all(abs(exact(folded[name]) - expected) <= bound + gamma(9, U32) * size), name


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
        ({f"{_Q0[17:]}.lora_B.weight": torch.ones(32, 4)}, "holds lora_B of .*q_proj twice"),
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


def test_refuses_an_empty_file(make_adapter: MakeAdapter, tiny_base: Path) -> None:
    path = make_adapter("adapter")
    save_file({}, path / "adapter_model.safetensors")
    with pytest.raises(StarmergeError, match="holds no tensors"):
        _open(path, tiny_base)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(StarmergeError, match=r"adapter_model\.safetensors is missing"):
        _open(path, tiny_base)


def test_refuses_an_adapter_of_another_base_unless_told(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    path = make_adapter("adapter")
    base = tmp_path / "models--someone--else" / "snapshots" / "abc"
    base.mkdir(parents=True)
    for file in tiny_base.iterdir():
        (base / file.name).symlink_to(file)
    (base / "config.json").unlink()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    with pytest.raises(UsageError, match=r"tests/tiny, but the base is someone/else.*--any-base"):
        _open(path, base)
    assert _open(path, base, any_base=True).tensors
    edit_json(path / "adapter_config.json", base_model_name_or_path="Someone/Else")
    assert _open(path, base).tensors


def test_a_config_that_names_what_a_base_was_trained_from_says_nothing_of_its_own_name(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    edit_json(base / "config.json", _name_or_path="someone/parent")
    one, other = make_adapter("one"), make_adapter("other", seed=1)
    merged = merge(base, [one, other], "average", output=tmp_path / "out")
    card = (merged.path / "README.md").read_text()
    assert "someone/parent" not in card
    assert "base_model:\n- tests/tiny\n" in card  # which the adapters name
    edit_json(other / "adapter_config.json", base_model_name_or_path="someone/parent")
    with pytest.raises(UsageError, match=r"tests/tiny, and .* someone/parent.*--any-base"):
        merge(base, [one, other], "average", output=tmp_path / "second")
    merged = merge(base, [one, other], "average", output=tmp_path / "second", any_base=True)
    assert "base_model:" not in (merged.path / "README.md").read_text()
