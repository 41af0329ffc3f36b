"""The plan of a merge: everything that is checked before a tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from starmerge_models.checkpoints import models as checkpoints
from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.metric import Metric, open_metric
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.side_files import too_long
from starmerge_models.checkpoints.source import Source, folder_of, resolve
from starmerge_models.checkpoints.stacked import (
    bases_of,
    open_referenced_base,
    open_referenced_model,
    parts_of,
)
from starmerge_models.checkpoints.tensors import MERGEABLE, Checkpoint
from starmerge_models.checkpoints.unknown_base import unknown_base
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.layout import Contents, PlannedTensor, lay_out
from starmerge_models.merging.metric import check_metric, unused_tasks
from starmerge_models.merging.outputs import Output, is_output_file, make_output
from starmerge_models.merging.vocabulary import with_one_vocabulary
from starmerge_models.methods.method import TensorContext
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.recipe import Recipe
from starmerge_models.storage import FileState, Place, real, relative, storage_of


@dataclass(frozen=True)
class Input:
    """An input of a merge."""

    name: str
    kind: str
    source: Source
    checkpoints: tuple[Checkpoint, ...] = ()
    """Checkpoints whose tensors are read one by one."""
    other_files: tuple[Place, ...] = ()
    """Other files of the input, which are read whole."""

    @property
    def files(self) -> list[Place]:
        """All files of the input."""
        return [*self.other_files, *(file for own in self.checkpoints for file in own.files)]

    def label(self, file: Place) -> str:
        """Return the name of a file in reports: its path relative to the input's folder."""
        return relative(file, folder_of(self.source.path))


@dataclass(frozen=True)
class Plan(Contents):
    """A checked merge that can be run."""

    recipe: Recipe
    output: Output
    """The kind of output."""
    path: Place
    """The folder to create."""
    overwrite: bool
    reason: str | None = None
    """The reason for the chain, if ``auto`` has chosen it."""
    metric: Metric | None = None
    states: Mapping[Place, FileState] = field(default_factory=dict)
    """State of each input file at the time of planning."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the inputs for the user."""
        return (*self.base.notes, *(note for model in self.models for note in model.notes))

    @property
    def inputs(self) -> list[Input]:
        """All inputs: the base, if it has weights, the models, tokenizers, and the metric."""
        inputs = []
        if self.base.has_weights:
            bases = bases_of(self.base)
            for base in bases:
                name = _name_of_part("base", base.source, bases)
                weights = (base.checkpoint.opened,)
                inputs.append(Input(name, "base", base.source, weights, base.settings))
        for model in self.models:
            parts = parts_of(model)
            for part in parts:
                name = _name_of_part(model.name, part.source, parts)
                own = tuple(own.opened for own in part.checkpoints), tuple(part.other_files)
                inputs.append(Input(name, part.kind, part.source, *own))
        for file in self.base.made_of:
            source = Source(str(file.parent), file.parent, None, None)
            name = f"{file.parent.name}/{file.name}"
            inputs.append(Input(name, "tokenizer", source, other_files=(file,)))
        if self.metric is not None:
            file = self.metric.file
            source = Source(str(file), file, None, None)
            inputs.append(Input(file.name, "metric", source, other_files=(file,)))
        return inputs

    def check_unchanged(self) -> None:
        """Check that the input files have not changed since planning.

        Raises:
            StarmergeError: A file was changed, replaced or deleted.
        """
        for file, state in self.states.items():
            if not storage_of(file).is_unchanged(file, state):
                raise StarmergeError(
                    f"{file} was changed while it was merged, so what was made of it is neither "
                    "the old nor the new. Begin again when nothing writes there."
                )

    @property
    def use_of_metric(self) -> str:
        """Description of the inputs whose moments the merge uses."""
        whitened = ["whitened inputs"] if self.pipeline.uses_metric else []
        along = ", along the merge" if self.metric is not None and self.metric.along else ""
        own = [f"the tasks' own inputs{along}"] if self.pipeline.needs_moments else []
        return " and ".join([*whitened, *own])

    @property
    def unused_prompts(self) -> list[str]:
        """Tasks of the metric whose prompts the chain could use but that name no model."""
        return unused_tasks(self.metric, self.pipeline, self.tasks) if self.metric else []

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(tensor.bytes_to_read for tensor in self.tensors)

    @property
    def bytes_to_write(self) -> int:
        """Upper bound of the output's bytes."""
        return self.output.bytes_to_write(self)

    def memory(self, threads: int, limit: int) -> int:
        """Estimate the peak memory for tensors, in bytes.

        Args:
            threads: Number of tensors merged at the same time.
            limit: Limit in bytes for concurrent tensors; a single larger tensor may exceed it.
        """
        each = sorted(map(self.memory_of, self.tensors), reverse=True)
        return max(each[0], min(limit, sum(each[:threads]))) if each else 0

    def memory_of(self, tensor: PlannedTensor) -> int:
        """Estimate the memory for merging and writing a tensor, in bytes."""
        is_merged = bool(tensor.models)
        reading = tensor.source.bytes_computed
        merging = tensor.memory(self.pipeline, self.tasks) if is_merged else reading
        return merging + self.output.memory(self, tensor)

    def context(self, tensor: PlannedTensor, base: Tensor | None) -> TensorContext:
        """Return a tensor's context for the methods, with the base's values if they were read."""
        return tensor.context(self.tasks, [entry.weight for entry in self.recipe.models], base)


