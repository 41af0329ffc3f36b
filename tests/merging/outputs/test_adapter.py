"""Merges written as an adapter: the bytes of the full merge, the best rank, PEFT's reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import starmerge_models as sm
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.merging.ranks import rank_costs
from starmerge_models.recipe import make_recipe
from tests.conftest import MakeAdapter, MakeFinetune, edit_json

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj.weight"


def _adapters(make: MakeAdapter, kind: str) -> list[Path]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True, "lora_alpha": 3},
        "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 5}},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "head": {"target_modules": ["v_proj", "lm_head"]},
        "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    }
    return [make("a"), make("b", seed=1, **options[kind]), make("c", seed=2, r=3)]


def _update(folder: Path) -> dict[str, np.ndarray]:
    """Return s·B·A of an adapter of one rank, float64, by the name of the weight."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = {k: t.double().numpy() for k, t in load_file(folder / _WEIGHTS).items()}
    products = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix(PREFIX).replace(".lora_A", "")
            products[name] = scale * tensors[key.replace("lora_A", "lora_B")] @ A
        elif ".lora_embedding_A" in key:
            name = key.removeprefix(PREFIX).replace(".lora_embedding_A", ".weight")
            B = tensors[key.replace("embedding_A", "embedding_B")]
            products[name] = (scale * B @ A).T
    return products


def _difference(model: Path, base: Path) -> dict[str, np.ndarray]:
    ours, theirs = (load_file(path / "model.safetensors") for path in (model, base))
    return {name: (ours[name].double() - theirs[name].double()).numpy() for name in ours}


