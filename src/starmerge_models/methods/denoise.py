"""The noise floor of stored fine-tunes, cut off."""

from __future__ import annotations

from typing import Any

from starmerge_models.deltas import Delta, Dense, LowRank, Stored
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import TensorContext, Transform, method
from starmerge_models.spectral import (
    Decomposition,
    Rounding,
    Truncation,
    certainly,
    floor_of,
    remembered,
    rounding_noise,
    svd,
)
from starmerge_models.spectral.gram import svd_dense_bytes
from starmerge_models.spectral.noise import noise_bytes


@method("denoise")
class Denoise(Transform):
    """Drop the singular values that the rounding of a stored fine-tune explains.

    A fine-tune stored in bfloat16 or float16 has rounded weights, and its δ a floor of noise of
    full rank. Methods that raise small singular values, such as ``iso_c`` and ``tsv_m``, raise the
    noise with them. Here every triplet below the floor goes, and the others stay as they are, as
    factors where they are few, so that a spectral merge after it works in their Core Space;
    adapters, whose factors have no such noise, and deltas of which the floor explains less than
    half stay whole. ``star`` does the same by itself.

    Source: the edge of a random matrix (arXiv 1408.6185) with the hard threshold of arXiv
    1305.5870, for variances predicted from the base's weights:
    :mod:`starmerge_models.spectral.noise`. Cost: an SVD of each dense delta.
    When to use: full fine-tunes of low-rank updates, before a spectral merge: ``denoise+tsv_m``.
    """

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed; see :meth:`Method.memory`."""
        if not tensor.has_dense or will_average(tensor, embeddings="average"):
            return 0
        m, n = tensor.matrix
        # The vectors that are kept, no more entries than the matrix has; or the matrix of them.
        kept = 8 * tensor.size + 4 * tensor.size
        return rounding_bytes(tensor) + svd_dense_bytes(m, n, tensor.width) + kept

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Tell what is made; see :meth:`Transform.result`."""
        if delta.rank is not None or will_average(tensor, embeddings="average"):
            return delta
        return DeltaShape(None, max(delta.nbytes, 8 * tensor.size))

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Cut off the floor of one delta; see :meth:`Transform.apply`."""
        if isinstance(delta, LowRank) or is_averaged([delta], tensor, embeddings="average"):
            return delta, None
        rounding = rounding_of(delta, tensor)
        return (delta, None) if rounding is None else above_floor(delta, rounding)


def above_floor(delta: Delta, rounding: Rounding) -> tuple[Delta, Truncation]:
    """Return what is left of a dense delta above its floor, and what was done.

    Args:
        delta: The delta.
        rounding: The noise in it.
    """

    def cut(decomposed: Decomposition) -> tuple[Delta, Truncation]:
        S, floor = decomposed.S, floor_of(decomposed, rounding)
        if not floor.applies or floor.above == len(S):
            return delta, Truncation(len(S), float(S.sum()), float(S.sum()), 1.0, floor)
        above = decomposed.first(floor.above)
        kept: Delta = above.compose(above.S)
        m, n = delta.shape
        if floor.above * (m + n) >= m * n:  # factors would have more entries than the matrix
            kept = Dense(kept.to_dense())
        after = float(above.S.sum())
        return kept, Truncation(floor.above, float(S.sum()), after, 1.0, floor)

    return certainly(svd(delta), cut)


def rounding_of(delta: Delta, tensor: TensorContext) -> Rounding | None:
    """Return the rounding noise in a delta that came from a stored fine-tune.

    Args:
        delta: The delta.
        tensor: The tensor, whose base tells how the weights were rounded.

    Returns:
        None for deltas that have none: adapters, what was computed, and zeros.
    """
    if isinstance(delta, LowRank) or tensor.base is None:
        return None
    return _rounding(delta)


def rounding_bytes(tensor: TensorShape) -> int:
    """Return the bytes that finding the rounding noise of a stored fine-tune takes."""
    return noise_bytes(*tensor.matrix) + tensor.looked_at


@remembered
def _rounding(delta: Dense) -> Rounding | None:
    if not isinstance(delta, Stored) or delta.stored is None or delta.is_zero():
        return None
    return rounding_noise(delta.base.reshape(delta.shape), delta.matrix, delta.stored)
