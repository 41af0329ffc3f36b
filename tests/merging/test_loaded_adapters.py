"""Adapters loaded into a model become one more: the update, what files give, nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import starmerge_models as sm
from tests.oracles import formats, linear, metagpt, star, ties

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Updates = dict[str, NDArray[np.float64]]
"""What an adapter adds to the weights, by the names of the layers."""

PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 5}}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "other rank": {"r": 3},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "dora": {"use_dora": True},
    "dora of an embedding": {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
}


def _config(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    return LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)


def _llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).eval()


def _loaded(base: nn.Module, **adapters: Mapping[str, Any]) -> PeftModel:
    """Return a model with random adapters of some options, of which the first is active."""
    torch.manual_seed(1)
    (first, options), *others = adapters.items()
    model = get_peft_model(base, _config(**options), adapter_name=first)
    for name, own in others:
        model.add_adapter(name, _config(**own))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # as training would have changed them
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape)
    return model.eval()


def _updates(model: nn.Module, adapter: str, options: Mapping[str, Any]) -> Updates:
    """Return what an adapter of some options adds, by the definition, in float64."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    updates: Updates = {}
    for key, A in tensors.items():
        if ".lora_A" not in key and ".lora_embedding_A" not in key:
            continue
        is_embedding = "embedding_A" in key
        name = re.sub(r"\.lora_.*", "", key.removeprefix("base_model.model."))
        patterns = options.get("alpha_pattern", {})
        alpha = next((a for p, a in patterns.items() if re.search(p, name)), None)
        alpha = options.get("lora_alpha", 8) if alpha is None else alpha
        r = A.shape[0]
        scale = alpha / (np.sqrt(r) if options.get("use_rslora") else r)
        B = tensors[re.sub(r"lora_(embedding_)?A", r"lora_\1B", key)]
        update = formats.lora(B, A, scale)
        weight = weights[f"{name}.weight"]
        is_turned = is_embedding or options.get("fan_in_fan_out")
        if options.get("use_dora"):
            magnitude = tensors[re.sub(r"lora_(embedding_)?A.*", "lora_magnitude_vector", key)]
            own = weight.T if is_turned else weight
            update = formats.dora(own, update, magnitude, 0)
        updates[name] = (update.T if is_turned else update).reshape(weight.shape)
    return updates


def _merged(model: nn.Module, options: Mapping[str, Any] = {}) -> Updates:
    """Return what the merged adapter adds, whose scale is to be 1."""
    config = model.peft_config["merged"]
    assert config.lora_alpha == config.r and not config.use_rslora and not config.use_dora
    return _updates(model, "merged", {"lora_alpha": config.r} | dict(options))


def _filled(all_updates: Sequence[Updates]) -> list[Updates]:
    """Return updates with zeros where one leaves a layer alone that another changes."""
    zeros = {name: np.zeros_like(u) for own in all_updates for name, u in own.items()}
    return [zeros | own for own in all_updates]


def _by_layer(merge: Callable[[list[Any]], Any]) -> Callable[[list[Updates]], Updates]:
    return lambda models: {name: merge([model[name] for model in models]) for name in models[0]}


METHODS: dict[str, Callable[[list[Updates]], Updates]] = {
    "average": _by_layer(linear.average),
    "task_arithmetic:alpha=0.7": _by_layer(lambda d: linear.task_arithmetic(d, 0.7)),
    "star:eta=60": _by_layer(lambda d: star.star(d, eta=60)),
    "metagpt": metagpt.metagpt,
    "ties:k=40": lambda models: ties.ties(models, k=40),
}


def _assert_same(found: Updates, expected: Updates, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        size = np.linalg.norm(update)
        assert np.linalg.norm(found[name] - update) <= tolerance * size, name
        assert size > 1e-4


def _tokens() -> Tensor:
    return torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(3))


