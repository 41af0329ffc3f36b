"""Base classes of merges that are equivariant under rotations of inputs and outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, total
from starmerge_models.methods.memory import DeltaShape, TensorShape, total_bytes, total_shape
from starmerge_models.methods.method import Deltas, Merge, TensorContext
from starmerge_models.spectral import CoreSpace, core_space, on_best_device
from starmerge_models.spectral.coordinates import Coordinates
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import svd_bytes
from starmerge_models.spectral.metric import Whitening

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class CoreSpaceMerge(Merge):
    """A merge that maps Q·τ_t·R to Q·M·R for all rotations Q and R.

    Such a merge works on the task vectors in Core Space: float64 matrices, small ones for adapters,
    whole ones for full fine-tunes. A merge that only uses the SVD of each task vector derives from
    this class and gets the SVD of an adapter from its factors. A merge that uses the matrices
    derives from :class:`SpectralMerge`. Vectors have one singular value, so they are averaged.
    Embeddings of full fine-tunes are averaged too, because their rows are tokens, not directions.
    Fine-tunes that were stored in bfloat16 or float16 have rounding noise in all directions: apply
    :mod:`denoise <starmerge_models.methods.denoise>` first.

    With a metric the merge works in whitened inputs (:mod:`starmerge_models.spectral.metric`), and
    the result is transformed back.
    """

    embeddings: Annotated[
        Literal["average", "merge"],
        Field(description="how embeddings of full fine-tunes are merged: averaged, or as matrices"),
    ] = "average"

    averages: ClassVar[bool] = True
    uses_metric: ClassVar[bool] = True

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes for one tensor; see :meth:`Method.memory`."""
        if will_average(tensor, embeddings=self.embeddings):
            return tensor.deltas_nbytes + total_bytes(tensor)
        if not self.uses_metric:
            tensor = replace(tensor, inputs=None)
        space = self.core_shape(tensor)
        work = max(self.matrix_memory(space), space.result_peak_bytes)
        return tensor.deltas_nbytes + max(space.construction_bytes, space.nbytes + work)

    def core_shape(self, tensor: TensorShape) -> CoreShape:
        """Return the sizes of the space to merge in; see :meth:`space`."""
        return tensor.core()

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak bytes of the merge beyond the space itself, including the result.

        All built-in methods override it. The default counts, for each task, an SVD and two square
        matrices of the longer side, and eight such matrices more.

        Args:
            space: The sizes of the space.
        """
        squares = 8 * 5 * max(space.p, space.q) ** 2
        own = space.count * (space.vectors + 2 * space.size)
        return own + squares + 8 * space.size + svd_bytes(space.p, space.q)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result of one tensor; see :meth:`Merge.result`."""
        if will_average(tensor, embeddings=self.embeddings):
            return total_shape(tensor)
        space = self.core_shape(tensor)
        return DeltaShape(space.rank, space.result)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        if is_averaged(list(held.values()), tensor, embeddings=self.embeddings):
            return total(held.values()).scaled(1 / tensor.total_weight)

        def merge_in(space: CoreSpace, tau: dict[int, Coordinates]) -> Delta:
            if not tau:
                return space.delta(torch.zeros_like(space.tasks[0].matrix))
            weights = [tensor.weights[t] for t in tau]
            merged = self.merge_coordinates(list(tau.values()), weights, space, tensor)
            return space.delta(merged) if isinstance(merged, Tensor) else space.product(*merged)

        return self.in_space(held, tensor, merge_in)

    def in_space(
        self,
        deltas: Mapping[int, Delta],
        tensor: TensorContext,
        work: Callable[[CoreSpace, dict[int, Coordinates]], _T],
    ) -> _T:
        """Return ``work(space, tau)``, on the best device, for one tensor's deltas.

        Args:
            deltas: w_t · τ_t by task; one or more.
            tensor: The tensor.
            work: Function of the space and, by task, the coordinates that are not zero.
        """
        given = list(deltas.values())
        inputs = tensor.inputs if self.uses_metric else None
        whitening = inputs.whitening if inputs is not None else None

        def work_on(device: torch.device) -> _T:
            space = self.space(given, device, whitening)
            tau = {t: C for t, C in zip(deltas, space.tasks, strict=True) if not C.is_zero}
            return work(space, tau)

        beside = self.extra_memory(given)
        if whitening is not None:
            beside += 3 * whitening.L.nbytes
        return on_best_device(given, work_on, beside=beside)

    def extra_memory(self, deltas: Sequence[Delta]) -> int:
        """Return the bytes that this merge takes in addition to other merges in Core Space."""
        return 0

    def space(
        self, deltas: Sequence[Delta], device: torch.device, whitening: Whitening | None
    ) -> CoreSpace:
        """Return the space to merge in, on a device."""
        return core_space(deltas, device, whitening)

    @abstractmethod
    def merge_coordinates(
        self,
        tau: list[Coordinates],
        weights: list[float],
        space: CoreSpace,
        tensor: TensorContext,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge the task vectors of one tensor in common orthonormal bases.

        The coordinates may be on a GPU, so new tensors must be created on their device.

        Args:
            tau: (p, q) each: w_t · τ_t of the tasks for which it is not zero, as matrix or factors.
            weights: Their w_t.
            space: The bases, the true shape (m, n), and the noise floor of singular values.
            tensor: The tensor.

        Returns:
            The same as :meth:`SpectralMerge.merge_matrices`.
        """


@dataclass(frozen=True, kw_only=True)
class SpectralMerge(CoreSpaceMerge):
    """A rotation-equivariant merge that works on the matrix of each task vector."""

    def core_shape(self, tensor: TensorShape) -> CoreShape:
        """Return the sizes of the space to merge in; see :meth:`CoreSpaceMerge.core_shape`."""
        return tensor.core().as_matrices()

    def space(
        self, deltas: Sequence[Delta], device: torch.device, whitening: Whitening | None
    ) -> CoreSpace:
        """Return the space to merge in; see :meth:`CoreSpaceMerge.space`."""
        return super().space(deltas, device, whitening).as_matrices()

    def merge_coordinates(
        self,
        tau: list[Coordinates],
        weights: list[float],
        space: CoreSpace,
        tensor: TensorContext,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge one tensor; see :meth:`CoreSpaceMerge.merge_coordinates`."""
        return self.merge_matrices([C.matrix for C in tau], weights, space, tensor)

    @abstractmethod
    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge the task vectors of one tensor in common orthonormal bases.

        The matrices may be on a GPU, so new tensors must be created on their device
        (``tau[0].new_zeros(…)``, ``torch.eye(…, device=tau[0].device)``).

        Args:
            tau: (p, q) float64 each: w_t · τ_t of the tasks for which it is not zero.
            weights: Their w_t.
            space: The bases, the true shape (m, n), and the noise floor of singular values.
            tensor: The tensor.

        Returns:
            The merged matrix (p, q), float64, on the same device; or factors (p, r) and (q, r) of
            left · rightᵀ, so that the update has the rank r.
        """


def is_averaged(deltas: Sequence[Delta], tensor: TensorContext, *, embeddings: str) -> bool:
    """Return whether a spectral method averages a tensor: a vector, or an embedding matrix."""
    return any(isinstance(delta, Dense) for delta in deltas) and _has_no_directions(
        tensor.shape, tensor.is_embedding, embeddings
    )


def will_average(tensor: TensorShape, *, embeddings: str) -> bool:
    """Return the result of :func:`is_averaged` from the shape, before the tensor is read."""
    return tensor.has_dense and _has_no_directions(tensor.shape, tensor.is_embedding, embeddings)


def _has_no_directions(shape: tuple[int, ...], is_embedding: bool, embeddings: str) -> bool:
    return len(shape) < 2 or (is_embedding and embeddings == "average")
