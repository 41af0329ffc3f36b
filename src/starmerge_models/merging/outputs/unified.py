"""Output of EMR-Merging: one vector for all tasks, and a mask and a rescaler for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starmerge_models.checkpoints.emr_task import (
    UNIFIED,
    check_task_names,
    mask_layout,
    mask_writer,
    pack,
    stored_name,
    write_task,
)
from starmerge_models.checkpoints.tensors import TensorInfo
from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter
from starmerge_models.deltas import matrix_shape
from starmerge_models.errors import StarmergeError
from starmerge_models.merging.fold import Folded, fold, fold_bytes
from starmerge_models.merging.layout import Contents, PlannedTensor
from starmerge_models.merging.outputs.model import survival
from starmerge_models.merging.outputs.output import Finished, Slot, digests_by_file
from starmerge_models.methods.emr import Rescalers, masks_of
from starmerge_models.methods.pipeline import Merged
from starmerge_models.recipe import Dtype
from starmerge_models.storage import OutputFolder


@dataclass(frozen=True)
class UnifiedOutput:
    """The unified vector in a folder ``unified``, and a folder for each task.

    Args:
        wanted_dtype: Dtype of the vector; "keep" is float32, because a difference has no original
            dtype.
    """

    wanted_dtype: Dtype

    kind = "unified"
    needs_base = False
    is_assembled = False
    reads_inputs = True
    member = None

    def dtype(self, source: TensorInfo, *, is_merged: bool) -> torch.dtype | None:
        """Return the dtype of the vector for merged tensors, and None for others."""
        dtype: torch.dtype = getattr(
            torch, "float32" if self.wanted_dtype == "keep" else self.wanted_dtype
        )
        return dtype if is_merged else None

    def check(self, contents: Contents) -> None:
        """Check that the models' names are valid names of folders."""
        check_task_names([model.name for model in contents.models])

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Estimate the memory of the vector before and after rounding, and of one task's mask."""
        vectors = tensor.source.size * (4 + 4 + 1)
        return vectors + fold_bytes(*matrix_shape(tensor.source.shape))

    def bytes_to_write(self, contents: Contents) -> int:
        """Return the bytes of the vector and of all masks."""
        return sum(map(self.nbytes, contents.tensors))

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes of a tensor of the vector and of its masks."""
        return tensor.nbytes + len(tensor.models) * mask_layout(tensor.source).nbytes

    def lay_out(self, contents: Contents, folder: OutputFolder) -> _UnifiedWriting:
        """Create the shards of the vector, and the files of the masks."""
        names = [model.name for model in contents.models]
        layout = [
            OutputTensor(stored_name(t.source.name), t.dtype, t.source.shape, t.nbytes)
            for t in contents.tensors
        ]
        unified = ShardWriter(folder, layout, stem=f"{UNIFIED}/model")
        masks = []
        for t, name in enumerate(names):
            layouts = [mask_layout(p.source) for p in contents.tensors if t in p.models]
            masks.append(mask_writer(folder, name, layouts))
        with ExitStack() as opened:
            for writer in (unified, *masks):
                opened.enter_context(writer)
            opened.pop_all()  # all files were created: keep them open
        return _UnifiedWriting(contents, folder, names, unified, masks)

    def library(self, contents: Contents) -> str:
        """Return the library that loads the tasks' models."""
        return "starmerge"

    def usage(self, contents: Contents, folder: str) -> str:
        """Return instructions to create a task's model."""
        name = contents.models[0].name
        return (
            f"This folder is no model. It holds one vector for all tasks, in `{UNIFIED}`, and for "
            f"each task a folder with its mask and rescaler, which is a model to starmerge: "
            f"`starmerge merge BASE {folder}/{name} -m average -o OUT` makes the model of {name}."
        )


@dataclass(frozen=True)
class _UnifiedWriting:
    contents: Contents
    folder: OutputFolder
    names: Sequence[str]
    unified: ShardWriter
    masks: Sequence[ShardWriter]

    def slots(self, tensor: PlannedTensor) -> list[Slot]:
        """Return the slot in the unified vector, and those of the masks."""
        name = stored_name(tensor.source.name)
        return [(self.unified, name), *((self.masks[t], name) for t in tensor.models)]

    def leave(self, tensor: PlannedTensor) -> str:
        """Never called: the vector does not contain unchanged tensors."""
        raise AssertionError(f"{tensor.source.name} has no place in the unified vector.")

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Write the tensor of the unified vector, and the mask of each task that changes it."""
        name = stored_name(tensor.source.name)
        tau_uni = _stored(merged, tensor)
        self.unified.write(name, tau_uni.weight)
        shares, norms = {}, {}
        for t, masked in masks_of(merged.inputs, tau_uni.weight.reshape(merged.delta.shape)):
            self.masks[t].write(name, pack(masked.M))
            shares[self.names[t]] = float(masked.M.double().mean()) if masked.M.numel() else 0.0
            norms[self.names[t]] = [masked.norm, masked.masked_norm]
        return {
            "update_norm": tau_uni.update_norm,
            "survived": tau_uni.survived,
            "masks": shares,
            "mask_norms": norms,
        }

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Write each task's rescaler."""
        sums = Rescalers(len(self.names))
        for record in records:
            for t, name in enumerate(self.names):
                if name in record["mask_norms"]:
                    sums.add(t, *record["mask_norms"][name])
        rescalers = dict(zip(self.names, sums.result(), strict=True))
        for name, rescaler in rescalers.items():
            write_task(self.folder, name, self.contents.base, rescaler)
        found = {self.contents.pipeline.merge.name: {"rescalers": rescalers}}
        by_file = digests_by_file(self, self.contents.tensors, digests)
        return Finished(survival(records), findings=found, digests=by_file)

    def close(self, *, flush: bool) -> None:
        """Close the shards and the masks."""
        for writer in (self.unified, *self.masks):
            writer.close(flush=flush)


def _stored(merged: Merged, tensor: PlannedTensor) -> Folded:
    """Return τ_uni rounded to its stored dtype, as a fold into zeros."""
    zero = torch.zeros((), dtype=torch.float32)
    folded = fold(zero.expand(tensor.source.shape), merged.delta, tensor.dtype)
    if not torch.isfinite(folded.weight).all():
        raise StarmergeError(
            f"The unified tensor {tensor.source.name} overflows {tensor.dtype}. Choose a wider "
            "--dtype, or none: then it is float32."
        )
    return folded
