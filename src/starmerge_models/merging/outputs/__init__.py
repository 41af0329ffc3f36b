"""The kinds of output of a merge: a model, an adapter, or EMR's vector with masks of the tasks."""

from starmerge_models.errors import UsageError
from starmerge_models.merging.outputs.adapter import AdapterOutput
from starmerge_models.merging.outputs.gguf import GgufOutput
from starmerge_models.merging.outputs.model import ModelOutput
from starmerge_models.merging.outputs.output import Finished, Output, Slot, Writing
from starmerge_models.merging.outputs.unified import UnifiedOutput
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.recipe import Recipe
from starmerge_models.storage import Place

__all__ = ["Finished", "Output", "Slot", "Writing", "is_output_file", "make_output"]


def is_output_file(recipe: Recipe, path: Place) -> bool:
    """Return whether the output's name is that of a single file.

    Raises:
        UsageError: The output is a model, which is a folder.
    """
    wanted = {".safetensors": AdapterOutput.kind, ".gguf": GgufOutput.kind}
    kind = wanted.get(path.suffix.lower())
    if kind is not None and recipe.output.kind != kind:
        raise UsageError(
            f"{path} is the name of a file, and only adapters of diffusion models (.safetensors; "
            "--as adapter) and of llama.cpp (.gguf; --as gguf) are single files; in a recipe the "
            "kind stands under output. Give a folder."
        )
    return kind is not None


def make_output(recipe: Recipe, pipeline: Pipeline, *, is_file: bool = False) -> Output:
    """Return the output of a recipe's merge.

    Args:
        recipe: The recipe.
        pipeline: The chain that merges.
        is_file: Whether the output is a single file instead of a folder.

    Raises:
        UsageError: The chain's result cannot be written as this kind of output, or an option is set
            that this kind does not have.
    """
    possible, wanted = pipeline.merge.outputs, recipe.output
    kind = wanted.kind or possible[0]
    if (AdapterOutput.kind if kind == GgufOutput.kind else kind) not in possible:
        raise UsageError(
            f"{pipeline.merge.name} cannot be written as {kind}, but as {' or '.join(possible)}. "
            "Leave the kind of output out, or choose another merge."
        )
    if kind in (AdapterOutput.kind, GgufOutput.kind):
        made = GgufOutput if kind == GgufOutput.kind else AdapterOutput
        return made(recipe.dtype, wanted.rank, wanted.max_error, is_file, recipe.to_yaml())
    for key in ("rank", "max_error"):
        if getattr(wanted, key) is not None:
            raise UsageError(
                f"The output is a {kind}, and {key} is of an adapter. Leave it out, or write an "
                "adapter (--as adapter; output: {kind: adapter} in a recipe)."
            )
    return ModelOutput(recipe.dtype) if kind == ModelOutput.kind else UnifiedOutput(recipe.dtype)
