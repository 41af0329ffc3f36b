"""The plan of a merge: everything that can be known, and go wrong, before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from starmerge.checkpoints.base import Base, open_base
from starmerge.checkpoints.models import FineTune, open_model
from starmerge.checkpoints.source import Source, resolve
from starmerge.checkpoints.tensors import MERGEABLE, TensorInfo
from starmerge.checkpoints.writer import OutputTensor, check_output, check_space
from starmerge.errors import StarmergeError, UsageError
from starmerge.merging.fold import PANEL_ROWS
from starmerge.methods.method import Method, TensorContext
from starmerge.recipe import Recipe


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    source: TensorInfo
    """The base's tensor."""
    dtype: torch.dtype
    """Its dtype in the output."""
    models: tuple[FineTune, ...]
    """The models that change it."""
    is_embedding: bool

    @property
    def output(self) -> OutputTensor:
        """The tensor as the writer wants to know it."""
        nbytes = self.source.size * self.dtype.itemsize
        return OutputTensor(self.source.name, self.dtype, self.source.shape, nbytes)

    @property
    def is_copied(self) -> bool:
        """Whether the output has the base's bytes."""
        return not self.models and self.dtype == self.source.dtype

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the base's tensor and of all its deltas."""
        name = self.source.name
        return self.source.nbytes + sum(model.nbytes(name) for model in self.models)

    def memory(self, method: Method) -> int:
        """Estimate the bytes in memory while it is merged, without the libraries."""
        if self.is_copied:
            return 0
        size, output = self.source.size, self.source.size * self.dtype.itemsize
        rows = self.source.shape[0] if self.source.shape else 1
        panel = 4 * 4 * size * min(PANEL_ROWS, rows) // max(rows, 1)
        factors = sum(
            model.nbytes(self.source.name) for model in self.models if self._is_low_rank(model)
        )
        dense = 0
        if not all(map(self._is_low_rank, self.models)):
            # The fine-tune's tensor, its float32 delta, the float32 sum; an SVD in float64.
            dense = size * (4 + 4 + 4)
            if method.svd_of_dense and len(self.source.shape) > 1:
                dense += 5 * 8 * size
        return self.source.nbytes + output + panel + 12 * factors + dense

    def _is_low_rank(self, model: FineTune) -> bool:
        return model.rank(self.source.name) is not None


@dataclass(frozen=True)
class Plan:
    """A merge that has been checked and can begin."""

    recipe: Recipe
    method: Method
    base: Base
    models: tuple[FineTune, ...]
    tensors: tuple[PlannedTensor, ...]
    output: Path
    overwrite: bool

    @property
    def merged(self) -> list[PlannedTensor]:
        """The tensors that some model changes."""
        return [tensor for tensor in self.tensors if tensor.models]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(tensor.bytes_to_read for tensor in self.tensors)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all tensors that are written, and of the files beside them."""
        beside = sum(file.stat().st_size for file in self.base.side_files)
        return beside + sum(tensor.output.nbytes for tensor in self.tensors)

    @property
    def memory(self) -> int:
        """Estimated peak of memory for tensors, bytes: that of the largest."""
        return max((tensor.memory(self.method) for tensor in self.tensors), default=0)

    def context(self, tensor: PlannedTensor) -> TensorContext:
        """Return what the method is told of a tensor."""
        return TensorContext(
            tensor.source.name, tensor.source.shape, tensor.is_embedding, len(self.models)
        )


def make_plan(recipe: Recipe, output: Path, *, overwrite: bool = False) -> Plan:
    """Open everything a recipe names, check it against each other, and lay out the output.

    Reads configs and headers only.

    Raises:
        UsageError: A wrong parameter, another base, an output folder that is taken.
        StarmergeError: A missing, unknown or misshapen tensor, a broken file, a disk too small.
    """
    method = recipe.make_method()
    check_output(output, overwrite=overwrite)
    base = open_base(resolve(recipe.base))
    models = []
    for entry in recipe.models:
        source = resolve(entry.path)
        _check_apart(output, source)
        models.append(open_model(entry.name, source, base, any_base=recipe.any_base))
    _check_apart(output, base.source)
    # Widest dtypes first, as safetensors writes them: so that every tensor is aligned in its file.
    tensors = sorted(_planned(recipe, base, models), key=lambda t: -t.dtype.itemsize)
    plan = Plan(recipe, method, base, tuple(models), tuple(tensors), output, overwrite)
    if not plan.merged:
        raise StarmergeError("None of the models changes any tensor of the base.")
    check_space(output, plan.bytes_to_write)
    return plan


def _check_apart(output: Path, source: Source) -> None:
    path, place = source.path.resolve(), output.resolve()
    if place in (path, *path.parents) or path in place.parents:
        raise UsageError(
            f"{output} is, holds or lies in the input {source}. Choose another output folder."
        )


def _planned(recipe: Recipe, base: Base, models: list[FineTune]) -> Iterator[PlannedTensor]:
    for name in base.checkpoint:
        source = base.checkpoint[name]
        changing = tuple(model for model in models if name in model.tensors)
        for model in changing:
            if name in base.tied and not model.tensors.issuperset(base.tied):
                raise StarmergeError(
                    f"{model.source} changes {name} alone, which the base ties to other tensors "
                    "(tie_word_embeddings in config.json). Untie the base first, or adapt neither."
                )
        if changing and source.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{source.file}: tensor {name} is stored in {source.dtype}, which cannot be "
                "merged. Use an unquantised base."
            )
        dtype = source.dtype
        if recipe.dtype != "keep" and dtype in MERGEABLE:
            dtype = getattr(torch, recipe.dtype)
        yield PlannedTensor(source, dtype, changing, base.is_embedding(name))