def _state(model: nn.Module) -> dict[str, Any]:
    """Return all that a merge could leave behind, in copies."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [name for name, _ in model.named_modules()],
        "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "configs": {name: c.to_dict() for name, c in model.peft_config.items()},
        "active": [
            (name, list(module.active_adapters))
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ],
        "dicts": [
            (name, dict(m.r), dict(m.scaling), sorted(m.lora_dropout))
            for name, m in model.named_modules()
            if isinstance(m, LoraLayer)
        ],
    }


def _assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert before == after


def _pairs() -> list[tuple[str, str]]:
    """Return each kind with two methods, and each method with several kinds."""
    methods = list(METHODS)
    pairs = [(kind, methods[(n + i) % 5]) for n, kind in enumerate(OPTIONS) for i in (0, 2)]
    # STAR averages embeddings that have no factors.
    return [pair for pair in pairs if pair != ("dora of an embedding", "star:eta=60")]


@pytest.mark.parametrize(("kind", "method"), _pairs())
def test_the_update_is_that_of_the_method(kind: str, method: str) -> None:
    options = {"first": OPTIONS["plain"], "second": OPTIONS[kind], "third": OPTIONS["rslora"]}
    model = _loaded(_llama(), **options)
    expected = METHODS[method](_filled([_updates(model, n, o) for n, o in options.items()]))
    result = sm.merge_adapters(model, list(options), method, rank=32)
    assert result.error < 1e-5
    _assert_same(_merged(model), expected)
    assert {name: module.norm for name, module in result.modules.items()} == pytest.approx(
        {name: np.linalg.norm(update) for name, update in expected.items()}, rel=1e-5
    )


def test_weights_count() -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["rslora"])
    a, b = _filled([_updates(model, "first", {}), _updates(model, "second", OPTIONS["rslora"])])
    sm.merge_adapters(model, ["second", "first"], "linear", weights=[2, -0.5])
    _assert_same(_merged(model), {name: (2 * b[name] - 0.5 * a[name]) / 1.5 for name in a})


def test_exact_factors_are_exact_and_what_is_cut_off_is_told() -> None:
    options = {"first": {}, "second": OPTIONS["other rank"]}
    model = _loaded(_llama(), **options)
    exact = sm.merge_adapters(model, ["first", "second"], "average", name="whole")
    assert (exact.rank, exact.error, exact.kept) == (7, 0, 1)
    assert "rank 7, exact, 4 layers" in repr(exact)
    cut = sm.merge_adapters(model, ["first", "second"], "average", rank=3)
    updates = METHODS["average"](_filled([_updates(model, n, o) for n, o in options.items()]))
    lost, total = 0.0, 0.0
    for name, update in updates.items():
        sigma = np.linalg.svd(update, compute_uv=False)
        assert cut.modules[name].rank == 3
        assert cut.modules[name].error == pytest.approx(
            np.linalg.norm(sigma[3:]) / np.linalg.norm(sigma), rel=1e-5
        )
        found = _merged(model)[name]
        assert np.linalg.norm(found - update) == pytest.approx(np.linalg.norm(sigma[3:]), rel=1e-5)
        lost, total = lost + sum(sigma[3:] ** 2), total + sum(sigma**2)
    assert cut.error == pytest.approx(np.sqrt(lost / total), rel=1e-5)
    assert cut.kept == pytest.approx(1 - lost / total, rel=1e-5)


@pytest.mark.parametrize("kind", [k for k in OPTIONS if "dora" not in k])
def test_the_forward_pass_is_that_of_the_base_with_the_update(kind: str) -> None:
    options = {"first": OPTIONS["rslora"], "second": OPTIONS[kind]}
    model = _loaded(_llama().double(), **options)
    base = _llama().double()
    updates = METHODS["average"](_filled([_updates(model, n, o) for n, o in options.items()]))
    with torch.no_grad():
        for name, update in updates.items():
            base.get_submodule(name).weight += torch.from_numpy(update)
        sm.merge_adapters(model, ["first", "second"], "average")
        model.set_adapter("merged")
        wanted, found = base(_tokens()).logits, model(_tokens()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["q_proj", "lm_head"]])
def test_dora_alone_becomes_a_plain_adapter_that_computes_the_same(targets: list[str]) -> None:
    model = _loaded(_llama(), first={"use_dora": True, "target_modules": targets})
    with pytest.raises(sm.UsageError, match=r"no factors.*rank=16"):
        sm.merge_adapters(model, ["first"], "average")
    result = sm.merge_adapters(model, ["first"], "average", rank=32)
    assert result.error < 1e-6
    with torch.no_grad():
        wanted = model(_tokens()).logits
        model.set_adapter("merged")
        torch.testing.assert_close(model(_tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    small = sm.merge_adapters(model, ["first"], "average", rank=2, name="small")
    assert 0.1 < small.error < 1


def test_layers_that_hold_their_weights_input_first() -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    torch.manual_seed(0)
    options = {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}
    every = {"first": options, "second": options | {"use_rslora": True}}
    model = _loaded(GPT2LMHeadModel(GPT2Config(**sizes)), **every)
    updates = [_updates(model, name, own) for name, own in every.items()]
    sm.merge_adapters(model, ["first", "second"], "star:eta=60")
    _assert_same(_merged(model, {"fan_in_fan_out": True}), METHODS["star:eta=60"](updates))
    assert model.peft_config["merged"].fan_in_fan_out


class _Convolutions(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 6, 3)
        self.two = nn.Conv2d(6, 8, 1, groups=groups)
        self.three = nn.Conv1d(8, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(*, use_dora: bool) -> None:
    torch.manual_seed(0)
    own = {"target_modules": ["one", "two", "three"], "r": 2, "task_type": None}
    options = {"first": own, "second": own | {"use_rslora": True, "use_dora": use_dora}}
    model = _loaded(_Convolutions(), **options)
    updates = [_updates(model, name, o) for name, o in options.items()]
    sm.merge_adapters(model, ["first", "second"], "average", rank=8 if use_dora else None)
    expected = METHODS["average"](updates)
    _assert_same(_merged(model), expected)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        model.set_adapter("merged")
        found = model(x)
        torch.manual_seed(0)
        base = _Convolutions()
        for name, update in expected.items():
            base.get_submodule(name).weight += torch.from_numpy(update).float()
        torch.testing.assert_close(found, base(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_have_the_dtype_of_the_merged_ones_and_what_it_costs_is_told(
    dtype: torch.dtype,
) -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["rslora"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    updates = [_updates(model, "first", {}), _updates(model, "second", OPTIONS["rslora"])]
    result = sm.merge_adapters(model, ["first", "second"], "average")
    own = [p for name, p in model.named_parameters() if ".merged." in name]
    assert {parameter.dtype for parameter in own} == {dtype} and len(own) == 8
    found, expected = _merged(model), METHODS["average"](updates)
    lost = [np.linalg.norm(found[name] - expected[name]) ** 2 for name in expected]
    total = [np.linalg.norm(update) ** 2 for update in expected.values()]
    assert result.error == pytest.approx(np.sqrt(sum(lost) / sum(total)), rel=1e-3)
    assert result.error > 1e-4
    big = {
        name: p.data.mul_(6e4 if dtype == torch.float16 else 1e38) for name, p in _factors(model)
    }
    assert big
    with pytest.raises(sm.StarmergeError, match="overflow"):
        sm.merge_adapters(model, ["first", "second"], "task_arithmetic:alpha=1000", name="huge")
    assert "huge" not in model.peft_config


def _factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".merged." not in name:
            yield name, parameter


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("rslora and patterns", "auto"),
        ("embedding", "auto"),
        ("dora", "auto"),
        ("head", "star+ties:eta=60"),
        ("dora", "star+ties:eta=60"),
        ("embedding", "dare:seed=3"),
        ("head", "lines"),
        ("rslora and patterns", "metagpt"),
        ("dora of an embedding", "metagpt"),
        ("embedding", "karcher"),
    ],
)
def test_the_files_give_the_same_factors(
    tiny_base: Path, tmp_path: Path, kind: str, method: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = _loaded(base, first=OPTIONS["plain"], second=OPTIONS[kind])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    folders = [tmp_path / "first", tmp_path / "second"]
    made = sm.merge(
        tiny_base, folders, method, output=tmp_path / "out", output_kind="adapter", rank=6
    )
    result = sm.merge_adapters(model, ["first", "second"], method, rank=6)
    assert result.method == made.report.content["recipe"]["method"]
    assert result.error == pytest.approx(made.report.content["output"]["error"], rel=1e-6)
    written = load_file(made.path / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, adapter_name="merged", save_embedding_layers=False)
    assert own.keys() == written.keys()
    for key, tensor in written.items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-5, atol=1e-6)


def test_what_is_saved_loads_again_and_merges(tiny_base: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = _loaded(base, first=OPTIONS["rslora"], second=OPTIONS["head"])
    sm.merge_adapters(model, ["first", "second"], "auto")
    model.save_pretrained(tmp_path, selected_adapters=["merged"], save_embedding_layers=False)
    model.set_adapter("merged")
    with torch.no_grad():
        wanted = model(_tokens()).logits
        fresh = AutoModelForCausalLM.from_pretrained(tiny_base)
        again = PeftModel.from_pretrained(fresh, tmp_path / "merged").eval()
        torch.testing.assert_close(again(_tokens()).logits, wanted, rtol=0, atol=0)
        full = sm.merge(tiny_base, [tmp_path / "merged"], "average", output=tmp_path / "full")
        folded = AutoModelForCausalLM.from_pretrained(full.path)
        torch.testing.assert_close(folded(_tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_nothing_else_changes() -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["embedding"], third=OPTIONS["dora"])
    model.set_adapter("second")
    before = _state(model)
    sm.merge_adapters(model, ["third", "second"], "average", rank=4)
    assert model.active_adapters == ["second"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".merged" in n)
    model.delete_adapter("merged")
    _assert_unchanged(before, _state(model))


def test_what_is_merged_in_inference_mode_can_be_trained() -> None:
    model, _ = _classifiers()
    with torch.inference_mode():
        sm.merge_adapters(model, ["first", "second"], "star:eta=60")
    assert not any(p.is_inference() for p in model.parameters())
    model.set_adapter("merged")
    model(_tokens() % 60).logits.sum().backward()
    trained = [p for name, p in model.named_parameters() if ".merged." in name]
    assert all(p.requires_grad and p.grad is not None for p in trained)


def test_a_model_without_the_wrapper_of_peft() -> None:
    model = _llama()
    for name in ("first", "second"):
        inject_adapter_in_model(_config(), model, name)
    assert not isinstance(model, PeftModel)
    updates = [_updates(model, name, {}) for name in ("first", "second")]
    before = _state(model)
    sm.merge_adapters(model, ["first", "second"], "average")
    assert _state(model)["active"] == before["active"]
    _assert_same(_merged(model), METHODS["average"](updates))


def _classifiers() -> tuple[PeftModel, list[Updates]]:
    """Return a classifier with two adapters that replace its head, and what they change there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=60, intermediate_size=24, pad_token_id=0, **sizes)
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = _loaded(RobertaForSequenceClassification(config), first=options, second=options)
    head = model.base_model.model.classifier
    heads = []
    for name in ("first", "second"):
        own = head.modules_to_save[name].state_dict()
        for tensor in own.values():
            tensor.add_(torch.randn(tensor.shape), alpha=0.1)
        before = head.original_module.state_dict()
        heads.append({key: formats.exact(own[key]) - formats.exact(before[key]) for key in own})
    return model, heads


