"""An update in a loaded model: the weights of a merge, and the base again afterwards."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import starmerge_models as sm
from starmerge_models.checkpoints.tensors import raw_bytes
from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models_demo import ADAPTERS
from tests.conftest import MakeAdapter, MakeFinetune
from tests.oracles import samples

_FILE = "model.safetensors"
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _bytes(tensor: Tensor) -> bytes:
    return bytes(raw_bytes(tensor.contiguous()))


def _assert_unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert _bytes(tensor) == _bytes(before[name]), name


def _small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 300), nn.BatchNorm1d(300), nn.Linear(300, 5)).to(dtype)


def _update(seed: int = 0) -> dict[str, Delta]:
    return {
        "0.weight": samples.low_rank(300, 7, 2, seed=seed),
        "0.bias": samples.dense(300, seed=seed),
        "1.running_mean": samples.dense(300, seed=seed + 1),
        "2.weight": samples.low_rank(5, 300, 3, seed=seed + 2, scale=0.5),
    }


@pytest.mark.parametrize("dtype", _DTYPES)
def test_the_weights_are_those_that_a_merge_writes(
    dtype: torch.dtype,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    models = [make_adapter("a", seed=1), make_adapter("b", seed=2, target_modules="all-linear")]
    models.append(make_finetune("c", seed=3))
    name = str(dtype).removeprefix("torch.")
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    vectors = sm.load_task_vectors(base, models)
    for method, chosen in ((sm.Star(eta=30), models[:2]), ("ties", models)):
        written = sm.merge(base, chosen, method, output=tmp_path / name, overwrite=True).path
        with sm.apply(model, vectors.merge(method, models=[path.name for path in chosen])):
            found = model.state_dict()
            for key, weight in load_file(written / "model.safetensors").items():
                assert torch.equal(found[key], weight), key
    original = load_file(base / "model.safetensors")
    _assert_unchanged(model, original)


def test_a_model_loaded_wider_than_its_files_gets_the_weights_of_a_wider_merge(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", make_adapter("a", seed=1)
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    written = sm.merge(base, [adapter], output=tmp_path / "out", dtype="float32").path
    sm.apply(model, sm.load_task_vectors(base, [adapter]).merge())
    for key, weight in load_file(written / "model.safetensors").items():
        assert torch.equal(model.state_dict()[key], weight), key


def test_the_real_model_gets_the_weights_of_a_merge_and_is_itself_again(
    smollm2: Path, tmp_path: Path
) -> None:
    adapters = [ADAPTERS / name for name in ("past", "digits")]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before, vectors = _bits(model), sm.load_task_vectors(smollm2, adapters)
    vectors.merge(sm.Star(eta=20))
    written = sm.merge(smollm2, adapters, sm.Star(eta=60), output=tmp_path / "merged").path
    with sm.apply(model, vectors.merge(sm.Star(eta=60))):
        for key, weight in load_file(written / "model.safetensors").items():
            assert torch.equal(model.state_dict()[key], weight), key
    _assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [*_DTYPES, torch.float64])
def test_parameters_and_buffers_get_the_sum_rounded_once(dtype: torch.dtype) -> None:
    model, update = _small(dtype), _update()
    before = _bits(model)
    with sm.apply(model, update):
        after = _bits(model)
    for name, tensor in after.items():
        if name not in update:
            assert torch.equal(tensor, before[name])
            continue
        exact = before[name].double() + torch.from_numpy(samples.exact(update[name])).reshape(
            tensor.shape
        )
        # One rounding of the result, and of at most four float32 operations before it.
        size = before[name].double().abs() + _magnitude(update[name]).reshape(tensor.shape)
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * 2.0**-24 * size
        if dtype == torch.float16:
            bound = bound + 2.0**-25  # half of its smallest step
        assert bool(((tensor.double() - exact).abs() <= 1.001 * bound).all()), name
        assert not torch.equal(tensor, before[name])


def _magnitude(delta: Delta) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.B.double().abs() @ delta.A.double().abs() * abs(delta.scale)
    return delta.matrix.double().abs()


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(_DTYPES),
    depth=st.integers(1, 4),
    raising=st.booleans(),
    chosen=st.sets(st.sampled_from(sorted(_update())), min_size=1),
)
def test_after_a_block_every_bit_and_object_is_as_before(dtype, depth, raising, chosen) -> None:
    model = _small(dtype)
    before = _bits(model)
    objects = dict(model.named_parameters()) | dict(model.named_buffers())
    addresses = {name: tensor.data_ptr() for name, tensor in objects.items()}

    def nest(level: int) -> None:
        if level == depth:
            if raising:
                raise KeyError("inside")
            return
        update = {name: delta for name, delta in _update(level).items() if name in chosen}
        with sm.apply(model, update):
            nest(level + 1)

    if raising:
        with pytest.raises(KeyError, match="inside"):
            nest(0)
    else:
        nest(0)
    _assert_unchanged(model, before)
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert tensor is objects[name]
        assert tensor.data_ptr() == addresses[name]
        assert tensor.grad is None
        assert tensor.requires_grad == objects[name].requires_grad


def test_threads_change_nothing() -> None:
    found = []
    for threads in (1, 2, 3):
        model = _small(torch.bfloat16)
        sm.apply(model, _update(), threads=threads)
        found.append(_bits(model))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def test_an_update_stays_that_nobody_takes_back() -> None:
    model, other = _small(), _small()
    sm.apply(model, _update())
    with sm.apply(model, _update(1)):
        pass
    kept = sm.apply(other, _update())
    _assert_unchanged(model, _bits(other))
    kept.restore()
    _assert_unchanged(other, _bits(_small()))


def test_updates_are_taken_back_in_the_opposite_order() -> None:
    model = _small()
    before = _bits(model)
    first = sm.apply(model, _update(0))
    middle = _bits(model)
    second = sm.apply(model[0], {"weight": samples.dense(300, 7, seed=8)})
    both = _bits(model)
    with pytest.raises(UsageError, match="Restore that one first"):
        first.restore()
    _assert_unchanged(model, both)
    second.restore()
    _assert_unchanged(model, middle)
    first.restore()
    _assert_unchanged(model, before)
    first.restore()
    _assert_unchanged(model, before)


def test_updates_of_other_tensors_stand_in_no_order() -> None:
    model = _small()
    before = _bits(model)
    first = sm.apply(model, {"0.bias": samples.dense(300)})
    second = sm.apply(model, {"2.bias": samples.dense(5)})
    first.restore()
    second.restore()
    _assert_unchanged(model, before)


class _Tied(nn.Module):
    """Two layers of one weight, and a third that holds a part of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8, bias=False)
        self.second = nn.Linear(6, 8, bias=False)
        self.second.weight = self.first.weight
        self.part = nn.Parameter(self.first.weight.detach()[:4])


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight", "first.weight"]])
def test_tied_weights_are_changed_once(names: list[str]) -> None:
    model, delta = _Tied(), samples.dense(8, 6)
    before = model.first.weight.detach().clone()
    with sm.apply(model, dict.fromkeys(names, delta)):
        assert model.first.weight is model.second.weight
        assert torch.equal(model.second.weight.detach(), before + delta.tensor)
    assert torch.equal(model.first.weight.detach(), before)


