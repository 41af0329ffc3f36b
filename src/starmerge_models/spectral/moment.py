"""The second moment of a module's inputs, by a root of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Side = Literal["columns", "rows"]
"""Which side of the stored matrix the input lies on: the columns of a weight that is stored as
(out, in), as those of linear layers are; the rows of one stored as (in, out), as GPT-2's are."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The uncentred second moment Σ = E[x xᵀ] of the inputs x of one linear module.

    Kept as a root, since a root in float32 knows the small eigenvalues of Σ to twice as many digits
    as Σ in float32 would; and since the root of a few inputs is small.
    """

    root: Tensor
    """R (k, n), float32: Σ = RᵀR, k ≤ n; k is the number of inputs where those are fewer than n."""
    tokens: int
    """How many inputs the mean was taken over."""

    @property
    def size(self) -> int:
        """n, the length of an input."""
        return self.root.shape[1]
