"""A merged adapter: the update itself, as a LoRA that the tool loads which made the merged ones."""

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
    approximated,
    approximation_bytes,
    distance_bytes,
    rounded,
)
from starmerge_models.merging.outputs.model import finite
from starmerge_models.merging.outputs.output import Finished, Slot
from starmerge_models.merging.outputs.places import Where, carried, others, places_of, style_of
from starmerge_models.methods.memory import TensorShape
from starmerge_models.methods.pipeline import Merged, Pipeline
from starmerge_models.recipe import Dtype
from starmerge_models.storage import OutputFolder
from starmerge_models.versions import __version__

FACTORS = "factors"
"""Folder of the factors before all ranks are known."""

_COMMON_METADATA = (
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "ss_base_model_version",
    "ss_v2",
)
"""Keys of headers that say which model an adapter is of; kept where all adapters agree."""

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's types of tasks, by how the names of transformers' classes end."""


@dataclass(frozen=True)
class AdapterOutput:
    """An adapter whose B·A is the merged update: a folder, or one file.

    It has the layout of the merged adapters: PEFT's, or for diffusion models kohya's or that of
    diffusers. PEFT's needs a config beside it, and is a folder.

    Where the update has no more factors than the rank allows, they are written as they are, in
    float32, and the adapter is exact: merged alone into the base, it gives the bytes of the merged
    model. Else it has the leading singular triplets of the update, the best approximation of that
    rank (Eckart and Young), as U√σ and √σVᵀ.

    Vectors have no factors, and tied embeddings no module of their own: what full fine-tunes change
    of them is left out, and counts in the error.

    Args:
        wanted: Dtype of the factors; "keep" is float32, in which they are made.
        rank: The highest rank; None: as high as the updates need.
        max_error: Refuse an adapter whose update is farther from the merge's, in the Frobenius norm
            relative to it.
        is_file: Write one file alone, instead of a folder.
        recipe: The recipe in YAML, for the header of a file that has no report beside it.
    """

    wanted: Dtype
    rank: int | None = None
    max_error: float | None = None
    is_file: bool = False
    recipe: str = ""

    kind = "adapter"
    needs_base = False
    is_assembled = True
    reads_inputs = False

    writing: ClassVar[type[AdapterWriting]]
    """What writes it."""

    @property
    def member(self) -> str | None:
        """The file of the folder that alone is published; None: all."""
        return WEIGHTS["kohya"] if self.is_file else None

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype | None:
        """Return the dtype of the factors, for tensors that some model changes."""
        dtype: torch.dtype = getattr(torch, "float32" if self.wanted == "keep" else self.wanted)
        return dtype if is_merged else None

    def check(self, contents: Contents) -> None:
        """Make sure that there is something to write, and that a file alone can be loaded."""
        self.check_places(contents)
        if self.is_file and style_of(contents) == "peft":
            raise UsageError(
                "The adapters have PEFT's layout, in which a config beside the file says what the "
                "updates are scaled by. Give a folder as the output."
            )

    def check_places(self, contents: Contents) -> None:
        """Make sure that some update has a place in an adapter, and all of experts have."""
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
        if all(place is None for place in places.values()) and not carried(contents):
            raise UsageError(
                "Nothing that the models change can be in an adapter: neither vectors nor tied "
                "embeddings can. Write a model."
            )

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Count what the decomposition needs, and the factors that are written, in some stages."""
        m, n = matrix_shape(tensor.source.shape)
        known = tensor.as_read(contents.pipeline, contents.tasks)
        r = contents.pipeline.result(known).rank
        k = min(x for x in (self.rank, r, m, n) if x is not None)
        needs = [approximation_bytes(m, n, r, k, known.width)]
        if tensor.dtype != torch.float32:
            needs.append(distance_bytes(m, n, k))
        return max(needs) + 24 * (m + n) * k

    def bytes_to_write(self, contents: Contents) -> int:
        """Return twice the bytes of factors of the highest rank that may be needed."""
        return 2 * sum(tensor.nbytes for tensor in self._layout(contents, places_of(contents)))

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return what is read for a tensor: what is written is little beside it."""
        return tensor.bytes_to_read

    def lay_out(self, contents: Contents, folder: OutputFolder) -> AdapterWriting:
        """Make room for the factors at the highest rank that may be needed.

        They go into a folder of their own, and into the adapter's file once the rank is known.

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
        """Return the library that loads adapters of such models."""
        return "peft" if style_of(contents) == "peft" else "diffusers"

    def usage(self, contents: Contents, folder: str) -> str:
        """Return how to load it, and how to fold it into the base."""
        if style_of(contents) != "peft":
            return f"Load it with diffusers (`pipeline.load_lora_weights('{folder}')`) or ComfyUI."
        base = contents.base.source.name or "BASE"
        return (
            f"Load it with PEFT (`PeftModel.from_pretrained(base, '{folder}')`) or a server of "
            f"LoRA adapters, or fold it into the base: `starmerge merge {base} {folder} -m average "
            f"-o OUT`."
        )

    def _check_rank(self, contents: Contents) -> None:
        """Make sure that there is a rank for what has no factors."""
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

    def _layout(self, contents: Contents, places: Mapping[str, Where]) -> list[OutputTensor]:
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
    """An adapter that is being written, its factors as yet at the highest rank they may have."""

    output: AdapterOutput
    contents: Contents
    where: Mapping[str, Where]
    folder: OutputFolder
    factors: ShardWriter

    def slots(self, tensor: PlannedTensor) -> list[Slot]:
        """Return those of the two factors, or of the whole weight."""
        place = self.where[tensor.source.name]
        keys = place.keys() if isinstance(place, Module) else () if place is None else (place,)
        return [(self.factors, key) for key in keys]

    def leave(self, tensor: PlannedTensor) -> str:
        """Never called: what no model changes has no place."""
        raise AssertionError(f"{tensor.source.name} has no place in an adapter.")

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Write the factors of the update, or the whole weight where an adapter has it so."""
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
        made = rounded(approximated(merged.delta, bound), tensor.dtype)
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
            StarmergeError: The adapter is farther from the merge than it may be.
        """
        r = max([1, *(record.get("rank", 1) for record in records)])  # PEFT knows no rank 0
        error = overall_error(records)
        if self.output.max_error is not None and error > self.output.max_error:
            raise StarmergeError(
                f"At rank {r} the adapter's update would be {error:.3g} of its norm away from the "
                f"merge's, and max_error is {self.output.max_error:g}. --dry-run shows the rank "
                "that each error costs."
            )
        taken = carried(self.contents)
        assembled = self.assemble(r)
        left_out = overall_error([{**q, "error": q["stored"] == "left out"} for q in records])
        facts = {"rank": r, "error": error, "kept": _kept(error), "left_out": left_out**2}
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
                [m.name for m in modules.values()], others(self.contents.base, modules)
            ),
            saved=[module for adapter in saving for module in adapter.config.modules_to_save],
            base_name=_base_name(self.contents.base, adapters),
            task_type=_task_type(self.contents.base, adapters),
        )
        config["ensure_weight_tying"] = any(tensor in self.contents.base.tied for tensor in places)
        config["fan_in_fan_out"] |= any(adapter.config.fan_in_fan_out for adapter in adapters)
        return config

    def _metadata(self, r: int) -> dict[str, str]:
        """Return the texts of the header: what tools of diffusion models look for; the recipe."""
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
        """Write all factors at rank r, and delete what they were collected in.

        Returns:
            The tensors that were written and their digests, by file.
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
                    sources[key] = _always(alpha)
            elif place is not None:
                info = collected[place]
                layout.append(OutputTensor(place, info.dtype, info.shape, info.nbytes))
                sources[place] = _reader(collected.read, place)
        for name, (adapter, key) in carried(self.contents).items():
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
        """Return how A and B are stored at rank r, and what reads them with zeros up to it.

        Args:
            r: The rank.
            tensor: The tensor that they change.
            place: Its module.
            collected: The factors at the highest rank that they may have.
        """
        own = place.layout(tensor.source.shape, r, tensor.dtype)
        return [(f, _resized(collected.read, f, axis, r)) for axis, f in enumerate(own)]

    def close(self, *, flush: bool) -> None:
        """Close the file of the factors."""
        self.factors.close(flush=flush)


AdapterOutput.writing = AdapterWriting


def overall_error(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the error of a whole adapter, relative to the norm of the whole update."""
    total_energy = math.fsum(record["update_norm"] ** 2 for record in records)
    lost = math.fsum((record["error"] * record["update_norm"]) ** 2 for record in records)
    return math.sqrt(lost / total_energy) if total_energy else 0.0


