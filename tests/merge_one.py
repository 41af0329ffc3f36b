"""Running a chain of methods on the task vectors of a single tensor."""

from dataclasses import dataclass

from starmerge_models.deltas import Delta
from starmerge_models.methods import Deltas, TensorContext, as_pipeline


@dataclass(frozen=True)
class Result:
    delta: Delta
    truncations: tuple
    """By delta; None where nothing was truncated."""


def given(deltas):
    return Deltas.of(dict(enumerate(deltas)))


def merge_one(
    method,
    deltas,
    *,
    tasks=None,
    shape=None,
    is_embedding=False,
    weights=None,
    base=None,
    inputs=None,
):
    """Merge the deltas of the first of `tasks` models; the others leave the tensor alone."""
    deltas = list(deltas)
    count = tasks or len(deltas)
    tensor = TensorContext(
        "weight",
        deltas[0].shape if shape is None else shape,
        is_embedding,
        tasks=tuple(map(str, range(count))),
        weights=(1.0,) * count if weights is None else tuple(weights),
        base=base,
        inputs=inputs,
    )
    chain = as_pipeline(method)
    chain.check(tensor.tasks, tensor.weights, [tensor.name])
    chain.check_tensors([tensor], [])
    prepared = chain.prepare(lambda look: iter([look(given(deltas), tensor)]))
    merged = prepared.merge(given(deltas), tensor)
    return Result(merged.delta, tuple(merged.truncations.get(t) for t in range(len(deltas))))
