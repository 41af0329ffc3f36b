"""Merging of deltas in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

from starmerge_models.deltas import Delta, Dense
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.checks import check_weights
from starmerge_models.merging.executors.executor import Executor, FunctionJob
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, as_pipeline

_Result = TypeVar("_Result")
_Kept = TypeVar("_Kept")


def merge_state(
    deltas: Sequence[Mapping[str, Delta]],
    method: Method | Pipeline | str = "star",
    *,
    weights: Sequence[float] | None = None,
    threads: int | None = None,
) -> dict[str, Delta]:
    """Merge deltas that are in memory.

    Names have no meaning here: no tensor is treated as an embedding. The result does not depend on
    ``threads``.

    Args:
        deltas: For each model, the deltas of the tensors that it changes, by name.
        method: A method, a chain, or a name such as "star+ties".
        weights: Factors of the task vectors, one for each model; by default all are 1.
        threads: Number of tensors merged at the same time; by default as many as for
            :func:`starmerge_models.merge`.

    Returns:
        For each tensor that some model changes, the update to add to the base. Dense results are
        matrices (m, n); see :func:`starmerge_models.deltas.matrix_shape`.

    Raises:
        UsageError: The method needs the base or a metric, or its parameters or the weights do not
            fit the deltas; two models disagree on the shape of a tensor.
        StarmergeError: A delta has a NaN or an infinity.
    """
    has_dense = any(isinstance(delta, Dense) for model in deltas for delta in model.values())
    pipeline, _ = as_pipeline(method).resolve_auto(has_dense=has_dense)
    check_one_update(pipeline)
    if pipeline.merge.needs_base:
        raise UsageError(
            f"{pipeline.merge.name} needs the base's weights: merge files with it, or what "
            "load_task_vectors reads of them."
        )
    names = list(dict.fromkeys(name for model in deltas for name in model))
    if not names:
        return {}
    for number, model in enumerate(deltas):
        for name, delta in model.items():
            if not delta.is_finite():
                raise StarmergeError(
                    f"Model {number}: the delta of {name} has a NaN or an infinity."
                )
    tasks = tuple(str(number) for number in range(len(deltas)))
    factors = check_weights(weights, len(deltas))
    pipeline.check(tasks, factors, names)

    def inputs(name: str) -> tuple[Deltas, TensorContext]:
        members = {t: model[name] for t, model in enumerate(deltas) if name in model}
        first = next(iter(members.values()))
        if len({delta.shape for delta in members.values()}) > 1:
            raise UsageError(
                f"The deltas of {name} have different shapes: "
                f"{sorted({delta.shape for delta in members.values()})}."
            )
        shape = first.layout if isinstance(first, Dense) else first.shape
        context = TensorContext(name, shape, is_embedding=False, tasks=tasks, weights=factors)
        return Deltas.of(members), context

    pipeline.check_tensors([inputs(name)[1] for name in names], [])
    with Threads(threads) as executor:
        return merge_all(pipeline, names, inputs, executor)


def merge_all(
    pipeline: Pipeline,
    names: Iterable[str],
    inputs: Callable[[str], tuple[Deltas, TensorContext]],
    executor: Executor,
    memory: Callable[[str], int] = lambda name: 0,
) -> dict[str, Delta]:
    """Merge every tensor of a model whose deltas are in memory.

    Args:
        pipeline: The chain, whose merge computes one update for all tasks.
        names: Names of the tensors that some model changes, in the order of processing.
        inputs: Returns the deltas and the context of a tensor.
        executor: The executor, with threads of this process.
        memory: Estimates the memory for merging a tensor, in bytes.
    """
    return merge_each(pipeline, names, inputs, lambda name, delta: delta, executor, memory)


def merge_each(
    pipeline: Pipeline,
    names: Iterable[str],
    inputs: Callable[[str], tuple[Deltas, TensorContext]],
    finish: Callable[[str, Delta], _Kept],
    executor: Executor,
    memory: Callable[[str], int] = lambda name: 0,
) -> dict[str, _Kept]:
    """Merge every tensor as :func:`merge_all` does, and return a function's results of the updates.

    Args:
        pipeline: As for :func:`merge_all`.
        names: As for :func:`merge_all`.
        inputs: As for :func:`merge_all`.
        finish: Called with the name and the merged update of each tensor.
        executor: As for :func:`merge_all`.
        memory: Estimates the bytes that merging a tensor, and finishing it, takes.
    """
    ordered = list(names)

    def run_all(work: Callable[[int], _Result]) -> Generator[_Result]:
        job = FunctionJob(work, lambda number: memory(ordered[number]))
        with closing(executor.run(job, range(len(ordered)))) as results:
            yield from results

    def walk(visit: Callable[[Deltas, TensorContext], _Result]) -> Generator[_Result]:
        return run_all(lambda number: visit(*inputs(ordered[number])))

    prepared = pipeline.prepare(walk)

    def merge_tensor(number: int) -> _Kept:
        name = ordered[number]
        return finish(name, prepared.merge(*inputs(name)).delta)

    with closing(run_all(merge_tensor)) as results:
        return dict(zip(ordered, results, strict=True))


def check_one_update(pipeline: Pipeline) -> None:
    """Check that a chain computes one update for all tasks.

    Raises:
        UsageError: It computes one for each task.
    """
    if "model" not in pipeline.merge.outputs:
        raise UsageError(
            f"{pipeline.merge.name} makes a model for each task, not one update for all: merge "
            f"files with it, or see starmerge_models.methods.{pipeline.merge.name}."
        )