def test_modules_that_adapters_replace_are_merged_as_differences(tmp_path: Path) -> None:
    model, heads = _classifiers()
    updates = METHODS["average"]([_updates(model, name, {}) for name in ("first", "second")])
    before = _state(model)
    result = sm.merge_adapters(model, ["first", "second"], "average", weights=[3, 1])
    assert result.error == 0 and result.modules["classifier.out_proj.bias"].rank is None
    head = model.base_model.model.classifier
    merged, base = head.modules_to_save["merged"].state_dict(), head.original_module.state_dict()
    assert merged.keys() == base.keys() == heads[0].keys()
    for key, tensor in merged.items():
        expected = formats.exact(base[key]) + (3 * heads[0][key] + heads[1][key]) / 4
        np.testing.assert_allclose(formats.exact(tensor), expected, rtol=0, atol=1e-6)
    assert updates.keys() < result.modules.keys() and model.active_adapters == ["first"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".merged" in n)
    model.set_adapter("merged")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    fresh = RobertaForSequenceClassification(model.base_model.config)
    fresh.load_state_dict({
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in model.base_model.model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    })  # fmt: skip
    with torch.no_grad():
        again = PeftModel.from_pretrained(fresh, tmp_path / "merged").eval()
        wanted = model(_tokens() % 60).logits
        torch.testing.assert_close(again(_tokens() % 60).logits, wanted)
    model.set_adapter("first")
    model.delete_adapter("merged")
    _assert_unchanged(before, _state(model))


