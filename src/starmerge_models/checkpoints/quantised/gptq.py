"""GPTQ's weights (arXiv 2210.17323), as AutoGPTQ and GPTQModel store them.

Sources: github.com/AutoGPTQ/AutoGPTQ (``nn_modules/qlinear``), github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.checkpoints.quantised.entries import SCALES, Entries
from starmerge_models.checkpoints.quantised.packing import group_numbers, panels, unpack
from starmerge_models.checkpoints.tensors import Checkpoint

_BITS = (2, 3, 4, 8)

_WORDS = (torch.int32,)


@dataclass(frozen=True)
class Gptq:
    """W_oi = s_go (q_io − z_go), with a scale s and a zero point z for each group g of inputs.

    Args:
        name: Name of the weight, for error messages.
        shape: Shape of W, (outputs, inputs).
        bits: Number of bits of q and z.
        group: Number of consecutive inputs in a group; None if the groups are stored.
        offset: Number that is added to the stored z: 1 in the first version of the format.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int | None
    offset: int

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W of q (inputs × bits / 32, outputs), z (groups, outputs × bits / 32), s and g."""
        words, zeros, scales, *order = parts
        outputs, inputs = self.shape
        z = unpack(zeros.T, self.bits, outputs).T
        z = ((z + self.offset) & ((1 << self.bits) - 1)).float()
        s = scales.float()
        if self.group is None:
            g = group_numbers(order[0], len(s), self.name)
        else:
            g = torch.arange(inputs) // self.group
        W = torch.empty(self.shape, dtype=torch.float32)
        # 32 numbers fill whole words, whatever their bits are.
        for rows in panels(inputs, outputs, 32):
            own = slice(rows.start * self.bits // 32, rows.stop * self.bits // 32)
            panel = unpack(words[own], self.bits, rows.stop - rows.start).float()
            panel.sub_(z[g[rows]]).mul_(s[g[rows]])
            W[:, rows] = panel.T
        return W


def gptq(entries: Entries) -> tuple[Checkpoint, str]:
    """Read GPTQ weights of 2, 3, 4 or 8 bits, of both versions of the format."""
    version = entries.settings.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        entries.refuse(f"GPTQ's checkpoint_format {version!r:.100}; gptq and gptq_v2 are read")
    offset = 1 if version == "gptq" else 0
    configured = entries.setting("bits", int)
    if configured not in _BITS:
        entries.refuse(f"GPTQ of {configured} bits; {', '.join(map(str, _BITS))} are read")
    size = entries.setting("group_size", int, -1)
    found = set()
    for prefix in entries.named(".qweight"):
        name = f"{prefix}.weight"
        words = entries.take(f"{prefix}.qweight", _WORDS, of=name)
        if len(words.shape) != 2:
            entries.fail(name, f"qweight has the shape {list(words.shape)}")
        order = entries.find(f"{prefix}.g_idx")
        inputs = words.shape[0] * 32 // configured if order is None else order.size
        bits = words.shape[0] * 32 // inputs if inputs else 0  # some have other bits than the model
        outputs = words.shape[1]
        if bits not in _BITS or words.shape[0] * 32 != inputs * bits or outputs * bits % 32:
            entries.fail(name, f"{list(words.shape)} words hold no {inputs} × {outputs} codes")
        scales = entries.take(f"{prefix}.scales", SCALES, of=name)
        groups = scales.shape[0] if len(scales.shape) == 2 else 0
        if not groups or scales.shape[1] != outputs:
            entries.fail(name, f"its scales have the shape {list(scales.shape)}")
        zeros = (groups, outputs * bits // 32)
        parts = [words, entries.take(f"{prefix}.qzeros", _WORDS, zeros, of=name), scales]
        group = inputs if size < 1 else size
        if order is not None:
            parts.append(entries.take(order.name, (torch.int32, torch.int64), (inputs,), of=name))
        elif -(-inputs // group) != groups:
            entries.fail(name, f"{groups} scales a column do not fit groups of {group} inputs")
        way = Gptq(name, (outputs, inputs), bits, group if order is None else None, offset)
        entries.make(words.name, name, (outputs, inputs), parts, way)
        found.add(bits)
    every = " and ".join(map(str, sorted(found)))
    return entries.result(".qweight", ".qzeros", ".scales", ".g_idx"), f"GPTQ, {every} bits"
