"""Writing a merge that is not static: a vector for all tasks, a mask and a number for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from starmerge.checkpoints.emr_task import UNIFIED, mask_writer, pack, write_task
from starmerge.checkpoints.writer import ShardWriter
from starmerge.errors import StarmergeError
from starmerge.merging.fold import Folded, fold
from starmerge.merging.plan import Plan, PlannedTensor
from starmerge.merging.report import tensor_record
from starmerge.methods.emr import Rescalers, masks_of
from starmerge.methods.method import Deltas, TensorContext, Walk
from starmerge.methods.pipeline import Merged, Prepared
from starmerge.spectral import Truncation


def write_unified(
    plan: Plan, prepared: Prepared, walk: Walk, folder: Path, advance: Callable[[int], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Go through the model once; write the unified vector, and a folder for each task.

    Args:
        plan: The plan, of a merge that is not static.
        prepared: Its chain.
        walk: Goes over the models' own task vectors, in the plan's order.
        folder: Where the merge goes.
        advance: Is told how many bytes were written.

    Returns:
        The records of the tensors; and what was found of the whole model, by method.

    Raises:
        StarmergeError: The unified vector overflows the output's dtype.
    """
    tensors = {tensor.source.name: tensor for tensor in plan.tensors}
    names = [model.name for model in plan.models]
    rescalers = Rescalers(len(names))
    (folder / UNIFIED).mkdir()
    with ExitStack() as stack:
        unified = stack.enter_context(
            ShardWriter(folder / UNIFIED, [tensor.output for tensor in plan.tensors])
        )
        masks = []
        for t, name in enumerate(names):
            (folder / name).mkdir()
            layouts = [tensor.mask for tensor in plan.tensors if t in tensor.models]
            masks.append(stack.enter_context(mask_writer(folder / name, layouts)))

        def write(
            deltas: Deltas, context: TensorContext
        ) -> tuple[dict[str, Any], dict[int, tuple[float, float]]]:
            tensor = tensors[context.name]
            truncations: dict[int, Truncation] = {}
            inputs = prepared.transformed(deltas, context, truncations, weighted=True)
            held = Deltas.of(dict(inputs.items()))
            merged = Merged(
                plan.pipeline.merge.merge(held, context, prepared.surveys[-1]), truncations
            )
            tau_uni = _stored(merged, tensor)
            unified.write(context.name, tau_uni.weight)
            kept = {}
            sums: dict[int, tuple[float, float]] = {}
            for t, masked in masks_of(held, tau_uni.weight.reshape(merged.delta.shape)):
                masks[t].write(context.name, pack(masked.M))
                sums[t] = masked.norm, masked.masked_norm
                kept[names[t]] = float(masked.M.double().mean()) if masked.M.numel() else 0.0
            advance(tensor.output.nbytes + len(kept) * tensor.mask.nbytes)
            return tensor_record(plan, tensor, merged, tau_uni) | {"masks": kept}, sums

        records = []
        for record, sums in walk(write):
            records.append(record)
            for t, (norm, masked_norm) in sums.items():
                rescalers.add(t, norm, masked_norm)
    lambdas = dict(zip(names, rescalers.result(), strict=True))
    for name, rescaler in lambdas.items():
        write_task(folder / name, name, plan.base, rescaler)
    return records, {plan.pipeline.merge.name: {"rescalers": lambdas}}


def usage(plan: Plan) -> str:
    """Return how to get a task's model, for the card."""
    name = plan.models[0].name
    return (
        f"This folder is no model. It holds one vector for all tasks, in `{UNIFIED}`, and for each "
        f"task a folder with its mask and rescaler, which is a model to starmerge: `starmerge "
        f"merge BASE {plan.output.name}/{name} -m average -o OUT` makes the model of {name}."
    )


def _stored(merged: Merged, tensor: PlannedTensor) -> Folded:
    """Return τ_uni as it is stored: folded into nothing."""
    zero = torch.zeros((), dtype=torch.float32)
    folded = fold(zero.expand(tensor.source.shape), merged.delta, tensor.dtype)
    if not torch.isfinite(folded.weight).all():
        raise StarmergeError(
            f"The unified tensor {tensor.source.name} overflows {tensor.dtype}. Choose a wider "
            "--dtype, or none: then it is float32."
        )
    return folded