@pytest.mark.parametrize("method", ["average", "ties:k=50", "auto", "karcher"])
def test_files_with_whole_modules_give_the_same(tmp_path: Path, method: str) -> None:
    model, _ = _classifiers()
    plain = model.base_model.model
    with model.disable_adapter():
        stored = {
            name.replace(".base_layer", "").replace(".original_module", ""): tensor
            for name, tensor in plain.state_dict().items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    fresh = RobertaForSequenceClassification(plain.config)
    fresh.load_state_dict(stored)
    fresh.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path)
    folders = [tmp_path / "first", tmp_path / "second"]
    options: dict[str, Any] = {"output": tmp_path / "out", "output_kind": "adapter", "rank": 4}
    made = sm.merge(tmp_path / "base", folders, method, **options)
    result = sm.merge_adapters(model, ["first", "second"], method, rank=4)
    assert result.method == made.report.content["recipe"]["method"]
    written = load_file(made.path / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, adapter_name="merged")
    assert own.keys() == written.keys()
    for key, tensor in written.items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-4, atol=1e-6)


def test_whole_modules_that_cannot_be_subtracted_are_refused() -> None:
    model, _ = _classifiers()
    head = model.base_model.model.classifier.modules_to_save["second"]
    head.out_proj.weight.data = torch.randn(3, 16)
    with pytest.raises(sm.UsageError, match=r"'second' replaces classifier\.out_proj\.weight.*\[3"):
        sm.merge_adapters(model, ["first", "second"], "average")
    head.out_proj.weight.data = torch.ones(2, 16, dtype=torch.float8_e4m3fn)
    with pytest.raises(sm.UsageError, match="float8"):
        sm.merge_adapters(model, ["first", "second"], "average")
    head.out_proj.weight.data = torch.full((2, 16), torch.inf)
    with pytest.raises(sm.StarmergeError, match=r"'second' has a NaN or an infinity"):
        sm.merge_adapters(model, ["first", "second"], "average")
    assert list(model.peft_config) == ["first", "second"]


