"""The merge itself: a walk over the base's tensors, one at a time, from files to files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.card import write_card
from starmerge.checkpoints.models import FineTune
from starmerge.checkpoints.writer import REPORT, ShardWriter, output_folder, write_json
from starmerge.deltas import Delta, Dense
from starmerge.errors import StarmergeError, UsageError
from starmerge.merging.fold import fold
from starmerge.merging.plan import Plan, PlannedTensor, make_plan
from starmerge.merging.report import InputHashes, MergeReport, make_report, tensor_record
from starmerge.merging.unified import usage, write_unified
from starmerge.methods.method import Deltas, Method, TensorContext
from starmerge.methods.pipeline import Pipeline, Prepared, as_pipeline
from starmerge.progress import progress_bar
from starmerge.recipe import Dtype, Recipe, make_recipe, parse_models

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class MergeResult:
    """A finished merge."""

    path: Path
    """The folder of the merged model."""
    report: MergeReport


def merge(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    method: Method | Pipeline | str = "star",
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    dtype: Dtype = "keep",
    any_base: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> MergeResult:
    """Merge fine-tunes of one base into a model that ``transformers`` loads.

    Memory is bounded by the largest tensor. The folder appears when it is complete.

    Args:
        base: The base model: a folder, or a Hub id ``org/name`` or ``org/name@revision``.
        models: LoRA adapters in PEFT's layout and full fine-tunes, as folders or Hub ids; a mapping
            gives them names.
        method: A method such as ``Star(eta=40)``, a chain of some, or a name such as "star+ties".
        output: The folder to create.
        weights: Factors of the task vectors, one for each model; by default all are 1.
        dtype: Dtype of the floating-point tensors; "keep" keeps each as it is.
        any_base: Accept adapters whose config names another base.
        overwrite: Replace what stands at ``output``.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: Something was asked for wrongly; nothing was read or written.
        StarmergeError: An input is broken or does not fit; nothing is left at ``output``.

    Example:
        ``starmerge.merge("base", ["a", "b"], starmerge.Star(eta=40), output="merged")``
    """
    if isinstance(models, str | Path):
        models = [models]
    if isinstance(models, Mapping):
        entries = [{"name": name, "path": str(path)} for name, path in models.items()]
    else:
        entries = parse_models([str(model) for model in models])
    pipeline = as_pipeline(method)
    factors = _weights(weights, len(entries))
    recipe = make_recipe(
        {
            "base": str(base),
            "models": [
                {**entry, "weight": weight} for entry, weight in zip(entries, factors, strict=True)
            ],
            "method": pipeline.name,
            "parameters": pipeline.parameters(),
            "dtype": dtype,
            "any_base": any_base,
        }
    )
    return run(make_plan(recipe, Path(output), overwrite=overwrite), progress=progress)


def run(plan: Plan, *, progress: bool = False) -> MergeResult:
    """Carry out a plan.

    Raises:
        StarmergeError: A NaN or an infinity, in an input or by overflow of the output's dtype; a
            file that ends early. Nothing is left at the plan's output.
    """
    changing: set[int] = set()
    prepared = plan.pipeline.prepare(partial(_walk, plan, changing, progress))
    findings = prepared.findings
    with (
        output_folder(plan.output, overwrite=plan.overwrite) as folder,
        ThreadPoolExecutor(1, "sha256") as pool,
        progress_bar("merging", plan.bytes_to_write, show=progress, in_bytes=True) as advance,
    ):
        hashes = InputHashes(plan, pool)
        try:
            if plan.pipeline.merge.is_static:
                records = _write_weights(plan, prepared, changing, folder, advance)
            else:
                walk = partial(_walk, plan, changing, False)
                records, found = write_unified(plan, prepared, walk, folder, advance)
                findings |= found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        report = make_report(plan, findings, records, hashes.result(), changing)
        _write_side_files(plan, folder, report)
    return MergeResult(plan.output, report)


def merge_state(
    deltas: Sequence[Mapping[str, Delta]],
    method: Method | Pipeline | str = "star",
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Delta]:
    """Merge deltas that are in memory.

    Names mean nothing here: no tensor counts as an embedding.

    Args:
        deltas: For each model, the delta of each tensor it changes, by name.
        method: A method, a chain of some, or a name such as "star+ties".
        weights: Factors of the task vectors, one for each model; by default all are 1.

    Returns:
        For each tensor that some model changes, what to add to the base. Dense results are
        matrices (m, n); see :func:`starmerge.deltas.matrix_shape`.

    Raises:
        UsageError: The method needs what deltas in memory do not have, or its parameters and the
            weights do not fit them.
        ValueError: Two models disagree on the shape of a tensor, or one has a NaN or an infinity.
    """
    pipeline = as_pipeline(method)
    if not pipeline.merge.is_static:
        raise UsageError(
            f"{pipeline.merge.name} makes a model for each task, not one update for all: merge "
            f"files with it, or see starmerge.methods.{pipeline.merge.name}."
        )
    if pipeline.merge.needs_base:
        raise UsageError(f"{pipeline.merge.name} needs the base's weights: merge files with it.")
    names = list(dict.fromkeys(name for model in deltas for name in model))
    if not names:
        return {}
    for number, model in enumerate(deltas):
        for name, delta in model.items():
            if not _is_finite(delta):
                raise ValueError(f"Model {number}: the delta of {name} has a NaN or an infinity.")
    tasks = tuple(str(number) for number in range(len(deltas)))
    factors = _weights(weights, len(deltas))
    pipeline.check(tasks, factors, names)

    def inputs(name: str) -> tuple[Deltas, TensorContext]:
        members = {t: model[name] for t, model in enumerate(deltas) if name in model}
        first = next(iter(members.values()))
        if len({delta.shape for delta in members.values()}) > 1:
            raise ValueError(
                f"The deltas of {name} have different shapes: "
                f"{sorted({delta.shape for delta in members.values()})}."
            )
        shape = tuple(first.tensor.shape) if isinstance(first, Dense) else first.shape
        context = TensorContext(name, shape, is_embedding=False, tasks=tasks, weights=factors)
        return Deltas.of(members), context

    def walk(look: Callable[[Deltas, TensorContext], _Seen]) -> Iterator[_Seen]:
        return (look(*inputs(name)) for name in names)

    prepared = pipeline.prepare(walk)
    return {name: prepared.merge(*inputs(name)).delta for name in names}


def _write_weights(
    plan: Plan,
    prepared: Prepared,
    changing: set[int],
    folder: Path,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write the merged model's weights; return the records of the merged tensors."""
    records = []
    with ShardWriter(folder, [tensor.output for tensor in plan.tensors]) as writer:
        for tensor in plan.tensors:
            name = tensor.source.name
            if tensor.is_copied:
                writer.copy(name, plan.base.checkpoint)
            elif not tensor.models:
                base = plan.base.checkpoint.read(name)
                writer.write(name, _finite(base.to(tensor.dtype), base, tensor))
            else:
                merged, record = _merge_tensor(plan, prepared, tensor, changing)
                writer.write(name, merged)
                records.append(record)
            advance(tensor.output.nbytes)
    return records


