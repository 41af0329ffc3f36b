"""STAR: Spectral Truncation And Rescale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods.denoise import above_floor, rounding_bytes, rounding_of
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import TensorContext, Transform, method
from starmerge_models.spectral import Rounding, Truncation, svd, truncate_and_rescale
from starmerge_models.spectral.gram import svd_dense_bytes

Percent = Annotated[float, Field(gt=0, le=100)]


def _eta_kind(eta: object) -> str:
    """Return the form in which η is given; pydantic then validates and reports that form alone."""
    return "list" if isinstance(eta, list) else "patterns" if isinstance(eta, dict) else "number"


Eta = Annotated[
    Annotated[Percent, Tag("number")]
    | Annotated[list[Percent], Tag("list")]
    | Annotated[dict[str, Percent], Tag("patterns")],
    Discriminator(_eta_kind),
]


@method("star")
class Star(Transform):
    """Truncate each task's spectrum, restore its nuclear norm; then average.

    For each task: δ = Σ σ_k u_k v_kᵀ; keep the smallest r with σ_1 + … + σ_r ≥ η % of Σσ; rescale
    the kept σ by Σσ / Σ_{k≤r}σ. Dropping the small singular values removes much of the interference
    with other tasks and little of the task itself. Alone, ``star`` takes the mean over tasks as in
    the paper; ``star+ties`` and other chains merge the truncated task vectors in another way.

    A vector (the weight of a norm, a bias) has one singular value, so it stays unchanged. So do
    embeddings of full fine-tunes, unless ``embeddings`` is "merge": their rows are tokens, not
    directions, and their SVD is the largest of the model.

    The weights of a fine-tune stored in bfloat16 or float16 are rounded, and the rounding adds a
    noise floor to the spectrum, which would inflate the nuclear norm and the rank. Singular values
    below the floor are dropped first (:mod:`starmerge_models.spectral.noise`). Adapters have no
    such noise.

    With a metric, the method truncates the spectrum of the task vector in whitened inputs
    (:mod:`starmerge_models.spectral.metric`). Whitening would change the shape of the rounding
    noise, so singular values below the noise floor are dropped before whitening.

    Source: arXiv 2502.10339, its rank rule and its default η = 40; defining repository
    github.com/IBM/STAR. Differences: an all-zero delta stays zero instead of NaN, and adapters are
    decomposed exactly, not by a randomised SVD.
    Cost: O((m + n)r²) per tensor and task for adapters; one SVD per tensor and task for full
    fine-tunes.
    When to use: several models whose average loses too much of each; there is nothing to tune.
    """

    eta: Annotated[
        Eta,
        Field(
            description="share of the nuclear norm to keep, in percent: a number, a list with one "
            'for each model, or numbers by patterns of tensor names ({"*.mlp.*": 30, "*": 40}, '
            "the first that matches)"
        ),
    ] = 40.0
    rank: Annotated[
        int | None, Field(ge=1, description="keep this many singular values, instead of eta")
    ] = None
    rescale: Annotated[
        bool, Field(description="restore the nuclear norm; false is the paper's ablation")
    ] = True
    noise_floor: Annotated[
        Literal["auto", "off"],
        Field(
            description="whether singular values of full fine-tunes below the noise of the stored "
            "weights' rounding are dropped before eta is applied"
        ),
    ] = "auto"
    embeddings: Annotated[
        Literal["average", "merge"],
        Field(description="how embeddings of full fine-tunes are merged: averaged, or as matrices"),
    ] = "average"

    uses_metric = True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Check a list or patterns of η against models and tensors; see :meth:`Method.check`."""
        if isinstance(self.eta, list) and len(self.eta) != len(tasks):
            raise UsageError(
                f"star: eta has {len(self.eta)} numbers for {len(tasks)} models. Give one for each."
            )
        if isinstance(self.eta, dict):
            for pattern in self.eta:
                if not any(fnmatchcase(tensor, pattern) for tensor in tensors):
                    raise UsageError(
                        f"star: no merged tensor matches the pattern {pattern!r} of eta."
                    )
            for tensor in tensors:
                if not any(fnmatchcase(tensor, pattern) for pattern in self.eta):
                    raise UsageError(
                        f"star: no pattern of eta matches the tensor {tensor}. Add '*' as the last."
                    )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        m, n = tensor.matrix
        # For factors: float64 copies of both, the kept vectors, and the vectors times the values.
        low = 4 * tensor.factors(max(delta.rank or 0 for delta in tensor.deltas))
        if not tensor.has_dense or will_average(tensor, embeddings=self.embeddings):
            return low
        # Whitening and denoising convert a matrix to float64.
        width = 8 if tensor.whitening else tensor.width
        whitened = 24 * tensor.size if tensor.whitening else 0
        # The kept vectors times their values, and the matrix of their product.
        k = self._max_rank(min(m, n))
        kept = tensor.factors(k) + 4 * tensor.size
        work = svd_dense_bytes(m, n, width, k) + whitened + kept
        return max(low, rounding_bytes(tensor) + work)

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        if delta.rank is not None:
            rank = self._max_rank(delta.rank)
            return DeltaShape(rank, tensor.factors(rank))
        if will_average(tensor, embeddings=self.embeddings):
            return delta
        # In whitened inputs, the result may have float64 factors of as many entries as the matrix.
        return DeltaShape(None, 8 * tensor.size) if tensor.whitening else dense_shape(tensor)

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Truncate and rescale one delta; see :meth:`Transform.apply`."""
        if is_averaged([delta], tensor, embeddings=self.embeddings):
            return delta, None
        rounding = rounding_of(delta, tensor) if self.noise_floor == "auto" else None
        if tensor.inputs is None:
            kept, truncation = self._truncated(delta, task, tensor, rounding)
        else:
            whitening, floor = tensor.inputs.whitening, None
            if rounding is not None:
                delta, cut = above_floor(delta, rounding)
                floor = cut.noise
            kept, truncation = self._truncated(whitening.whiten(delta), task, tensor, None)
            kept, truncation = whitening.restore(kept), replace(truncation, noise=floor)
        # The kept factors of a full matrix may have more entries than the matrix itself.
        return kept if isinstance(delta, LowRank) else Dense(kept.to_dense()), truncation

    def _max_rank(self, rank: int) -> int:
        """Return an upper bound of the kept rank of a matrix of the given rank.

        The first r of k descending numbers are at least r/k of their sum.
        """
        if self.rank is not None:
            return min(self.rank, rank)
        given = self.eta.values() if isinstance(self.eta, dict) else self.eta
        largest = max(given) if not isinstance(given, float) else given
        return min(rank, math.ceil(largest * rank / 100))

    def _truncated(
        self, delta: Delta, task: int, tensor: TensorContext, rounding: Rounding | None
    ) -> tuple[LowRank, Truncation]:
        return truncate_and_rescale(
            svd(delta),
            eta=self._eta(task, tensor),
            rank=self.rank,
            rescale=self.rescale,
            rounding=rounding,
        )

    def _eta(self, task: int, tensor: TensorContext) -> float:
        if isinstance(self.eta, dict):
            return next(
                eta for pattern, eta in self.eta.items() if fnmatchcase(tensor.name, pattern)
            )
        return self.eta[task] if isinstance(self.eta, list) else self.eta
