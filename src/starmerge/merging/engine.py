"""The merge itself: a walk over the base's tensors, some at a time, from files to files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.card import write_card
from starmerge.checkpoints.output import REPORT, files_in, output_folder, printable
from starmerge.checkpoints.tensors import prefetch
from starmerge.checkpoints.writer import ShardWriter, write_json
from starmerge.deltas import Delta, is_finite
from starmerge.errors import StarmergeError
from starmerge.merging.checks import check_base, check_delta, check_weights
from starmerge.merging.fold import Fold
from starmerge.merging.plan import Plan, PlannedTensor, make_plan
from starmerge.merging.report import InputHashes, MergeReport, make_report, tensor_record
from starmerge.merging.unified import usage, write_unified
from starmerge.merging.workers import Workers
from starmerge.methods.method import Deltas, Method, TensorContext
from starmerge.methods.pipeline import Pipeline, Prepared, as_pipeline
from starmerge.progress import progress_bar
from starmerge.recipe import Dtype, Recipe, make_recipe, model_entries, reference

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
    metric: str | Path | None = None,
    dtype: Dtype = "keep",
    any_base: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merge fine-tunes of one base into a model that ``transformers`` loads.

    The folder appears when it is complete. Its bytes do not depend on ``threads`` and ``memory``.

    Args:
        base: The base model: a folder, or a Hub id ``org/name`` or ``org/name@revision``.
        models: LoRA adapters in PEFT's layout and full fine-tunes, as folders or Hub ids; a mapping
            gives them names.
        method: A method such as ``Star(eta=40)``, a chain of some, or a name such as "star+ties".
        output: The folder to create.
        weights: Factors of the task vectors, one for each model; by default all are 1.
        metric: A file of :func:`starmerge.calibrate` for this base: spectral methods then merge in
            whitened inputs.
        dtype: Dtype of the floating-point tensors; "keep" keeps each as it is.
        any_base: Accept adapters whose config names another base.
        overwrite: Replace what stands at ``output``.
        threads: How many tensors are merged at once, each by one thread; by default as many as
            there are processors, or as OMP_NUM_THREADS says.
        memory: Bytes that the tensors that are merged at once may take, or a text such as "4GB";
            by default a quarter of the machine's memory. A tensor that needs more is merged alone.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: Something was asked for wrongly; nothing was read or written.
        StarmergeError: An input is broken or does not fit; nothing is left at ``output``.

    Example:
        ``starmerge.merge("base", ["a", "b"], starmerge.Star(eta=40), output="merged")``
    """
    entries = model_entries(models)
    pipeline = as_pipeline(method)
    factors = check_weights(weights, len(entries))
    recipe = make_recipe(
        {
            "base": reference(base),
            "models": [
                {**entry, "weight": weight} for entry, weight in zip(entries, factors, strict=True)
            ],
            "method": pipeline.name,
            "parameters": pipeline.parameters(),
            "metric": None if metric is None else str(metric),
            "dtype": dtype,
            "any_base": any_base,
        }
    )
    plan = make_plan(recipe, Path(output), overwrite=overwrite)
    return run(plan, threads=threads, memory=memory, progress=progress)


