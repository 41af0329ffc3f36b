"""What the merges have in common that any rotation leaves alone."""

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
    """A merge that gives Q·M·R for Q·τ_t·R, Q and R being rotations.

    Such a merge sees the task vectors in Core Space: the small matrices of adapters, the whole ones
    of full fine-tunes, in float64 both. Those that need but the SVD of each task vector derive from
    this class, and take it from the factors of adapters; those that look at the matrices derive
    from :class:`SpectralMerge`. Vectors have one singular value, so they are averaged; so
    are embeddings of full fine-tunes, whose rows are tokens and not directions. Fine-tunes that
    were stored in bfloat16 or float16 have rounding noise in all directions: :mod:`denoise
    <starmerge_models.methods.denoise>` them first.

    With a metric it sees them in whitened inputs (:mod:`starmerge_models.spectral.metric`), and
    what it makes there is brought back.
    """

    embeddings: Annotated[
        Literal["average", "merge"],
        Field(description="what is done with embeddings of full fine-tunes"),
    ] = "average"

    averages: ClassVar[bool] = True
    uses_metric: ClassVar[bool] = True

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed for one tensor; see :meth:`Method.memory`."""
        if will_average(tensor, embeddings=self.embeddings):
            return tensor.held + total_bytes(tensor)
        if not self.uses_metric:
            tensor = replace(tensor, inputs=None)
        space = self.core_shape(tensor)
        work = max(self.matrix_memory(space), space.leaving)
        return tensor.held + max(space.making, space.nbytes + work)

    def core_shape(self, tensor: TensorShape) -> CoreShape:
        """Return the sizes of the space to merge in; see :meth:`space`."""
        return tensor.core()

    def matrix_memory(self, space: CoreShape) -> int:
        """Tell the bytes that merging needs beside what the space holds, its result too.

        All of starmerge's own methods tell it. One that does not counts as if it had an SVD and two
        matrices of each task, square ones of the longer side, and eight more.

        Args:
            space: The sizes of the space.
        """
        squares = 8 * 5 * max(space.p, space.q) ** 2
        own = space.count * (space.vectors + 2 * space.size)
        return own + squares + 8 * space.size + svd_bytes(space.p, space.q)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made of one tensor; see :meth:`Merge.result`."""
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
            work: Is called with the space to merge in and, by task, what is there and is not zero.
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
        """Return the bytes that merging takes beside what merges in Core Space usually do."""
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

        They may lie on a GPU, and so must everything that is put together with them.

        Args:
            tau: (p, q) each: w_t · τ_t of the tasks for which it is not zero, as matrix or factors.
            weights: Their w_t.
            space: The bases, the true shape (m, n), and below what a singular value is rounding.
            tensor: The tensor.

        Returns:
            As :meth:`SpectralMerge.merge_matrices`.
        """


@dataclass(frozen=True, kw_only=True)
class SpectralMerge(CoreSpaceMerge):
    """A merge that rotations leave alone, and that sees the matrix of each task vector."""

    def core_shape(self, tensor: TensorShape) -> CoreShape:
        """Return the sizes of the space to merge in; see :meth:`CoreSpaceMerge.core_shape`."""
        return tensor.core().whole()

    def space(
        self, deltas: Sequence[Delta], device: torch.device, whitening: Whitening | None
    ) -> CoreSpace:
        """Return the space to merge in; see :meth:`CoreSpaceMerge.space`."""
        return super().space(deltas, device, whitening).whole()

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

        They may lie on a GPU, and so must everything that is put together with them: make tensors
        of them (``tau[0].new_zeros(…)``, ``torch.eye(…, device=tau[0].device)``).

        Args:
            tau: (p, q) float64 each: w_t · τ_t of the tasks for which it is not zero.
            weights: Their w_t.
            space: The bases, the true shape (m, n), and below what a singular value is rounding.
            tensor: The tensor.

        Returns:
            The merged matrix (p, q), float64, on their device; or factors (p, r) and (q, r) of
            left · rightᵀ, of which the update then has the rank r.
        """


def is_averaged(deltas: Sequence[Delta], tensor: TensorContext, *, embeddings: str) -> bool:
    """Tell whether a spectral method leaves a tensor to averaging."""
    return any(isinstance(delta, Dense) for delta in deltas) and _has_no_directions(
        tensor.shape, tensor.is_embedding, embeddings
    )


def will_average(tensor: TensorShape, *, embeddings: str) -> bool:
    """Tell the same before the tensor is read."""
    return tensor.has_dense and _has_no_directions(tensor.shape, tensor.is_embedding, embeddings)


def _has_no_directions(shape: tuple[int, ...], is_embedding: bool, embeddings: str) -> bool:
    return len(shape) < 2 or (is_embedding and embeddings == "average")