def _walk(
    plan: Plan, changing: set[int], progress: bool, look: Callable[[Deltas, TensorContext], _Seen]
) -> Iterator[_Seen]:
    """Yield what ``look`` returns for each tensor that some model changes."""
    size = sum(tensor.bytes_to_read for tensor in plan.merged)
    with progress_bar("surveying", size, show=progress, in_bytes=True) as advance:
        for tensor in plan.merged:
            base = plan.base.checkpoint.read(tensor.source.name)
            yield look(_deltas(plan, tensor, base, changing), plan.context(tensor, base))
            advance(tensor.bytes_to_read)


def _merge_tensor(
    plan: Plan, prepared: Prepared, tensor: PlannedTensor, changing: set[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Return a merged tensor in its output dtype, and its record in the report."""
    base = plan.base.checkpoint.read(tensor.source.name)
    merged = prepared.merge(_deltas(plan, tensor, base, changing), plan.context(tensor, base))
    folded = fold(base, merged.delta, tensor.dtype)
    return _finite(folded.weight, base, tensor), tensor_record(plan, tensor, merged, folded)


def _deltas(plan: Plan, tensor: PlannedTensor, base: Tensor, changing: set[int]) -> Deltas:
    """Return the task vectors of a tensor, each of which is checked when it is read.

    The numbers of the models whose delta is not zero are added to ``changing``.
    """
    name = tensor.source.name

    def load(t: int, model: FineTune) -> Delta:
        delta = model.delta(name, base)
        if not _is_finite(delta):
            _finite(base, base, tensor)
            raise StarmergeError(
                f"{model.source}: the update of tensor {name} has a NaN or an infinity. The "
                "fine-tune diverged, or its file is damaged."
            )
        if t not in changing and _is_nonzero(delta):
            changing.add(t)
        return delta

    return Deltas({t: partial(load, t, model) for t, model in tensor.models.items()})


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise UsageError(f"There are {len(weights)} weights for {count} models. Give one for each.")
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"The weights are {list(weights)}. Give finite numbers.")
    return tuple(float(weight) for weight in weights)


def _finite(weight: Tensor, base: Tensor, tensor: PlannedTensor) -> Tensor:
    """Return a tensor of the output, made from the base's, unless it has a NaN or an infinity."""
    if not torch.isfinite(weight).all():
        name = tensor.source.name
        if not torch.isfinite(base).all():
            raise StarmergeError(f"{tensor.source.file}: tensor {name} has a NaN or an infinity.")
        raise StarmergeError(
            f"The merged tensor {name} overflows {tensor.dtype}. Choose a wider --dtype; if that "
            "is not enough, look at the scale of the updates (lora_alpha)."
        )
    return weight


def _is_nonzero(delta: Delta) -> bool:
    if isinstance(delta, Dense):
        return bool(delta.tensor.any())
    return bool(delta.B.any()) and bool(delta.A.any()) and delta.scale != 0


def _is_finite(delta: Delta) -> bool:
    if isinstance(delta, Dense):
        return bool(torch.isfinite(delta.tensor).all())
    factors = all(bool(torch.isfinite(factor).all()) for factor in (delta.B, delta.A))
    return factors and math.isfinite(delta.scale)


def _write_side_files(plan: Plan, folder: Path, report: MergeReport) -> None:
    """Write card and report, beside weights of a model also config and tokenizer."""
    summary, library = report.summary(), "transformers"
    if plan.pipeline.merge.is_static:
        for file in plan.base.side_files:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", _config(plan.base, plan.recipe))
    else:
        summary, library = f"{summary} {usage(plan)}", "starmerge"
    write_json(folder / REPORT, report.content)
    write_card(
        folder / "README.md",
        plan.output.name,
        plan.base,
        plan.models,
        plan.recipe.to_yaml(),
        summary,
        library=library,
    )


def _config(base: Base, recipe: Recipe) -> dict[str, Any]:
    """Return the base's config, without its name and with the dtype of the output."""
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    if recipe.dtype != "keep":
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = recipe.dtype
    return config
