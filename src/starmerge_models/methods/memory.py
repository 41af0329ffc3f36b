"""What is known of a tensor before it is read, and the memory of what methods do with it.

Each method tells the bytes that it needs (:meth:`starmerge_models.methods.method.Method.memory`),
and a chain adds them up (:meth:`starmerge_models.methods.pipeline.Pipeline.memory`). An estimate is
an upper bound of the peak. It counts what takes more than a few rows of the tensor. Kernels tell
their cost beside their code: ``svd_bytes``, ``core_shape`` and others in
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
    """A task vector, or a merged update, that is not there yet."""

    rank: int | None
    """Upper bound of the rank of one that has factors; None for one that is dense."""
    nbytes: int = 0
    """Bytes that it takes while it is held. 0 where those are its file's: a difference of stored
    tensors is made when it is looked at, and factors as they are read are counted once by the
    plan."""


@dataclass(frozen=True)
class InputsShape:
    """The moments of a tensor's inputs: how many rows their roots have."""

    size: int
    """n, the length of an input."""
    text: int | None
    """Rows of the root for all tasks; None: no method of the chain asks for it."""
    own: tuple[int, ...] = ()
    """Rows of the root for each of the T tasks' own inputs; empty: no method asks for them."""


@dataclass(frozen=True)
class TensorShape:
    """What is known of one tensor before anything is read."""

    shape: tuple[int, ...]
    is_embedding: bool
    deltas: tuple[DeltaShape, ...]
    """The task vectors of the tasks that change it, as a method gets them; at least one."""
    tasks: int
    """T, the number of all models of the merge."""
    width: int = 4
    """Bytes of an entry in which stored tensors are subtracted: 4, or 8 for float64."""
    inputs: InputsShape | None = None
    """The moments of its inputs, where the merge has a metric."""
    merged: DeltaShape | None = None
    """The merged update so far, for post-steps."""

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
    def held(self) -> int:
        """Bytes of all task vectors side by side, for methods that make a list of them."""
        return sum(delta.nbytes for delta in self.deltas)

    @property
    def one_by_one(self) -> int:
        """Bytes of the largest task vector, for methods that let go of each."""
        return max(delta.nbytes for delta in self.deltas)

    @property
    def looked_at(self) -> int:
        """Bytes of a difference of stored tensors as a matrix: the base is widened beside it."""
        stored = any(delta.rank is None and not delta.nbytes for delta in self.deltas)
        return 2 * self.width * self.size if stored else 0

    @property
    def whitening(self) -> int:
        """Bytes of the whitening by the text for all tasks, where a metric has one."""
        if self.inputs is None or self.inputs.text is None:
            return 0
        return whitening_bytes(self.inputs.text, self.inputs.size)

    def factors(self, rank: int, itemsize: int = 8) -> int:
        """Return the bytes of factors (m, rank) and (rank, n)."""
        m, n = self.matrix
        return itemsize * rank * (m + n)

    def core(self, *others: DeltaShape) -> CoreShape:
        """Return the sizes of the Core Space of the task vectors, and of others before them."""
        ranks = [delta.rank for delta in (*others, *self.deltas)]
        is_whitened = self.inputs is not None and self.inputs.text is not None
        return core_shape(self.matrix, ranks, width=self.width, is_whitened=is_whitened)


def total_bytes(tensor: TensorShape) -> int:
    """Return the peak of :func:`starmerge_models.deltas.total` and of scaling its result.

    Factors are widened and scaled in their places side by side: one float32 copy. Of a dense sum
    there are the sum in float32, the next task vector beside it, and in the end the scaled sum.
    Differences of stored tensors alone are not added before they are looked at.
    """
    low = [delta for delta in tensor.deltas if delta.rank is not None]
    side_by_side = sum(delta.nbytes for delta in low) + tensor.factors(tensor.total_rank, 4)
    if not tensor.has_dense:
        return side_by_side
    if not low and not tensor.one_by_one:
        return 0
    return side_by_side + tensor.looked_at + 8 * tensor.size + tensor.one_by_one


def total_shape(tensor: TensorShape) -> DeltaShape:
    """Return what the scaled sum of the task vectors is."""
    if not tensor.has_dense:
        return DeltaShape(tensor.total_rank, tensor.factors(tensor.total_rank, 4))
    stored = all(delta.rank is None and not delta.nbytes for delta in tensor.deltas)
    return DeltaShape(None, 0 if stored else 4 * tensor.size)


def products_bytes(tensor: TensorShape) -> int:
    """Return the peak of products of the merged update with each task vector, and of norms."""
    merged = scaled_shape(tensor)
    return tensor.one_by_one + max(inner_bytes(tensor, [merged, d]) for d in tensor.deltas)


def scaled_shape(tensor: TensorShape) -> DeltaShape:
    """Return what the merged update is after it has been scaled, which copies a dense one."""
    assert tensor.merged is not None, "post-steps are told of the merged update"
    return tensor.merged


def dense_shape(tensor: TensorShape) -> DeltaShape:
    """Return what a dense float32 result is."""
    return DeltaShape(None, 4 * tensor.size)


def inner_bytes(tensor: TensorShape, deltas: Sequence[DeltaShape]) -> int:
    """Return the peak of inner products of two deltas, and of norms.

    Two dense ones become float64, and so does their product; of factors there are float64 copies.
    """
    dense = sum(delta.rank is None for delta in deltas)
    factors = sum(tensor.factors(delta.rank) for delta in deltas if delta.rank is not None)
    matrices = {0: 0, 1: 8}.get(dense, 24) * tensor.size
    return matrices + (2 * tensor.width * tensor.size if dense else 0) + 2 * factors