def test_another_adapter_that_replaces_modules_is_left_alone() -> None:
    model = _loaded(_llama(), first={}, second={}, head={"modules_to_save": ["lm_head"]})
    model.set_adapter("head")
    before = _state(model)
    sm.merge_adapters(model, ["first", "second"], "average")
    model.delete_adapter("merged")
    model.set_adapter("head")
    _assert_unchanged(before, _state(model))


def test_the_base_may_be_quantised_where_factors_are_enough() -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["rslora"], third=OPTIONS["dora"])
    updates = [_updates(model, "first", {}), _updates(model, "second", OPTIONS["rslora"])]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.requires_grad_(False).data = weight.data.mul(100).to(torch.int8)
    sm.merge_adapters(model, ["first", "second"], "average", name="merged")
    _assert_same(_merged(model), METHODS["average"](updates))
    for adapters, method in ((["first", "third"], "average"), (["first", "second"], "karcher")):
        with pytest.raises(sm.UsageError, match=r"torch\.int8.*unquantised"):
            sm.merge_adapters(model, adapters, method, name="other", rank=4)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # two of bitsandbytes' four-bit numbers a byte
            weight = module.get_base_layer().weight
            weight.data = torch.zeros(weight.numel() // 4, 1, dtype=torch.bfloat16)
    with pytest.raises(sm.UsageError, match=r"'third'.*packed.*unquantised"):
        sm.merge_adapters(model, ["first", "third"], "average", name="other", rank=4)
    assert "other" not in model.peft_config


def test_what_add_weighted_adapter_makes_of_rslora_is_no_nearer() -> None:
    model = _loaded(_llama(), first={"use_rslora": True}, second={"use_rslora": True})
    expected = METHODS["average"](
        [_updates(model, name, {"use_rslora": True}) for name in ("first", "second")]
    )
    model.base_model.add_weighted_adapter(
        ["first", "second"], [0.5, 0.5], "theirs", combination_type="linear"
    )
    sm.merge_adapters(model, ["first", "second"], "average")
    size = np.sqrt(sum(np.linalg.norm(update) ** 2 for update in expected.values()))

    def distance(adapter: str) -> float:
        lost = 0.0
        for name, update in expected.items():
            layer = model.base_model.model.get_submodule(name)
            found = layer.get_delta_weight(adapter).detach().double().numpy()
            lost += float(np.linalg.norm(found - update)) ** 2
        return float(np.sqrt(lost) / size)

    assert distance("merged") < 1e-6
    assert distance("merged") <= distance("theirs")  # 1.2 with PEFT 0.21; a later one may be right


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_adapter_can_be_made_of_is_refused_by_name(kind: str) -> None:
    options, message = REFUSED[kind]
    model = _loaded(_llama(attention_bias=True), first={} if kind != "bias" else options, **{})
    if kind != "bias":
        model.add_adapter("second", _config(**options))
    before = _state(model)
    with pytest.raises(sm.UsageError, match=re.escape(message)):
        sm.merge_adapters(model, list(model.peft_config), "average", rank=4)
    _assert_unchanged(before, _state(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["first", "secnd"]}, r"'secnd'. Did you mean 'second'\? Loaded: first, sec"),
        ({"adapters": ["first", "x"]}, r"No adapter is called 'x'. Loaded: first, second"),
        ({"adapters": "first"}, "Give a list of their names"),
        ({"adapters": None}, "Give a list of their names"),
        ({"adapters": [1]}, "Give a list of their names"),
        ({"adapters": []}, "at least one"),
        ({"adapters": ["first", "first"]}, "Give each once"),
        ({"name": "second"}, "'second' is loaded already"),
        ({"name": "a.b"}, "without a dot"),
        ({"name": "keys"}, "none of their attributes"),
        ({"name": "training"}, "none of their attributes"),
        ({"name": "get"}, "none of their attributes"),
        ({"name": ""}, "cannot be the name"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"weights": [1.0]}, "1 weights for 2"),
        ({"weights": [1, -1], "method": "average"}, "sum to zero"),
        ({"method": "emr"}, "a model for each task"),
        ({"method": "regmean"}, "moments"),
        ({"method": "ties"}, r"no factors.*rank=16"),
        ({"method": "starr"}, "star"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["rslora"])
    before = _state(model)
    with pytest.raises(sm.UsageError, match=message):
        sm.merge_adapters(model, **{"adapters": ["first", "second"]} | arguments)
    _assert_unchanged(before, _state(model))


