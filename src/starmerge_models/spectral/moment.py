"""The second moment of a module's inputs, stored as its square root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Side = Literal["columns", "rows"]
"""The side of the stored matrix on which the inputs are: the columns of a weight (out, in), as in
linear layers; the rows of a weight (in, out), as in GPT-2."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The uncentred second moment Σ = E[x xᵀ] of the inputs x of one linear module.

    It is stored as a root, because a float32 root gives the small eigenvalues of Σ with twice as
    many digits as Σ in float32, and because the root of a few inputs is small.
    """

    root: Tensor
    """R (k, n), float32: Σ = RᵀR, k ≤ n; k is the number of inputs if there are fewer than n."""
    tokens: int
    """Number of inputs in the mean."""

    @property
    def size(self) -> int:
        """n, the length of an input."""
        return self.root.shape[1]
