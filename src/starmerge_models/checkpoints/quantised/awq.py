"""AWQ's weights (arXiv 2306.00978), as AutoAWQ stores them in its version "gemm".

Source: github.com/casper-hansen/AutoAWQ (``awq/utils/packing_utils.py``,
``awq/modules/linear/gemm.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.checkpoints.quantised.entries import SCALES, Entries
from starmerge_models.checkpoints.quantised.packing import panels
from starmerge_models.checkpoints.tensors import Checkpoint

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Index of each of eight consecutive outputs among the word's groups of four bits, from the lowest:
a word contains outputs 0, 2, 4, 6, 1, 3, 5, 7."""

_WORDS = (torch.int32,)


@dataclass(frozen=True)
class Awq:
    """W_oi = s_go (q_io − z_go), with a scale s and a zero point z for each group g of inputs.

    Args:
        shape: Shape of W, (outputs, inputs).
        group: Number of inputs in a group.
    """

    shape: tuple[int, int]
    group: int

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return W of q (inputs, outputs / 8), z (groups, outputs / 8) and s (groups, outputs)."""
        words, zeros, scales = parts
        z, s = _unpack(zeros).float(), scales.float()
        W = torch.empty(self.shape, dtype=torch.float32)
        for rows in panels(self.shape[1], self.shape[0], 1):
            g = torch.arange(rows.start, rows.stop) // self.group
            panel = _unpack(words[rows]).float()
            W[:, rows] = panel.sub_(z[g]).mul_(s[g]).T
        return W


def _unpack(words: Tensor) -> Tensor:
    """Return the numbers of four bits of (n, m) words, (n, 8 m)."""
    shifts = 4 * torch.tensor(_PLACE, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def awq(entries: Entries) -> tuple[Checkpoint, str]:
    """Read AWQ weights of four bits."""
    settings = entries.settings
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        entries.refuse(f"AWQ's version {version}; gemm is read")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        entries.refuse(f"AWQ of {bits!r:.100} bits; 4 are read")
    for prefix in entries.named(".qweight"):
        name = f"{prefix}.weight"
        words = entries.take(f"{prefix}.qweight", _WORDS, of=name)
        scales = entries.take(f"{prefix}.scales", SCALES, of=name)
        if len(words.shape) != 2 or len(scales.shape) != 2 or not words.size or not scales.size:
            entries.fail(name, f"its shapes are {list(words.shape)} and {list(scales.shape)}")
        inputs, outputs = words.shape[0], 8 * words.shape[1]
        groups = scales.shape[0]
        if scales.shape[1] != outputs or inputs % groups:
            entries.fail(name, f"{list(scales.shape)} scales do not fit {inputs} × {outputs} codes")
        zeros = entries.take(f"{prefix}.qzeros", _WORDS, (groups, outputs // 8), of=name)
        way = Awq((outputs, inputs), inputs // groups)
        entries.make(words.name, name, (outputs, inputs), (words, zeros, scales), way)
    return entries.result(".qweight", ".qzeros", ".scales"), "AWQ, 4 bits"