_WEIGHTS = "adapter_model.safetensors"
_FULL = "model.safetensors"


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "embedding", "head", "one layer"])
@pytest.mark.parametrize("method", ["average", "star", "shares"])
def test_an_exact_adapter_merged_alone_gives_the_bytes_of_the_merged_model(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, kind: str, method: str
) -> None:
    models = _adapters(make_adapter, kind)
    weights = [1.0, 0.5, 2.0]
    full = sm.merge(tiny_base, models, method, weights=weights, output=tmp_path / "full")
    made = sm.merge(
        None, models, method, weights=weights, output=tmp_path / "made", output_kind="adapter"
    )
    assert made.report.content["output"]["error"] == 0
    back = sm.merge(tiny_base, [made.path], "average", output=tmp_path / "back")
    assert (full.path / "model.safetensors").read_bytes() == (
        back.path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_exact_adapter_gives_the_bytes_into_a_base_of_any_dtype(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    stored = load_file(tiny_base / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in stored.items()}, base / _FULL)
    models = _adapters(make_adapter, "rslora")
    full = sm.merge(base, models, "star", output=tmp_path / "full")
    made = sm.merge(None, models, "star", output=tmp_path / "made", output_kind="adapter")
    back = sm.merge(base, [made.path], "average", output=tmp_path / "back")
    assert {tensor.dtype for tensor in load_file(back.path / _FULL).values()} == {dtype}
    assert (full.path / _FULL).read_bytes() == (back.path / _FULL).read_bytes()


def test_a_base_of_which_a_part_is_read_is_hashed_whole(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    models = [make_adapter("a", use_dora=True)]
    options: dict[str, Any] = {"output_kind": "adapter", "rank": 4}
    adapter = sm.merge(tiny_base, models, "average", output=tmp_path / "made", **options)
    model = sm.merge(tiny_base, models, "average", output=tmp_path / "full")
    ours, theirs = (made.report.content["inputs"] for made in (adapter, model))
    assert ours == theirs
    assert ours[0]["tensors"].keys() == {_FULL}
    without = sm.merge(
        tiny_base, [make_adapter("b")], "average", output=tmp_path / "unread", **options
    )
    assert without.report.content["inputs"][0]["tensors"] == {}, "nothing of it is read"


def test_the_base_adds_nothing_to_an_adapter_of_adapters(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    models = _adapters(make_adapter, "embedding")
    for base, name in ((None, "without"), (tiny_base, "with")):
        sm.merge(base, models, "star", output=tmp_path / name, output_kind="adapter", rank=5)
    assert (tmp_path / "without" / _WEIGHTS).read_bytes() == (
        tmp_path / "with" / _WEIGHTS
    ).read_bytes()


def test_peft_loads_it_with_the_logits_of_the_merged_model(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    models = _adapters(make_adapter, "patterns")
    full = sm.merge(tiny_base, models, "task_arithmetic", output=tmp_path / "full")
    made = sm.merge(
        None, models, "task_arithmetic", output=tmp_path / "made", output_kind="adapter"
    )
    ids = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = plain(ids).logits.detach()
    wanted = AutoModelForCausalLM.from_pretrained(full.path)(ids).logits.detach()
    logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
    assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert float((before - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


def test_layers_stored_input_first_get_peft_s_orientation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ).save_pretrained(tmp_path / "base")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = LoraConfig(
            r=3,
            target_modules=["c_attn", "c_proj"],
            init_lora_weights=False,
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        models.append(tmp_path / f"adapter{seed}")
        get_peft_model(model, config).save_pretrained(models[-1])
    full = sm.merge(tmp_path / "base", models, "average", output=tmp_path / "full")
    for base, name in ((None, "without"), (tmp_path / "base", "with")):
        made = sm.merge(
            base, models, output=tmp_path / name, output_kind="adapter", method="average"
        )
        back = sm.merge(tmp_path / "base", [made.path], "average", output=tmp_path / f"{name}-back")
        wanted, found = (load_file(path / "model.safetensors") for path in (full.path, back.path))
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        ids = torch.arange(12)[None]
        logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
        merged = AutoModelForCausalLM.from_pretrained(full.path)(ids).logits.detach()
        torch.testing.assert_close(logits, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_bare", [False, True])
def test_a_fine_tune_of_layers_stored_input_first_gives_an_adapter_that_peft_loads(
    tmp_path: Path, is_bare: bool
) -> None:
    """Files of GPT-2 often have the names of the model without its head."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    if is_bare:
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    names = [key for key in tensors if key.endswith(("c_attn.weight", "c_proj.weight"))]
    tuned = {k: t + 0.1 * torch.randn(t.shape) if k in names else t for k, t in tensors.items()}
    for folder, content in (("base", tensors), ("tuned", tuned)):
        file = tmp_path / folder / "model.safetensors"
        save_file(content, file, metadata={"format": "pt"})
    made = sm.merge(
        tmp_path / "base",
        [tmp_path / "tuned"],
        "average",
        output=tmp_path / "made",
        output_kind="adapter",
        rank=16,
    )
    assert made.report.content["output"]["error"] < 1e-5
    ids = torch.arange(12)[None]
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    before = plain(ids).logits.detach()
    wanted = GPT2LMHeadModel.from_pretrained(tmp_path / "tuned")(ids).logits.detach()
    logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert float((before - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("method", ["average", "ties", "star+ties"])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_lower_rank_is_the_best_approximation_and_says_its_error(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, method: str, rank: int
) -> None:
    models = _adapters(make_adapter, "embedding")
    full = sm.merge(tiny_base, models, method, output=tmp_path / "full")
    made = sm.merge(
        None, models, method, output=tmp_path / "made", output_kind="adapter", rank=rank
    )
    wanted, found = _difference(full.path, tiny_base), _update(made.path)
    lost = energy = 0.0
    for record in made.report.tensors:
        name = record["name"]
        U, S, Vh = np.linalg.svd(wanted[name], full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        # The merged model holds the update in float32, added to weights as large as 1.
        np.testing.assert_allclose(found[name], best, atol=1e-5 * S[0])
        tail = float(np.square(S[rank:]).sum())
        assert record["error"] == pytest.approx((tail / np.square(S).sum()) ** 0.5, abs=1e-4)
        lost, energy = lost + tail, energy + float(np.square(S).sum())
    assert made.report.content["output"]["error"] == pytest.approx((lost / energy) ** 0.5, abs=1e-4)


def test_full_fine_tunes_give_their_adapter_and_what_is_left_out_counts(
    make_adapter: MakeAdapter, make_finetune: MakeFinetune, tiny_base: Path, tmp_path: Path
) -> None:
    models = [make_finetune("a"), make_adapter("b"), make_finetune("c", seed=1)]
    full = sm.merge(tiny_base, models, "average", output=tmp_path / "full")
    made = sm.merge(
        tiny_base, models, "average", output=tmp_path / "made", output_kind="adapter", rank=6
    )
    wanted, found = _difference(full.path, tiny_base), _update(made.path)
    lost = 0.0
    for name, update in wanted.items():
        if update.ndim == 1:
            assert name not in found
            lost += float(np.square(update).sum())
            continue
        U, S, Vh = np.linalg.svd(update, full_matrices=False)
        np.testing.assert_allclose(found[name], (U[:, :6] * S[:6]) @ Vh[:6], atol=1e-4 * S[0])
        lost += float(np.square(S[6:]).sum())
    energy = sum(float(np.square(update).sum()) for update in wanted.values())
    output = made.report.content["output"]
    assert output["error"] == pytest.approx((lost / energy) ** 0.5, rel=1e-3)
    assert output["kept"] == pytest.approx(1 - lost / energy, rel=1e-3)
    assert "left out" in made.report.summary()
    ids = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
    assert torch.isfinite(logits).all()


def test_every_rank_is_the_same_number_and_nothing_else_scales(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    made = sm.merge(
        None,
        _adapters(make_adapter, "patterns"),
        "average",
        output=tmp_path / "made",
        output_kind="adapter",
    )
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == made.report.content["output"]["rank"] == 11
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and not config["use_dora"]
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "tests/tiny"
    for key, factor in load_file(made.path / _WEIGHTS).items():
        assert factor.shape[0 if "lora_A" in key else 1] == 11
        assert factor.dtype == torch.float32


def test_modules_are_named_in_full_where_the_end_of_a_name_means_others_too(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    only = {"layers_to_transform": [1], "layers_pattern": "layers"}
    models = [make_adapter("a", **only), make_adapter("b", seed=1, **only)]
    made = sm.merge(tiny_base, models, output=tmp_path / "out", output_kind="adapter")
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_a_target_never_means_a_layer_that_is_called_by_the_same_number(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    torch.manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    save_file(Block().state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "none"}))
    models = [tmp_path / "a", tmp_path / "b"]
    for model in models:
        config = LoraConfig(r=2, target_modules=["mlp.2", "layers.1.0"], init_lora_weights=False)
        get_peft_model(Block(), config).save_pretrained(model)
    for given, name in ((base, "with"), (None, "without")):
        made = sm.merge(given, models, "average", output=tmp_path / name, output_kind="adapter")
        loaded = PeftModel.from_pretrained(Block(), made.path)
        adapted = {key.split(".lora_A")[0] for key, _ in loaded.named_parameters() if "_A" in key}
        assert adapted == {f"{PREFIX}mlp.2", f"{PREFIX}layers.1.0"}


def test_adapters_that_change_nothing_give_one_that_peft_loads(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    for model in models:
        tensors = load_file(model / _WEIGHTS)
        zero = {key: t * ("lora_A" in key) for key, t in tensors.items()}
        save_file(zero, model / _WEIGHTS, metadata={"format": "pt"})
    made = sm.merge(None, models, "star", output=tmp_path / "made", output_kind="adapter")
    assert made.report.content["output"]["rank"] == 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), made.path)
    for update in _update(made.path).values():
        assert not update.any()


def test_more_factors_than_rows_give_a_whole_adapter_without_an_error(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter(f"m{seed}", seed=seed) for seed in range(12)]
    made = sm.merge(None, models, "average", output=tmp_path / "made", output_kind="adapter")
    assert made.report.content["output"]["error"] == 0
    updates = [_update(model) for model in models]
    for name, found in _update(made.path).items():
        wanted = sum(update[name] for update in updates) / len(updates)
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("rank", [None, 8])
def test_more_factors_than_rows_that_repeat_themselves_give_their_own_rank(
    make_adapter: MakeAdapter, tmp_path: Path, rank: int | None
) -> None:
    models = [make_adapter("a")] + [make_adapter(f"b{seed}", r=1) for seed in range(3)]
    models = [shutil.copytree(models[0], tmp_path / f"copy{i}") for i in range(12)] + models
    made = sm.merge(
        None, models, "average", output=tmp_path / "made", output_kind="adapter", rank=rank
    )
    content = made.report.content["output"]
    updates = [_update(model) for model in models]
    for name, found in _update(made.path).items():
        wanted = sum(update[name] for update in updates) / len(updates)
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)
    ranks = [np.linalg.matrix_rank(update[name]) for update in updates for name in update]
    assert content["error"] == 0 and content["rank"] == max(ranks) + 1


def test_bfloat16_says_what_its_rounding_costs(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    models = _adapters(make_adapter, "plain")
    kwargs: dict[str, Any] = {"output_kind": "adapter"}
    exact = sm.merge(None, models, "average", output=tmp_path / "exact", **kwargs)
    rounded = sm.merge(
        None, models, "average", output=tmp_path / "half", dtype="bfloat16", **kwargs
    )
    wanted, found = _update(exact.path), _update(rounded.path)
    for record in rounded.report.tensors:
        name = record["name"]
        error = np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
        assert 1e-4 < error < 1e-2
        assert record["error"] == pytest.approx(error, rel=1e-3)


def test_a_whole_module_is_merged_with_the_base_and_carried_over_without(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    models = [make_adapter("a", modules_to_save=["lm_head"]), make_adapter("b", seed=1)]
    key = f"{PREFIX}lm_head.weight"
    tensors = load_file(models[0] / _WEIGHTS)
    tensors[key] += 0.1
    save_file(tensors, models[0] / _WEIGHTS, metadata={"format": "pt"})
    full = sm.merge(tiny_base, models, "average", output=tmp_path / "full")
    made = sm.merge(tiny_base, models, "average", output=tmp_path / "made", output_kind="adapter")
    merged = load_file(full.path / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(load_file(made.path / _WEIGHTS)[key], merged, rtol=0, atol=0)
    back = sm.merge(tiny_base, [made.path], "average", output=tmp_path / "back")
    assert (full.path / "model.safetensors").read_bytes() == (
        back.path / "model.safetensors"
    ).read_bytes()
    alone = sm.merge(None, models, "average", output=tmp_path / "alone", output_kind="adapter")
    assert torch.equal(load_file(alone.path / _WEIGHTS)[key], tensors[key])
    assert "carried over" in alone.report.summary()
    ids = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
    wanted = AutoModelForCausalLM.from_pretrained(full.path)(ids).logits.detach()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


def test_adapters_that_name_modules_otherwise_meet_without_the_base(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    first, second = make_adapter("a"), make_adapter("b", seed=1)
    full = sm.merge(tiny_base, [first, second], "average", output=tmp_path / "full")
    tensors = load_file(second / _WEIGHTS)
    shorter = {key.replace(f"{PREFIX}model.", PREFIX): t for key, t in tensors.items()}
    save_file(shorter, second / _WEIGHTS, metadata={"format": "pt"})
    made = sm.merge(None, [first, second], "average", output=tmp_path / "m", output_kind="adapter")
    back = sm.merge(tiny_base, [made.path], "average", output=tmp_path / "back")
    assert (full.path / "model.safetensors").read_bytes() == (
        back.path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("order", [1, -1])
def test_modules_of_the_inner_model_get_the_names_of_the_outer_one(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, order: int
) -> None:
    outer = make_adapter("a", target_modules=["q_proj", "lm_head"])
    inner = make_adapter("b", seed=1, target_modules=["v_proj"])
    tensors = load_file(inner / _WEIGHTS)
    shorter = {key.replace(f"{PREFIX}model.", PREFIX): t for key, t in tensors.items()}
    save_file(shorter, inner / _WEIGHTS, metadata={"format": "pt"})
    models = [outer, inner][::order]
    full = sm.merge(tiny_base, models, "average", output=tmp_path / "full")
    made = sm.merge(tiny_base, models, "average", output=tmp_path / "made", output_kind="adapter")
    ids = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    logits = PeftModel.from_pretrained(plain, made.path).eval()(ids).logits.detach()
    wanted = AutoModelForCausalLM.from_pretrained(full.path)(ids).logits.detach()
    assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    with pytest.raises(sm.UsageError, match="cannot be told.*Give the base"):
        _no_base(models, tmp_path / "alone")


@pytest.mark.parametrize("has_base", [True, False])
def test_peft_loads_a_head_of_several_layers_that_was_trained_whole(
    tmp_path: Path, has_base: bool
) -> None:
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=20,
        )
    ).save_pretrained(base)
    load = AutoModelForSequenceClassification.from_pretrained
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    trained = get_peft_model(load(base), config)
    for name, parameter in trained.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    trained.save_pretrained(adapter)
    made = sm.merge(
        base if has_base else None,
        [adapter],
        "average",
        output=tmp_path / "made",
        output_kind="adapter",
    )
    ids = torch.arange(3, 15)[None]
    wanted = trained.eval()(ids).logits.detach()
    logits = PeftModel.from_pretrained(load(base), made.path).eval()(ids).logits.detach()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_dry_run_tells_the_errors_that_the_ranks_have(
    make_adapter: MakeAdapter, tmp_path: Path, method: str
) -> None:
    models = _adapters(make_adapter, "plain")
    content = {"models": list(map(str, models)), "method": method}
    plan = make_plan(
        make_recipe(content | {"output": {"kind": "adapter", "rank": 1}}), tmp_path / "out"
    )
    costs = rank_costs(plan, Threads(1))
    assert not (tmp_path / "out").exists()
    assert [cost.rank for cost in costs] == sorted({cost.rank for cost in costs})
    assert costs[-1].error < 1e-6
    for cost in costs[:3]:
        made = sm.merge(
            None,
            models,
            method,
            output=tmp_path / f"rank{cost.rank}",
            output_kind="adapter",
            rank=cost.rank,
        )
        assert made.report.content["output"]["error"] == pytest.approx(cost.error, rel=1e-4)


def _no_base(models: list[Path], output: Path, **options: Any) -> None:
    sm.merge(None, models, output=output, **({"output_kind": "adapter"} | options))


_Make = tuple[MakeAdapter, MakeFinetune]

_REFUSED: dict[str, tuple[Callable[[_Make], tuple[list[Path], dict[str, Any]]], str]] = {
    "no factors and no rank": (
        lambda make: ([make[0]("a"), make[0]("b")], {"method": "ties"}),
        "would have the rank 32.*--rank",
    ),
    "too far": (
        lambda make: ([make[0]("a"), make[0]("b", seed=1)], {"rank": 1, "max_error": 0.01}),
        "At rank 1 the adapter's update would be .* max_error is 0.01",
    ),
    "a fine-tune": (
        lambda make: ([make[0]("a"), make[1]("b")], {}),
        "is no adapter.*Give the base",
    ),
    "DoRA": (
        lambda make: ([make[0]("a", use_dora=True)], {}),
        "is DoRA's.*Give the base",
    ),
    "a method of weights": (
        lambda make: ([make[0]("a"), make[0]("b")], {"method": "karcher", "rank": 2}),
        "karcher works on the base's weights. Give the base",
    ),
    "a metric": (
        lambda make: ([make[0]("a"), make[0]("b")], {"metric": "metric.safetensors"}),
        "metric",
    ),
    "a model per task": (
        lambda make: ([make[0]("a"), make[0]("b")], {"method": "emr"}),
        "emr cannot be written as adapter",
    ),
    "a model": (
        lambda make: ([make[0]("a")], {"output_kind": "model"}),
        "lacks the base.*--as adapter",
    ),
    "a rank of zero": (lambda make: ([make[0]("a")], {"rank": 0}), "rank"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refuses_what_cannot_be_an_adapter_and_leaves_nothing(
    make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path, case: str
) -> None:
    models, options = _REFUSED[case][0]((make_adapter, make_finetune))
    before = set(tmp_path.iterdir())
    with pytest.raises(sm.StarmergeError, match=_REFUSED[case][1]):
        _no_base(models, tmp_path / "out", **options)
    assert set(tmp_path.iterdir()) == before


def test_refuses_adapters_of_two_bases(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    edit_json(models[1] / "adapter_config.json", base_model_name_or_path="tests/other")
    with pytest.raises(sm.UsageError, match="tests/tiny.*tests/other.*--any-base"):
        _no_base(models, tmp_path / "out")
    _no_base(models, tmp_path / "out", any_base=True)


def test_refuses_adapters_of_other_shapes(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    tensors = load_file(models[1] / _WEIGHTS)
    key = f"{PREFIX}{Q}".replace(".weight", ".lora_A.weight")
    tensors[key] = tensors[key][:, :8].contiguous()
    save_file(tensors, models[1] / _WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(sm.StarmergeError, match=r"q_proj.weight has the shape \[32, 8\]"):
        _no_base(models, tmp_path / "out")


def test_a_rank_is_of_an_adapter(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(sm.UsageError, match="rank is of an adapter"):
        sm.merge(tiny_base, [make_adapter("a")], output=tmp_path / "out", rank=4)