def test_tied_weights_that_would_differ_are_refused() -> None:
    model = _Tied()
    before = _bits(model)
    update = {"first.weight": samples.dense(8, 6), "second.weight": samples.dense(8, 6, seed=1)}
    with pytest.raises(UsageError, match=r"first.weight and second.weight are one tensor"):
        sm.apply(model, update)
    with pytest.raises(UsageError, match="share memory"):
        sm.apply(model, {"part": samples.dense(4, 6), "first.weight": samples.dense(8, 6)})
    _assert_unchanged(model, before)


def test_parts_of_one_storage_that_do_not_overlap_are_changed_each() -> None:
    model, flat = nn.Linear(6, 8), torch.randn(56)
    model.weight = nn.Parameter(flat[:48].view(8, 6))
    model.bias = nn.Parameter(flat[48:])
    before, update = flat.clone(), {"weight": samples.dense(8, 6), "bias": samples.dense(8)}
    with sm.apply(model, update):
        added = torch.cat([update["weight"].tensor.flatten(), update["bias"].tensor])
        assert torch.equal(flat, before + added)
    assert torch.equal(flat, before)


def test_tensors_that_are_not_contiguous_are_changed_in_place() -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    before, delta = model.weight.detach().clone(), samples.dense(4, 3, 2, 2)
    with sm.apply(model, {"weight": delta}):
        assert torch.equal(model.weight.detach(), before + delta.tensor)
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight.detach(), before)


