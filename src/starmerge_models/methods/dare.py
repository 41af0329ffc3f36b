"""DARE: drop and rescale."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.kinds.entrywise import panel_bytes, panels
from starmerge_models.methods.kinds.masks import masked
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import TensorContext, Transform, method
from starmerge_models.spectral import Truncation


@method("dare")
class Dare(Transform):
    """Drop entries of each task vector at random, and scale up the rest.

    Each entry is dropped with probability p, and divided by 1 − p if it is kept, so that the
    expected task vector is unchanged. Any merge can follow: ``dare+ties``,
    ``dare+task_arithmetic``.

    The choice of dropped entries depends only on the seed, the model's name, the tensor's name and
    the entry's index. It is the same in a merge with other models, in another order, and on another
    machine.

    Source: arXiv 2311.03099; defining repository github.com/yule-BUAA/MergeLM.
    Cost: one random number per entry; the result is dense.
    When to use: full fine-tunes with large, redundant task vectors.
    """

    p: Annotated[float, Field(ge=0, lt=1, description="probability of dropping an entry")] = 0.5
    seed: Annotated[int, Field(ge=0, description="seed of the random choice of entries")] = 0

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return 4 * tensor.size + panel_bytes(tensor, 1, numbers=6)

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        return dense_shape(tensor)

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Drop and rescale one delta; see :meth:`Transform.apply`."""
        if self.p == 0:
            return delta, None
        draws = Draws(self.seed, tensor.tasks[task], tensor.name)
        left = torch.empty(delta.shape, dtype=torch.float32)
        for rows in panels(delta.shape):
            entries = delta.entries(rows)
            m = draws.kept(self.p, entries.numel()).view(entries.shape)
            left[rows] = masked(entries / (1 - self.p), m)
        return Dense(left), None


class Draws:
    """The stream of random numbers for a tensor's entries, in row-major order.

    The numbers are the 32-bit words of the counter-based generator Philox4x64, keyed by a digest of
    the arguments.

    Args:
        seed: The seed.
        task: The task's name.
        tensor: The tensor's name.
    """

    def __init__(self, seed: int, task: str, tensor: str) -> None:
        text = "\0".join((str(seed), task, tensor)).encode()
        key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
        self._generator = np.random.Philox(key=key)
        self._left = np.empty(0, dtype="<u4")

    def kept(self, p: float | Tensor, count: int) -> Tensor:
        """Return a mask of the kept ones among the next entries, (count,) bool.

        Args:
            p: Probability of dropping an entry; a number for all, or (count,) float64.
            count: Number of entries to draw for.
        """
        words = self._left
        if len(words) < count:
            drawn = self._generator.random_raw((count - len(words) + 1) // 2)
            drawn = drawn.astype("<u8", copy=False).view("<u4")
            words = np.concatenate([words, drawn]) if len(words) else drawn
        self._left = words[count:].copy()
        floors = np.minimum(np.rint(np.asarray(p, dtype=np.float64) * 2**32), 2**32 - 1)
        return torch.from_numpy(words[:count] >= floors.astype(np.uint32))


def kept(p: float | Tensor, seed: int, task: str, tensor: str, count: int) -> Tensor:
    """Return a mask of the kept ones of ``count`` entries, (count,) bool; see :meth:`Draws.kept`.

    Args:
        p: Probability of dropping an entry; a number for all, or (count,) float64.
        seed: The seed.
        task: The task's name.
        tensor: The tensor's name.
        count: Number of entries.
    """
    return Draws(seed, task, tensor).kept(p, count)
