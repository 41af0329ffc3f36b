"""The noise floor of stored fine-tunes, cut off."""

from __future__ import annotations

from typing import Any

from starmerge.deltas import Delta, Dense, LowRank
from starmerge.methods.method import TensorContext, Transform, method
from starmerge.methods.spectral_merge import is_averaged
from starmerge.spectral import SVD, Floor, Truncation, noise_floor, rounding_noise, svd


@method("denoise")
class Denoise(Transform):
    """Drop the singular values that the rounding of a stored fine-tune explains.

    A fine-tune stored in bfloat16 or float16 has rounded weights, and its δ a floor of noise of
    full rank. Methods that raise small singular values, such as ``iso_c`` and ``tsv_m``, raise the
    noise with them. Here every triplet below the floor goes, and the others stay as they are;
    adapters, whose factors have no such noise, and deltas of which the floor explains less than
    half stay whole. ``star`` does the same by itself.

    Source: the edge of a random matrix (arXiv 1408.6185) with the hard threshold of arXiv
    1305.5870, for variances predicted from the base's weights: :mod:`starmerge.spectral.noise`.
    Cost: an SVD of each dense delta.
    When to use: full fine-tunes of low-rank updates, before a spectral merge: ``denoise+tsv_m``.
    """

    decomposes = True

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Cut off the floor of one delta; see :meth:`Transform.apply`."""
        if isinstance(delta, LowRank) or is_averaged([delta], tensor, embeddings="average"):
            return delta, None
        decomposed = svd(delta)
        above, floor = above_floor(decomposed, delta, tensor)
        if floor is None:
            return delta, None
        before, after = float(decomposed.S.sum()), float(above.S.sum())
        is_whole = len(above.S) == len(decomposed.S)
        kept = delta if is_whole else Dense(above.compose(above.S).to_dense())
        return kept, Truncation(len(above.S), before, after, 1.0, floor)


def above_floor(decomposed: SVD, delta: Delta, tensor: TensorContext) -> tuple[SVD, Floor | None]:
    """Return the triplets above the noise floor of a delta that came from a stored fine-tune.

    Args:
        decomposed: The delta's SVD.
        delta: The delta.
        tensor: The tensor, whose base tells how the weights were rounded.

    Returns:
        All triplets if no floor applies; and the floor, None for deltas that have none.
    """
    if isinstance(delta, LowRank) or delta.stored is None or tensor.base is None:
        return decomposed, None
    if len(decomposed.S) == 0:
        return decomposed, None
    base = tensor.base.reshape(delta.shape)
    floor = noise_floor(decomposed.S, rounding_noise(base, delta.matrix, delta.stored))
    return (decomposed.first(floor.above) if floor.applies else decomposed), floor
