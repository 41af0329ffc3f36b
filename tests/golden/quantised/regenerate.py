"""Quantise small matrices by the formats' own libraries, and store what these read back.

The tests only read what this wrote; nothing runs it by itself. Make a scratch environment for it,
never the project's own, and run it from the root of the checkout:

    python3.11 -m venv /tmp/quantised
    /tmp/quantised/bin/pip install torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 \
        compressed-tensors==0.20.0
    /tmp/quantised/bin/pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9
    /tmp/quantised/bin/python -m tests.golden.quantised.regenerate

Each `NAME.safetensors` is a checkpoint of one quantised layer, `layer`, as the library would save
it, with `expected`, the weight that the library computes of it, (outputs, inputs). Its metadata
have the `quantization_config` of the model, and the version. Of AutoGPTQ and AutoAWQ, which
import much that needs a GPU, the files with the arithmetic are loaded alone.
"""

from __future__ import annotations

import json
from importlib.metadata import distribution, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.naive_quantized.base import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent


def store(
    name: str, library: str, config: dict[str, Any], tensors: dict[str, Tensor], expected: Tensor
) -> None:
    """Write one case."""
    save_file(
        {f"layer.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        | {"expected": expected.contiguous()},
        HERE / f"{name}.safetensors",
        metadata={
            "quantization_config": json.dumps(config),
            "made by": f"{library} {version(library)}",
        },
    )


def four_bits(name: str, shape: tuple[int, int], kind: str, **options: Any) -> None:
    """Quantise a matrix to NF4 or FP4."""
    codes, state = bnb.quantize_4bit(torch.randn(shape), quant_type=kind, **options)
    state.dtype = torch.float32
    expected = bnb.dequantize_4bit(codes, state)
    parts = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    store(name, "bitsandbytes", config, {"weight": codes, **parts}, expected)


def eight_bits() -> None:
    """Quantise a matrix to the int8 of LLM.int8."""
    codes, absmax, _ = bnb.int8_vectorwise_quant(torch.randn(24, 40))
    expected = bnb.int8_vectorwise_dequant(codes, absmax)
    parts = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    store("bnb_int8", "bitsandbytes", config, parts, expected)


def alone(package: str, file: str) -> ModuleType:
    """Load one file of a package."""
    path = Path(str(distribution(package).locate_file(file)))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gptq(name: str, bits: int, *, group: int, act_order: bool = False) -> None:
    """Pack random codes as AutoGPTQ does, and read them by a product with the identity."""
    inputs, outputs = 64, 32
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    groups = inputs // group
    scales = torch.rand(outputs, groups) + 0.5
    zeros = torch.randint(1, 2**bits, (outputs, groups)).float()
    order = torch.arange(inputs) // group
    if act_order:
        order = order[torch.randperm(inputs)]
    q = torch.randint(0, 2**bits, (outputs, inputs))
    linear.weight.data = (q - zeros[:, order]) * scales.half().float()[:, order]
    module = alone("auto-gptq", "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    layer = module.QuantLinear(bits, group, inputs, outputs, False, weight_dtype=torch.float32)
    layer.pack(linear, scales.half().float(), zeros.clone(), order.int())
    expected = layer(torch.eye(inputs)).T
    parts = {key: getattr(layer, key) for key in ("qweight", "qzeros", "g_idx")}
    parts["scales"] = layer.scales.half()
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    store(name, "auto-gptq", config, parts, expected)


def awq() -> None:
    """Pack random codes in AWQ's order, and read them by AutoAWQ."""
    inputs, outputs, group = 64, 32, 16
    packing = alone("autoawq", "awq/utils/packing_utils.py")

    def packed(numbers: Tensor) -> Tensor:
        words = torch.zeros(numbers.shape[0], outputs // 8, dtype=torch.int32)
        for column in range(outputs // 8):
            for i, place in enumerate(packing.AWQ_ORDER):
                words[:, column] |= numbers[:, 8 * column + place].int() << (4 * i)
        return words

    parts = {
        "qweight": packed(torch.randint(0, 16, (inputs, outputs))),
        "qzeros": packed(torch.randint(0, 16, (inputs // group, outputs))),
        "scales": (torch.rand(inputs // group, outputs) + 0.5).half(),
    }
    expected = packing.dequantize_gemm(
        parts["qweight"], parts["qzeros"], parts["scales"].float(), 4, group
    ).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    store("awq", "autoawq", config, parts, expected)


def compressed(
    name: str,
    kind: Any,
    format_: str,
    scales: tuple[int, int],
    *,
    has_zero: bool = False,
    **options: Any,
) -> None:
    """Compress a matrix by compressed-tensors."""
    arguments = QuantizationArgs(symmetric=not has_zero, **options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": torch.randn(40, 96), "weight_scale": torch.rand(scales) / 50 + 0.01}
    if has_zero:
        state["weight_zero_point"] = torch.randint(-8, 8, scales, dtype=torch.int8)
    stored = kind.compress(state, scheme)
    expected = kind.decompress(stored, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
    }
    store(name, "compressed-tensors", config, stored, expected)


def main() -> None:
    """Make all cases."""
    torch.manual_seed(0)
    four_bits("bnb_nf4", (24, 40), "nf4")
    four_bits("bnb_fp4", (24, 40), "fp4", blocksize=128)
    four_bits("bnb_nf4_as_bfloat16", (24, 40), "nf4", quant_storage=torch.bfloat16)
    # Two blocks of blocks, and a block that is not full.
    four_bits("bnb_nf4_double", (36, 520), "nf4", compress_statistics=True)
    eight_bits()
    for bits in (2, 3, 4, 8):
        gptq(f"gptq_{bits}", bits, group=32)
    gptq("gptq_4_act_order", 4, group=16, act_order=True)
    awq()
    floats, integers, words = (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
        PackedQuantizationCompressor,
    )
    fp8 = {"num_bits": 8, "type": "float"}
    compressed("ct_fp8_channel", floats, "float-quantized", (40, 1), strategy="channel", **fp8)
    compressed("ct_fp8_tensor", floats, "float-quantized", (1, 1), strategy="tensor", **fp8)
    compressed(
        "ct_fp8_block",
        floats,
        "float-quantized",
        (3, 3),
        strategy="block",
        block_structure=[16, 32],
        **fp8,
    )
    compressed("ct_int8", integers, "int-quantized", (40, 1), num_bits=8, strategy="channel")
    for bits in (3, 4, 8):
        compressed(
            f"ct_packed_{bits}",
            words,
            "pack-quantized",
            (40, 3),
            num_bits=bits,
            strategy="group",
            group_size=32,
        )
    compressed(
        "ct_packed_4_zero",
        words,
        "pack-quantized",
        (40, 3),
        has_zero=True,
        num_bits=4,
        strategy="group",
        group_size=32,
    )


if __name__ == "__main__":
    main()
