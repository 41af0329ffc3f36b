"""The plan of a merge: everything that can be known, and go wrong, before a tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from starmerge.checkpoints.adapter import Adapter
from starmerge.checkpoints.base import Base, open_base
from starmerge.checkpoints.emr_task import check_task_names, mask_layout
from starmerge.checkpoints.metric import Metric, open_metric
from starmerge.checkpoints.models import FineTune, open_model
from starmerge.checkpoints.output import check_output, check_space
from starmerge.checkpoints.source import Source, resolve
from starmerge.checkpoints.tensors import MERGEABLE, TensorInfo
from starmerge.checkpoints.writer import OutputTensor
from starmerge.deltas import matrix_shape
from starmerge.errors import StarmergeError, UsageError
from starmerge.merging.fold import FOLD_ENTRIES
from starmerge.merging.metric import (
    check_metric,
    inputs_of,
    unused_tasks,
    wanted,
)
from starmerge.methods.entrywise import PANEL_ENTRIES
from starmerge.methods.method import TensorContext
from starmerge.methods.pipeline import Pipeline
from starmerge.recipe import Dtype, Recipe


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    source: TensorInfo
    """The base's tensor."""
    dtype: torch.dtype
    """Its dtype in the output."""
    models: Mapping[int, FineTune]
    """The models that change it, by their number in the recipe."""
    is_embedding: bool
    layer: tuple[int, int] | None = None
    """Which of how many layers it belongs to; see :func:`layers`."""
    metric: Metric | None = None
    """What knows the moments of its inputs, where a method asks for them."""

    @property
    def output(self) -> OutputTensor:
        """The tensor as the writer wants to know it."""
        nbytes = self.source.size * self.dtype.itemsize
        return OutputTensor(self.source.name, self.dtype, self.source.shape, nbytes)

    @property
    def mask(self) -> OutputTensor:
        """A task's mask of the tensor, where the merge is not static."""
        return mask_layout(self.source)

    @property
    def is_copied(self) -> bool:
        """Whether the output has the base's bytes."""
        return not self.models and self.dtype == self.source.dtype

    @property
    def inputs(self) -> Iterator[TensorInfo]:
        """What is read: the base's tensor, and what its deltas are made of."""
        yield self.source
        for model in self.models.values():
            yield from model.inputs(self.source.name)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all that is read."""
        return sum(info.nbytes for info in self.inputs)

    def context(
        self, tasks: Sequence[str], weights: Sequence[float], base: Tensor | None
    ) -> TensorContext:
        """Return what the methods are told of it.

        Args:
            tasks: Names of all models of the merge.
            weights: Their weights.
            base: The base's tensor, if it has been read.
        """
        name = self.source.name
        return TensorContext(
            name,
            self.source.shape,
            self.is_embedding,
            tasks=tuple(tasks),
            weights=tuple(weights),
            base=base,
            layer=self.layer,
            inputs=None if self.metric is None else inputs_of(self.metric, name, tasks),
        )

    def is_whitened(self, pipeline: Pipeline) -> bool:
        """Tell whether a chain asks for the moment of its inputs.

        Vectors have no inputs, kernels no moments; embeddings of full fine-tunes are averaged
        unless a method merges them.
        """
        if len(self.source.shape) != 2 or not self.models:
            return False
        users = pipeline.metric_users
        averaged = all(getattr(step, "embeddings", None) == "average" for step in users)
        has_dense = any(model.rank(self.source.name) is None for model in self.models.values())
        return not (self.is_embedding and has_dense and averaged)

    def memory(self, pipeline: Pipeline, tasks: Sequence[str]) -> int:
        """Estimate the bytes in memory while it is merged.

        Without the libraries, and without what the system may have back, as the windows of files.

        Args:
            pipeline: The chain.
            tasks: Names of all models of the merge.
        """
        if self.is_copied:
            return 0
        if not self.models:
            return self.output.nbytes
        size = self.source.size
        factors = sum(
            info.nbytes
            for model in self.models.values()
            if self._is_low_rank(model)
            for info in model.inputs(self.source.name)
        )
        return (
            24 * min(FOLD_ENTRIES, size)
            + 12 * factors
            + self._working_memory(pipeline)
            + self._metric_memory(pipeline, tasks)
            # The unified vector before and after it is rounded, and one task's mask.
            + (0 if pipeline.merge.is_static else size * (4 + 4 + 1))
        )

    def _working_memory(self, pipeline: Pipeline) -> int:
        """Estimate what matrices and bases the methods make of the task vectors."""
        size, count = self.source.size, len(self.models)
        ranks = [model.rank(self.source.name) for model in self.models.values()]
        total_rank = sum(rank for rank in ranks if rank is not None)
        m, n = matrix_shape(self.source.shape)
        spectral = pipeline.holds_all and pipeline.decomposes and min(m, n) > 1
        has_dense = None in ranks or any(step.makes_dense for step in pipeline.transforms)
        if spectral and not has_dense and total_rank < min(m, n):
            # Bases of all columns and rows, the task vectors in them, and as much to work with.
            bases = 8 * (3 * count * total_rank**2 + 2 * total_rank * (m + n))
            return bases + (4 * size if pipeline.merge.makes_dense else 0)
        if not (spectral or has_dense or pipeline.merge.makes_dense):
            return 0
        # A task vector that was computed and the float32 sum; panels of all tasks.
        dense = size * (4 + 4) + 32 * min(PANEL_ENTRIES, count * size)
        if pipeline.holds_all and has_dense:
            dense += 4 * size * count
        if spectral:
            dense += 8 * size * (count + 5)
        elif pipeline.decomposes and min(m, n) > 1:
            dense += 28 * size + 8 * min(m, n) ** 2
        return dense

    def _metric_memory(self, pipeline: Pipeline, tasks: Sequence[str]) -> int:
        """Estimate what is made of the moments of its inputs."""
        if self.metric is None:
            return 0
        name, shape = self.source.name, self.source.shape
        n = shape[self.metric.side(name) == "columns"]
        # Roots in float64; Σ, its root, and a copy while that is made.
        roots = [2 * self.metric.nbytes(name, task) for task in wanted(pipeline, tasks)]
        if not pipeline.needs_moments:
            return sum(roots) + 24 * n**2
        # All roots side by side, as far as they are no longer than a square matrix; the sum of
        # products, one more, and a task vector.
        side_by_side = min(sum(roots), 8 * n**2)
        dense = 0 if all(map(self._is_low_rank, self.models.values())) else 24 * self.source.size
        return max(roots) + 4 * side_by_side + dense + (24 * n**2 if pipeline.uses_metric else 0)

    def _is_low_rank(self, model: FineTune) -> bool:
        return model.rank(self.source.name) is not None


@dataclass(frozen=True)
class Plan:
    """A merge that has been checked and can begin."""

    recipe: Recipe
    pipeline: Pipeline
    base: Base
    models: tuple[FineTune, ...]
    tensors: tuple[PlannedTensor, ...]
    output: Path
    overwrite: bool
    reason: str | None = None
    """Why the methods are these, where the recipe left it to ``auto``."""
    metric: Metric | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(entry.name for entry in self.recipe.models)

    @property
    def use_of_metric(self) -> str:
        """In words, in whose inputs the merge is made."""
        whitened = ["whitened inputs"] if self.pipeline.uses_metric else []
        along = ", along the merge" if self.metric is not None and self.metric.along else ""
        own = [f"the tasks' own inputs{along}"] if self.pipeline.needs_moments else []
        return " and ".join([*whitened, *own])

    @property
    def unused_prompts(self) -> list[str]:
        """Tasks of the metric whose prompts the chain would use, if a model had their name."""
        return unused_tasks(self.metric, self.pipeline, self.tasks) if self.metric else []

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
        """Bytes of all tensors that are written, and of the files or the masks beside them."""
        if self.pipeline.merge.is_static:
            beside = sum(file.stat().st_size for file in self.base.side_files)
        else:
            beside = sum(len(tensor.models) * tensor.mask.nbytes for tensor in self.tensors)
        return beside + sum(tensor.output.nbytes for tensor in self.tensors)

    def memory(self, threads: int, limit: int) -> int:
        """Estimate the peak of memory for tensors, bytes.

        Args:
            threads: How many tensors are merged at once.
            limit: Bytes that they may take together; the largest of them may take more, alone.
        """
        each = sorted(map(self.memory_of, self.tensors), reverse=True)
        return max(each[0], min(limit, sum(each[:threads]))) if each else 0

    def memory_of(self, tensor: PlannedTensor) -> int:
        """Estimate the bytes in memory while a tensor is merged."""
        return tensor.memory(self.pipeline, self.tasks)

    def context(self, tensor: PlannedTensor, base: Tensor | None) -> TensorContext:
        """Return what the methods are told of a tensor, given the base's, if it has been read."""
        return tensor.context(self.tasks, [entry.weight for entry in self.recipe.models], base)