def rank_bound(contents: Contents, tensor: PlannedTensor) -> int | None:
    """Return the highest number of factors of a tensor's merged update; None: it has none."""
    known = tensor.as_read(contents.pipeline, contents.tasks)
    return factors_made(contents.pipeline, known)


def factors_made(pipeline: Pipeline, known: TensorShape) -> int | None:
    """Return how many factors at most a chain makes of a tensor; None: the update has none.

    An update may be dense because the models' factors together are as many as the matrix has rows
    or columns: then it needs no more than these.

    Args:
        pipeline: The chain.
        known: What is known of the tensor's task vectors.
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
    """Return what reads a factor and gives it the rank r along an axis, with zeros."""

    def resized() -> Tensor:
        stored = read(factor.name)
        whole = stored.new_zeros(factor.shape)
        count = min(r, stored.shape[axis])
        whole.narrow(axis, 0, count).copy_(stored.narrow(axis, 0, count))
        return whole

    return resized


def _always(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _base_name(base: Base, adapters: Sequence[Adapter]) -> str | None:
    named = [adapter.config.base_name for adapter in adapters if adapter.config.base_name]
    if base.source.name:
        return base.source.name
    return named[0] if named else str(base.source) if base.has_weights else None


def _task_type(base: Base, adapters: Sequence[Adapter]) -> str | None:
    """Return the type of task that all adapters have, or the one with whole modules.

    Without adapters, that of the base's architecture.
    """
    if not adapters:
        kind = str((base.config.get("architectures") or [""])[0])
        return next((task for end, task in _TASK_TYPES.items() if kind.endswith(end)), None)
    kinds = {adapter.config.task_type for adapter in adapters}
    saving = [adapter.config.task_type for adapter in adapters if adapter.saved]
    return saving[0] if saving else kinds.pop() if len(kinds) == 1 else None


def _kept(error: float) -> float:
    """Return the share of the update's energy that is kept."""
    return max(0.0, 1 - error**2)


def _summary(r: int, error: float, left_out: float, carried: Mapping[str, object]) -> str:
    text = f"adapter of rank {r}, exact"
    if error:
        text = (
            f"adapter of rank {r}, which keeps {_kept(error):.2%} of the update (error {error:.3g})"
        )
    if left_out:
        text += f"; {left_out:.2%} of the update, in vectors and tied embeddings, is left out"
    if carried:
        text += f"; {len(carried)} tensors of whole modules carried over as they are"
    return text