def make_plan(recipe: Recipe, path: Place, *, overwrite: bool = False, writes: bool = True) -> Plan:
    """Open all inputs of a recipe, check them, and lay out the output.

    Only configs and headers are read; with a metric also the whole base, at the end, to hash it.

    Args:
        recipe: The recipe.
        path: The output.
        overwrite: Whether the output may replace an earlier merge.
        writes: Whether the output will be written, so that its place must be free and have space.

    Raises:
        UsageError: A parameter is wrong, a model has another base, the output's place is taken, or
            the metric does not fit.
        StarmergeError: A tensor is missing, unknown or has a wrong shape, a file is broken, or the
            disk is too small.
    """
    pipeline = recipe.make_pipeline()
    is_file = is_output_file(recipe, path)
    if writes:
        storage_of(path).check_output(path, overwrite=overwrite, is_file=is_file)
    metric = None if recipe.metric is None else open_metric(recipe.metric)
    base, models = open_models(recipe)
    pipeline, reason = choose(pipeline, models, metric)
    if reason is not None:
        chosen = {"method": pipeline.name, "parameters": pipeline.parameters()}
        recipe = recipe.model_copy(update=chosen)
    sources = [part.source for model in models for part in parts_of(model)]
    sources += [part.source for part in bases_of(base)] if base.has_weights else []
    sources += [] if metric is None else [Source(str(metric.file), metric.file, None, None)]
    for source in sources if writes else ():
        _check_apart(path, source)
    output = make_output(recipe, pipeline, is_file=is_file)
    if output.needs_base:
        base = replace(base, notes=(*base.notes, *map(_note_too_long, too_long(base.source.path))))
    tensors = lay_out(base, models, output)
    weights = [entry.weight for entry in recipe.models]
    try:
        tensors = check_merge(pipeline, base, models, weights, tensors, metric)
    except UsageError as error:
        if reason is None:
            raise
        # Add the reason, because the error may name a method that auto has chosen.
        raise UsageError(f"{error} ({reason})") from error
    plan = Plan(pipeline, base, models, tensors, recipe, output, path, overwrite, reason, metric)
    output.check(plan)
    if writes:
        storage_of(path).check_free_space(path, plan.bytes_to_write)
    files = {file for entry in plan.inputs for file in entry.files}
    files.update(base.made_of)
    if output.needs_base:
        beside = base.side_files.values()
        files.update(file for file in beside if not isinstance(file, bytes))
    return replace(
        plan, states={file: storage_of(file).state(file) for file in sorted(files, key=str)}
    )


