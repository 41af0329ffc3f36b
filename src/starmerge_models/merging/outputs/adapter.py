"""Output as an adapter: the merged update as a LoRA in the format of the merged adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.experts import stack_of
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.file import (
    CONFIG,
    WEIGHTS,
    Module,
    adapter_config,
    target_modules,
)
from starmerge_models.checkpoints.opening import open_checkpoint
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter, json_bytes
from starmerge_models.deltas import matrix_shape
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.fold import fold
from starmerge_models.merging.layout import Contents, PlannedTensor
from starmerge_models.merging.outputs.approximation import (
    approximate,
    approximation_bytes,
    distance_bytes,
    rounded,
)
from starmerge_models.merging.outputs.model import finite
from starmerge_models.merging.outputs.output import Finished, Slot
from starmerge_models.merging.outputs.places import (
    AdapterPlace,
    carried_over,
    places_of,
    style_of,
    unadapted_modules,
)
from starmerge_models.methods.memory import TensorShape
from starmerge_models.methods.pipeline import Merged, Pipeline
from starmerge_models.recipe import Dtype
from starmerge_models.storage import OutputFolder
from starmerge_models.versions import __version__

FACTORS = "factors"
"""Temporary folder of the factors until all ranks are known."""

_COMMON_METADATA = (
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "ss_base_model_version",
    "ss_v2",
)
"""Header keys that identify the base model of an adapter; copied if all adapters agree."""

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's task types, by the suffix of transformers' class names."""


