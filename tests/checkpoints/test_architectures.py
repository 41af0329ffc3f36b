"""Adapters of real architectures: the same weights as PEFT folds, tensor by tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from starmerge_models import merge
from starmerge_models.checkpoints import names
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.finetuned import open_finetuned
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.lora.update import Product
from starmerge_models.checkpoints.models import files_of
from starmerge_models.checkpoints.names import match_names
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError
from starmerge_models.methods.task_arithmetic import TaskArithmetic
from tests.oracles import adapters as oracle
from tests.oracles.bounds import U32
from tests.oracles.deltas import exact

_TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_TEXT, **_HEADS)),
    "tied llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_TEXT, **_HEADS, tie_word_embeddings=True)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**_TEXT, num_attention_heads=2, max_position_embeddings=12)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    ),
    "untied gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12, tie_word_embeddings=False
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_TEXT, **_HEADS, num_local_experts=2)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a base, or returns the one it has made."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        if not path.exists():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(path)
        return path

    return make


_CLASSIFIER = {"target_modules": ["query"], "task_type": "SEQ_CLS"}


def _load(path: Path, name: str) -> PreTrainedModel:
    return type(MODELS[name]()).from_pretrained(path)


def _adapter(base: Path, name: str, path: Path, *, bin: bool = False, **options: Any) -> Path:
    """Make a random adapter; all that was trained is random, whatever starts as the base's."""
    torch.manual_seed(1)
    model = get_peft_model(
        _load(base, name), LoraConfig(**({"r": 3, "init_lora_weights": False} | options))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        for key, buffer in model.named_buffers():
            if "modules_to_save" in key and buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape))
    model.save_pretrained(path, safe_serialization=not bin)
    return path


def _folded_by_peft(base: Path, name: str, adapter: Path, out: Path) -> dict[str, Tensor]:
    PeftModel.from_pretrained(_load(base, name), adapter).merge_and_unload().save_pretrained(out)
    return dict(load_file(out / "model.safetensors"))


def _open(adapter: Path, base: Path) -> Adapter:
    return open_adapter("a", resolve(adapter), open_base(resolve(base)))