def test_models_that_hold_no_such_adapters_are_refused() -> None:
    with pytest.raises(sm.UsageError, match="LlamaForCausalLM holds no adapters"):
        sm.merge_adapters(_llama(), ["first"])
    with pytest.raises(sm.UsageError, match="str holds no adapters"):
        sm.merge_adapters("adapters/a", ["first"])  # type: ignore[arg-type]
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config in (ia3, prompts):
        with pytest.raises(sm.UsageError, match="only LORA adapters"):
            sm.merge_adapters(get_peft_model(_llama(), config, adapter_name="first"), ["first"])
    mixed = get_peft_model(_llama(), _config(), adapter_name="first", mixed=True)
    with pytest.raises(sm.UsageError, match="PeftMixedModel"):
        sm.merge_adapters(mixed, ["first"])
    compiled = nn.Module()
    compiled._orig_mod = _loaded(_llama(), first={})  # as in torch.compile's, slow to import
    with pytest.raises(sm.UsageError, match="_orig_mod"):
        sm.merge_adapters(compiled, ["first"])


def test_adapters_that_are_not_beside_the_weights_as_trained_are_refused() -> None:
    model = _loaded(_llama(), first={}, second=OPTIONS["rslora"])
    model.merge_adapter(["second"])
    with pytest.raises(sm.UsageError, match=r"'second' are merged into.*unmerge_adapter"):
        sm.merge_adapters(model, ["first"], "average")
    model.unmerge_adapter()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("second", 0.7)
    with pytest.raises(sm.UsageError, match=r"'second'.*0\.7 times as strongly.*weights="):
        sm.merge_adapters(model, ["first", "second"], "average")
    sm.merge_adapters(model, ["first"], "average")