@dataclass(frozen=True)
class AdapterOutput:
    """An adapter whose B·A is the merged update: a folder, or a single file.

    It has the format of the merged adapters: PEFT's, or for diffusion models that of kohya or
    diffusers. PEFT's format needs a config file, so it is always a folder.

    If the update has no more factors than the rank allows, they are written unchanged, in float32,
    and the adapter is exact: merged alone into the base, it gives the bytes of the merged model.
    Otherwise the adapter contains the leading singular triplets of the update, the best
    approximation of that rank (Eckart and Young), as U√σ and √σVᵀ.

    Vectors have no factors, and tied embeddings have no separate module: changes of these by full
    fine-tunes are left out, and count in the error.

    Args:
        wanted_dtype: Dtype of the factors; "keep" is float32, in which they are computed.
        rank: The highest rank; None for as high as the updates need.
        max_error: Refuse an adapter whose relative error of the update, in the Frobenius norm, is
            larger.
        is_file: Write a single file instead of a folder.
        recipe: The recipe in YAML, for the header of a file without a report.
    """

    wanted_dtype: Dtype
    rank: int | None = None
    max_error: float | None = None
    is_file: bool = False
    recipe: str = ""

    kind = "adapter"
    needs_base = False
    is_assembled = True
    reads_inputs = False

    writing: ClassVar[type[AdapterWriting]]
    """Class of the writer."""

    @property
    def member(self) -> str | None:
        """The only file of the folder that is published; None for the whole folder."""
        return WEIGHTS["kohya"] if self.is_file else None

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype | None:
        """Return the dtype of the factors for merged tensors, and None for others."""
        dtype: torch.dtype = getattr(
            torch, "float32" if self.wanted_dtype == "keep" else self.wanted_dtype
        )
        return dtype if is_merged else None

    def check(self, contents: Contents) -> None:
        """Check that the adapter has content, and that a single file can be loaded."""
        self.check_places(contents)
        if self.is_file and style_of(contents) == "peft":
            raise UsageError(
                "The adapters have PEFT's layout, in which a config beside the file says what the "
                "updates are scaled by. Give a folder as the output."
            )

    def check_places(self, contents: Contents) -> None:
        """Check that an update can be stored in an adapter, and that all of joined experts can."""
        for tensor in contents.tensors:
            if stack_of(tensor.source.name):
                raise UsageError(
                    f"{tensor.source.name} is one of several joined experts, for whose updates an "
                    "adapter is not written. Write a model."
                )
        places = places_of(contents)
        for name, place in places.items():
            if isinstance(place, str) and name in contents.base.tied:
                raise UsageError(
                    f"{name} is replaced whole, together with the output layer that is tied to it, "
                    "and an adapter is not written of both. Write a model."
                )
        if all(place is None for place in places.values()) and not carried_over(contents):
            raise UsageError(
                "Nothing that the models change can be in an adapter: neither vectors nor tied "
                "embeddings can. Write a model."
            )

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Estimate the memory of the decomposition and of the written factors, in bytes."""
        m, n = matrix_shape(tensor.source.shape)
        known = tensor.tensor_shape(contents.pipeline, contents.tasks)
        r = contents.pipeline.result(known).rank
        k = min(x for x in (self.rank, r, m, n) if x is not None)
        needs = [approximation_bytes(m, n, r, k, known.width)]
        if tensor.dtype != torch.float32:
            needs.append(distance_bytes(m, n, k))
        return max(needs) + 24 * (m + n) * k

    def bytes_to_write(self, contents: Contents) -> int:
        """Return twice the bytes of the factors at the highest rank that may be needed."""
        return 2 * sum(tensor.nbytes for tensor in self._layout(contents, places_of(contents)))

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes that are read for a tensor, which are many more than are written."""
        return tensor.bytes_to_read

    def lay_out(self, contents: Contents, folder: OutputFolder) -> AdapterWriting:
        """Allocate files for the factors at the highest rank that may be needed.

        The factors are first written to a temporary folder, and to the adapter's file when the rank
        is known.

        Raises:
            UsageError: Some update has no factors, and no rank is given.
        """
        self._check_rank(contents)
        places = places_of(contents)
        layout = self._layout(contents, places)
        factors = ShardWriter(folder, layout, stem=f"{FACTORS}/model")
        factors.lay_out()
        return self.writing(self, contents, places, folder, factors)

    def library(self, contents: Contents) -> str:
        """Return the library that loads adapters of this kind of model."""
        return "peft" if style_of(contents) == "peft" else "diffusers"

    def usage(self, contents: Contents, folder: str) -> str:
        """Return instructions to load the adapter, and to merge it into the base."""
        if style_of(contents) != "peft":
            return f"Load it with diffusers (`pipeline.load_lora_weights('{folder}')`) or ComfyUI."
        base = contents.base.source.name or "BASE"
        return (
            f"Load it with PEFT (`PeftModel.from_pretrained(base, '{folder}')`) or a server of "
            f"LoRA adapters, or fold it into the base: `starmerge merge {base} {folder} -m average "
            f"-o OUT`."
        )

    def _check_rank(self, contents: Contents) -> None:
        """Check that a rank is given for updates without factors."""
        if self.rank is not None:
            return
        places = places_of(contents)
        for tensor in contents.tensors:
            place = places[tensor.source.name]
            if isinstance(place, Module) and rank_bound(contents, tensor) is None:
                full = min(matrix_shape(tensor.source.shape))
                raise UsageError(
                    f"The merged update of {tensor.source.name} has no factors, so an exact "
                    f"adapter would have the rank {full}. Choose a rank (--rank 16; rank: 16 under "
                    "output: in a recipe); --dry-run shows the error of each rank."
                )

    def _layout(self, contents: Contents, places: Mapping[str, AdapterPlace]) -> list[OutputTensor]:
        layout = []
        for tensor in contents.tensors:
            place, source = places[tensor.source.name], tensor.source
            if isinstance(place, Module):
                bound = self.bound(contents, tensor)
                layout += place.layout(source.shape, bound, tensor.dtype)
            elif place is not None:
                layout.append(OutputTensor(place, source.dtype, source.shape, source.nbytes))
        return layout

    def bound(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Return the highest rank that a tensor's factors may have."""
        full = min(matrix_shape(tensor.source.shape))
        bound = rank_bound(contents, tensor)
        return max(1, min(x for x in (self.rank, bound, full) if x is not None))


@dataclass(frozen=True)
class AdapterWriting:
    """The writer of an adapter, whose factors are first stored at the highest possible rank."""

    output: AdapterOutput
    contents: Contents
    where: Mapping[str, AdapterPlace]
    folder: OutputFolder
    factors: ShardWriter

    def slots(self, tensor: PlannedTensor) -> list[Slot]:
        """Return the slots of the two factors, or of the whole weight."""
        place = self.where[tensor.source.name]
        keys = place.keys() if isinstance(place, Module) else () if place is None else (place,)
        return [(self.factors, key) for key in keys]

    def leave(self, tensor: PlannedTensor) -> str:
        """Never called: an adapter does not contain unchanged tensors."""
        raise AssertionError(f"{tensor.source.name} has no place in an adapter.")

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Write the factors of the update, or the whole weight if the adapters store it whole."""
        place = self.where[tensor.source.name]
        if place is None:
            norm = merged.delta.frobenius()
            return {"update_norm": norm, "stored": "left out", "error": 1.0 if norm else 0.0}
        if isinstance(place, str):
            assert base is not None, "the update of a whole module is a difference from it"
            whole = fold(base, merged.delta, tensor.source.dtype)
            self.factors.write(place, finite(whole.weight, base, tensor))
            return {"update_norm": whole.update_norm, "stored": "whole", "error": 0.0}
        bound = self.output.bound(self.contents, tensor)
        made = rounded(approximate(merged.delta, bound), tensor.dtype)
        if not math.isfinite(made.error):
            raise StarmergeError(
                f"The factors of {tensor.source.name} overflow {tensor.dtype}. Choose a wider "
                "--dtype, or none: then it is float32."
            )
        A, B = place.factors(made.left, made.right)
        rank = A.shape[0]
        padded = A.new_zeros(bound, A.shape[1]), B.new_zeros(B.shape[0], bound)
        padded[0][:rank], padded[1][:, :rank] = A, B
        for key, factor in zip(place.keys(), padded, strict=True):
            self.factors.write(key, factor)
        return {
            "update_norm": made.norm,
            "stored": f"rank {rank}",
            "rank": rank,
            "error": made.error / made.norm if made.norm else 0.0,
        }

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Write the adapter's file with one rank for all factors, and its config.

        Raises:
            StarmergeError: The error of the adapter is larger than ``max_error``.
        """
        r = max([1, *(record.get("rank", 1) for record in records)])  # PEFT does not allow rank 0
        error = overall_error(records)
        if self.output.max_error is not None and error > self.output.max_error:
            raise StarmergeError(
                f"At rank {r} the adapter's update would be {error:.3g} of its norm away from the "
                f"merge's, and max_error is {self.output.max_error:g}. --dry-run shows the rank "
                "that each error costs."
            )
        taken = carried_over(self.contents)
        assembled = self.assemble(r)
        left_out = overall_error([{**q, "error": q["stored"] == "left out"} for q in records])
        facts = {"rank": r, "error": error, "kept": _kept_energy(error), "left_out": left_out**2}
        return Finished(_summary(r, error, left_out**2, taken), facts, digests=assembled)

    def _config(self, r: int) -> dict[str, Any]:
        """Return PEFT's config."""
        places = self.where
        modules = {name: place for name, place in places.items() if isinstance(place, Module)}
        adapters = [model for model in self.contents.models if isinstance(model, Adapter)]
        saving = [adapter for adapter in adapters if adapter.saved]
        config = adapter_config(
            modules.values(),
            r=r,
            targets=target_modules(
                [m.name for m in modules.values()], unadapted_modules(self.contents.base, modules)
            ),
            saved=[module for adapter in saving for module in adapter.config.modules_to_save],
            base_name=_base_name(self.contents.base, adapters),
            task_type=_task_type(self.contents.base, adapters),
        )
        config["ensure_weight_tying"] = any(tensor in self.contents.base.tied for tensor in places)
        config["fan_in_fan_out"] |= any(adapter.config.fan_in_fan_out for adapter in adapters)
        return config

    def _metadata(self, r: int) -> dict[str, str]:
        """Return the header's metadata: keys for tools of diffusion models, and the recipe."""
        style = style_of(self.contents)
        if style == "peft":
            return {}
        adapters = [model for model in self.contents.models if isinstance(model, Adapter)]
        headers = [adapter.checkpoint.metadata for adapter in adapters]
        common = {
            key: headers[0][key]
            for key in _COMMON_METADATA
            if key in headers[0] and all(header.get(key) == headers[0][key] for header in headers)
        }
        if style == "kohya":
            common |= {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(r),
                "ss_network_alpha": str(float(r)),
            }
        made = {"version": __version__, "recipe": self.output.recipe}
        return {**common, **{f"starmerge_{key}": text for key, text in made.items()}}

    def assemble(self, r: int) -> dict[str, list[tuple[OutputTensor, str]]]:
        """Write all factors at rank r to the final file, and delete the temporary folder.

        Returns:
            The written tensors and their digests, by file.
        """
        collected = open_checkpoint(self.folder.place(FACTORS))
        layout: list[OutputTensor] = []
        sources: dict[str, Callable[[], Tensor]] = {}
        for tensor in self.contents.tensors:
            place = self.where[tensor.source.name]
            if isinstance(place, Module):
                own = self.factors_at(r, tensor, place, collected)
                layout += [factor for factor, _ in own]
                sources |= {factor.name: read for factor, read in own}
                for key, alpha in place.alpha(r).items():
                    layout.append(OutputTensor(key, alpha.dtype, (), alpha.nbytes))
                    sources[key] = _constant(alpha)
            elif place is not None:
                info = collected[place]
                layout.append(OutputTensor(place, info.dtype, info.shape, info.nbytes))
                sources[place] = _reader(collected.read, place)
        for name, (adapter, key) in carried_over(self.contents).items():
            info = adapter.checkpoint[key]
            layout.append(OutputTensor(name, info.dtype, info.shape, info.nbytes))
            sources[name] = _reader(adapter.checkpoint.read, key)
        layout.sort(key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        style = style_of(self.contents)
        stem = WEIGHTS[style].removesuffix(".safetensors")
        whole = sum(tensor.nbytes for tensor in layout)
        with ShardWriter(
            self.folder, layout, stem=stem, shard_bytes=whole, metadata=self._metadata(r)
        ) as writer:
            for name, source in sources.items():
                writer.write(name, source())
            digests = {name: writer.digest(name) for name in sources}
        if style == "peft":
            self.folder.put(CONFIG, json_bytes(self._config(r)))
        del collected
        self.folder.delete(FACTORS)
        return writer.by_file(digests)

    def factors_at(
        self, r: int, tensor: PlannedTensor, place: Module, collected: Checkpoint
    ) -> list[tuple[OutputTensor, Callable[[], Tensor]]]:
        """Return the layouts of A and B at rank r, and functions that read them, padded by zeros.

        Args:
            r: The rank.
            tensor: The tensor that they change.
            place: The tensor's module.
            collected: The stored factors at their highest possible rank.
        """
        own = place.layout(tensor.source.shape, r, tensor.dtype)
        return [(f, _resized(collected.read, f, axis, r)) for axis, f in enumerate(own)]

    def close(self, *, flush: bool) -> None:
        """Close the file of the factors."""
        self.factors.close(flush=flush)


AdapterOutput.writing = AdapterWriting


def overall_error(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the relative error of the whole adapter in the Frobenius norm."""
    total_energy = math.fsum(record["update_norm"] ** 2 for record in records)
    lost = math.fsum((record["error"] * record["update_norm"]) ** 2 for record in records)
    return math.sqrt(lost / total_energy) if total_energy else 0.0


def rank_bound(contents: Contents, tensor: PlannedTensor) -> int | None:
    """Return the highest number of factors of a tensor's merged update; None if it is dense."""
    known = tensor.tensor_shape(contents.pipeline, contents.tasks)
    return factors_made(contents.pipeline, known)


def factors_made(pipeline: Pipeline, known: TensorShape) -> int | None:
    """Return the highest number of factors of a tensor's merged update; None if it is dense.

    If the update is dense only because the models have as many factors together as the matrix has
    rows or columns, the bound is that number of rows or columns.

    Args:
        pipeline: The chain.
        known: The shapes of the tensor's task vectors.
    """
    if known.has_dense:
        return None
    rank = pipeline.result(known).rank
    if rank is None and known.total_rank >= min(known.matrix):
        return known.total_rank
    return rank


def _resized(
    read: Callable[[str], Tensor], factor: OutputTensor, axis: int, r: int
) -> Callable[[], Tensor]:
    """Return a function that reads a factor and pads it with zeros to rank r along an axis."""

    def resized() -> Tensor:
        stored = read(factor.name)
        whole = stored.new_zeros(factor.shape)
        count = min(r, stored.shape[axis])
        whole.narrow(axis, 0, count).copy_(stored.narrow(axis, 0, count))
        return whole

    return resized


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _base_name(base: Base, adapters: Sequence[Adapter]) -> str | None:
    named = [adapter.config.base_name for adapter in adapters if adapter.config.base_name]
    if base.source.name:
        return base.source.name
    return named[0] if named else str(base.source) if base.has_weights else None


def _task_type(base: Base, adapters: Sequence[Adapter]) -> str | None:
    """Return the task type that all adapters have, or that of the adapter with whole modules.

    Without adapters, return that of the base's architecture.
    """
    if not adapters:
        kind = str((base.config.get("architectures") or [""])[0])
        return next((task for end, task in _TASK_TYPES.items() if kind.endswith(end)), None)
    kinds = {adapter.config.task_type for adapter in adapters}
    saving = [adapter.config.task_type for adapter in adapters if adapter.saved]
    return saving[0] if saving else kinds.pop() if len(kinds) == 1 else None


def _kept_energy(error: float) -> float:
    """Return the kept share of the update's energy for a relative error."""
    return max(0.0, 1 - error**2)


def _summary(r: int, error: float, left_out: float, carried: Mapping[str, object]) -> str:
    text = f"adapter of rank {r}, exact"
    if error:
        kept = _kept_energy(error)
        text = f"adapter of rank {r}, which keeps {kept:.2%} of the update (error {error:.3g})"
    if left_out:
        text += f"; {left_out:.2%} of the update, in vectors and tied embeddings, is left out"
    if carried:
        text += f"; {len(carried)} tensors of whole modules carried over as they are"
    return text
