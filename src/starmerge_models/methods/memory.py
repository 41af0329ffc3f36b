"""Estimates of the memory of a merge, from shapes and ranks alone, before any tensor is read.

Each method estimates its own peak (:meth:`starmerge_models.methods.method.Method.memory`), and a
chain combines the estimates (:meth:`starmerge_models.methods.pipeline.Pipeline.memory`). Each is an
upper bound of the peak in bytes. It leaves out buffers of a few rows of the tensor. The
estimates of the kernels are defined beside their code: ``svd_bytes``, ``core_shape`` and others in
:mod:`starmerge_models.spectral`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from starmerge_models.deltas import matrix_shape
from starmerge_models.spectral.core_space import CoreShape, core_shape
from starmerge_models.spectral.metric import whitening_bytes


@dataclass(frozen=True)
class DeltaShape:
    """Rank and size of a task vector or merged update that has not been computed yet."""

    rank: int | None
    """Upper bound of the rank if the delta has factors; None if it is dense."""
    nbytes: int = 0
    """Bytes in memory beyond those of the files; 0 for a lazy difference of stored tensors and for
    factors as they are read, which the plan counts once."""


@dataclass(frozen=True)
class InputsShape:
    """Sizes of the moments of a tensor's inputs, as the numbers of rows of their square roots."""

    size: int
    """n, the length of an input."""
    text: int | None
    """Rows of the root that all tasks share; None if no method of the chain uses it."""
    own: tuple[int, ...] = ()
    """Rows of the root of each of the T tasks' own inputs; empty if no method uses them."""


@dataclass(frozen=True)
class TensorShape:
    """Shapes and ranks of one tensor and its task vectors, known before any data is read."""

    shape: tuple[int, ...]
    is_embedding: bool
    deltas: tuple[DeltaShape, ...]
    """The task vectors of the tasks that change it, as they are passed to a method; at least
    one."""
    tasks: int
    """T, the number of all models of the merge."""
    width: int = 4
    """Bytes of an entry of a difference of stored tensors: 4, or 8 for float64."""
    inputs: InputsShape | None = None
    """The moments of its inputs; None for a merge without a metric."""
    merged: DeltaShape | None = None
    """The merged update so far; set for post-steps alone."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) of the tensor as a matrix."""
        return matrix_shape(self.shape)

    @cached_property
    def size(self) -> int:
        """Number of entries."""
        m, n = self.matrix
        return m * n

    @property
    def has_dense(self) -> bool:
        """Whether a task vector is dense."""
        return any(delta.rank is None for delta in self.deltas)

    @property
    def total_rank(self) -> int:
        """Σr over the task vectors that have factors."""
        return sum(delta.rank or 0 for delta in self.deltas)

    @property
    def deltas_nbytes(self) -> int:
        """Bytes of all task vectors together, for methods that hold a list of them."""
        return sum(delta.nbytes for delta in self.deltas)

    @property
    def largest_delta_nbytes(self) -> int:
        """Bytes of the largest task vector, for methods that hold one at a time."""
        return max(delta.nbytes for delta in self.deltas)

    @property
    def difference_nbytes(self) -> int:
        """Bytes of computing a difference of stored tensors: the matrix and the widened base."""
        stored = any(delta.rank is None and not delta.nbytes for delta in self.deltas)
        return 2 * self.width * self.size if stored else 0

    @property
    def whitening(self) -> int:
        """Bytes of the whitening that all tasks share; 0 without one."""
        if self.inputs is None or self.inputs.text is None:
            return 0
        return whitening_bytes(self.inputs.text, self.inputs.size)

    def factors(self, rank: int, itemsize: int = 8) -> int:
        """Return the bytes of factors (m, rank) and (rank, n)."""
        m, n = self.matrix
        return itemsize * rank * (m + n)

    def core(self, *others: DeltaShape) -> CoreShape:
        """Return the sizes of the Core Space of ``others`` followed by the task vectors."""
        ranks = [delta.rank for delta in (*others, *self.deltas)]
        is_whitened = self.inputs is not None and self.inputs.text is not None
        return core_shape(self.matrix, ranks, width=self.width, is_whitened=is_whitened)


def total_bytes(tensor: TensorShape) -> int:
    """Return the peak of :func:`starmerge_models.deltas.total` and of scaling its result, in bytes.

    Factors are concatenated in one float32 copy, which is scaled in place. A dense sum takes the
    float32 sum, the next task vector, and at the end the scaled sum. Differences of stored tensors
    are lazy: a sum of nothing else takes no memory.
    """
    low = [delta for delta in tensor.deltas if delta.rank is not None]
    side_by_side = sum(delta.nbytes for delta in low) + tensor.factors(tensor.total_rank, 4)
    if not tensor.has_dense:
        return side_by_side
    if not low and not tensor.largest_delta_nbytes:
        return 0
    return side_by_side + tensor.difference_nbytes + 8 * tensor.size + tensor.largest_delta_nbytes


def total_shape(tensor: TensorShape) -> DeltaShape:
    """Return the shape of the scaled sum of the task vectors."""
    if not tensor.has_dense:
        return DeltaShape(tensor.total_rank, tensor.factors(tensor.total_rank, 4))
    stored = all(delta.rank is None and not delta.nbytes for delta in tensor.deltas)
    return DeltaShape(None, 0 if stored else 4 * tensor.size)


def products_bytes(tensor: TensorShape) -> int:
    """Return the peak bytes of inner products of the update with each task vector, and of norms."""
    merged = scaled_shape(tensor)
    return tensor.largest_delta_nbytes + max(
        inner_bytes(tensor, [merged, d]) for d in tensor.deltas
    )


def scaled_shape(tensor: TensorShape) -> DeltaShape:
    """Return the shape of the scaled merged update; scaling copies a dense update."""
    assert tensor.merged is not None, "the chain sets the merged update for post-steps"
    return tensor.merged


def dense_shape(tensor: TensorShape) -> DeltaShape:
    """Return the shape of a dense float32 result."""
    return DeltaShape(None, 4 * tensor.size)


def inner_bytes(tensor: TensorShape, deltas: Sequence[DeltaShape]) -> int:
    """Return the peak bytes of an inner product of two deltas, or of a norm.

    Two dense deltas and their product are float64; factors are copied to float64.
    """
    dense = sum(delta.rank is None for delta in deltas)
    factors = sum(tensor.factors(delta.rank) for delta in deltas if delta.rank is not None)
    matrices = {0: 0, 1: 8}.get(dense, 24) * tensor.size
    return matrices + (2 * tensor.width * tensor.size if dense else 0) + 2 * factors
