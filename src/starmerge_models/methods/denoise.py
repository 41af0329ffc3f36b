"""Denoising: drop the singular values below the rounding noise of stored fine-tunes."""

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
    floor_of,
    memoised,
    rounding_noise,
    svd,
    with_exact_fallback,
)
from starmerge_models.spectral.gram import svd_dense_bytes
from starmerge_models.spectral.noise import noise_bytes


@method("denoise")
class Denoise(Transform):
    """Drop the singular values that are explained by the rounding of a stored fine-tune.

    A fine-tune stored in bfloat16 or float16 has rounded weights, which add full-rank noise to its
    δ. Methods that raise small singular values, such as ``iso_c`` and ``tsv_m``, raise the noise
    with them. This step drops every singular triplet below the noise floor and leaves the others
    unchanged. Few remaining triplets are returned as factors, so that a spectral merge after this
    step works in their Core Space. Adapters, whose factors have no such noise, and deltas of which
    the floor explains less than half are not changed. ``star`` contains this step.

    Source: the edge of a random matrix (arXiv 1408.6185) with the hard threshold of arXiv
    1305.5870, for variances predicted from the base's weights:
    :mod:`starmerge_models.spectral.noise`. Cost: an SVD of each dense delta.
    When to use: full fine-tunes whose update has a low rank, before a spectral merge, as in
    ``denoise+tsv_m``.
    """

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        if not tensor.has_dense or will_average(tensor, embeddings="average"):
            return 0
        m, n = tensor.matrix
        # The kept vectors, of at most as many entries as the matrix, or the matrix itself.
        kept = 8 * tensor.size + 4 * tensor.size
        return rounding_bytes(tensor) + svd_dense_bytes(m, n, tensor.width) + kept

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        if delta.rank is not None or will_average(tensor, embeddings="average"):
            return delta
        return DeltaShape(None, max(delta.nbytes, 8 * tensor.size))

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Drop the noise of one delta; see :meth:`Transform.apply`."""
        if isinstance(delta, LowRank) or is_averaged([delta], tensor, embeddings="average"):
            return delta, None
        rounding = rounding_of(delta, tensor)
        return (delta, None) if rounding is None else above_floor(delta, rounding)


def above_floor(delta: Delta, rounding: Rounding) -> tuple[Delta, Truncation]:
    """Return a dense delta without the triplets below its noise floor, and a record of the cut.

    Args:
        delta: The delta.
        rounding: The rounding noise in the delta.
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

    return with_exact_fallback(svd(delta), cut)


def rounding_of(delta: Delta, tensor: TensorContext) -> Rounding | None:
    """Return the rounding noise in a delta that came from a stored fine-tune.

    Args:
        delta: The delta.
        tensor: The tensor; the values of its base determine the step of the rounding.

    Returns:
        None for deltas without such noise: adapters, computed deltas, and zeros.
    """
    if isinstance(delta, LowRank) or tensor.base is None:
        return None
    return _rounding(delta)


def rounding_bytes(tensor: TensorShape) -> int:
    """Return the peak bytes of estimating the rounding noise of a stored fine-tune."""
    return noise_bytes(*tensor.matrix) + tensor.difference_nbytes


@memoised
def _rounding(delta: Dense) -> Rounding | None:
    if not isinstance(delta, Stored) or delta.stored is None or delta.is_zero():
        return None
    return rounding_noise(delta.base.reshape(delta.shape), delta.matrix, delta.stored)
