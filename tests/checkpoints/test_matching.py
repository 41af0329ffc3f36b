"""Full fine-tunes beside their base: names, ties, buffers, experts, heads; the merge transformers
loads has the right values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.configs import compare_configs
from starmerge_models.checkpoints.finetuned import open_finetuned
from starmerge_models.checkpoints.source import resolve
from starmerge_models.merging.verify import verify
from tests.conftest import edit_json

_TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_BERT = {**_TEXT, "num_attention_heads": 2, "max_position_embeddings": 12}

Tensors = dict[str, Tensor]


def _weights(folder: Path) -> Tensors:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def _store(folder: Path, tensors: Tensors) -> Path:
    separate = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(separate, folder / "model.safetensors", {"format": "pt"})
    return folder


def _shaken(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a base, and shaken copies of it."""

    def make(name: str, *, seed: int | None = None, **config: Any) -> Path:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**_TEXT, **_HEADS, **config))
        return _saved(model if seed is None else _shaken(model, seed), tmp_path / name)

    return make


def _merged(base: Path, *models: Path, **options: Any) -> Tensors:
    out = base.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    sm.merge(base, list(models), options.pop("method", "average"), output=out, **options)
    return _weights(out)


def _assert_mean(merged: Tensors, base: Tensors, *tuned: Tensors) -> None:
    """The average of models whose tensors have the base's names: their mean, rounded once."""
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        W_0 = weight.double().numpy()
        expected = W_0 + sum(t[name].double().numpy() - W_0 for t in tuned) / len(tuned)
        error = abs(merged[name].double().numpy() - expected)
        scale = abs(W_0) + sum(abs(t[name].double().numpy()) for t in tuned)
        assert np.all(error <= 4 * np.finfo(np.float32).eps * scale), name


# Ties


def test_a_tied_head_is_the_embedding_stored_or_not(llama: Callable[..., Path]) -> None:
    lean = llama("lean", tie_word_embeddings=True)
    one, two = (llama(f"t{s}", seed=s, tie_word_embeddings=True) for s in (1, 2))
    tuned = [_weights(one), _weights(two)]
    assert "lm_head.weight" not in tuned[0]
    embedding = "model.embed_tokens.weight"
    both = _copy(lean, lean.parent / "both")
    _store(both, _weights(lean) | {"lm_head.weight": _weights(lean)[embedding]})
    _store(two, tuned[1] | {"lm_head.weight": tuned[1][embedding]})
    whole = [t | {"lm_head.weight": t[embedding]} for t in tuned]
    _assert_mean(_merged(both, one, two), _weights(both), *whole)
    _assert_mean(_merged(lean, one, two), _weights(lean), *tuned)


def test_what_a_tied_file_says_of_its_head_does_not_count(llama: Callable[..., Path]) -> None:
    base = llama("base", tie_word_embeddings=True)
    tuned = llama("tuned", seed=1, tie_word_embeddings=True)
    weights = _weights(tuned)
    _store(tuned, weights | {"lm_head.weight": torch.full((40, 16), 7.0)})
    _assert_mean(_merged(base, tuned), _weights(base), weights)