def open_models(recipe: Recipe) -> tuple[Base, tuple[FineTune, ...]]:
    """Open a recipe's base and models; reads configs, headers, and tokenizers that differ.

    Raises:
        UsageError: A model has another base, or is of a kind that cannot be merged, or its
            tokenizer does not fit that of the output.
        StarmergeError: A tensor is missing, unknown or has a wrong shape, or a file is broken.
    """
    if recipe.base is None:
        sources = [resolve(entry.path, may_be_file=True) for entry in recipe.models]
        base = unknown_base(sources, any_base=recipe.any_base)
    else:
        base = open_referenced_base(recipe.base, any_base=recipe.any_base)

    def opened(base: Base) -> tuple[FineTune, ...]:
        return tuple(
            open_referenced_model(
                entry.name, entry.path, base, any_base=recipe.any_base, common=recipe.common
            )
            for entry in recipe.models
        )

    found = checkpoints.open_models(opened, base, any_base=recipe.any_base)
    return with_one_vocabulary(recipe, *found)


def choose(
    pipeline: Pipeline, models: Collection[FineTune], metric: Metric | None
) -> tuple[Pipeline, str | None]:
    """Return the chain for some models, and the reason if ``auto`` has chosen it."""
    return pipeline.resolve_auto(
        [model.name for model in models],
        has_dense=any(model.rank(name) is None for model in models for name in model.tensors),
        prompts=None if metric is None else metric.tasks,
    )


def check_merge(
    pipeline: Pipeline,
    base: Base,
    models: Sequence[FineTune],
    weights: Sequence[float],
    tensors: Sequence[PlannedTensor],
    metric: Metric | None,
) -> tuple[PlannedTensor, ...]:
    """Check a chain, the models with their weights, the tensors and a metric against each other.

    Returns:
        The tensors, with the metric set for those whose inputs the chain uses.

    Raises:
        UsageError: The parameters do not fit; two adapters without a base replace whole modules;
            the metric lacks a moment, or is of another base.
        StarmergeError: No model changes any tensor; the metric is damaged.
    """
    _check_saved_modules(models)
    merged = [tensor for tensor in tensors if tensor.models]
    if not merged:
        raise StarmergeError("None of the models changes any tensor of the base.")
    if pipeline.merge.needs_base and not base.has_weights:
        raise UsageError(
            f"{pipeline.merge.name} works on the base's weights. Give the base before the models."
        )
    tasks = [model.name for model in models]
    pipeline.check(tasks, weights, [tensor.source.name for tensor in merged])
    if pipeline.merge.needs_base:
        tensors = [replace(t, reads_base=True) if t.models else t for t in tensors]
    planned = tuple(tensors)
    if metric is not None:
        if not base.has_weights:
            raise UsageError("A metric is of one base. Give the base before the models.")
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
    return tuple(
        replace(t, models={})
        if t.models
        and t.repeats_base
        and pipeline.merge.keeps_base(t.context(tasks, weights, None))
        else t
        for t in planned
    )


def _note_too_long(name: str) -> str:
    return (
        f"{name} of the base is not copied: it is too long for a tokenizer's file or code, and is "
        "taken for weights. Copy it yourself if the model needs it."
    )


def _name_of_part(whole: str, source: Source, parts: Collection[object]) -> str:
    """Return the name in reports of one of the models of which a base or a model is composed."""
    return whole if len(parts) == 1 else f"{whole}, {source}"


def _check_apart(output: Place, source: Source) -> None:
    path, place = real(source.path), real(output)
    if place in (path, *path.parents) or path in place.parents:
        raise UsageError(
            f"{output} is, holds or lies in the input {source}. Choose another output folder."
        )


def _check_saved_modules(models: Iterable[FineTune]) -> None:
    """Refuse whole modules in several adapters without a base, whose changes are unknown."""
    saving = [model for model in models if isinstance(model, Adapter) and model.carried]
    if len(saving) > 1:
        raise UsageError(
            f"{saving[0].source} and {saving[1].source} both replace whole modules "
            f"(modules_to_save in adapter_config.json), such as {min(saving[1].saved)}, and what "
            "the training changed in them is a difference from the base's. Give the base before "
            "the models."
        )
