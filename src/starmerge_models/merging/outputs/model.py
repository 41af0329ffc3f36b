"""Output as a model: the base with the update added to its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from starmerge_models.checkpoints.hashing import read_and_hash
from starmerge_models.checkpoints.opening import DIFFUSION_STEM
from starmerge_models.checkpoints.tensors import MERGEABLE, TensorInfo
from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter, json_bytes
from starmerge_models.deltas import is_finite, matrix_shape
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.checks import check_base
from starmerge_models.merging.fold import Fold, fold_bytes
from starmerge_models.merging.layout import Contents, PlannedTensor
from starmerge_models.merging.outputs.output import Finished, Slot, digests_by_file
from starmerge_models.methods.pipeline import Merged
from starmerge_models.recipe import Dtype
from starmerge_models.storage import OutputFolder, Place, copy_file, storage_of

_LITTLE = 0.9
"""Share of the update that must survive rounding; below it the summary recommends float32."""


@dataclass(frozen=True)
class ModelOutput:
    """A folder that ``transformers`` loads.

    Args:
        wanted_dtype: Dtype of the floating-point tensors; "keep" keeps the dtype of each tensor.
    """

    wanted_dtype: Dtype

    kind = "model"
    needs_base = True
    is_assembled = False
    reads_inputs = False
    member = None

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype:
        """Return the wanted dtype for floating-point tensors, and the base's for others."""
        is_kept = self.wanted_dtype == "keep" or source.dtype not in MERGEABLE
        dtype: torch.dtype = source.dtype if is_kept else getattr(torch, self.wanted_dtype)
        return dtype

    def check(self, contents: Contents) -> None:
        """Check that a dtype is chosen for a quantised base; any update can be written."""
        base = contents.base
        if base.quantised and self.wanted_dtype == "keep":
            own = base.config.get("dtype") or base.config.get("torch_dtype")
            computes = ", in which its config computes" if own in get_args(Dtype) else ""
            dtype = own if computes else "bfloat16"
            raise UsageError(
                f"The base {base.source} is quantised ({base.quantised}), and a merge of it is "
                f"not: there is no dtype to keep. Choose one: --dtype {dtype}{computes}."
            )

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Estimate the memory of panels and factors, or of converting an unchanged tensor."""
        if tensor.models:
            merged = contents.pipeline.result(
                tensor.tensor_shape(contents.pipeline, contents.tasks)
            )
            return fold_bytes(*matrix_shape(tensor.source.shape), merged.rank or 0)
        return 0 if _is_copied(tensor) else tensor.nbytes

    def bytes_to_write(self, contents: Contents) -> int:
        """Return the bytes of the weights and of all other files."""
        beside = contents.base.side_files.values()
        return sum(map(_size, beside)) + sum(map(self.nbytes, contents.tensors))

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes of a tensor."""
        return tensor.nbytes

    def lay_out(self, contents: Contents, folder: OutputFolder) -> _ModelWriting:
        """Create the shards."""
        layout = [
            OutputTensor(t.source.name, t.dtype, t.source.shape, t.nbytes) for t in contents.tensors
        ]
        shards = ShardWriter(folder, layout, stem=contents.base.stem)
        shards.lay_out()
        return _ModelWriting(self.wanted_dtype, contents, folder, shards)

    def library(self, contents: Contents) -> str:
        """Return the library of the base, which also loads the merged model."""
        return "diffusers" if contents.base.stem == DIFFUSION_STEM else "transformers"

    def usage(self, contents: Contents, folder: str) -> str:
        """Return an empty text: the metadata of the card name the library."""
        return ""


@dataclass(frozen=True)
class _ModelWriting:
    wanted_dtype: Dtype
    contents: Contents
    folder: OutputFolder
    shards: ShardWriter

    def slots(self, tensor: PlannedTensor) -> list[Slot]:
        """Return the tensor's slot in the shards."""
        return [(self.shards, tensor.source.name)]

    def leave(self, tensor: PlannedTensor) -> str:
        """Copy the base's bytes, or convert them."""
        name, checkpoint = tensor.source.name, self.contents.base.checkpoint
        if _is_copied(tensor):
            return self.shards.copy(name, checkpoint)
        base, digest = read_and_hash(tensor.source)
        self.shards.write(name, finite(base.to(tensor.dtype), base, tensor))
        return digest

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Add the update to the base, by panels."""
        assert base is not None, "a model contains the base's weights"
        adding = Fold(base, merged.delta, tensor.dtype)
        for start, panel in adding.panels():
            self.shards.write(tensor.source.name, finite(panel, base, tensor), start)
        return {"update_norm": adding.update_norm, "survived": adding.survived}

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Write the config, and copy the tokenizer and other side files."""
        for name, file in self.contents.base.side_files.items():
            if isinstance(file, bytes):
                self.folder.put(name, file)
            else:
                copy_file(file, self.folder, name)
        self.folder.put("config.json", json_bytes(self._config()))
        by_file = digests_by_file(self, self.contents.tensors, digests)
        return Finished(survival(records), digests=by_file)

    def close(self, *, flush: bool) -> None:
        """Close the shards."""
        self.shards.close(flush=flush)

    def _config(self) -> dict[str, Any]:
        """Return the base's config without its name, and with the dtype of the output."""
        base = self.contents.base.config
        config = {key: value for key, value in base.items() if key != "_name_or_path"}
        if self.wanted_dtype != "keep":
            for key in ("dtype", "torch_dtype"):
                if key in config:
                    config[key] = self.wanted_dtype
        return config


def finite(weight: Tensor, base: Tensor, tensor: PlannedTensor) -> Tensor:
    """Return a part of the merged weight after checking that it is finite.

    Raises:
        StarmergeError: It has a NaN or an infinity, from the base or by overflow.
    """
    if not is_finite(weight):
        check_base(tensor.source, base)
        raise StarmergeError(
            f"The merged tensor {tensor.source.name} overflows {tensor.dtype}. Choose a wider "
            "--dtype; if that is not enough, look at the scale of the updates (lora_alpha)."
        )
    return weight


def survival(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a phrase with the share of the update that survives the rounding of the output.

    Args:
        records: ``update_norm`` and ``survived`` of each tensor.
    """
    energies = [record["update_norm"] ** 2 for record in records]
    if not any(energies):
        return "the update is zero"
    kept = sum(r["survived"] * e for r, e in zip(records, energies, strict=True)) / sum(energies)
    text = f"{kept:.1%} of the update survives the rounding of the output"
    return text if kept >= _LITTLE else f"{text} (with dtype float32 all of it would)"


def _size(file: Place | bytes) -> int:
    """Return the size in bytes of a file, given by its place or its content."""
    return len(file) if isinstance(file, bytes) else storage_of(file).state(file).size


def _is_copied(tensor: PlannedTensor) -> bool:
    """Return whether the output has the same bytes as the base."""
    return not tensor.models and tensor.dtype == tensor.source.dtype