def _expected(
    adapter: Adapter, name: str, weight: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact folded weight, and how far float32's rounding takes one from it."""
    read = adapter.checkpoint.read
    if name in adapter.saved:
        expected = exact(read(adapter.replacements[name]))
        return expected, U32 * (abs(expected) + abs(expected - exact(weight)))
    placed = adapter.updates[name]
    change, magnitude = placed.update.change, placed.update.magnitude
    assert isinstance(change, Product)
    B, A = read(change.b), read(change.a)
    if magnitude is None:
        return oracle.plain(weight, B, A, change.scale, placed.transposed)
    return oracle.dora(weight, B, A, change.scale, read(magnitude.key), placed.transposed)


def _assert_as_peft(adapter: Adapter, base: Path, folded: dict[str, Tensor]) -> None:
    """Ours lies within float32's rounding of the exact weight, and so does PEFT's."""
    stored = load_file(base / "model.safetensors")
    assert folded.keys() == stored.keys()
    for name, weight in stored.items():
        if name not in adapter.tensors:
            assert torch.equal(folded[name], weight), name
            continue
        assert not torch.equal(folded[name], weight), name
        expected, bound = _expected(adapter, name, weight)
        dense = exact(adapter.delta(name, weight).to_dense().reshape(weight.shape))
        if adapter.rank(name) is None:
            # Saved modules and DoRA: made in wide precision and rounded once.
            ours = U32 * abs(dense)
        else:
            a = adapter.updates[name].update.keys[0]
            assert adapter.rank(name) == len(adapter.checkpoint.read(a))
            ours = bound
        assert np.all(abs(exact(weight) + dense - expected) <= ours), name
        assert np.all(abs(exact(folded[name]) - expected) <= bound + U32 * abs(expected)), name


def _has_dense_deltas(adapter: Adapter, options: dict[str, Any]) -> bool:
    dense = {name for name in adapter.tensors if adapter.rank(name) is None}
    return dense == (adapter.tensors if options.get("use_dora") else adapter.saved)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"embed_tokens": 5, "layers.0.mlp.down_proj": 2},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "gate_proj", "embed_tokens"],
            "use_dora": True,
            "modules_to_save": ["lm_head"],
        },
    ),
    ("tied llama", {"target_modules": "all-linear", "init_lora_weights": "orthogonal", "r": 4}),
    ("tied llama", {"target_modules": ["k_proj", "up_proj"], "init_lora_weights": "mica"}),
    ("t5", {"target_modules": ["q", "v", "wo"]}),
    ("t5", {"target_modules": ["k", "wi"], "use_dora": True, "task_type": "SEQ_2_SEQ_LM"}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    (
        "bert",
        {"target_modules": ["dense", "word_embeddings"], "task_type": "SEQ_CLS", "use_dora": True},
    ),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    ("untied gpt2", {"target_modules": ["c_attn", "wte", "wpe", "lm_head"]}),
    ("untied gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    ("vit", {"target_modules": ["q_proj", "o_proj", "fc1", "projection"]}),
    ("vit", {"target_modules": "all-linear", "use_dora": True}),
    ("vit", {"target_modules": ["projection", "fc2"], "modules_to_save": ["classifier"]}),
    ("resnet", {"target_modules": ["convolution"]}),
    ("resnet", {"target_modules": ["convolution"], "use_dora": True, "use_rslora": True}),
    (
        "resnet",
        {
            "target_modules": ["convolution"],
            "rank_pattern": {"shortcut.convolution": 1},
            "modules_to_save": ["classifier", "normalization"],
        },
    ),
    ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gives_the_weights_that_peft_folds(
    base: Callable[[str], Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    adapter = _adapter(base(name), name, tmp_path / "a", **options)
    folded = _folded_by_peft(base(name), name, adapter, tmp_path / "m")
    opened = _open(adapter, base(name))
    _assert_as_peft(opened, base(name), folded)
    assert _has_dense_deltas(opened, options)
    weights = (
        opened.checkpoint[key]
        for key in opened.checkpoint
        if "base_layer" not in key  # compared
    )
    size = sum(weight.nbytes for weight in weights if weight.dtype.is_floating_point)
    read = [info.nbytes for tensor in opened.tensors for info in opened.inputs(tensor)]
    assert sum(read) == size
    assert bool(opened.saved) == ("modules_to_save" in options or "SEQ_CLS" in options.values())


def test_reads_factors_of_mixed_dtypes_and_a_bin_file(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}
    adapter = _adapter(base("bert"), "bert", tmp_path / "a", bin=True, **options)
    file = adapter / "adapter_model.bin"
    tensors = torch.load(file)
    torch.save({k: t.bfloat16() if "_B" in k else t for k, t in tensors.items()}, file)
    folded = _folded_by_peft(base("bert"), "bert", adapter, tmp_path / "m")
    opened = _open(adapter, base("bert"))
    assert file in files_of(opened)
    dtypes = {opened.checkpoint[key].dtype for key in opened.checkpoint}
    assert dtypes == {torch.bfloat16, torch.float32}
    _assert_as_peft(opened, base("bert"), folded)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert file not in files_of(_open(adapter, base("bert"))), "safetensors come first, as in PEFT"


def test_a_pickle_that_would_run_code_is_refused(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _adapter(base("t5"), "t5", tmp_path / "a", bin=True, target_modules=["q"])
    torch.save({"x": Path("y")}, adapter / "adapter_model.bin")
    with pytest.raises(StarmergeError, match="would run code"):
        _open(adapter, base("t5"))


def test_merges_convolutions_and_copies_the_counters_of_batch_norms(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _adapter(
        base("resnet"),
        "resnet",
        tmp_path / "a",
        target_modules=["convolution"],
        modules_to_save=["normalization"],
    )
    merge(base("resnet"), [adapter], TaskArithmetic(alpha=1.0), output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert any(tensor.dtype == torch.int64 for tensor in merged.values())
    opened = _open(adapter, base("resnet"))
    for name, weight in load_file(base("resnet") / "model.safetensors").items():
        if name not in opened.tensors:
            assert torch.equal(merged[name], weight), name
            continue
        expected, bound = _expected(opened, name, weight)
        assert np.all(abs(exact(merged[name]) - expected) <= bound + U32 * abs(expected)), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", {"target_modules": ["shared"]}, "compute otherwise when they are not tied"),
        ("t5", {"target_modules": ["encoder.embed_tokens"]}, "that this one ties to another"),
        ("llama", {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("llama", {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ("bert", {"target_modules": ["query"], "lora_bias": True}, "lora_bias"),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}, "bias is 'lora_only'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_what_cannot_be_folded_exactly(
    base: Callable[[str], Path], tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    options = {"target_modules": ["q_proj"]} | options
    adapter = _adapter(base(name), name, tmp_path / "a", **options)
    with pytest.raises(StarmergeError, match=message):
        merge(base(name), [adapter], output=tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_peft_changes_both_ends_of_tied_weights(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Why an adapter on one end is refused: the adapted model changes one end only."""
    path = _adapter(base("gpt2"), "gpt2", tmp_path / "a", target_modules=["lm_head"])
    model = PeftModel.from_pretrained(_load(base("gpt2"), "gpt2"), path)
    tokens = torch.tensor([[1, 2, 3]])
    adapted = model(tokens).logits
    folded = model.merge_and_unload()
    assert not torch.allclose(adapted, folded(tokens).logits, atol=1e-3)


def test_merges_attention_adapters_and_full_finetunes_of_a_mixture_of_experts(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _adapter(base("mixtral"), "mixtral", tmp_path / "a", target_modules=["q_proj"])
    tuned = _load(base("mixtral"), "mixtral")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "full")
    opened = open_base(resolve(base("mixtral")))
    finetune = open_finetuned("f", resolve(tmp_path / "full"), opened)
    assert finetune.tensors == set(opened.checkpoint)
    assert any("experts.1.w2" in name for name in finetune.tensors)
    merge(
        base("mixtral"),
        [adapter, tmp_path / "full"],
        TaskArithmetic(alpha=1.0),
        output=tmp_path / "o",
    )
    _load(tmp_path / "o", "mixtral")
    merged = load_file(tmp_path / "o" / "model.safetensors")
    theirs = load_file(tmp_path / "full" / "model.safetensors")
    part = _open(adapter, base("mixtral"))
    for name, weight in load_file(base("mixtral") / "model.safetensors").items():
        expected, bound = exact(theirs[name]), 0.0
        if name in part.tensors:
            folded, bound = _expected(part, name, weight)
            expected = expected + folded - exact(weight)
        # The difference, its sum with the other update, and the sum with the weight are rounded.
        size = abs(expected) + 2 * abs(expected - exact(weight)) + abs(exact(theirs[name]))
        assert np.all(abs(exact(merged[name]) - expected) <= bound + U32 * size), name


def test_finds_experts_by_their_names_in_the_file(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    """An adapter made before transformers joined the experts names them as the file does."""
    adapter = _adapter(base("mixtral"), "mixtral", tmp_path / "a", target_modules=["q_proj"])
    module = "model.layers.1.block_sparse_moe.experts.1.w2"
    factors = {"A": torch.randn(3, 24), "B": torch.randn(16, 3)}
    save_file(
        {f"base_model.model.{module}.lora_{k}.weight": v for k, v in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    opened = _open(adapter, base("mixtral"))
    assert opened.tensors == {f"{module}.weight"}


@pytest.mark.parametrize("experts", [1, 2])
def test_tensors_that_are_joined_on_loading_have_no_name_in_the_model(
    tmp_path: Path, experts: int
) -> None:
    config = MixtralConfig(
        **_TEXT, **_HEADS, num_local_experts=experts, num_experts_per_tok=experts
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    base = open_base(resolve(tmp_path))
    layer = "model.layers.0"
    renamed = [f"{layer}.mlp.gate.weight", f"{layer}.self_attn.q_proj.weight"]
    assert match_names(base.source, base, renamed) == {
        renamed[0]: f"{layer}.block_sparse_moe.gate.weight",
        renamed[1]: renamed[1],
    }
    for joined in ("gate_up_proj", "down_proj"):
        assert match_names(base.source, base, [f"{layer}.mlp.experts.{joined}"]) == {}


def test_without_transformers_names_of_its_own_are_an_error(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _adapter(base("vit"), "vit", tmp_path / "a", target_modules=["q_proj"])
    assert (
        "vit.encoder.layer.1.attention.attention.query.weight"
        in _open(adapter, base("vit")).tensors
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    names._asked.cache_clear()  # what it has said is kept
    with pytest.raises(StarmergeError, match=r"adapts vit\.layers\.0\.attention\.q_proj.*install"):
        _open(adapter, base("vit"))


def test_a_head_that_the_base_lacks_is_an_error(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _adapter(
        base("bert"), "bert", tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS"
    )
    _load(base("bert"), "bert").bert.save_pretrained(tmp_path / "inner")
    with pytest.raises(StarmergeError, match=r"classifier\..*has no tensor classifier\."):
        _open(adapter, tmp_path / "inner")


def test_an_adapter_of_a_headed_model_fits_its_encoder_and_the_other_way(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    names = {f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)}
    inner = _load(base("bert"), "bert").bert
    inner.save_pretrained(tmp_path / "inner")
    adapter = _adapter(base("bert"), "bert", tmp_path / "a", target_modules=["query"])
    assert _open(adapter, tmp_path / "inner").tensors == names
    get_peft_model(inner, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "b")
    assert _open(tmp_path / "b", base("bert")).tensors == {f"bert.{name}" for name in names}


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("base_model.model.classifier.weight", torch.ones(5, 16), r"\[5, 16\].*\[2, 16\]"),
        ("base_model.model.classifier.weight", torch.ones(2, 16).char(), "cannot be subtracted"),
        ("classifier.weight", torch.ones(2, 16), r"classifier\.weight, which are to be the same"),
        ("base_model.model.bert.pooler.dense.bias", torch.ones(16), "is no LoRA factor"),
        ("base_model.model.classifier.new", torch.ones(2), r"has no tensor classifier\.new"),
    ],
)
def test_a_head_that_does_not_fit_is_an_error(
    base: Callable[[str], Path], tmp_path: Path, key: str, tensor: Tensor, message: str
) -> None:
    adapter = _adapter(base("bert"), "bert", tmp_path / "a", **_CLASSIFIER)
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {key: tensor}, file)
    with pytest.raises(StarmergeError, match=message):
        _open(adapter, base("bert"))


def test_a_module_that_is_both_adapted_and_saved_is_an_error(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _adapter(base("bert"), "bert", tmp_path / "a", **_CLASSIFIER)
    file = adapter / "adapter_model.safetensors"
    factors = {"A": torch.ones(3, 16), "B": torch.ones(2, 3)}
    new = {f"base_model.model.classifier.lora_{k}.weight": factor for k, factor in factors.items()}
    save_file(load_file(file) | new, file)
    with pytest.raises(StarmergeError, match="factors of classifier and the whole of it"):
        _open(adapter, base("bert"))


def test_modules_to_save_are_ends_of_names(base: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["_head", "1.input_layernorm"]}
    adapter = _adapter(base("llama"), "llama", tmp_path / "a", **options)
    saved = {"lm_head.weight", "model.layers.1.input_layernorm.weight"}
    assert _open(adapter, base("llama")).saved == saved


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_another_base_is_an_error(base: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT saves the base's weight beside the factors of an output layer."""
    adapter = _adapter(base("llama"), "llama", tmp_path / "a", target_modules=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    weight = load_file(base("llama") / "model.safetensors")["lm_head.weight"]
    assert torch.equal(tensors[key], weight)
    for changed, message in ((2 * weight, "is not the base's weight"), (weight[1:], r"\[39, 16\]")):
        save_file(tensors | {key: changed.contiguous()}, file)
        with pytest.raises(StarmergeError, match=message):
            _open(adapter, base("llama")).delta("lm_head.weight", weight)
    half = weight.bfloat16()
    for rounded in (half, half.float(), weight.half().float(), weight.double()):
        save_file(tensors | {key: rounded}, file)
        assert _open(adapter, base("llama")).delta("lm_head.weight", weight).shape == (40, 16)


def test_modules_to_save_must_be_in_the_file(base: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = _adapter(
        base("bert"), "bert", tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS"
    )
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "classifier" not in k}, file)
    with pytest.raises(StarmergeError, match="modules_to_save is .*holds no tensor"):
        _open(adapter, base("bert"))


@pytest.mark.parametrize("name", MODELS)
def test_a_full_fine_tune_of_each_architecture_is_merged_whole(
    base: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model = _load(base(name), name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    merge(base(name), [tmp_path / "tuned"], TaskArithmetic(alpha=1.0), output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert merged.keys() == load_file(base(name) / "model.safetensors").keys()
    for tensor, weight in tuned.items():
        largest = abs(exact(weight)) + abs(exact(merged[tensor]))
        assert np.all(abs(exact(merged[tensor]) - exact(weight)) <= 4 * U32 * largest), tensor
    loaded = _load(tmp_path / "out", name).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-6, atol=1e-7, msg=key)