def run(
    plan: Plan,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> MergeResult:
    """Carry out a plan; see :func:`merge`.

    Raises:
        UsageError: ``threads`` or ``memory`` is not a positive number.
        StarmergeError: A NaN or an infinity, in an input or by overflow of the output's dtype; a
            file that is shorter than it was. Nothing is left at the plan's output.
    """
    inputs = _Inputs()
    pool = Workers(threads, memory)
    with (
        output_folder(plan.output, overwrite=plan.overwrite) as folder,
        pool as workers,
        InputHashes(plan) as hashes,
    ):
        walk = partial(_walk, plan, workers, inputs, progress)
        prepared = plan.pipeline.prepare(walk)
        findings = prepared.findings
        with progress_bar("merging", plan.bytes_to_write, show=progress, in_bytes=True) as advance:
            if plan.pipeline.merge.is_static:
                records = _write_weights(plan, prepared, workers, inputs, folder, advance)
            else:
                walk = partial(_walk, plan, workers, inputs, False)
                records, found = write_unified(plan, prepared, walk, folder, advance)
                findings |= found
        report = make_report(plan, findings, records, hashes.result(), inputs.changing)
        _write_side_files(plan, folder, report)
    return MergeResult(plan.output, report)


def _write_weights(
    plan: Plan,
    prepared: Prepared,
    workers: Workers,
    inputs: _Inputs,
    folder: Path,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write the merged model's weights; return the records of the merged tensors."""
    records = []
    with ShardWriter(folder, [tensor.output for tensor in plan.tensors]) as writer:

        def write(tensor: PlannedTensor) -> dict[str, Any] | None:
            name = tensor.source.name
            if tensor.is_copied:
                writer.copy(name, plan.base.checkpoint)
                return None
            base = plan.base.checkpoint.read(name)
            if not tensor.models:
                writer.write(name, _finite(base.to(tensor.dtype), base, tensor))
                return None
            merged = prepared.merge(inputs.of(tensor, base), plan.context(tensor, base))
            adding = Fold(base, merged.delta, tensor.dtype)
            for start, panel in adding.panels():
                writer.write(name, _finite(panel, base, tensor), start)
            return tensor_record(plan, tensor, merged, adding)

        with closing(_in_order(plan, workers, write, plan.tensors)) as written:
            for tensor, record in zip(plan.tensors, written, strict=True):
                if record is not None:
                    records.append(record)
                advance(tensor.output.nbytes)
    return records


def _walk(
    plan: Plan,
    workers: Workers,
    inputs: _Inputs,
    progress: bool,
    look: Callable[[Deltas, TensorContext], _Seen],
) -> Iterator[_Seen]:
    """Yield what ``look`` returns for each tensor that some model changes."""

    def see(tensor: PlannedTensor) -> _Seen:
        base = plan.base.checkpoint.read(tensor.source.name)
        return look(inputs.of(tensor, base), plan.context(tensor, base))

    size = sum(tensor.bytes_to_read for tensor in plan.merged)
    with (
        progress_bar("surveying", size, show=progress, in_bytes=True) as advance,
        closing(_in_order(plan, workers, see, plan.merged)) as seen,
    ):
        for tensor, result in zip(plan.merged, seen, strict=True):
            yield result
            advance(tensor.bytes_to_read)


def _in_order(
    plan: Plan,
    workers: Workers,
    work: Callable[[PlannedTensor], _Seen],
    tensors: Sequence[PlannedTensor],
) -> Generator[_Seen]:
    """Work on some tensors at once, and read ahead those that come next; yield in their order."""

    def announce(tensor: PlannedTensor) -> None:
        for info in tensor.inputs:
            prefetch(info)

    return workers.in_order(
        work,
        tensors,
        memory=plan.memory_of,
        announce=announce,
        nbytes=lambda tensor: tensor.bytes_to_read,
    )


class _Inputs:
    """The task vectors of the models, which are checked when they are read for the first time."""

    def __init__(self) -> None:
        self.changing: set[int] = set()
        """Numbers of the models of which some delta that was read is not zero."""
        self._checked: set[tuple[int, str]] = set()

    def of(self, tensor: PlannedTensor, base: Tensor) -> Deltas:
        """Return the task vectors of a tensor, given the base's."""
        loaders = {t: partial(self._load, tensor, base, t) for t in tensor.models}
        return Deltas(loaders)

    def _load(self, tensor: PlannedTensor, base: Tensor, t: int) -> Delta:
        model, name = tensor.models[t], tensor.source.name
        delta = model.delta(name, base)
        if (t, name) not in self._checked:
            check_delta(delta, model, tensor.source, base)
            if t not in self.changing and not delta.is_zero():
                self.changing.add(t)
            self._checked.add((t, name))
        return delta


def _finite(weight: Tensor, base: Tensor, tensor: PlannedTensor) -> Tensor:
    """Return a part of the output, made from the base's, unless it has a NaN or an infinity."""
    if not is_finite(weight):
        check_base(tensor.source, base)
        raise StarmergeError(
            f"The merged tensor {tensor.source.name} overflows {tensor.dtype}. Choose a wider "
            "--dtype; if that is not enough, look at the scale of the updates (lora_alpha)."
        )
    return weight


def _write_side_files(plan: Plan, folder: Path, report: MergeReport) -> None:
    """Write card and report, beside weights of a model also config and tokenizer."""
    summary, library = report.summary(), "transformers"
    if plan.pipeline.merge.is_static:
        for file in plan.base.side_files:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", _config(plan.base, plan.recipe))
    else:
        summary, library = f"{summary} {usage(plan)}", "starmerge"
    write_card(
        folder / "README.md",
        printable(plan.output.name),
        plan.base,
        plan.models,
        plan.recipe.to_yaml(),
        summary,
        library=library,
        metric=None if plan.metric is None else plan.metric.file.name,
    )
    report.content["files"] = [*files_in(folder), REPORT]
    write_json(folder / REPORT, report.content)


def _config(base: Base, recipe: Recipe) -> dict[str, Any]:
    """Return the base's config, without its name and with the dtype of the output."""
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    if recipe.dtype != "keep":
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = recipe.dtype
    return config
