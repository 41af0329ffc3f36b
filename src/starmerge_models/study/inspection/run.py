"""Runs an inspection: opens the models and measures tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.deltas import Delta, Dense, matrix_shape
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.checks import check_base, check_delta, check_weights
from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.in_memory import check_one_update
from starmerge_models.merging.layout import PlannedTensor, lay_out
from starmerge_models.merging.plan import check_merge, choose, open_models
from starmerge_models.methods.memory import DeltaShape
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, Prepared, as_pipeline, make_pipeline
from starmerge_models.progress import progress_bar
from starmerge_models.recipe import make_recipe, model_entries, reference
from starmerge_models.spectral.gram import svd_dense_bytes
from starmerge_models.study.candidates import candidate_name
from starmerge_models.study.inspection.conflict import conflict_bytes
from starmerge_models.study.inspection.entries import entries_bytes
from starmerge_models.study.inspection.inspection import Inspection, make_inspection
from starmerge_models.study.inspection.spectrum import LEADING
from starmerge_models.study.inspection.tensor_measures import TensorMeasures, measure_tensor
from starmerge_models.study.inspection.totals import ModelInfo
from starmerge_models.study.names import model_name

_Result = TypeVar("_Result")

Models = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def inspect(
    base: str | Path,
    models: Models,
    *,
    eta: float = 40.0,
    methods: str | Method | Pipeline | Sequence[str | Method | Pipeline] = (),
    weights: Sequence[float] | None = None,
    merged: Models = (),
    any_base: bool = False,
    common: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Inspection:
    """Measure the task vectors of fine-tunes of one base, and the conflicts between them.

    Everything is computed from the weights; no model is run. Adapters stay in factored form. Base
    and models are opened and checked as by :func:`starmerge_models.merge`, and read tensor by
    tensor, so that only the current tensors are in memory. The result does not depend on
    ``threads``.

    With ``methods`` or ``merged``, merges are compared with their task vectors: how much of each
    task a merge keeps on the task's own inputs, and its other response there.

    Args:
        base: The base model: a folder, or a Hub id ``org/name`` or ``org/name@revision``.
        models: LoRA adapters and full fine-tunes, as folders or Hub ids; a mapping names them.
        eta: STAR's η, in percent; it determines the kept ranks and the subspaces of the paper's
            bound.
        methods: Methods, chains or their names, to merge the models by in memory.
        weights: Factors of the task vectors in these merges; by default all are 1.
        merged: Existing merges of the models: merged models or adapters.
        any_base: Accept models whose config names another base, or differs from the base's.
        common: Use only the tensors that the models share with the base.
        threads: How many tensors to measure concurrently; by default as many as for a merge.
        memory: Limit of the current tensors' memory in bytes, or as a text such as "4GB".
        progress: Whether to show a progress bar.

    Raises:
        UsageError: An argument is invalid: η, a method, a model that cannot be merged, or two
            merges or models with the same name.
        StarmergeError: An input is broken, does not fit, or has a NaN or an infinity, or the models
            change no tensor.

    Example:
        ``sm.inspect("base", ["adapters/a", "adapters/b"]).to_frame("conflicts")``
    """
    if not 0 < eta <= 100:
        raise UsageError(f"eta is {eta!r}. Give a percentage: above 0, up to 100.")
    single = isinstance(methods, str | Method | Pipeline)
    chains = _by_name([methods] if single else methods)  # type: ignore[list-item, arg-type]
    entries, others = model_entries(models), model_entries(merged)
    for entry in others:
        if entry["name"] in chains:
            raise UsageError(
                f"Two merges are called {entry['name']!r}. Give the existing merge another name: "
                "NAME=PATH."
            )
    recipe = make_recipe(
        {
            "base": reference(base),
            "models": [*entries, *others],
            "any_base": any_base,
            "common": common,
        }
    )
    opened, fine_tunes = open_models(recipe)
    tasks, merges = fine_tunes[: len(entries)], fine_tunes[len(entries) :]
    factors = check_weights(weights, len(tasks))
    tensors = [tensor for tensor in lay_out(opened, tasks) if tensor.models]
    if not tensors:
        raise StarmergeError("None of the models changes any tensor of the base.")
    chosen = {name: choose(chain, tasks, None)[0] for name, chain in chains.items()}
    for chain in chosen.values():
        check_merge(chain, opened, tasks, factors, lay_out(opened, tasks), None)
    reading = _TensorReader(opened, tasks, merges, tensors, factors, tuple(chosen.values()))
    with Threads(threads, memory) as executor:
        prepared = {
            name: _prepare(name, chain, reading, executor, show=progress)
            for name, chain in chosen.items()
        }
        measures = _walk(
            reading, executor, partial(reading.measure, prepared, eta), "Inspecting", show=progress
        )
        found = list(measures)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.source.dtype).removeprefix("torch.")] += tensor.source.nbytes
    return make_inspection(
        found,
        [ModelInfo(model.name, model.kind) for model in tasks],
        base=model_name(base),
        dtype=sizes.most_common(1)[0][0],
        eta=eta,
        notes=(*opened.notes, *(note for model in fine_tunes for note in model.notes)),
    )


def _by_name(methods: Iterable[str | Method | Pipeline]) -> dict[str, Pipeline]:
    """Return chains by their unique names."""
    chains: dict[str, Pipeline] = {}
    for chain in map(as_pipeline, methods):
        check_one_update(chain)
        name = candidate_name(chain)
        if chain.needs_moments:
            raise UsageError(
                f"{name} needs a metric of the inputs, and an inspection has none. Merge with "
                "starmerge merge --metric, and pass the result as an existing merge."
            )
        if name in chains:
            raise UsageError(f"The merge {name} is given twice. Leave one out.")
        chains[name] = chain
    return chains


class _TensorReader:
    """The tensors that at least one model changes, read lazily.

    Args:
        base: The base.
        models: The inspected models.
        merges: Existing merges of them.
        tensors: The tensors that at least one of the models changes.
        weights: Factors of the task vectors in merges.
        chains: The merges to compute.
    """

    def __init__(
        self,
        base: Base,
        models: Sequence[FineTune],
        merges: Sequence[FineTune],
        tensors: Sequence[PlannedTensor],
        weights: Sequence[float],
        chains: Sequence[Pipeline],
    ) -> None:
        self._base, self._merges, self.tensors = base, merges, tensors
        self._tasks = [model.name for model in models]
        self._weights = weights
        self._chains = chains

    def apply(self, look: Callable[[Deltas, TensorContext], _Result], number: int) -> _Result:
        """Apply a method's function to a tensor, whose task vectors are read lazily."""
        tensor = self.tensors[number]
        base = self._base.checkpoint.read(tensor.source.name)
        deltas = Deltas(
            {t: partial(self._delta, model, tensor, base) for t, model in tensor.models.items()}
        )
        return look(deltas, tensor.context(self._tasks, self._weights, base))

    def measure(self, prepared: Mapping[str, Prepared], eta: float, number: int) -> TensorMeasures:
        """Measure a tensor and its merges."""
        tensor = self.tensors[number]
        base = self._base.checkpoint.read(tensor.source.name)
        deltas = {t: self._delta(model, tensor, base) for t, model in tensor.models.items()}
        context = tensor.context(self._tasks, self._weights, base)
        merges: dict[str, Delta] = {
            name: chain.merge(Deltas.of(deltas), context).delta for name, chain in prepared.items()
        }
        for model in self._merges:
            if tensor.source.name in model.tensors:
                merges[model.name] = self._delta(model, tensor, base)
            else:
                nothing = torch.zeros(matrix_shape(tensor.source.shape))
                merges[model.name] = Dense(nothing)
        found = measure_tensor(deltas, merges, context, eta)
        if not math.isfinite(found.entries.base):
            check_base(tensor.source, base)
        return found

    def memory(self, number: int) -> int:
        """Estimate the bytes in memory while a tensor is measured."""
        tensor = self.tensors[number]
        star = make_pipeline("star")
        merging = max(tensor.memory(chain, self._tasks) for chain in (star, *self._chains))
        shape = tensor.tensor_shape(star, self._tasks)
        (m, n), p = shape.matrix, min(shape.matrix)
        ranks = [_triplets(delta, p) for delta in shape.deltas]
        dense = sum(delta.rank is None for delta in shape.deltas)
        held = dense * 8 * p * p + 8 * sum(ranks) * (m + n)
        decomposing = svd_dense_bytes(m, n, shape.width) if dense else 0
        merges = 4 * m * n * len(self._merges)
        work = max(conflict_bytes((m, n), ranks), entries_bytes((m, n), len(ranks)), decomposing)
        return merging + held + merges + work

    def _delta(self, model: FineTune, tensor: PlannedTensor, base: Tensor) -> Delta:
        delta = model.delta(tensor.source.name, base)
        check_delta(delta, model, tensor.source, base)
        return delta


def _triplets(delta: DeltaShape, p: int) -> int:
    """Estimate how many triplets of a task vector are in memory."""
    return min(p, delta.rank if delta.rank is not None else max(LEADING, math.ceil(0.3 * p)))


def _prepare(
    name: str, chain: Pipeline, reading: _TensorReader, executor: Threads, *, show: bool
) -> Prepared:
    """Run the surveys of a chain's methods over the whole model."""

    def walk(look: Callable[[Deltas, TensorContext], _Result]) -> Generator[_Result]:
        return _walk(reading, executor, partial(reading.apply, look), f"Merging: {name}", show=show)

    return chain.prepare(walk)


def _walk(
    reading: _TensorReader,
    executor: Threads,
    work: Callable[[int], _Result],
    label: str,
    *,
    show: bool,
) -> Generator[_Result]:
    """Yield the result of the work on each tensor, in order, with a progress bar."""
    numbers = range(len(reading.tensors))
    with (
        progress_bar(label, len(numbers), show=show) as advance,
        closing(executor.run(FunctionJob(work, reading.memory), numbers)) as seen,
    ):
        for each in seen:
            advance(1)
            yield each