def make_plan(recipe: Recipe, output: Path, *, overwrite: bool = False) -> Plan:
    """Open everything a recipe names, check it against each other, and lay out the output.

    Reads configs and headers only; with a metric, at the end, all of the base, to hash it.

    Raises:
        UsageError: A wrong parameter, another base, an output folder that is taken, a metric that
            does not fit.
        StarmergeError: A missing, unknown or misshapen tensor, a broken file, a disk too small.
    """
    pipeline = recipe.make_pipeline()
    check_output(output, overwrite=overwrite)
    metric = None if recipe.metric is None else open_metric(recipe.metric)
    base, models = open_models(recipe)
    pipeline, reason = choose(pipeline, models, metric)
    if reason is not None:
        chosen = {"method": pipeline.name, "parameters": pipeline.parameters()}
        recipe = recipe.model_copy(update=chosen)
    for source in (*(model.source for model in models), base.source):
        _check_apart(output, source)
    is_static = pipeline.merge.is_static
    tensors = lay_out(base, models, dtype=recipe.dtype, is_static=is_static)
    weights = [entry.weight for entry in recipe.models]
    try:
        tensors = check_merge(pipeline, base, models, weights, tensors, metric)
    except UsageError as error:
        if reason is None:
            raise
        # It may name a method that the user did not ask for.
        raise UsageError(f"{error} ({reason})") from error
    if not is_static:
        check_task_names([model.name for model in models])
    plan = Plan(recipe, pipeline, base, models, tensors, output, overwrite, reason, metric)
    check_space(output, plan.bytes_to_write)
    return plan