def test_groups_experts_and_offloaded_layers_are_refused() -> None:
    own = {"target_modules": ["one", "two"], "r": 2, "task_type": None}
    with pytest.raises(sm.UsageError, match="two, a convolution in groups"):
        sm.merge_adapters(_loaded(_Convolutions(groups=2), first=own), ["first"], "average")
    mixer = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    own = {"target_modules": ["attn"], "task_type": None}
    with pytest.raises(sm.UsageError, match="attn, a fused attention"):
        sm.merge_adapters(_loaded(mixer, first=own), ["first"], "average")
    options = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    with pytest.raises(sm.UsageError, match="q_proj, parameters of experts"):
        sm.merge_adapters(_loaded(_llama(), first=options), ["first"], "average")
    model = _loaded(_llama(), first={})
    model.base_model.model.model.layers[1].to("meta")
    with pytest.raises(sm.UsageError, match=r"layers\.1.*offloaded"):
        sm.merge_adapters(model, ["first"], "average")


def test_adapters_that_change_nothing_are_told() -> None:
    model = _loaded(_llama(), first={}, second={})
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.delete_adapter("second")
    with pytest.raises(sm.StarmergeError, match="None of the adapters changes any layer"):
        sm.merge_adapters(model, ["second"], "average")
    sm.merge_adapters(model, ["first", "second"], "average")


def test_an_adapter_that_diverged_is_told() -> None:
    model = _loaded(_llama(), first={}, second={})
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.lora_B["second"].weight.data[1, 2] = torch.nan
    with pytest.raises(sm.StarmergeError, match=r"'second' has a NaN .* model\.layers\.1.*v_proj"):
        sm.merge_adapters(model, ["first", "second"], "average")


def test_a_failure_half_way_takes_back_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _loaded(_llama(), first={}, second={"target_modules": ["q_proj", "embed_tokens"]})
    before = _state(model)
    place = LoraLayer._move_adapter_to_device_of_base_layer
    calls = []

    def fails(self: LoraLayer, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room")
        place(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "_move_adapter_to_device_of_base_layer", fails)
    with pytest.raises(MemoryError):
        sm.merge_adapters(model, ["first", "second"], "average")
    monkeypatch.undo()
    _assert_unchanged(before, _state(model))
    sm.merge_adapters(model, ["first", "second"], "average")


def test_ends_that_are_trained_as_one_are_refused() -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = _loaded(_llama(tie_word_embeddings=True), first=options)
    with pytest.raises(sm.UsageError, match=r"both ends.*ensure_weight_tying"):
        sm.merge_adapters(model, ["first"], "average")


def _pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _style(folder: Path, seed: int, parts: Sequence[str], **options: Any) -> Path:
    """Save a LoRA of a trainer of diffusers, which puts its config into the file's header."""
    pipe = _pipeline()
    torch.manual_seed(seed)
    targets = {"unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    layers: dict[str, Any] = {"unet_lora_layers": None, "text_encoder_lora_layers": None}
    for part in parts:
        model = getattr(pipe, part)
        config = _config(**{"task_type": None, "target_modules": targets[part], "r": 2} | options)
        inject_adapter_in_model(config, model)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    both = ("unet", "text_encoder")
    options: dict[str, dict[str, Any]] = {
        "first": {"lora_alpha": 3},
        "second": {"use_rslora": True, "r": 3},
        "third": {},
    }
    pipe = _pipeline()
    for seed, (name, own) in enumerate(options.items()):
        parts = both if name != "third" else ("unet",)
        pipe.load_lora_weights(_style(tmp_path / name, seed, parts, **own), adapter_name=name)
    pipe.set_adapters(["second"])
    models = {part: getattr(pipe, part) for part in both}
    expected: dict[str, Updates] = {}
    for part, model in models.items():
        every = [_updates(model, n, o) for n, o in options.items() if n in model.peft_config]
        own = _filled([*every, *[{}] * (3 - len(every))])
        expected[part] = METHODS["average"](own)
    result = sm.merge_adapters(pipe, ["first", "second", "third"], "average")
    assert result.error == 0 and result.rank == 7
    assert {name.partition(".")[0] for name in result.modules} == set(both)
    assert any("conv1" in name for name in result.modules)
    assert pipe.get_active_adapters() == ["second"]
    for part, model in models.items():
        _assert_same(_merged(model), expected[part])
    pipe.set_adapters("merged")
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    with torch.no_grad():
        found = pipe.unet(sample, 3, text).sample
        plain = _pipeline().unet
        for name, update in expected["unet"].items():
            plain.get_submodule(name).weight += torch.from_numpy(update).float()
        torch.testing.assert_close(found, plain(sample, 3, text).sample, rtol=1e-4, atol=1e-4)
    # What is saved of it is the same adapter in a new pipeline.
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model, adapter_name="merged")
              for part, model in models.items()}  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(tmp_path / "merged", **layers)
    again = _pipeline()
    again.load_lora_weights(tmp_path / "merged", adapter_name="merged")
    with torch.no_grad():
        torch.testing.assert_close(again.unet(sample, 3, text).sample, found, rtol=0, atol=1e-6)
    pipe.delete_adapters("merged")
    assert pipe.get_list_adapters() == {
        "unet": ["first", "second", "third"], "text_encoder": ["first", "second"]
    }  # fmt: skip