def test_names_that_the_model_does_not_have_say_what_to_do(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    path = make_adapter("a")
    update = sm.load_task_vectors(tiny_base, [path]).merge("average")
    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    cases = [
        (
            nn.ModuleDict({"inner": whole}),
            r"calls it inner\.model.*give apply the part model.inner",
        ),
        (AutoModel.from_pretrained(tiny_base), r"calls it layers.*class.*or take 'model\.'"),
        (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), path),
            "unload",
        ),
    ]
    for model, said in cases:
        before = _bits(model)
        with pytest.raises(UsageError, match=said):
            sm.apply(model, update)
        _assert_unchanged(model, before)
    with pytest.raises(UsageError, match=r"nearest it has is 0\.weight.*joins"):
        sm.apply(_small(), {"0.weigth": samples.dense(300, 7)})
    with pytest.raises(UsageError, match="has no tensor 那.* If transformers joins"):
        sm.apply(_small(), {"那": samples.dense(300, 7)})


def test_tensors_that_transformers_renames_are_found_by_their_names_in_the_files(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "image_size": 4, "patch_size": 2}
    vit = ViTForImageClassification(
        ViTConfig(num_hidden_layers=2, num_attention_heads=2, num_channels=1, **sizes)
    )
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for folder in folders:
        vit.save_pretrained(folder)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    base, *tuned = folders
    update = sm.load_task_vectors(base, tuned).merge("star")
    sm.merge(base, tuned, "star", output=tmp_path / "merged")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged").state_dict()
    model = ViTForImageClassification.from_pretrained(base)
    before = _bits(model)
    renamed = update.keys() - before.keys()
    assert renamed
    with sm.apply(model, update):
        assert all(torch.equal(merged[name], own) for name, own in model.state_dict().items())
    _assert_unchanged(model, before)
    # Two updates of one tensor, by its old name and its new one, are not mixed up.
    (twice,) = [name for name in before if name.endswith("layers.0.attention.q_proj.bias")]
    with pytest.raises(UsageError, match="has no tensor vit.*query.bias"):
        sm.apply(model, {**update, twice: samples.dense(8)})
    _assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("update", "error", "said"),
    [
        (
            {"2.weight": samples.dense(300, 5)},
            UsageError,
            r"shape \[5, 300\].*update is \[300, 5\]",
        ),
        ({"1.num_batches_tracked": Dense(torch.ones(()))}, UsageError, "stored in torch.int64"),
        ({"2.bias": Dense(torch.full((5,), float("nan")))}, StarmergeError, "2.bias gets a NaN"),
        ({"2.bias": Dense(torch.full((5,), 1e6))}, StarmergeError, "overflows torch.float16"),
        (
            {"2.weight": LowRank(torch.full((5, 1), 1e30), torch.full((1, 300), 1e30))},
            StarmergeError,
            "2.weight gets a NaN or an infinity",
        ),
    ],
)
def test_an_update_that_fails_changes_nothing(update, error, said) -> None:
    model = _small(torch.float16)
    before = _bits(model)
    for whole in (update, _update() | update):
        with pytest.raises(error, match=said):
            sm.apply(model, whole)
        _assert_unchanged(model, before)
    with sm.apply(model, _update()):
        pass
    _assert_unchanged(model, before)


def test_a_broken_model_is_told_from_a_broken_update() -> None:
    model = _small()
    with torch.no_grad():
        model[2].bias[3] = float("inf")
    with pytest.raises(StarmergeError, match=r"2\.bias has a NaN or an infinity in the model"):
        sm.apply(model, {"2.bias": samples.dense(5)})


def test_weights_that_are_not_there_or_quantised_are_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.weight has no values.*meta"):
        sm.apply(_small().to("meta"), _update())
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"weight is stored in torch\.int8.*unquantised"):
        sm.apply(model, {"weight": samples.dense(4, 4)})

    class Packed(nn.Parameter):
        """As quantising libraries have them."""

    model.weight = Packed(torch.ones(4, 4))
    with pytest.raises(UsageError, match=r"weight is a Packed, which is quantised"):
        sm.apply(model, {"weight": samples.dense(4, 4)})


def test_a_model_that_was_converted_or_replaced_is_not_restored() -> None:
    model = _small()
    applied = sm.apply(model, _update())
    model.half()
    converted = _bits(model)
    with pytest.raises(UsageError, match=r"0\.weight was converted, replaced or written to"):
        applied.restore()
    _assert_unchanged(model, converted)
    model = _small()
    applied = sm.apply(model, _update())
    model.load_state_dict(_bits(_small()), assign=True)
    with pytest.raises(UsageError, match="converted, replaced or written to"):
        applied.restore()