def test_an_untied_fine_tune_of_a_tied_base_unties_the_output(llama: Callable[..., Path]) -> None:
    base = llama("base", tie_word_embeddings=True)
    untied = llama("untied", seed=1, tie_word_embeddings=False)
    tied = llama("tied", seed=2, tie_word_embeddings=True)
    result = sm.merge(base, [untied, tied], "average", output=base.parent / "out")
    assert any("lm_head.weight is no longer tied" in n for n in result.report.content["notes"])
    embedding = "model.embed_tokens.weight"
    theirs = _weights(tied) | {"lm_head.weight": _weights(tied)[embedding]}
    ours = _weights(base) | {"lm_head.weight": _weights(base)[embedding]}
    _assert_mean(_weights(result.path), ours, _weights(untied), theirs)
    config = json.loads((result.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    assert torch.equal(loaded.lm_head.weight, _weights(result.path)["lm_head.weight"])
    # Some configs name a part for text, and have none.
    edit_json(base / "config.json", text_config=None)
    name = "lm_head.weight"
    torch.testing.assert_close(_merged(base, untied)[name], _weights(untied)[name])
    # Trained apart, but equal still: nothing is untied.
    weights = _weights(untied)
    _store(untied, weights | {"lm_head.weight": weights[embedding]})
    del weights["lm_head.weight"]
    _assert_mean(_merged(base, untied), _weights(base), weights)
    assert json.loads((base.parent / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_tied_fine_tune_of_an_untied_base_changes_both_ends(llama: Callable[..., Path]) -> None:
    base = llama("base", tie_word_embeddings=False)
    tuned = llama("tuned", seed=1, tie_word_embeddings=True)
    weights = _weights(tuned)
    whole = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    _assert_mean(_merged(base, tuned), _weights(base), whole)
    assert not json.loads((base.parent / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("method", ["dare", "della", "dare+ties", "star", "ties"])
def test_both_ends_of_tied_weights_come_out_alike(llama: Callable[..., Path], method: str) -> None:
    base = llama("base", tie_word_embeddings=True)
    embedding = _weights(base)["model.embed_tokens.weight"]
    _store(base, _weights(base) | {"lm_head.weight": embedding})
    models = [llama(f"t{s}", seed=s, tie_word_embeddings=True) for s in (1, 2)]
    merged = _merged(base, *models, method=method)
    assert not torch.equal(merged["lm_head.weight"], embedding)
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


# Buffers


def test_buffers_that_are_recomputed_are_the_bases(llama: Callable[..., Path]) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    plain = _weights(base)
    frequencies = {name.format(i): torch.rand(4) for i in range(2)}
    _store(base, plain | frequencies)
    merged = _merged(base, tuned)
    assert all(torch.equal(merged.pop(key), frequencies[key]) for key in frequencies)
    _assert_mean(merged, plain, _weights(tuned))
    weights = _weights(tuned)
    _store(tuned, weights | {key: torch.rand(4) for key in frequencies})
    merged = _merged(base, tuned)  # both have them, and differ
    assert all(torch.equal(merged.pop(key), frequencies[key]) for key in frequencies)
    _assert_mean(merged, plain, weights)


def test_a_causal_mask_is_a_buffer_and_a_bias_of_that_name_is_not(
    llama: Callable[..., Path],
) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    mask, bias = torch.ones(1, 1, 4, 4), torch.ones(4)
    _store(base, _weights(base) | {"h.0.attn.bias": mask, "h.1.attn.bias": bias})
    before = _weights(tuned)
    _store(tuned, before | {"h.1.attn.bias": bias + 1})
    merged = _merged(base, tuned)
    assert torch.equal(merged["h.0.attn.bias"], mask)
    assert torch.equal(merged["h.1.attn.bias"], bias + 1)


def _bart() -> PreTrainedModel:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 12}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return BartForConditionalGeneration(BartConfig(vocab_size=40, **heads, **layers, **widths))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("old", ["base", "tuned"])
@pytest.mark.parametrize("kind", ["bert", "bart", "t5"])
def test_what_old_files_hold_and_models_do_not_is_left_alone(
    tmp_path: Path, kind: str, old: str
) -> None:
    made = {"bert": lambda: BertForMaskedLM(BertConfig(**_BERT)), "bart": _bart, "t5": _t5}[kind]
    torch.manual_seed(0)
    base = _saved(made(), tmp_path / "base")
    tuned = _saved(_shaken(type(made()).from_pretrained(base)), tmp_path / "tuned")
    wanted = type(made()).from_pretrained(tuned).state_dict()
    folder = base if old == "base" else tuned
    stored = _weights(folder)
    if kind == "bert":  # both ends of the tied weight and of its bias
        stored["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"]
        stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"]
    elif kind == "bart":
        stored["model.encoder.version"] = torch.tensor([3.0])
        stored.pop("final_logits_bias")  # of zeros
    else:  # the files of t5-small have it
        bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        stored[bias] = torch.ones(32, 2)
    _store(folder, stored)
    _merged(base, tuned)
    merged = type(made()).from_pretrained(base.parent / "out").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_an_output_layer_that_is_untied_has_its_bias_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = _saved(BertForMaskedLM(BertConfig(**_BERT)), tmp_path / "base")
    model = BertForMaskedLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    output = model.cls.predictions.decoder
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    output.bias = torch.nn.Parameter(output.bias.detach().clone())
    tuned = _saved(_shaken(model), tmp_path / "tuned")
    wanted = BertForMaskedLM.from_pretrained(tuned)
    _merged(base, tuned)
    merged = BertForMaskedLM.from_pretrained(base.parent / "out")
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        ours, theirs = (each.eval()(tokens).logits for each in (merged, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Names


def test_finds_an_inner_model_in_a_whole_one_and_the_other_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = _saved(BertModel(BertConfig(**_BERT), add_pooling_layer=False), tmp_path / "inner")
    outer = _saved(
        BertForMaskedLM.from_pretrained(inner, attn_implementation="eager"), tmp_path / "outer"
    )
    tuned = _saved(
        _shaken(BertModel.from_pretrained(inner, add_pooling_layer=False)), tmp_path / "t"
    )
    base = _weights(outer)
    merged = _merged(outer, tuned, common=True)
    theirs = {f"bert.{name}": tensor for name, tensor in _weights(tuned).items()}
    assert len(theirs) == len(_weights(inner)) > 30
    _assert_mean(merged, base, base | theirs)
    big = _saved(_shaken(BertForMaskedLM.from_pretrained(outer)), tmp_path / "big")
    merged = _merged(inner, big, common=True)
    theirs = {name.removeprefix("bert."): tensor for name, tensor in _weights(big).items()}
    _assert_mean(merged, _weights(inner), theirs)


def test_finds_the_text_model_within_one_for_images_and_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(**_TEXT, **_HEADS)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **vision}
    )
    base = _saved(LlavaForConditionalGeneration(config), tmp_path / "base")
    tuned = _saved(_shaken(LlamaForCausalLM(text)), tmp_path / "tuned")
    merged = _merged(base, tuned)
    before = _weights(base)
    theirs = {f"language_model.{name}": tensor for name, tensor in _weights(tuned).items()}
    assert theirs.keys() < before.keys()
    _assert_mean(merged, before, before | theirs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.", "layers._fsdp_wrapped_module."),
        (".mlp.", "._checkpoint_wrapped_module.mlp."),
        ("model.", "_orig_mod.model."),
        ("", "module."),
    ],
)
def test_what_wrappers_of_training_put_into_names_is_ignored(
    llama: Callable[..., Path], old: str, new: str
) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    weights = _weights(tuned)
    _store(tuned, {name.replace(old, new, 1): tensor for name, tensor in weights.items()})
    assert _weights(tuned).keys() != weights.keys()
    _assert_mean(_merged(base, tuned), _weights(base), weights)


# Experts


def _moe(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**_TEXT, **_HEADS, num_local_experts=3))
    config = Qwen3MoeConfig(
        **_TEXT, **_HEADS, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
@pytest.mark.parametrize("joined", ["base", "tuned", "both", "none"])
def test_experts_joined_and_one_by_one_are_the_same_model(
    tmp_path: Path, kind: str, joined: str
) -> None:
    base = _saved(_moe(kind), tmp_path / "base")
    model = _shaken(type(_moe(kind)).from_pretrained(base))
    tuned = _saved(model, tmp_path / "tuned")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in expected)
    if joined in ("base", "both"):
        _store(base, type(model).from_pretrained(base).state_dict())
    if joined in ("tuned", "both"):
        _store(tuned, expected)
    merged = _merged(base, tuned)
    assert merged.keys() == _weights(base).keys()
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


def test_each_of_joined_experts_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    """STAR truncates each expert as it would if they lay one by one."""
    base = _saved(_moe("qwen"), tmp_path / "base")
    tuned = _saved(_shaken(Qwen3MoeForCausalLM.from_pretrained(base)), tmp_path / "tuned")
    separate = _merged(base, tuned, method="star")
    for folder in (base, tuned):
        _store(folder, Qwen3MoeForCausalLM.from_pretrained(folder).state_dict())
    result = sm.merge(base, [tuned], "star", output=tmp_path / "joined")
    name = "model.layers.1.mlp.experts.down_proj"
    merged = _weights(result.path)[name]
    for expert in range(3):
        one = separate[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert torch.equal(merged[expert], one)
    ranks = {record["name"]: record for record in result.report.tensors}
    assert ranks[f"{name}[2]"]["shape"] == [16, 8]
    assert verify(result.path, repeat="all").is_right


# Heads, towers, and what is broken


def test_heads_are_named_and_left_out_on_request(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = _saved(BertForMaskedLM(BertConfig(**_BERT)), tmp_path / "base")
    tuned = []
    for seed, labels in enumerate((2, 3)):
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        tuned.append(_saved(_shaken(model, seed), tmp_path / f"t{seed}"))
    with pytest.raises(
        sm.StarmergeError, match=r"lacks cls\.\* .* has .*classifier\.\* \(2 tensors\).*--common"
    ):
        sm.merge(base, tuned, "average", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = _merged(base, *tuned, common=True)
    before = _weights(base)
    shared = [{k: v for k, v in _weights(t).items() if k in before} for t in tuned]
    assert len(shared[0]) > 30
    _assert_mean(merged, before, *(before | own for own in shared))
    # A head of another size under one name is another head.
    one = _copy(tuned[0], tmp_path / "as-base")
    with pytest.raises(sm.StarmergeError, match=r"classifier\.\w+ has the shape .*--common"):
        sm.merge(one, [tuned[1]], "average", output=tmp_path / "x")
    merged = _merged(one, tuned[1], common=True)
    assert torch.equal(merged["classifier.weight"], _weights(one)["classifier.weight"])


def test_a_part_of_the_base_is_merged_into_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 2}
    text = {**part, "vocab_size": 40, "max_position_embeddings": 12}
    vision = {**part, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    base = _saved(CLIPModel(config), tmp_path / "base")
    tuned = _saved(_shaken(CLIPVisionModel.from_pretrained(base)), tmp_path / "tuned")
    result = sm.merge(base, [tuned], "average", output=tmp_path / "out")
    before = _weights(base)
    _assert_mean(_weights(result.path), before, before | _weights(tuned))
    assert any("text_model.*" in note for note in result.report.content["notes"])


def test_tensors_saved_empty_are_called_that(llama: Callable[..., Path]) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    weights = _weights(tuned)
    _store(tuned, weights | {"model.norm.weight": torch.empty(0)})
    with pytest.raises(sm.StarmergeError, match=r"norm\.weight is empty.*ZeRO-3.*zero_to_fp32"):
        sm.merge(base, [tuned], output=base.parent / "out", common=True)


def test_another_model_altogether_is_refused_even_in_common(
    llama: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    other = _saved(BertModel(BertConfig(**_BERT)), tmp_path / "bert")
    opened = open_base(resolve(llama("base")))
    with pytest.raises(sm.StarmergeError, match="has no tensor of the base"):
        open_finetuned("x", resolve(other), opened, any_base=True, common=True)


# Configs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 4, "head_dim": 4}, "num_attention_heads: 4, in the base 2"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta: 1000000.0, in the base 10000.0",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', in the base 'silu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05"),
        ({"model_type": "mistral"}, "model_type: 'mistral'"),
    ],
)
def test_configs_of_another_function_are_refused(
    llama: Callable[..., Path], change: dict[str, Any], words: str
) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    edit_json(tuned / "config.json", **change)
    with pytest.raises(sm.UsageError, match=f"{words}.*--any-base") as error:
        sm.merge(base, [tuned], output=base.parent / "out")
    assert str(tuned) in str(error.value)
    assert not (base.parent / "out").exists()
    result = sm.merge(base, [tuned], output=base.parent / "out", any_base=True)
    assert words in " ".join(result.report.content["notes"])


def test_context_length_dtype_and_version_are_notes(llama: Callable[..., Path]) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    edit_json(
        tuned / "config.json",
        max_position_embeddings=99,
        dtype="bfloat16",
        transformers_version="4.1",
        use_cache=False,
        attention_dropout=0.1,
    )
    result = sm.merge(base, [tuned], output=base.parent / "out")
    (note,) = result.report.content["notes"]
    for key in ("max_position_embeddings: 99", "dtype: 'bfloat16'", "transformers_version: '4.1'"):
        assert key in note
    assert "use_cache" not in note and "dropout" not in note


def test_rotary_embeddings_are_compared_across_spellings(llama: Callable[..., Path]) -> None:
    base, tuned = llama("base"), llama("tuned", seed=1)
    config = json.loads((tuned / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (tuned / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
    assert sm.merge(base, [tuned], output=base.parent / "out").report.content["notes"] == []
    edit_json(tuned / "config.json", rope_scaling={"rope_type": "default"})
    assert sm.merge(base, [tuned], output=base.parent / "again")
    edit_json(tuned / "config.json", rope_theta=5e5)
    with pytest.raises(sm.UsageError, match="rope_theta: 500000"):
        sm.merge(base, [tuned], output=base.parent / "third")


def test_a_matrix_as_long_as_the_vocabulary_is_no_end_of_the_tie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    base = _saved(GPT2LMHeadModel(config), tmp_path / "base")  # mlp.c_proj is (64, 16), too
    tuned = _saved(_shaken(GPT2LMHeadModel.from_pretrained(base)), tmp_path / "tuned")
    _assert_mean(_merged(base, tuned), _weights(base), _weights(tuned))


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ({"model_type": "llama"}, {"model_type": "llama", "head_dim": 128, "hidden_act": "swish"}),
        (
            {"model_type": "qwen2_vl", "num_attention_heads": 4, "rope_theta": 1e6},
            {
                "model_type": "qwen2_vl",
                "text_config": {
                    "model_type": "qwen2_vl_text",
                    "num_attention_heads": 4,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
        ),
        (
            {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
        ),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25}, {"model_type": "gpt_neox"}),
        ({"model_type": "gpt2", "n_head": 4}, {"model_type": "gpt2", "num_attention_heads": 4}),
        (
            {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope"}},
            {"model_type": "qwen2_vl", "rope_scaling": {"type": "default", "rope_type": "default"}},
        ),
        ({"model_type": "unknown", "head_dim": None}, {"model_type": "unknown", "head_dim": 4}),
    ],
)
def test_configs_that_say_the_same_in_other_words_differ_in_nothing(
    base: dict[str, Any], tuned: dict[str, Any]
) -> None:
    assert compare_configs(base, tuned).function == ()


@pytest.mark.parametrize(
    ("base", "tuned", "words"),
    [
        ({"model_type": "llama"}, {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05, in the base 1e-06"),
        ({"model_type": "llama"}, {"rope_theta": 5e5}, "rope_theta: 500000.0"),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 50.0},
            {"attn_logit_softcapping": None},
            "attn_logit_softcapping: None, in the base 50.0",
        ),
        ({"model_type": "gpt2", "n_head": 4}, {"num_attention_heads": 2}, "n_head: 2, in the"),
        ({"model_type": "gpt2"}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by"),
        ({"model_type": "gpt_neox"}, {"rotary_pct": 1.0}, "partial_rotary_factor: 1.0"),
        ({"model_type": "clip"}, {"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act"),
    ],
)
def test_a_key_that_one_config_leaves_out_has_the_default_of_its_class(
    base: dict[str, Any], tuned: dict[str, Any], words: str
) -> None:
    (found,) = compare_configs(base, {"model_type": base["model_type"], **tuned}).function
    assert words in found
