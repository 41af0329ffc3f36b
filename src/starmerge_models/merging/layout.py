"""The tensors of a merge: their sources, the models that change them, and memory estimates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.layers import layers
from starmerge_models.checkpoints.metric import Metric
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.tensors import MERGEABLE, TensorInfo, stored_of
from starmerge_models.deltas import compute_dtype, matrix_shape
from starmerge_models.errors import StarmergeError
from starmerge_models.merging.metric import inputs_of, needed_moments
from starmerge_models.methods.memory import DeltaShape, InputsShape, TensorShape
from starmerge_models.methods.method import TensorContext
from starmerge_models.methods.pipeline import Pipeline


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    source: TensorInfo
    """The base's tensor."""
    dtype: torch.dtype
    """Dtype in the output."""
    models: Mapping[int, FineTune]
    """The models that change the tensor, by their number in the recipe."""
    is_embedding: bool
    layer: tuple[int, int] | None = None
    """(layer, number of layers) of the tensor; see
    :func:`starmerge_models.checkpoints.layers.layers`."""
    metric: Metric | None = None
    """The metric with the moments of its inputs, if a method uses them."""
    reads_base: bool = True
    """Whether the base's tensor is read."""
    tied_to: str | None = None
    """The name of the tensor to which this one is tied. Methods get this name for both, so that
    results that depend on the name, such as random draws, are the same."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in the output's dtype."""
        return self.source.size * self.dtype.itemsize

    @property
    def inputs(self) -> Iterator[TensorInfo]:
        """The tensors to read: the base's, if it is needed, and the sources of the deltas."""
        if self.reads_base:
            yield self.source
        for model in self.models.values():
            yield from model.inputs(self.source.name)

    @property
    def stored_inputs(self) -> tuple[TensorInfo, ...]:
        """The stored tensors to read, without duplicates."""
        return stored_of(self.inputs)

    @property
    def repeats_base(self) -> bool:
        """Whether all models that contain the tensor read it from the base's own file."""
        own = replace(self.source, name="", origin=None)
        inputs = [model.inputs(self.source.name) for model in self.models.values()]
        return all(
            len(read) == 1 and replace(read[0], name="", origin=None) == own for read in inputs
        )

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors to read."""
        return sum(info.bytes_read for info in self.inputs)

    def context(
        self, tasks: Sequence[str], weights: Sequence[float], base: Tensor | None
    ) -> TensorContext:
        """Return the context of the tensor for the methods.

        Args:
            tasks: Names of all models of the merge.
            weights: Their weights.
            base: The values of the base's tensor, if it has been read.
        """
        name = self.source.name
        return TensorContext(
            self.tied_to or name,
            self.source.shape,
            self.is_embedding,
            tasks=tuple(tasks),
            weights=tuple(weights),
            base=base,
            layer=self.layer,
            inputs=None if self.metric is None else inputs_of(self.metric, name, tasks),
        )

    def is_whitened(self, pipeline: Pipeline) -> bool:
        """Return whether a chain uses the moment of the tensor's inputs.

        Vectors have no inputs, and kernels have no moments; embeddings of full fine-tunes are
        averaged unless a method merges them.
        """
        if len(self.source.shape) != 2 or not self.models:
            return False
        users = pipeline.metric_users
        averaged = all(getattr(step, "embeddings", None) == "average" for step in users)
        has_dense = any(model.rank(self.source.name) is None for model in self.models.values())
        return not (self.is_embedding and has_dense and averaged)

    def memory(self, pipeline: Pipeline, tasks: Sequence[str]) -> int:
        """Estimate the memory for merging the tensor's task vectors, in bytes.

        The estimate does not contain the libraries, nor memory that the system can reclaim, such as
        memory-mapped files.

        Args:
            pipeline: The chain.
            tasks: Names of all models of the merge.
        """
        name = self.source.name
        factors = sum(map(self._factor_bytes, self.models.values()))
        # Computed dense deltas, such as those of DoRA, need their factors in float64.
        computing = max(
            8 * sum(info.nbytes for info in model.inputs(name)) if self._is_computed(model) else 0
            for model in self.models.values()
        )
        derived = sum(info.bytes_computed for info in self.inputs)
        return factors + computing + derived + pipeline.memory(self.tensor_shape(pipeline, tasks))

    def tensor_shape(self, pipeline: Pipeline, tasks: Sequence[str]) -> TensorShape:
        """Return the shapes and ranks of the tensor, which are known before it is read.

        Args:
            pipeline: The chain.
            tasks: Names of all models of the merge.
        """
        name, width = self.source.name, compute_dtype(self.source.dtype).itemsize
        deltas = tuple(
            DeltaShape(model.rank(name), width * self.source.size * self._is_computed(model))
            for model in self.models.values()
        )
        return TensorShape(
            self.source.shape,
            self.is_embedding,
            deltas,
            tasks=len(tasks),
            width=width,
            inputs=self._inputs_shape(pipeline, tasks),
        )

    def _inputs_shape(self, pipeline: Pipeline, tasks: Sequence[str]) -> InputsShape | None:
        if self.metric is None:
            return None
        name = self.source.name
        n = self.source.shape[self.metric.side(name) == "columns"]
        rows = {
            task: self.metric.nbytes(name, task) // (torch.float32.itemsize * n)
            for task in needed_moments(pipeline, tasks)
        }
        own = tuple(rows[task] for task in tasks if task in rows)
        return InputsShape(n, rows.get(None), own)

    def _factor_bytes(self, model: FineTune) -> int:
        """Return the bytes of the factors of a model's delta, as stored or computed."""
        name = self.source.name
        rank, stored = model.rank(name), model.inputs(name)
        if rank is None:
            return 0
        entries = rank * sum(matrix_shape(self.source.shape))
        held = sum(info.nbytes for info in stored)
        is_made = sum(info.size for info in stored) < entries
        return held + entries * torch.float32.itemsize * is_made

    def _is_computed(self, model: FineTune) -> bool:
        """Return whether a dense delta is a matrix in memory, not a lazy difference."""
        name = self.source.name
        read = [info.shape for info in model.inputs(name)]
        return model.rank(name) is None and read != [self.source.shape]