@pytest.mark.parametrize("write", ["load", "step"])
def test_a_model_whose_values_were_written_to_is_not_restored(write: str) -> None:
    model = _small()
    applied = sm.apply(model, {"0.weight": samples.low_rank(300, 7, 2)})
    if write == "load":
        model.load_state_dict({name: tensor + 1 for name, tensor in _bits(_small()).items()})
    else:
        model.eval()(torch.ones(2, 7)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    written = _bits(model)
    with pytest.raises(UsageError, match=r"0\.weight was converted, replaced or written to"):
        applied.restore()
    _assert_unchanged(model, written)


def test_what_is_written_between_two_updates_forbids_to_restore_the_first_alone() -> None:
    model = _small()
    first = sm.apply(model, _update(0))
    with torch.no_grad():
        model[0].bias += 1
    before = _bits(model)
    with sm.apply(model, _update(1)):
        pass
    with pytest.raises(UsageError, match=r"0\.bias was converted, replaced or written to"):
        first.restore()
    _assert_unchanged(model, before)


def test_parts_of_one_tensor_that_two_updates_change_are_restored() -> None:
    model, flat = nn.Linear(6, 8), torch.randn(56)
    model.weight = nn.Parameter(flat[:48].view(8, 6))
    model.bias = nn.Parameter(flat[48:])
    before = flat.clone()
    first = sm.apply(model, {"weight": samples.dense(8, 6)})
    second = sm.apply(model, {"bias": samples.dense(8)})
    second.restore()
    first.restore()
    assert torch.equal(flat, before)


def test_an_update_that_fails_leaves_those_that_stand_restorable() -> None:
    model = _small(torch.float16)
    before = _bits(model)
    first = sm.apply(model, _update())
    with pytest.raises(StarmergeError, match="overflows"):
        sm.apply(model, _update(1) | {"2.bias": Dense(torch.full((5,), 1e6))})
    first.restore()
    _assert_unchanged(model, before)


@torch.inference_mode()
def test_models_made_in_inference_mode_are_changed_and_restored() -> None:
    model = _small()
    before = _bits(model)
    with sm.apply(model, _update()):
        assert not torch.equal(model[0].weight, before["0.weight"])
    _assert_unchanged(model, before)


def test_empty_tensors_of_two_models_have_nothing_in_common() -> None:
    models = [nn.Embedding(0, 3), nn.Embedding(0, 3)]
    first, second = (sm.apply(model, {"weight": samples.dense(0, 3)}) for model in models)
    first.restore()
    second.restore()


def test_what_is_no_update_is_refused() -> None:
    model = _small()
    before = _bits(model)
    with pytest.raises(UsageError, match=r"The update is a list\. Give deltas by the names"):
        sm.apply(model, [samples.dense(5)])
    with pytest.raises(UsageError, match=r"2\.bias is a Tensor\. Give a delta: Dense\(tensor\)"):
        sm.apply(model, {"2.bias": torch.ones(5)})
    _assert_unchanged(model, before)


def test_an_empty_update_is_none() -> None:
    model = _small()
    before = _bits(model)
    with sm.apply(model, {}):
        _assert_unchanged(model, before)


def test_experts_that_the_model_joins_are_changed_one_by_one(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=False,
    )
    base = tmp_path / "base"
    # The files hold the experts as the model does: joined.
    MixtralForCausalLM(config).save_pretrained(base, save_original_format=False)
    joined = "model.layers.0.mlp.experts.down_proj"
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = make_adapter("a", base=base, lora_dropout=0.0, **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    before, parameter = _bits(model), model.get_parameter(joined)
    update = sm.load_task_vectors(base, [adapter]).merge("average")
    assert {f"{joined}[{expert}]" for expert in range(4)} <= update.keys()
    written = load_file(sm.merge(base, [adapter], "average", output=tmp_path / "out").path / _FILE)
    with sm.apply(model, update):
        assert all(torch.equal(written[name], own) for name, own in model.state_dict().items())
        assert model.get_parameter(joined) is parameter
    _assert_unchanged(model, before)

    one = {f"{joined}[2]": update[f"{joined}[2]"]}
    with sm.apply(model, one):
        found = model.state_dict()[joined]
        assert torch.equal(found[2], written[joined][2])
        assert torch.equal(found[[0, 1, 3]], before[joined][[0, 1, 3]])
    applied = sm.apply(model, one)
    with torch.no_grad():
        model.get_parameter(joined)[0] = 0
    with pytest.raises(UsageError, match=f"{joined} was converted, replaced or written to"):
        applied.restore()

    for update, said in (
        ({f"{joined}[4]": one[f"{joined}[2]"]}, r"The model has no tensor .*\[4\]"),
        ({f"{joined}[0]": Dense(torch.zeros(3, 3))}, r"\[0\] has the shape \[16, 24\]"),
        ({"lm_head.weight[0]": Dense(torch.zeros(3, 3))}, "lm_head.weight"),
    ):
        with pytest.raises(UsageError, match=said):
            sm.apply(model, update)
