"""Layers of several models, stacked and renumbered."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import starmerge_models as sm
from starmerge_models.checkpoints.layers import is_before_layers, is_of
from starmerge_models.errors import UsageError

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LLAMA = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "tie_word_embeddings": False}


@pytest.fixture
def make(tmp_path):
    """A function that saves a random model of a config in a folder."""

    def save(name, kind=LlamaForCausalLM, config=None, seed=None, **options):
        torch.manual_seed(sum(map(ord, name)) if seed is None else seed)
        config = LlamaConfig(**(LLAMA | options)) if config is None else config
        kind(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def weights(folder):
    return load_file(folder / "model.safetensors")


def stacked(base, output, models=None, method="average", **options):
    return sm.merge(str(base), [str(m) for m in models or [base]], method, output=output, **options)


def merged_name(x, y):
    """What a model is called that has the layers of the test below."""
    return f"{x.name}[0:3],{y.name}[1:4],{x.name}[3:4]"


def test_layers_are_renumbered_and_load(make, tmp_path):
    x, y = make("x"), make("y")
    merged = stacked(f"{x}[0:3],{y}[1:4],{x}[3:4]", tmp_path / "out")
    found, of_x, of_y = weights(merged.path), weights(x), weights(y)
    picked = [(of_x, 0), (of_x, 1), (of_x, 2), (of_y, 1), (of_y, 2), (of_y, 3), (of_x, 3)]
    expected = {
        name.replace(f"layers.{i}.", f"layers.{place}."): own[name]
        for place, (own, i) in enumerate(picked)
        for name in own
        if f"layers.{i}." in name
    }
    expected |= {name: of_x[name] for name in of_x if "layers" not in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    loaded = AutoModelForCausalLM.from_pretrained(merged.path)
    assert loaded.config.num_hidden_layers == 7
    tokens = torch.arange(6)[None]
    parts = {id(m): LlamaForCausalLM.from_pretrained(m) for m in (x, y)}
    one, other = parts.values()
    one.model.layers = torch.nn.ModuleList(
        (one if own is of_x else other).model.layers[i] for own, i in picked
    )
    for place, layer in enumerate(one.model.layers):
        layer.self_attn.layer_idx = place
    one.config.num_hidden_layers = 7
    torch.testing.assert_close(loaded(tokens).logits, one(tokens).logits)
    inputs = merged.report.content["inputs"]
    assert [entry["reference"] for entry in inputs] == [str(x), str(y)] * 2
    verdict = sm.verify(merged.path, repeat="all")
    assert verdict.is_right
    whose = [f"{name}, {folder}" for name in ("base", merged_name(x, y)) for folder in (x, y)]
    assert verdict.inputs == {f"{own}: model.safetensors": "same" for own in whose}


def test_what_stands_before_and_behind_the_layers(make, tmp_path):
    x, y = make("x"), make("y")
    found = weights(stacked(f"{x}[0:1],{y}[0:2]", tmp_path / "out").path)
    assert torch.equal(found["model.embed_tokens.weight"], weights(x)["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], weights(y)[name])


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("transformer.word_embeddings_layernorm.bias", True),
        ("gpt_neox.embed_in.weight", True),
        ("gpt_neox.embed_out.weight", False),
        ("embed_out.weight", False),
        ("shared.weight", True),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("lm_head.weight", False),
        ("score.weight", False),
        ("decoder.final_layer_norm.weight", False),
        ("model.encoder.conv1.weight", True),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", True),
        ("bert.pooler.dense.weight", False),
    ],
)
def test_tensors_before_the_layers(name, before):
    assert is_before_layers(name) is before


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mlp.up_proj.weight", "text"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", "decoder"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.visual.blocks.0.attn.proj.weight", "vision"),
        ("model.visual.merger.norm.weight", "projector"),
        ("multi_modal_projector.linear_1.weight", "projector"),
        ("shared.weight", "text"),
    ],
)
def test_parts_of_models(name, part):
    parts = ("text", "encoder", "decoder", "vision", "projector")
    assert [other for other in parts if is_of(other, name)] == [part]
    assert is_of("", name)


def test_models_are_cut_like_the_base_or_as_they_say(make, tmp_path):
    x, y, a, b = (make(name) for name in "xyab")
    base = f"{x}[0:3],{y}[1:3]"
    models = [f"{a}[1:4],{b}[2:4]", b]
    found = weights(stacked(base, tmp_path / "out", models, sm.TaskArithmetic(alpha=1)).path)
    X, Y, A, B = (weights(folder) for folder in (x, y, a, b))
    for tensor in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"):
        for place, (base_of, i, own, j) in enumerate(
            [(X, 0, A, 1), (X, 1, A, 2), (X, 2, A, 3), (Y, 1, B, 2), (Y, 2, B, 3)]
        ):
            start = base_of[f"model.layers.{i}.{tensor}"].double()
            one = own[f"model.layers.{j}.{tensor}"].double() - start
            two = B[f"model.layers.{i}.{tensor}"].double() - start
            torch.testing.assert_close(
                found[f"model.layers.{place}.{tensor}"].double(), start + one + two,
                rtol=0, atol=1e-6,
            )  # fmt: skip
    head = B["lm_head.weight"] + (B["lm_head.weight"] - Y["lm_head.weight"])
    torch.testing.assert_close(found["lm_head.weight"], head, rtol=0, atol=1e-6)
    embedding = A["model.embed_tokens.weight"] + B["model.embed_tokens.weight"]
    embedding -= X["model.embed_tokens.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedding, rtol=0, atol=1e-6)


def test_a_whole_base_is_cut_like_a_stacked_model(make, tmp_path):
    x, a, b = make("x"), make("a"), make("b")
    found = weights(stacked(x, tmp_path / "out", [f"{a}[0:2],{b}[0:2]"]).path)
    for tensor in ("mlp.up_proj.weight", "input_layernorm.weight"):
        for place, (own, i) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1)]):
            expected = weights(own)[f"model.layers.{i}.{tensor}"]
            torch.testing.assert_close(found[f"model.layers.{place}.{tensor}"], expected)
    with pytest.raises(UsageError, match=r"has 3 layers, and the base .* 4"):
        stacked(x, tmp_path / "other", [f"{a}[0:2],{b}[0:1]"])


def test_adapters_follow_their_layers(make, make_adapter, tmp_path):
    x = make("x")
    adapter = make_adapter("adapter", base=x)
    alone = weights(stacked(x, tmp_path / "alone", [adapter], any_base=True).path)
    base = f"{x}[0:2],{x}[1:4]"
    found = weights(stacked(base, tmp_path / "out", [adapter], any_base=True).path)
    for place, i in enumerate([0, 1, 1, 2, 3]):
        name = "self_attn.q_proj.weight"
        expected = alone[f"model.layers.{i}.{name}"]
        assert torch.equal(found[f"model.layers.{place}.{name}"], expected)
    # On other layers than its own it needs the model that it was trained on.
    shifted = f"{x}+{adapter}[0:2],{x}+{adapter}[0:3]"
    found = weights(stacked(base, tmp_path / "shifted", [shifted], any_base=True).path)
    for place, i in enumerate([0, 1, 0, 1, 2]):
        for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            expected = alone[f"model.layers.{i}.{name}"]
            torch.testing.assert_close(found[f"model.layers.{place}.{name}"], expected)
    with pytest.raises(UsageError, match="is an adapter of other layers than those of the base"):
        stacked(base, tmp_path / "no", [f"{adapter}[0:2],{adapter}[0:3]"], any_base=True)


def gemma3(**options):
    own = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma3TextConfig(**own, **options)


@pytest.mark.parametrize(
    ("kind", "config", "layers_at"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=80, n_embd=16, n_layer=4, n_head=2), "n_layer"),
        (
            Gemma3ForCausalLM,
            gemma3(layer_types=["full_attention", *["sliding_attention"] * 3]),
            "num_hidden_layers",
        ),
        (
            MixtralForCausalLM,
            MixtralConfig(
                **LLAMA, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
            ),
            "num_hidden_layers",
        ),
        (
            Qwen3ForCausalLM,
            Qwen3Config(**LLAMA, head_dim=8, use_sliding_window=True, max_window_layers=2),
            "num_hidden_layers",
        ),
    ],
    ids=["gpt2", "gemma3", "mixtral", "qwen3"],
)
def test_architectures_stack_and_load(kind, config, layers_at, make, tmp_path):
    x = make("x", kind, config)
    merged = stacked(f"{x}[0:2],{x}[0:4]", tmp_path / "out")
    loaded, info = kind.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = json.loads((merged.path / "config.json").read_text())
    assert found[layers_at] == 6
    types = json.loads((x / "config.json").read_text()).get("layer_types")
    if types is not None:
        assert found["layer_types"] == [*types[:2], *types]
    assert torch.isfinite(loaded(torch.arange(5)[None]).logits).all()
    whole = stacked(f"{x}[0:4]", tmp_path / "whole")
    tokens = torch.arange(7)[None]
    assert torch.equal(
        kind.from_pretrained(whole.path)(tokens).logits, kind.from_pretrained(x)(tokens).logits
    )


def test_encoders_and_decoders_are_cut_by_their_names(make, tmp_path):
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    x, y = (make(name, T5ForConditionalGeneration, config) for name in "xy")
    base = f"{x}[encoder 0:3],{y}[encoder 1:3],{y}[decoder 1:2],{x}[decoder 0:2]"
    merged = stacked(base, tmp_path / "out")
    found, of_x, of_y = weights(merged.path), weights(x), weights(y)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.config.num_layers, loaded.config.num_decoder_layers) == (5, 3)
    q = "layer.0.SelfAttention.q.weight"
    for place, (own, i) in enumerate([(of_y, 1), (of_x, 0), (of_x, 1)]):
        assert torch.equal(found[f"decoder.block.{place}.{q}"], own[f"decoder.block.{i}.{q}"])
    for place, (own, i) in enumerate([(of_x, 0), (of_x, 1), (of_x, 2), (of_y, 1), (of_y, 2)]):
        assert torch.equal(found[f"encoder.block.{place}.{q}"], own[f"encoder.block.{i}.{q}"])
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(found[bias], of_y[bias])
    assert torch.equal(found["shared.weight"], of_x["shared.weight"])
    norms = {"decoder.final_layer_norm.weight": of_x, "encoder.final_layer_norm.weight": of_y}
    assert all(torch.equal(found[name], own[name]) for name, own in norms.items())
    with pytest.raises(UsageError, match=r"several stacks of layers .*MODEL\[encoder 0:8\]"):
        stacked(f"{x}[0:2]", tmp_path / "no")
    with pytest.raises(UsageError, match="has no vision layers"):
        stacked(f"{x}[vision 0:2]", tmp_path / "no")


def test_whisper_has_the_numbers_of_both_stacks(make, tmp_path):
    config = WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=10, max_target_positions=10, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    x = make("x", WhisperForConditionalGeneration, config)
    merged = stacked(f"{x}[encoder 0:2],{x}[encoder 1:2],{x}[decoder 1:3]", tmp_path / "out")
    kind = WhisperForConditionalGeneration
    _, info = kind.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = AutoConfig.from_pretrained(merged.path)
    assert (found.encoder_layers, found.decoder_layers) == (3, 2)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{x}[0:5]", r"x has 4 layers, and \[0:5\] goes beyond"),
        ("{x}[0:2],{wide}[0:2]", r"wide: tensor .* has the shape .* no layer of .*x has one like"),
        ("{x}[0:2],{gpt}[0:2]", "gpt: by its config.json its layers are other functions"),
        ("{x}[0:2],{heads}[0:2]", "other functions of their weights .* num_key_value_heads: 2"),
        ("{x}[0:2],{large}[0:2]", "has .* as .*, and .*x a tensor of the shape"),
    ],
)
def test_what_does_not_fit_together_is_refused(reference, message, make, tmp_path):
    make("x"), make("wide", intermediate_size=32), make("large", vocab_size=80)
    make("heads", num_key_value_heads=2)
    make("gpt", GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2))
    places = {name: tmp_path / name for name in ("x", "wide", "gpt", "large", "heads")}
    with pytest.raises(UsageError, match=message):
        stacked(reference.format(**places), tmp_path / "out", [places["x"]])


def test_layers_of_another_kind_are_stacked_on_request(make, tmp_path):
    x, y = make("x"), make("y")
    config = json.loads((y / "config.json").read_text()) | {"model_type": "mistral"}
    (y / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="model_type: 'mistral', in the base 'llama'.*--any-base"):
        stacked(f"{x}[0:2],{y}[0:2]", tmp_path / "out")
    merged = stacked(f"{x}[0:2],{y}[0:2]", tmp_path / "out", any_base=True)
    assert any("model_type" in note for note in merged.report.content["notes"])


def tied(name, make, **options):
    """A model with tied ends, which files hold once."""
    return make(name, tie_word_embeddings=True, **options)


def test_ends_that_are_tied(make, tmp_path):
    x, y, a = tied("x", make), tied("y", make), make("a")
    found = weights(stacked(f"{x}[0:2],{y}[2:4]", tmp_path / "both").path)
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], weights(x)["model.embed_tokens.weight"])
    # The first model has an output layer of its own, and the last one's is its embedding.
    found = weights(stacked(f"{a}[0:2],{y}[2:4]", tmp_path / "mixed").path)
    assert torch.equal(found["lm_head.weight"], weights(y)["model.embed_tokens.weight"])
    # A model that is not tied unties the stack.
    merged = stacked(f"{x}[0:2],{y}[2:4]", tmp_path / "untied", [a])
    found, of_a = weights(merged.path), weights(a)
    assert json.loads((merged.path / "config.json").read_text())["tie_word_embeddings"] is False
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(found[name], of_a[name])


def test_cuts_that_differ_are_refused(make, tmp_path):
    x, a = make("x"), make("a")
    with pytest.raises(UsageError, match="is cut otherwise than the base"):
        stacked(f"{x}[0:2],{x}[1:4]", tmp_path / "out", [f"{a}[0:3],{a}[2:4]"])


def test_a_config_without_a_number_of_layers_is_refused(make, tmp_path):
    x = make("x")
    config = json.loads((x / "config.json").read_text())
    del config["num_hidden_layers"]
    (x / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no key with the number of layers, 4, that is known"):
        stacked(f"{x}[0:2]", tmp_path / "out")


def test_shards_and_dtypes_are_as_they_come(make, tmp_path):
    x, y = make("x"), make("y")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in weights(y).items()}
    save_file(halves, y / "model.safetensors", {"format": "pt"})
    found = weights(stacked(f"{x}[0:1],{y}[3:4]", tmp_path / "out").path)
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert found["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    one = weights(stacked(f"{x}[0:1],{y}[3:4]", tmp_path / "one", dtype="float32").path)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