def open_models(recipe: Recipe) -> tuple[Base, tuple[FineTune, ...]]:
    """Open a recipe's base and its models; reads configs and headers only.

    Raises:
        UsageError: A model is of another base, or of a kind that cannot be merged.
        StarmergeError: A missing, unknown or misshapen tensor, a broken file.
    """
    base = open_base(resolve(recipe.base))
    models = tuple(
        open_model(entry.name, resolve(entry.path), base, any_base=recipe.any_base)
        for entry in recipe.models
    )
    return base, models


def choose(
    pipeline: Pipeline, models: Collection[FineTune], metric: Metric | None
) -> tuple[Pipeline, str | None]:
    """Return the chain that merges some models, and the reason if ``auto`` stands for it."""
    return pipeline.chosen(
        [model.name for model in models],
        has_dense=any(model.rank(name) is None for model in models for name in model.tensors),
        prompts=None if metric is None else metric.tasks,
    )


def lay_out(
    base: Base, models: Sequence[FineTune], *, dtype: Dtype = "keep", is_static: bool = True
) -> tuple[PlannedTensor, ...]:
    """Lay out the tensors of the output: all of the base's, or what is merged of them.

    Widest dtypes first, as safetensors writes them: so that every tensor is aligned in its file.

    Args:
        base: The base.
        models: What is merged into it.
        dtype: Dtype of the floating-point tensors.
        is_static: Whether the output is one model.

    Raises:
        StarmergeError: A model changes one end of tied tensors, or one that is quantised.
    """
    planned = _planned(base, models, dtype, is_static=is_static)
    return tuple(sorted(planned, key=lambda tensor: -tensor.dtype.itemsize))


