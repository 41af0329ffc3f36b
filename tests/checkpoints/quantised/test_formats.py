"""Quantised weights: the numbers that the formats' own libraries read, and those of definitions."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from starmerge_models.checkpoints.opening import open_checkpoint
from starmerge_models.checkpoints.quantised import bitsandbytes, dequantised, packing, settings_of
from starmerge_models.errors import StarmergeError, UsageError
from tests.checkpoints.quantised.stored import GPTQ, gptq_layer, read
from tests.oracles import quantised as oracle

GOLDEN = Path(__file__).parents[2] / "golden" / "quantised"
CASES = sorted(file.stem for file in GOLDEN.glob("*.safetensors"))


def golden(case: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Return what is stored, the weight that the library reads, and the model's settings."""
    file = GOLDEN / f"{case}.safetensors"
    tensors = load_file(file)
    expected = tensors.pop("expected")
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["quantization_config"])
    return tensors, expected, config


@pytest.mark.parametrize("panel", [1, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_what_the_formats_own_library_reads(
    case: str, panel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PANEL", panel)
    monkeypatch.setattr(bitsandbytes, "PANEL", panel)
    stored, expected, config = golden(case)
    found = read(stored | {"norm.weight": torch.ones(3)}, config, tmp_path)
    assert set(found.checkpoint) == {"layer.weight", "norm.weight"}
    info = found.checkpoint["layer.weight"]
    assert (info.dtype, info.shape) == (torch.float32, tuple(expected.shape))
    assert torch.equal(found.checkpoint.read("layer.weight"), expected)
    assert torch.equal(found.checkpoint.read("norm.weight"), torch.ones(3))
    assert found.config == {}


@pytest.mark.parametrize("case", CASES)
def test_what_a_weight_is_made_of_is_known(case: str, tmp_path: Path) -> None:
    stored, expected, config = golden(case)
    info = read(stored, config, tmp_path).checkpoint["layer.weight"]
    assert {own.name for own in info.stored} <= stored.keys()
    assert info.bytes_read <= sum(tensor.nbytes for tensor in stored.values())
    assert info.bytes_computed == 4 * expected.numel()
    assert pickle.loads(pickle.dumps(info)) == info


@settings(max_examples=30)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 3),
    groups=st.integers(1, 5),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 2**16),
)
def test_gptq_reads_any_codes_zeros_and_orders(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    inputs: int,
    groups: int,
    version: str,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    inputs, outputs = 32 * inputs, 32
    q = random.integers(0, 2**bits, (inputs, outputs))
    z = random.integers(0, 2**bits, (groups, outputs))
    s = random.uniform(0.5, 2, (groups, outputs)).astype(np.float16)
    order = random.integers(0, groups, inputs)
    stored_z = (z - (version == "gptq")) % 2**bits
    stored = {
        "layer.qweight": torch.from_numpy(oracle.packed(q, bits)),
        "layer.qzeros": torch.from_numpy(oracle.packed(stored_z.T, bits).T.copy()),
        "layer.scales": torch.from_numpy(s),
        "layer.g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    settings = GPTQ | {"bits": bits, "checkpoint_format": version}
    found = read(stored, settings, tmp_path_factory.mktemp("gptq"))
    W = found.checkpoint.read("layer.weight").double().numpy()
    # Codes of 8 bits times scales of 11: exact in the 24 bits of float32.
    assert np.array_equal(W, oracle.grouped(q, z, s.astype(float), order))


@settings(max_examples=20)
@given(groups=st.integers(1, 4), size=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_awq_reads_any_codes_and_zeros(
    tmp_path_factory: pytest.TempPathFactory, groups: int, size: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    inputs, outputs = groups * size, 16
    q = random.integers(0, 16, (inputs, outputs))
    z = random.integers(0, 16, (groups, outputs))
    s = random.uniform(0.5, 2, (groups, outputs)).astype(np.float16)
    stored = {
        "layer.qweight": torch.from_numpy(oracle.packed_awq(q)),
        "layer.qzeros": torch.from_numpy(oracle.packed_awq(z)),
        "layer.scales": torch.from_numpy(s),
    }
    found = read(stored, {"quant_method": "awq", "bits": 4}, tmp_path_factory.mktemp("awq"))
    W = found.checkpoint.read("layer.weight").double().numpy()
    expected = oracle.grouped(q, z, s.astype(float), np.arange(inputs) // size)
    assert np.array_equal(W, expected)


@settings(max_examples=40)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 35),
    groups=st.integers(1, 4),
    size=st.integers(1, 20),
    has_zero=st.booleans(),
    has_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_packed_codes_are_read_with_any_zeros_and_orders(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    rows: int,
    groups: int,
    size: int,
    has_zero: bool,
    has_order: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    columns, low = groups * size, -(2 ** (bits - 1))
    q = random.integers(low, -low, (columns, rows))
    z = random.integers(low, -low, (groups, rows)) * has_zero
    s = random.uniform(0.5, 2, (groups, rows)).astype(np.float16)
    order = random.integers(0, groups, columns) if has_order else np.arange(columns) // size
    stored = {
        "a.weight_packed": torch.from_numpy(oracle.packed(q - low, bits).T.copy()),
        "a.weight_shape": torch.tensor([rows, columns]),
        "a.weight_scale": torch.from_numpy(s.T.copy()),
    }
    if has_zero:
        stored["a.weight_zero_point"] = torch.from_numpy(oracle.packed(z.T - low, bits))
    if has_order:
        stored["a.weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    scheme = {"weights": {"num_bits": bits, "strategy": "group", "group_size": size}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }
    found = read(stored, settings, tmp_path_factory.mktemp("packed"))
    W = found.checkpoint.read("a.weight").double().numpy()
    assert np.array_equal(W, oracle.grouped(q, z, s.astype(float), order))


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    experts=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    seed=st.integers(0, 2**16),
)
def test_fp8_reads_scales_of_any_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    block: tuple[int, int],
    experts: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    counts = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    lead = () if experts is None else (experts,)
    q = torch.randn(*lead, *shape).to(dtype)
    s = (torch.rand(*lead, *counts) + 0.5).bfloat16()
    # Of experts, which transformers holds as parameters, the names have no "weight".
    stored = {"experts.up_proj": q, "experts.up_proj_scale_inv": s}
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    found = read(stored, settings, tmp_path_factory.mktemp("fp8"))
    names = [f"experts.up_proj[{e}]" for e in range(experts or 0)] or ["experts.up_proj"]
    assert list(found.checkpoint) == names
    pairs = zip(names, q.view(-1, *shape), s.view(-1, *counts), strict=True)
    for name, codes, scales in pairs:
        own = found.checkpoint.read(name).double()
        expected = oracle.of_blocks(codes.double().numpy(), scales.double().numpy(), *block)
        assert np.array_equal(own.numpy(), expected)  # 4 bits times 8


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 1)])
def test_fp8_reads_a_scale_a_row_or_a_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    q = torch.randn(6, 5).to(torch.float8_e4m3fn)
    s = torch.rand(shape) + 0.5
    stored = {"a.weight": q, "a.weight_scale_inv": s, "a.activation_scale": torch.ones(())}
    found = read(stored, {"quant_method": "fp8", "weight_block_size": None}, tmp_path)
    expected = q.float() * (s.reshape(-1, 1) if s.ndim else s)
    assert torch.equal(found.checkpoint.read("a.weight"), expected)
    assert set(found.checkpoint) == {"a.weight"}
    by_row = {"a.weight": q, "a.weight_scale": s, "a.input_scale_ub": torch.ones(1)}
    found = read(by_row, {"quant_method": "fbgemm_fp8"}, tmp_path)
    assert torch.equal(found.checkpoint.read("a.weight"), expected)


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    block=st.sampled_from([2, 8, 64]),
    outer=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**16),
)
def test_four_bits_read_any_code_book(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    block: int,
    outer: int | None,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    q = random.integers(0, 16, size)
    both = np.append(q, [0] * (size % 2)).reshape(-1, 2)
    code = random.normal(size=16).astype(np.float32)
    absmax = random.uniform(0.5, 2, -(-size // block)).astype(np.float32)
    state: dict[str, Any] = {"shape": shape, "blocksize": block, "dtype": "bfloat16"}
    parts = {"quant_map": code, "absmax": absmax}
    if outer is not None:
        p = random.integers(0, 256, len(absmax)).astype(np.uint8)
        code2 = random.normal(size=256).astype(np.float32)
        absmax2 = random.uniform(0.5, 2, -(-len(p) // outer)).astype(np.float32)
        absmax = oracle.code_book(p, code2, absmax2, outer) + 0.25
        state |= {"nested_blocksize": outer, "nested_offset": 0.25, "nested_dtype": "float32"}
        parts |= {"absmax": p, "nested_quant_map": code2, "nested_absmax": absmax2}
    stored = {f"a.weight.{key}": torch.from_numpy(part) for key, part in parts.items()}
    stored["a.weight"] = torch.from_numpy((16 * both[:, 0] + both[:, 1]).astype(np.uint8))[:, None]
    stored["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    found = read(stored, {"load_in_4bit": True}, tmp_path_factory.mktemp("bnb"))
    W = found.checkpoint.read("a.weight").double().numpy()
    expected = oracle.code_book(q, code, absmax, block).reshape(shape)
    # Three roundings of float32: of the inner product, its sum with the offset, the outer product.
    # The sum may cancel, so that its error is relative to what was added.
    size = np.abs(code).max() * (np.abs(absmax).max() + 1)
    assert np.abs(W - expected).max() <= 3 * 2**-24 * max(1, size) * 4


def test_a_config_of_the_text_model_within_another_counts(tmp_path: Path) -> None:
    stored, expected, settings = golden("gptq_4")
    read(stored, settings, tmp_path)
    config = {"text_config": {"quantization_config": settings, "vocab_size": 3}}
    assert settings_of(config) == settings
    assert settings_of({"text_config": None}) is None
    found = dequantised(open_checkpoint(tmp_path), config, "the model")
    assert found.config == {"text_config": {"vocab_size": 3}}
    assert found.format == "GPTQ, 4 bits"
    assert torch.equal(found.checkpoint.read("layer.weight"), expected)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gptq_4", {"layer.scales": None}, r"layer\.weight .*layer\.scales.* is missing"),
        ("gptq_4", {"layer.qzeros": None}, r"layer\.qzeros.* is missing"),
        ("gptq_4", {"layer.qweight": None}, r"layer\.\w+ .*belongs to no quantised weight"),
        ("gptq_4", {"layer.qzeros": torch.zeros(2, 3).int()}, r"\[2, 3\] in place of \[2, 4\]"),
        ("gptq_4", {"layer.scales": torch.zeros(2, 31)}, r"scales have the shape \[2, 31\]"),
        ("gptq_4", {"layer.scales": torch.zeros(2, 32).int()}, "stored in torch.int32"),
        ("gptq_4", {"layer.g_idx": torch.zeros(63).int()}, "hold no 63 × 32 codes"),
        ("gptq_4", {"layer.g_idx": torch.zeros(0).int()}, "hold no 0 × 32 codes"),
        ("gptq_4", {"layer.qweight": torch.zeros(8).int()}, r"qweight has the shape \[8\]"),
        ("gptq_4", {"layer.weight": torch.zeros(2)}, "stored twice"),
        ("awq", {"layer.scales": torch.zeros(3, 32)}, "do not fit 64 × 32"),
        ("awq", {"layer.qzeros": None}, "is missing"),
        ("bnb_nf4", {"layer.weight": None}, "belongs to it, is missing|belongs to no"),
        ("bnb_nf4", {"layer.weight": torch.zeros(7, 1).byte()}, "7 bytes do not hold 960 codes"),
        ("bnb_nf4", {"layer.weight.absmax": torch.zeros(14)}, r"\[14\] in place of \[15\]"),
        ("bnb_nf4", {"layer.weight.quant_state.bitsandbytes__nf4": None}, "no quantised weight"),
        (
            "bnb_nf4",
            {"layer.weight.quant_state.bitsandbytes__nf4": torch.tensor([123, 34]).byte()},
            "state .* is broken",
        ),
        (
            "bnb_nf4",
            {
                "layer.weight.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(b'{"shape": [2, -3], "blocksize": 64}')
                ).byte()
            },
            "its numbers are",
        ),
        ("bnb_nf4_double", {"layer.weight.nested_absmax": torch.zeros(1)}, "in place of"),
        ("bnb_int8", {"layer.SCB": None}, "belongs to no quantised weight"),
        ("bnb_int8", {"layer.SCB": torch.zeros(7)}, "in place of"),
        ("bnb_int8", {"layer.weight_format": torch.tensor(2).byte()}, "not stored row after row"),
        (
            "ct_fp8_block",
            {"layer.weight_scale": torch.ones(3, 2)},
            "config names blocks of 16 × 32",
        ),
        ("ct_fp8_channel", {"layer.weight_scale": None}, "is missing"),
        ("ct_int8", {"layer.weight_scale": torch.ones(7, 5)}, "config names no blocks"),
        ("ct_packed_4", {"layer.weight_shape": None}, "is missing"),
        ("ct_packed_4", {"layer.weight_shape": torch.tensor([40, 7])}, "do not hold 40 × 7"),
        ("ct_packed_4", {"layer.weight_scale": torch.ones(40, 7)}, "7 groups do not divide 96"),
        ("ct_packed_4", {"layer.weight_packed": None}, "belongs to no quantised weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(
    case: str, changes: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    stored, _, config = golden(case)
    changed = {key: part for key, part in (stored | changes).items() if part is not None}
    with pytest.raises(StarmergeError, match=words):
        read(changed, config, tmp_path)


STRANGE = [None, 0, -1, "x", [], {}, [1, 2], 2**70, 1.5, True, {"a": None}, {"a": {"format": []}}]


@settings(max_examples=300)
@given(case=st.sampled_from(CASES), data=st.data())
def test_nothing_but_a_clear_error_comes_of_a_spoilt_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, case: str, data: st.DataObject
) -> None:
    stored, _, config = golden(case)
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(st.sampled_from(STRANGE))
    else:
        name = data.draw(st.sampled_from(sorted(stored)))
        part = stored[name]
        entries = part.contiguous().view(-1).view(torch.uint8)
        spoilt = data.draw(st.sampled_from(["dtype", "shape", "order", "bytes"]))
        if spoilt == "dtype":
            dtypes = [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
            part = part.to(data.draw(st.sampled_from(dtypes)))
        elif spoilt == "shape":
            shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
            part = torch.zeros(shape).to(part.dtype)
        elif spoilt == "order" and part.ndim > 1:
            part = part.T.contiguous()
        else:
            seed = data.draw(st.integers(0, 2**16))
            order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
            part = entries[order].view(part.dtype).view(part.shape)
        stored[name] = part
    try:
        found = read(stored, config, tmp_path_factory.mktemp("spoilt"))
        for name, info in found.checkpoint.items():
            weight = found.checkpoint.read(name)
            assert (weight.dtype, weight.shape) == (info.dtype, info.shape)
    except StarmergeError as error:
        assert "the model" in str(error) or "layer.weight" in str(error)


def test_an_input_of_a_group_that_is_not_there_is_refused_when_it_is_read(tmp_path: Path) -> None:
    stored, _, config = golden("gptq_4")
    for wrong in (-1, 2):
        stored["layer.g_idx"][5] = wrong
        found = read(stored, config, tmp_path)
        with pytest.raises(StarmergeError, match=r"layer\.weight: .*g_idx"):
            found.checkpoint.read("layer.weight")


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gptq_4", {"quant_method": "hqq"}, r"\(hqq\), which is not read: awq, .* are"),
        ("gptq_4", {"quant_method": "mxfp4"}, r"Mxfp4Config\(dequantize=True\)"),
        ("gptq_4", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq_4", {"bits": 5}, "GPTQ of 5 bits"),
        ("awq", {"version": "gemv"}, "AWQ's version gemv"),
        ("awq", {"bits": 3}, "AWQ of 3 bits"),
        ("ct_packed_4", {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        ("ct_packed_4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
        ("ct_packed_4", {"transform_config": {"config_groups": {"u": {}}}}, "are rotated"),
    ],
)
def test_a_format_that_is_not_read_is_refused(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stored, _, config = golden(case)
    with pytest.raises(UsageError, match=words):
        read(stored, config | changes, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": "4"}, "bits of quantization_config is '4', and must be of the type int"),
        ({"bits": True}, "bits of quantization_config is True"),
        ({"bits": None}, "quantization_config of its config has no 'bits'"),
        ({"group_size": [3]}, "group_size"),
    ],
)
def test_a_setting_of_another_type_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stored, _, config = golden("gptq_4")
    with pytest.raises(StarmergeError, match=words):
        read(stored, config | changes, tmp_path)


def test_a_config_that_promises_quantised_weights_where_all_are_plain_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(StarmergeError, match="none of its tensors is"):
        read({"a.weight": torch.ones(2, 2)}, GPTQ, tmp_path)


def test_a_model_whose_plain_layers_are_stored_the_other_way_round_is_refused(
    tmp_path: Path,
) -> None:
    stored, _, settings = golden("gptq_4")
    read(stored, settings, tmp_path)
    config = {"quantization_config": settings, "model_type": "gpt2", "_name_or_path": "gpt2"}
    with pytest.raises(UsageError, match=r"a quantised gpt2, .*the unquantised model; its config"):
        dequantised(open_checkpoint(tmp_path), config, "the model")


def test_without_an_order_groups_are_one_after_the_other(tmp_path: Path) -> None:
    W = np.random.default_rng(0).normal(size=(32, 48))
    stored, expected = gptq_layer("layer", W, group=16)
    del stored["layer.g_idx"]
    found = read(stored, GPTQ, tmp_path)
    assert np.array_equal(found.checkpoint.read("layer.weight").double().numpy(), expected)
    with pytest.raises(StarmergeError, match="do not fit groups of 32 inputs"):
        read(stored, GPTQ | {"group_size": 32}, tmp_path)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 6), (3, 6, 1)])
def test_joined_experts_have_scales_of_their_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    q = torch.randn(3, 6, 5).to(torch.float8_e4m3fn)
    s = torch.rand(shape) + 0.5
    stored = {"experts.up_proj": q, "experts.up_proj_scale_inv": s}
    found = read(stored, {"quant_method": "fp8", "weight_block_size": None}, tmp_path)
    assert list(found.checkpoint) == [f"experts.up_proj[{expert}]" for expert in range(3)]
    for expert in range(3):
        own = s[expert].reshape(-1, 1) if s[expert].numel() > 1 else s[expert].reshape(())
        expected = q[expert].float() * own
        assert torch.equal(found.checkpoint.read(f"experts.up_proj[{expert}]"), expected)
