"""Weights stored as one code per entry and one scale per block: fp8 and compressed-tensors.

Sources: github.com/deepseek-ai/DeepSeek-V3 (``inference/kernel.py``), transformers
(``integrations/finegrained_fp8.py``) and github.com/vllm-project/compressed-tensors
(``compressors/``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starmerge_models.checkpoints.experts import companion_name
from starmerge_models.checkpoints.quantised.entries import SCALES, Entries
from starmerge_models.checkpoints.quantised.packing import group_numbers, of_blocks, panels, unpack
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo, read_tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_NOT_WEIGHTS = (".input_scale", ".output_scale", ".activation_scale", ".input_zero_point")
"""Suffixes of tensors for the inputs of a layer, which weights do not depend on."""


@dataclass(frozen=True)
class Scaled:
    """W = (q − z) · s, with a scale s, and perhaps a zero point z, for each block of entries.

    Args:
        block: Rows and columns of a block.
    """

    block: tuple[int, int]

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W (… , m, n) of q, s (… , ⌈m / rows⌉, ⌈n / columns⌉) and perhaps z."""
        codes, *blocks = parts
        m, n = codes.shape[-2:]
        W = torch.empty(codes.shape, dtype=torch.float32)
        matrices = W.view(-1, m, n)
        counts = -(-m // self.block[0]), -(-n // self.block[1])
        # One matrix for each expert, where there are some.
        scale, *zero = (
            x.float().reshape(-1, *counts).expand(len(matrices), -1, -1) for x in blocks
        )
        for e, own in enumerate(matrices):
            for rows in panels(m, n, self.block[0]):
                own[rows] = codes.view(-1, m, n)[e, rows]
                for z in zero:
                    own[rows] -= of_blocks(z[e], rows, n, self.block)
                own[rows] *= of_blocks(scale[e], rows, n, self.block)
        return W


@dataclass(frozen=True)
class Packed:
    """W = (q − z) · s, with codes q packed along the rows, and s and z for each group of a row.

    Args:
        name: Name of the weight, for error messages.
        bits: Number of bits of a code.
        shape: Shape of W.
        group: Number of consecutive entries of a row that share a scale.
        has_zero: Whether zero points are stored, packed along the columns; otherwise they are 0.
        has_order: Whether the group of each entry is stored, because groups are not consecutive.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    group: int
    has_zero: bool
    has_order: bool

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W (m, n) of q (m, ⌈n bits / 32⌉), s (m, groups), and perhaps z and the groups."""
        words, scale, *more = parts
        m, n = self.shape
        offset = 1 << (self.bits - 1)  # q and z are signed, and stored without a sign
        zero = torch.zeros((), dtype=torch.float32).expand(scale.shape)
        if self.has_zero:
            zero = unpack(more.pop(0), self.bits, m).float() - offset
        groups = group_numbers(more[0], scale.shape[1], self.name) if self.has_order else None
        W = torch.empty(self.shape, dtype=torch.float32)
        for rows in panels(m, n, 1):
            own = W[rows]
            own[:] = unpack(words[rows].T, self.bits, n).T
            own -= offset
            if groups is not None:
                own -= zero[rows][:, groups]
                own *= scale[rows].float()[:, groups]
            else:
                own -= of_blocks(zero[rows], slice(0, len(own)), n, (1, self.group))
                own *= of_blocks(scale[rows].float(), slice(0, len(own)), n, (1, self.group))
        return W


def fp8(entries: Entries) -> tuple[Checkpoint, str]:
    """Read fp8 weights with a scale per block, row or tensor, named ``…_scale_inv``.

    Such are the weights of DeepSeek and Qwen, with blocks of 128 × 128 entries, and those of
    transformers' ``FineGrainedFP8Config``.
    """
    block = _block(entries, entries.settings.get("weight_block_size"))
    for name, info in entries.checkpoint.items():
        if info.dtype in FP8:
            entries.find(name)
            _scaled(entries, info, companion_name(name, "_scale_inv"), block)
    entries.ignore(*_NOT_WEIGHTS)
    blocks = "" if block is None else f", a scale for {block[0]} × {block[1]} entries"
    return entries.result("_scale_inv"), f"fp8{blocks}"


def fbgemm_fp8(entries: Entries) -> tuple[Checkpoint, str]:
    """Read the fp8 weights of FBGEMM, with a scale per row, named ``…_scale``."""
    for name, info in entries.checkpoint.items():
        if info.dtype in FP8:
            entries.find(name)
            _scaled(entries, info, companion_name(name, "_scale"), None)
    entries.ignore(".input_scale_ub", *_NOT_WEIGHTS)
    return entries.result("_scale"), "fp8, a scale for each row"


def compressed_tensors(entries: Entries) -> tuple[Checkpoint, str]:
    """Read the formats of compressed-tensors for fp8, int8 and packed integers of 1 to 8 bits."""
    known = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized"}
    named = [entries.setting("format", str), *(group.get("format") for group in _groups(entries))]
    unknown = {str(name) for name in named if name is not None} - known - {"mixed-precision"}
    if unknown:
        entries.refuse(
            f"compressed-tensors' format {', '.join(sorted(unknown))}; "
            f"{', '.join(sorted(known))} are read"
        )
    if entries.setting("sparsity_config", dict, {}).get("format") not in (None, "dense"):
        entries.refuse("its weights are stored sparse")
    if entries.setting("transform_config", dict, {}).get("config_groups"):
        entries.refuse("its weights are rotated (transform_config)")
    schemes = [group.get("weights") or {} for group in _groups(entries)]
    blocks = {_block(entries, scheme.get("block_structure")) for scheme in schemes} - {None}
    if len(blocks) > 1:
        entries.refuse("it has blocks of several sizes")
    block = next(iter(blocks), None)
    kinds = set()
    for prefix in entries.named(".weight_packed"):
        kinds.add(_packed(entries, prefix, [s.get("num_bits") for s in schemes]))
    for name, info in entries.checkpoint.items():
        if info.dtype in (*FP8, torch.int8) and name.endswith(".weight"):
            entries.find(name)
            _scaled(entries, info, f"{name}_scale", block, zero=f"{name}_zero_point")
            kinds.add("fp8" if info.dtype in FP8 else "8 bits")
    entries.ignore(*_NOT_WEIGHTS, ".k_scale", ".v_scale", ".q_scale")
    suffixes = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
    return entries.result(*suffixes), f"compressed-tensors, {', '.join(sorted(kinds))}"


def _groups(entries: Entries) -> list[Mapping[str, Any]]:
    groups = entries.setting("config_groups", dict, {})
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights") or {}, dict):
            entries.refuse(f"config_groups: {name} is {group!r:.100}")
    return list(groups.values())


def _scaled(
    entries: Entries,
    codes: TensorInfo,
    scale: str,
    block: tuple[int, int] | None,
    zero: str | None = None,
) -> None:
    """Replace codes by the computed weight; the shape of the scale determines the blocks."""
    info = entries.take(scale, SCALES, of=codes.name)
    if len(codes.shape) < 2 or not codes.size:
        entries.fail(codes.name, f"it has the shape {list(codes.shape)}")
    *others, m, n = codes.shape
    if info.size == 1 or (others and info.shape in ((*others, 1, 1), (*others,))):
        size = (m, n)
    elif info.shape in ((*others, m, 1), (*others, m)):
        size = (1, n)
    elif block is not None and info.shape == (*others, -(-m // block[0]), -(-n // block[1])):
        size = block
    elif info.size and info.shape[:-1] == (*others, m) and not n % info.shape[-1]:
        size = (1, n // info.shape[-1])
    else:
        given = "no blocks" if block is None else f"blocks of {block[0]} × {block[1]}"
        entries.fail(
            codes.name,
            f"its scale {scale} has the shape {list(info.shape)}, it has {list(codes.shape)} "
            f"itself, and the config names {given}",
        )
    parts = [codes, info]
    if zero is not None and zero in entries.checkpoint:
        parts.append(entries.take(zero, (torch.int8, *SCALES, *FP8), info.shape, of=codes.name))
    entries.make(codes.name, codes.name, codes.shape, parts, Scaled(size))


def _block(entries: Entries, value: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block from the config."""
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(n) is int and n > 0 for n in value)
    ):
        entries.refuse(f"its blocks have the size {value!r:.100}")
    return value[0], value[1]


def _packed(entries: Entries, prefix: str, configured: list[Any]) -> str:
    """Replace packed codes by the computed weight; return the description of the format."""
    name = f"{prefix}.weight"
    words = entries.take(f"{name}_packed", (torch.int32,), of=name)
    stored = entries.take(f"{name}_shape", (torch.int64, torch.int32), (2,), of=name)
    m, n = read_tensor(stored, mapped=False).tolist()
    # A model may have several schemes: the number of words determines that of this weight.
    fitting = [b for b in range(1, 9) if words.shape == (m, -(-n * b // 32))]
    fitting = [b for b in fitting if b in configured] or fitting
    if m < 1 or n < 1 or len(fitting) != 1:
        entries.fail(name, f"{list(words.shape)} words do not hold {m} × {n} codes")
    (bits,) = fitting
    scale = entries.take(f"{name}_scale", SCALES, of=name)
    if len(scale.shape) != 2 or scale.shape[0] != m or not scale.shape[1]:
        entries.fail(name, f"its scale has the shape {list(scale.shape)}")
    groups = scale.shape[1]
    order = entries.find(f"{name}_g_idx")
    group = -(-n // groups)
    if order is None and n % groups:
        entries.fail(name, f"{groups} groups do not divide {n} entries")
    zero = None
    if f"{name}_zero_point" in entries.checkpoint:
        shape = (-(-m * bits // 32), groups)
        zero = entries.take(f"{name}_zero_point", (torch.int32,), shape, of=name)
    if order is not None:
        entries.take(order.name, (torch.int32, torch.int64), (n,), of=name)
    parts = [words, scale, *(one for one in (zero, order) if one is not None)]
    way = Packed(name, bits, (m, n), group, zero is not None, order is not None)
    entries.make(words.name, name, (m, n), parts, way)
    return f"{bits} bits"