def test_a_pipeline_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _pipeline()
    for seed, name in enumerate(("first", "second")):
        style = _style(tmp_path / name, seed, ("unet", "text_encoder"))
        pipe.load_lora_weights(style, adapter_name=name)
    pipe.set_adapters(["first", "second"], adapter_weights=[1.0, 0.5])
    states = [_state(model) for model in (pipe.unet, pipe.text_encoder)]
    with pytest.raises(sm.UsageError, match=r"'second' changes .*0\.5 times as strongly"):
        sm.merge_adapters(pipe, ["first", "second"], "average")
    with pytest.raises(sm.UsageError, match="'thrid'. Loaded: first, second"):
        sm.merge_adapters(pipe, ["first", "thrid"])
    with pytest.raises(sm.UsageError, match="StableDiffusionPipeline holds no adapters"):
        sm.merge_adapters(_pipeline(), ["first"])
    for state, model in zip(states, (pipe.unet, pipe.text_encoder), strict=True):
        _assert_unchanged(state, _state(model))
    pipe.set_adapters(["first", "second"])
    states = [_state(model) for model in (pipe.unet, pipe.text_encoder)]
    second = list(pipe.components).index("unet") > list(pipe.components).index("text_encoder")
    last = pipe.unet if second else pipe.text_encoder
    layers = [m for m in last.modules() if isinstance(m, LoraLayer)]
    update = type(layers[0]).update_layer

    def fails(self: LoraLayer, *args: Any, **kwargs: Any) -> None:
        if self is layers[-1]:
            raise MemoryError("no room")
        update(self, *args, **kwargs)

    for kind in {type(layer) for layer in layers}:
        monkeypatch.setattr(kind, "update_layer", fails)
    with pytest.raises(MemoryError):
        sm.merge_adapters(pipe, ["first", "second"], "average")
    monkeypatch.undo()
    for state, model in zip(states, (pipe.unet, pipe.text_encoder), strict=True):
        _assert_unchanged(state, _state(model))
    pipe.fuse_lora(adapter_names=["first"])
    with pytest.raises(sm.UsageError, match=r"'first' are merged into.*unfuse_lora"):
        sm.merge_adapters(pipe, ["first", "second"], "average")


def test_the_package_does_not_import_peft() -> None:
    program = "import sys, starmerge_models; assert not {'peft', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
