"""What PEFT writes beside plain factors: ties, experts, grown embeddings, wrapped paths, shards.

The reference is PEFT itself: the logits of the model with the adapter, or the weights it folds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import starmerge_models as sm
from tests.conftest import edit_json

pytestmark = pytest.mark.filterwarnings("ignore")

_TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_TOKENS = torch.tensor([[3, 5, 7, 9, 11, 13, 2, 39]])
_FILE = "adapter_model.safetensors"


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _llama(folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    return _save(LlamaForCausalLM(LlamaConfig(**_TEXT, **_HEADS, **config)), folder)


def _trained(
    base: Path | PreTrainedModel, folder: Path, seed: int = 1, **options: Any
) -> PeftModel:
    """Return a model with an adapter of random values, which has been saved."""
    model = base
    if isinstance(base, Path):
        model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**settings | options))
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in peft.named_parameters(remove_duplicate=False):
            is_trained = "lora_" in name or "modules_to_save" in name
            if is_trained and parameter.data_ptr() not in done:
                done.add(parameter.data_ptr())
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)
    return peft.eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(_TOKENS % 40).logits
    return logits


def _merged(base: Path, *adapters: Path, **options: Any) -> PreTrainedModel:
    out = base.parent / "out"
    sm.merge(base, list(adapters), "average", output=out, overwrite=True, **options)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def _flag(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True))


# Ties


@pytest.mark.parametrize("both_stored", [False, True])
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    ],
)
def test_tied_ends_come_out_as_peft_computes_with_them(
    tmp_path: Path, options: dict[str, Any], tied: bool, both_stored: bool
) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    peft = _trained(base, tmp_path / "a", **{"target_modules": ["q_proj"], **options})
    if both_stored:
        weights = _weights(base)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = _merged(base, tmp_path / "a")
    torch.testing.assert_close(_logits(model), _logits(peft), rtol=1e-5, atol=1e-6)
    assert _flag(tmp_path / "out") is tied
    ends = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(*ends) is tied


def test_a_tied_adapter_changes_both_ends_where_another_unties_them(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    tying = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    both = _trained(base, tmp_path / "both", **tying)
    one = _trained(base, tmp_path / "one", seed=2, target_modules=["lm_head"])
    model = _merged(base, tmp_path / "both", tmp_path / "one")
    before = _weights(base)["model.embed_tokens.weight"]
    first = both.base_model.model.model.embed_tokens.get_delta_weight("default")
    second = one.base_model.model.lm_head.get_delta_weight("default")
    torch.testing.assert_close(model.model.embed_tokens.weight.data, before + first / 2)
    torch.testing.assert_close(model.lm_head.weight.data, before + (first + second) / 2)


def test_ends_that_are_tied_and_were_trained_apart_are_an_error(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    _trained(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    edit_json(tmp_path / "a" / "adapter_config.json", ensure_weight_tying=True)
    with pytest.raises(sm.StarmergeError, match=r"differently.*ensure_weight_tying"):
        _merged(base, tmp_path / "a")


def test_gpt2_unties_its_table_of_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    base = _save(GPT2LMHeadModel(config), tmp_path / "base")
    peft = _trained(base, tmp_path / "a", target_modules=["wte"])
    model = _merged(base, tmp_path / "a")
    torch.testing.assert_close(_logits(model), _logits(peft), rtol=1e-5, atol=1e-6)
    assert _flag(tmp_path / "out") is False


# Experts


def _moe(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**_TEXT, **_HEADS, num_local_experts=3))
    if kind == "gpt-oss":
        text = {**_TEXT, "intermediate_size": 20}
        return GptOssForCausalLM(
            GptOssConfig(**text, **_HEADS, num_local_experts=3, num_experts_per_tok=2)
        )
    inner = 8 if kind == "square" else 6  # 2·8 rows of 16 columns: a square
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_TEXT, **_HEADS, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=inner
        )
    )


@pytest.mark.parametrize(
    ("kind", "joined", "names"),
    [
        ("qwen", False, ["gate_up_proj"]),
        ("qwen", True, ["down_proj"]),
        ("qwen", False, ["gate_up_proj", "down_proj"]),
        ("mixtral", False, ["gate_up_proj", "down_proj"]),
        ("mixtral", True, ["gate_up_proj", "down_proj"]),
        ("square", True, ["gate_up_proj", "down_proj"]),
        ("gpt-oss", False, ["gate_up_proj", "down_proj"]),  # joined in its files, too
    ],
)
def test_adapters_of_joined_experts_change_each_as_peft_does(
    tmp_path: Path, kind: str, names: list[str], joined: bool
) -> None:
    base = _save(_moe(kind), tmp_path / "base")
    peft = _trained(
        base,
        tmp_path / "a",
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{name}" for name in names],
        rank_pattern={"gate_up_proj": 2},
        alpha_pattern={"down_proj": 7},
    )
    if joined:
        model = type(_moe(kind)).from_pretrained(base)
        save_file(dict(model.state_dict()), base / "model.safetensors", {"format": "pt"})
    merged = _merged(base, tmp_path / "a").state_dict()
    folded = peft.merge_and_unload().state_dict()
    before = type(_moe(kind)).from_pretrained(base).state_dict()
    for name, tensor in folded.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        is_changed = any(name.endswith(f"experts.{n}") for n in names) or "q_proj.weight" in name
        assert torch.equal(merged[name], before[name]) is not is_changed, name


@pytest.mark.parametrize("version", ["0.18.0", "0.19.0", "0.19.1", "9" * 5000])
def test_which_way_a_square_expert_is_held_is_told_by_the_version(
    tmp_path: Path, version: str
) -> None:
    base = _save(_moe("square"), tmp_path / "base")
    names = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    peft = _trained(base, tmp_path / "a", **names)
    edit_json(tmp_path / "a" / "adapter_config.json", peft_version=version)
    merged = _merged(base, tmp_path / "a").state_dict()
    key = "model.layers.0.mlp.experts.gate_up_proj"
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()[key]
    delta = peft.merge_and_unload().state_dict()[key] - before
    expected = delta.transpose(1, 2) if version in ("0.18.0", "0.19.0") else delta
    torch.testing.assert_close(merged[key] - before, expected, rtol=1e-4, atol=1e-6)
    edit_json(tmp_path / "a" / "adapter_config.json", peft_version=None)
    with pytest.raises(sm.UsageError, match=r"square.*peft_version"):
        _merged(base, tmp_path / "a")


def test_the_sides_of_a_square_expert_are_told_by_the_others_first(tmp_path: Path) -> None:
    base = _save(_moe("square"), tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    peft = _trained(base, tmp_path / "a", target_modules=["q_proj"], target_parameters=names)
    edit_json(tmp_path / "a" / "adapter_config.json", peft_version=None)
    merged, folded = _merged(base, tmp_path / "a"), peft.merge_and_unload()
    torch.testing.assert_close(_logits(merged), _logits(folded), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("joined", [False, True])
def test_adapters_of_single_experts_fit_joined_and_separate_ones(
    tmp_path: Path, joined: bool
) -> None:
    base = _save(_moe("qwen"), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    file, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in _weights(base).items():
        wanted[name] = weight
        if ".experts." in name:
            A = torch.randn(2, weight.shape[1], generator=generator)
            B = torch.randn(weight.shape[0], 2, generator=generator)
            key = f"base_model.model.{name.removesuffix('.weight')}"
            file |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            wanted[name] = weight + 2 * B @ A
    adapter = tmp_path / "a"
    adapter.mkdir()
    save_file(file, adapter / _FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    expected = _save(_moe("qwen"), tmp_path / "expected")
    save_file(wanted, expected / "model.safetensors", {"format": "pt"})
    if joined:
        model = Qwen3MoeForCausalLM.from_pretrained(base)
        save_file(dict(model.state_dict()), base / "model.safetensors", {"format": "pt"})
    merged = _merged(base, adapter).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(expected).state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_factors_that_fit_no_parameter_are_an_error(tmp_path: Path) -> None:
    base = _save(_moe("qwen"), tmp_path / "base")
    _trained(base, tmp_path / "a", target_modules=[], target_parameters=["experts.down_proj"])
    stored = load_file(tmp_path / "a" / _FILE)
    cut = {key: t[:, :-1].contiguous() if "lora_A" in key else t for key, t in stored.items()}
    save_file(cut, tmp_path / "a" / _FILE)
    with pytest.raises(sm.StarmergeError, match=r"experts, of target_parameters .* fit none"):
        _merged(base, tmp_path / "a")


# Copies and whole modules


def _grown(tmp_path: Path) -> Path:
    base = _llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(43)
    return _save(model, tmp_path / "grown")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_grown_embeddings_are_read_in_every_layout(tmp_path: Path, options: dict[str, Any]) -> None:
    base = _llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(43)
    grown = _save(model, tmp_path / "grown")
    peft = _trained(model, tmp_path / "a", **options)
    expected = peft.merge_and_unload().state_dict()
    merged = _merged(grown, tmp_path / "a").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_copy_that_is_not_the_bases_is_found_by_the_dry_run(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base")
    _trained(base, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / _FILE
    stored = load_file(file)
    weights = _weights(base)
    name = "model.embed_tokens.weight"
    for key, words in (
        (f"base_model.model.{name}", "is not the base's weight, so the adapter is more than"),
        (
            "base_model.model.model.embed_tokens.base_layer.weight",
            "is not the base's weight. The adapter was trained on another base",
        ),
        (
            "base_model.model.model.embed_tokens.original_module.weight",
            "is not the base's weight. The adapter was trained on another base",
        ),
    ):
        save_file(stored | {key: weights[name]}, file)
        sm.load_task_vectors(base, [tmp_path / "a"])
        save_file(stored | {key: weights[name].bfloat16()}, file)
        sm.load_task_vectors(base, [tmp_path / "a"])
        save_file(stored | {key: weights[name] + 0.01}, file)
        with pytest.raises(sm.StarmergeError, match=words):
            sm.merge(base, [tmp_path / "a"], output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_adapters_with_trained_embeddings_are_averaged(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base")
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folded = [
        _trained(base, tmp_path / f"a{s}", seed=s, **saved).merge_and_unload().state_dict()
        for s in (1, 2)
    ]
    merged = _merged(base, tmp_path / "a1", tmp_path / "a2").state_dict()
    for name, tensor in merged.items():
        expected = (folded[0][name] + folded[1][name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_two_ways_to_store_a_whole_module_must_agree(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base")
    _trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = tmp_path / "a" / _FILE
    stored = load_file(file)
    key = "base_model.model.lm_head.weight"
    again = "base_model.model.lm_head.modules_to_save.weight"
    save_file(stored | {again: stored[key].clone()}, file)
    sm.load_task_vectors(base, [tmp_path / "a"])
    save_file(stored | {again: stored[key] + 1}, file)
    with pytest.raises(sm.StarmergeError, match=r"lm_head\..*weight, which are to be the same"):
        sm.load_task_vectors(base, [tmp_path / "a"])


# Paths and shards


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: key.replace(".layers.0.", ".layers._fsdp_wrapped_module.0."),
        lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
)
def test_what_wrappers_put_into_paths_is_ignored(
    tmp_path: Path, wrap: Callable[[str], str]
) -> None:
    base = _llama(tmp_path / "base")
    peft = _trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    file = tmp_path / "a" / _FILE
    save_file({wrap(key): tensor for key, tensor in load_file(file).items()}, file)
    merged = _merged(base, tmp_path / "a")
    torch.testing.assert_close(_logits(merged), _logits(peft), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [True, False])
def test_sharded_adapters_are_read_whole(tmp_path: Path, index: bool) -> None:
    base = _llama(tmp_path / "base")
    peft = _trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    file = tmp_path / "a" / _FILE
    stored = load_file(file)
    file.unlink()
    shards = [f"adapter_model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict(list(stored.items())[n::2]) for n in (0, 1)]
    for name, part in zip(shards, parts, strict=True):
        save_file(part, tmp_path / "a" / name)
    if index:
        where = {key: name for name, part in zip(shards, parts, strict=True) for key in part}
        (tmp_path / "a" / f"{_FILE}.index.json").write_text(json.dumps({"weight_map": where}))
    merged = _merged(base, tmp_path / "a")
    torch.testing.assert_close(_logits(merged), _logits(peft), rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert set(report["inputs"][1]["tensors"]) == set(shards)
    (tmp_path / "a" / shards[1]).unlink()
    with pytest.raises(sm.StarmergeError, match=r"adapter_model-00002-of-00002\.safetensors"):
        _merged(base, tmp_path / "a")


# Adapters out of adapters


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_a_merged_adapter_ties_what_its_sources_tie(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    peft = _trained(base, tmp_path / "a", **options)
    sm.merge(base, [tmp_path / "a"], "average", output=tmp_path / "m", output_kind="adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "m")
    torch.testing.assert_close(_logits(again), _logits(peft), rtol=1e-5, atol=1e-6)


def test_tied_ends_that_are_saved_whole_make_no_adapter(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    _trained(base, tmp_path / "a", target_modules=["q_proj"], **options)
    with pytest.raises(sm.UsageError, match=r"embed_tokens\.weight is replaced whole.*a model"):
        sm.merge(base, [tmp_path / "a"], "average", output=tmp_path / "m", output_kind="adapter")


def test_merged_experts_are_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    base = _save(_moe("square"), tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    # torch's grouped products want strides of 16 bytes.
    options = {"r": 4, "rank_pattern": {"gate_up_proj": 8}}
    peft = _trained(
        base, tmp_path / "a", target_modules=["q_proj"], target_parameters=names, **options
    )
    sm.merge(base, [tmp_path / "a"], "average", output=tmp_path / "m", output_kind="adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "m")
    torch.testing.assert_close(_logits(again), _logits(peft), rtol=1e-5, atol=1e-6)
    model = Qwen3MoeForCausalLM.from_pretrained(base)
    save_file(dict(model.state_dict()), base / "model.safetensors", {"format": "pt"})
    with pytest.raises(sm.UsageError, match=r"down_proj\[0\].*joined.*Write a model"):
        sm.merge(base, [tmp_path / "a"], "average", output=tmp_path / "n", output_kind="adapter")


# Heads


def test_a_head_that_the_base_lacks_is_left_out_on_request(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}
    peft = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **options))
    peft.save_pretrained(tmp_path / "a")
    with pytest.raises(sm.StarmergeError, match=r"no tensor score\.weight.*--common"):
        sm.merge(base, [tmp_path / "a"], output=tmp_path / "out")
    result = sm.merge(base, [tmp_path / "a"], "average", output=tmp_path / "out", common=True)
    note = "a: of the adapter, score.weight is left out, which the base lacks."
    assert note in result.report.content["notes"]
    folded = peft.merge_and_unload().state_dict()
    before, merged = _weights(base), _weights(tmp_path / "out")
    assert torch.equal(merged.pop("lm_head.weight"), before["lm_head.weight"])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-5, atol=1e-6, msg=name)


def test_tied_ends_of_one_shape_and_two_scales_are_not_one_change(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base", tie_word_embeddings=True)
    tying = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    _trained(base, tmp_path / "a", **tying)
    edit_json(tmp_path / "a" / "adapter_config.json", alpha_pattern={"lm_head": 10})
    with pytest.raises(sm.StarmergeError, match=r"differently.*ensure_weight_tying"):
        sm.load_task_vectors(base, [tmp_path / "a"])
    edit_json(tmp_path / "a" / "adapter_config.json", ensure_weight_tying=False)
    model = _merged(base, tmp_path / "a")
    before = _weights(base)["model.embed_tokens.weight"]
    changes = model.lm_head.weight - before, model.model.embed_tokens.weight - before
    torch.testing.assert_close(changes[0], 2 * changes[1], rtol=1e-4, atol=1e-6)
