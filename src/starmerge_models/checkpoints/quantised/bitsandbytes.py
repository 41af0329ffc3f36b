"""Weights of bitsandbytes: NF4 and FP4 (QLoRA, arXiv 2305.14314), and LLM.int8 (2208.07339).

Source: github.com/bitsandbytes-foundation/bitsandbytes (``functional.py``, ``nn/modules.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.checkpoints.quantised.entries import SCALES, Entries
from starmerge_models.checkpoints.quantised.packing import PANEL, panels
from starmerge_models.checkpoints.tensors import Checkpoint, read_tensor
from starmerge_models.parsing import parse_json

_STATE = ".quant_state.bitsandbytes__"

_PER_127 = 7.874015718698502e-3
"""1/127 as rounded by the library."""


@dataclass(frozen=True)
class FourBits:
    """W_k = code[q_k] · a_b, with the greatest magnitude a of each block b of entries.

    With double quantisation a_b = code2[p_b] · a2_c + offset, for blocks c of blocks.

    Args:
        shape: Shape of W.
        block: Entries of a block, in row-major order.
        outer: Number of a's in a block of double quantisation, and the offset; None without it.
    """

    shape: tuple[int, ...]
    block: int
    outer: tuple[int, float] | None

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W from the q (two per byte, the higher bits first), a or p, the codes, and a2."""
        stored, absmax, code, *nested = parts
        packed = stored.contiguous().view(torch.uint8).flatten()
        if self.outer is not None:
            outer, offset = self.outer
            code2, absmax2 = nested
            of = torch.arange(len(absmax)) // outer
            absmax = code2.float()[absmax.long()] * absmax2.float()[of] + offset
        absmax, code = absmax.float(), code.float()
        # The two entries of each byte.
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
        size = math.prod(self.shape)
        W = torch.empty(size + size % 2, dtype=torch.float32)
        step = self.block * max(1, PANEL // self.block)
        for start in range(0, size, step):
            stop = min(start + step, len(W))
            panel = W[start:stop]
            both = packed[start // 2 : stop // 2].int()
            torch.index_select(pairs, 0, both, out=panel.view(-1, 2))
            own = absmax[start // self.block : -(-stop // self.block)]
            whole = len(panel) // self.block * self.block
            panel[:whole].view(-1, self.block).mul_(own[: whole // self.block, None])
            panel[whole:].mul_(own[-1])
        return W[:size].view(self.shape)


@dataclass(frozen=True)
class EightBits:
    """W_oi = q_oi · a_o / 127, with the greatest magnitude a of each row."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W from q (m, n) and a (m,)."""
        codes, absmax = parts
        m, n = codes.shape
        W = torch.empty((m, n), dtype=torch.float32)
        for rows in panels(m, n, 1):
            W[rows] = codes[rows]
            W[rows] *= absmax[rows].float()[:, None]
            W[rows] *= _PER_127
        return W


def bitsandbytes(entries: Entries) -> tuple[Checkpoint, str]:
    """Read weights of 4 bits with their states, and of 8 bits with their rows' maxima."""
    kinds = set()
    for key in list(entries.checkpoint):
        name, found, kind = key.partition(_STATE)
        if found:
            kinds.add(_four_bits(entries, name, key, kind))
    for prefix in entries.named(".SCB"):
        name = f"{prefix}.weight"
        codes = entries.take(name, (torch.int8,), of=name)
        if len(codes.shape) != 2:
            entries.fail(name, f"it has the shape {list(codes.shape)}")
        absmax = entries.take(f"{prefix}.SCB", SCALES, (codes.shape[0],), of=name)
        layout = entries.find(f"{prefix}.weight_format")
        if layout is not None and read_tensor(layout, mapped=False).any():
            entries.fail(name, "it is not stored row after row")
        entries.make(name, name, codes.shape, (codes, absmax), EightBits())
        kinds.add("8 bits")
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    suffixes = (*(f".weight.{part}" for part in parts), ".SCB", ".weight_format")
    return entries.result(*suffixes), f"bitsandbytes, {', '.join(sorted(kinds))}"


def _four_bits(entries: Entries, name: str, key: str, kind: str) -> str:
    """Replace the codes of a weight by the computed weight; return the name of the format."""
    info = entries.take(key, (torch.uint8,), of=name)
    try:
        state = parse_json(bytes(read_tensor(info, mapped=False).tolist()))
        shape, block = tuple(state["shape"]), state["blocksize"]
        outer = None
        if "nested_blocksize" in state:
            outer = (state["nested_blocksize"], float(state["nested_offset"]))
        numbers = (*shape, block, *(outer or ())[:1])
        if not shape or not all(type(n) is int and 0 < n < 2**40 for n in numbers) or block % 2:
            raise ValueError(f"its numbers are {numbers}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        entries.fail(name, f"its state {key} is broken: {error}")
    size = math.prod(shape)
    stored = entries.take(name, (torch.uint8, *SCALES, torch.float64), of=name)
    if stored.nbytes < -(-size // 2) or stored.nbytes - size // 2 > 8:
        entries.fail(name, f"{stored.nbytes} bytes do not hold {size} codes")
    blocks = -(-size // block)
    code = entries.take(f"{name}.quant_map", SCALES, (16,), of=name)
    if outer is None:
        parts = [stored, entries.take(f"{name}.absmax", SCALES, (blocks,), of=name), code]
    else:
        absmax = entries.take(f"{name}.absmax", (torch.uint8,), (blocks,), of=name)
        code2 = entries.take(f"{name}.nested_quant_map", SCALES, (256,), of=name)
        counts = (-(-blocks // outer[0]),)
        absmax2 = entries.take(f"{name}.nested_absmax", SCALES, counts, of=name)
        parts = [stored, absmax, code, code2, absmax2]
    entries.make(name, name, shape, parts, FourBits(shape, block, outer))
    return f"{kind} of 4 bits{'' if outer is None else ', quantised doubly'}"
