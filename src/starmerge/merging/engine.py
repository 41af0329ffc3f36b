"""The merge itself: a walk over the base's tensors, one at a time, from files to files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.card import write_card
from starmerge.checkpoints.writer import REPORT, ShardWriter, output_folder, write_json
from starmerge.deltas import Delta, Dense, LowRank
from starmerge.errors import StarmergeError
from starmerge.merging.fold import fold
from starmerge.merging.plan import Plan, PlannedTensor, make_plan
from starmerge.merging.report import InputHashes, MergeReport, make_report, tensor_record
from starmerge.methods.method import Method, TensorContext
from starmerge.progress import progress_bar
from starmerge.recipe import Dtype, Recipe, make_recipe, parse_models


@dataclass(frozen=True)
class MergeResult:
    """A finished merge."""

    path: Path
    """The folder of the merged model."""
    report: MergeReport


def merge(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    method: Method | str = "star",
    *,
    output: str | Path,
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
        method: A method such as ``Star(eta=40)``, or its name.
        output: The folder to create.
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
    recipe = make_recipe(
        {
            "base": str(base),
            "models": entries,
            "method": method if isinstance(method, str) else method.name,
            "parameters": {} if isinstance(method, str) else method.parameters(),
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
    records = []
    with (
        output_folder(plan.output, overwrite=plan.overwrite) as folder,
        ThreadPoolExecutor(1, "sha256") as pool,
        progress_bar("merging", plan.bytes_to_write, show=progress, in_bytes=True) as advance,
    ):
        hashes = InputHashes(plan, pool)
        try:
            with ShardWriter(folder, [tensor.output for tensor in plan.tensors]) as writer:
                for tensor in plan.tensors:
                    name = tensor.source.name
                    if tensor.is_copied:
                        writer.copy(name, plan.base.checkpoint)
                    elif not tensor.models:
                        base = plan.base.checkpoint.read(name)
                        writer.write(name, _finite(base.to(tensor.dtype), base, tensor))
                    else:
                        merged, record = _merge_tensor(plan, tensor)
                        writer.write(name, merged)
                        records.append(record)
                    advance(tensor.output.nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        report = make_report(plan, records, hashes.result())
        _write_side_files(plan, folder, report)
    return MergeResult(plan.output, report)


def merge_state(deltas: Sequence[Mapping[str, Delta]], method: Method) -> dict[str, Delta]:
    """Merge deltas that are in memory.

    Names mean nothing here: no tensor counts as an embedding.

    Args:
        deltas: For each model, the delta of each tensor it changes, by name.
        method: The method.

    Returns:
        For each tensor that some model changes, what to add to the base. Dense results are
        matrices (m, n); see :func:`starmerge.deltas.matrix_shape`.

    Raises:
        ValueError: Two models disagree on the shape of a tensor, or one has a NaN or an infinity.
    """
    merged = {}
    for name in dict.fromkeys(name for model in deltas for name in model):
        first = next(model[name] for model in deltas if name in model)
        shape = tuple(first.tensor.shape) if isinstance(first, Dense) else first.shape
        context = TensorContext(name, shape, is_embedding=False, tasks=len(deltas))
        members = (model[name] for model in deltas if name in model)
        merged[name] = method.merge(members, context).delta
    return merged


def _merge_tensor(plan: Plan, tensor: PlannedTensor) -> tuple[Tensor, dict[str, Any]]:
    """Return a merged tensor in its output dtype, and its record in the report."""
    name = tensor.source.name
    base = plan.base.checkpoint.read(name)

    def deltas() -> Iterator[Delta]:
        for model in tensor.models:
            delta = model.delta(name, base)
            if not _is_finite(delta):
                _finite(base, base, tensor)
                raise StarmergeError(
                    f"{model.source}: the update of tensor {name} has a NaN or an infinity. The "
                    "fine-tune diverged, or its file is damaged."
                )
            yield delta
            del delta  # or it would stand beside the next one

    merged = plan.method.merge(deltas(), plan.context(tensor))
    folded = fold(base, merged.delta, tensor.dtype)
    return _finite(folded.weight, base, tensor), tensor_record(tensor, merged, folded)


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


def _is_finite(delta: Delta) -> bool:
    parts = (delta.B, delta.A) if isinstance(delta, LowRank) else (delta.tensor,)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _write_side_files(plan: Plan, folder: Path, report: MergeReport) -> None:
    """Write config, tokenizer, card and report beside the weights."""
    for file in plan.base.side_files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", _config(plan.base, plan.recipe))
    write_json(folder / REPORT, report.content)
    write_card(
        folder / "README.md",
        plan.output.name,
        plan.base,
        plan.models,
        plan.recipe.to_yaml(),
        report.summary(),
    )


def _config(base: Base, recipe: Recipe) -> dict[str, Any]:
    """Return the base's config, without its name and with the dtype of the output."""
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    if recipe.dtype != "keep":
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = recipe.dtype
    return config