def check_merge(
    pipeline: Pipeline,
    base: Base,
    models: Sequence[FineTune],
    weights: Sequence[float],
    tensors: Sequence[PlannedTensor],
    metric: Metric | None,
) -> tuple[PlannedTensor, ...]:
    """Compare a chain, the models with their weights, the tensors and a metric with each other.

    Returns:
        The tensors, those whose inputs matter to the chain with the metric.

    Raises:
        UsageError: The parameters do not fit; two adapters replace whole modules; the metric lacks
            a moment, or is of another base.
        StarmergeError: No model changes anything; the metric is damaged.
    """
    _check_saved_modules(models)
    merged = [tensor for tensor in tensors if tensor.models]
    if not merged:
        raise StarmergeError("None of the models changes any tensor of the base.")
    tasks = [model.name for model in models]
    pipeline.check(tasks, weights, [tensor.source.name for tensor in merged])
    planned = tuple(tensors)
    if metric is not None:
        whitened = {t.source.name: t for t in tensors if t.is_whitened(pipeline)}
        check_metric(metric, base, pipeline, models, list(whitened))
        planned = tuple(
            replace(t, metric=metric) if t.source.name in whitened else t for t in tensors
        )
    pipeline.check_tensors(
        [t.context(tasks, weights, None) for t in planned if t.models],
        [
            t.context(tasks, weights, None)
            for t in planned
            if not t.models and t.source.dtype in MERGEABLE
        ],
    )
    return planned


def layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the layer of each tensor that belongs to one: its index, and how many there are.

    The layer is the first part of the name that is a number; layers whose names begin alike are
    counted together: ``encoder.layers.3.fc.weight`` is one of those of ``encoder.layers``. A name
    without a number, as that of an embedding, belongs to none.
    """
    places: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for name in names:
        prefix, _, number = layer_of(name).rpartition(".")
        if number.isdecimal():
            places[name] = prefix, int(number)
            counts[prefix] = max(counts.get(prefix, 0), int(number) + 1)
    return {name: (index, counts[prefix]) for name, (prefix, index) in places.items()}


def layer_of(name: str) -> str:
    """Return a tensor's name up to its first part that is a number, the layer; else all of it."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: place + 1])


def _check_apart(output: Path, source: Source) -> None:
    path, place = source.path.resolve(), output.resolve()
    if place in (path, *path.parents) or path in place.parents:
        raise UsageError(
            f"{output} is, holds or lies in the input {source}. Choose another output folder."
        )


def _check_saved_modules(models: Iterable[FineTune]) -> None:
    saving = [model for model in models if isinstance(model, Adapter) and model.saved]
    if len(saving) > 1:
        raise UsageError(
            f"{saving[0].source} and {saving[1].source} both replace whole modules "
            f"(modules_to_save in adapter_config.json), such as {min(saving[1].saved)}. Merge at "
            "most one such adapter."
        )


def _planned(
    base: Base, models: Sequence[FineTune], wanted: Dtype, *, is_static: bool
) -> Iterator[PlannedTensor]:
    places = layers(base.checkpoint)
    changed = [model.tensors for model in models]
    for name in base.checkpoint:
        source = base.checkpoint[name]
        changing = {t: model for t, model in enumerate(models) if name in changed[t]}
        for t, model in changing.items():
            if name in base.tied and not changed[t].issuperset(base.tied):
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
        if wanted != "keep" and dtype in MERGEABLE:
            dtype = getattr(torch, wanted)
        elif not is_static:
            dtype = torch.float32  # of differences there is no dtype to keep
        if changing or is_static:
            yield PlannedTensor(source, dtype, changing, base.is_embedding(name), places.get(name))