@dataclass(frozen=True)
class Contents:
    """The content of an output."""

    pipeline: Pipeline
    base: Base
    models: tuple[FineTune, ...]
    tensors: tuple[PlannedTensor, ...]
    """The tensors of the output, merged and copied ones."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(model.name for model in self.models)

    @property
    def merged(self) -> list[PlannedTensor]:
        """The tensors that some model changes."""
        return [tensor for tensor in self.tensors if tensor.models]


class Placement(Protocol):
    """The part of the output's interface that decides which tensors it contains."""

    @property
    def needs_base(self) -> bool:
        """Whether the output contains the base's weights, not only their changes."""

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype | None:
        """Return the dtype of a base's tensor in the output; None if the output lacks it.

        Args:
            source: The tensor.
            is_merged: Whether some model changes it.
        """


class AllTensors:
    """The placement of a merge in memory: all tensors of the base, each in its own dtype."""

    needs_base = True

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype:
        """Return the base's dtype."""
        return source.dtype


def lay_out(
    base: Base, models: Sequence[FineTune], placing: Placement | None = None
) -> tuple[PlannedTensor, ...]:
    """Lay out the tensors of the output: all tensors of the base, or only the merged ones.

    The widest dtypes come first, as in files of safetensors, so that every tensor is aligned.

    Args:
        base: The base.
        models: The models to merge.
        placing: The placement of the tensors; by default :class:`AllTensors`.

    Raises:
        StarmergeError: A model changes one end of tied tensors, or one that is quantised.
    """
    planned = _planned(base, models, placing or AllTensors())
    return tuple(sorted(planned, key=lambda tensor: -tensor.dtype.itemsize))


def _planned(base: Base, models: Sequence[FineTune], placing: Placement) -> Iterator[PlannedTensor]:
    places = layers(base.checkpoint)
    changed = [model.tensors for model in models]
    for name in base.checkpoint:
        source = base.checkpoint[name]
        changing = {t: model for t, model in enumerate(models) if name in changed[t]}
        for t, model in changing.items():
            if name in base.tied and not changed[t].issuperset(base.tied):
                raise StarmergeError(
                    f"{model.source} changes {name} alone, which the base ties to other tensors "
                    "(tie_word_embeddings in config.json). Give a model that changes all of "
                    "them, or none."
                )
        if changing and source.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{source.file}: tensor {name} is stored in {source.dtype}, which cannot be "
                "merged. Use an unquantised base."
            )
        dtype = placing.dtype(source, is_merged=bool(changing))
        if dtype is None:
            continue
        reads_base = placing.needs_base or any(m.needs_base(name) for m in changing.values())
        yield PlannedTensor(
            source,
            dtype,
            changing,
            base.is_embedding(name),
            places.get(name),
            reads_base=reads_base,
            tied_to=base.embedding if name in base.tied and name != base.embedding else None,
        )
