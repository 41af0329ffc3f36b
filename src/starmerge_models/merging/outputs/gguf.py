"""Output as an adapter in GGUF, which llama.cpp loads together with a model (``--lora``).

Sources: github.com/ggml-org/llama.cpp, ``convert_lora_to_gguf.py`` and ``conversion`` of models
for names and order of rows, ``src/llama-adapter.cpp`` for the loader: the update of a weight is
alpha/r · B·A with A (r, in) and B (out, r); for the embedding A is stored as (rows, r). The names
are those of the ``gguf`` library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starmerge_models.checkpoints.lora.file import Module
from starmerge_models.checkpoints.opening import open_checkpoint
from starmerge_models.checkpoints.writer import OutputTensor
from starmerge_models.errors import UsageError
from starmerge_models.merging.layout import Contents
from starmerge_models.merging.outputs.adapter import FACTORS, AdapterOutput, AdapterWriting
from starmerge_models.merging.outputs.places import carried_over, places_of, style_of

_ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""llama.cpp's architectures, by ``model_type`` in config.json."""

_INTERLEAVED = ("llama",)
"""Architectures for which llama.cpp stores the rows of q_proj and k_proj in Meta's order."""

_TOOL = (
    "Write an adapter in PEFT's layout (--as adapter), and convert it with llama.cpp's "
    "convert_lora_to_gguf.py."
)

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""GGUF's names of the dtypes."""

_FILE = "adapter.gguf"

_MOST_LAYERS = 10_000
"""Most layers of a model, because the library lists the names of all layers in advance."""


@dataclass(frozen=True)
class GgufOutput(AdapterOutput):
    """An adapter in one GGUF file, alone or in a folder with its report.

    The factors are those of :class:`AdapterOutput`. The architecture and the number of heads are
    read from the base's config.
    """

    kind = "gguf"

    @property
    def member(self) -> str | None:
        """The file, if it is the whole output; None for a folder."""
        return _FILE if self.is_file else None

    def check(self, contents: Contents) -> None:
        """Check that llama.cpp has a name for each changed module."""
        self.check_places(contents)
        if find_spec("gguf") is None:
            raise UsageError(
                "GGUF is written with the package gguf, which is not installed: "
                "pip install 'starmerge-models[gguf]'."
            )
        if style_of(contents) != "peft":
            raise UsageError(
                "The adapters are of a diffusion model, and llama.cpp runs language models. Write "
                "an adapter (--as adapter)."
            )
        kind = contents.base.config.get("model_type")
        if not isinstance(kind, str) or kind not in _ARCHITECTURES:
            is_missing = kind is None
            what = "not known: give the base before the models" if is_missing else f"{kind!r:.100}"
            raise UsageError(
                f"The base's model_type is {what}. Adapters in GGUF are written for "
                f"{', '.join(_ARCHITECTURES)}. {_TOOL}"
            )
        whole = [place for place in places_of(contents).values() if isinstance(place, str)]
        if whole or carried_over(contents):
            name = next(iter((*whole, *carried_over(contents))))
            raise UsageError(
                f"{name} is stored whole (modules_to_save), and an adapter in GGUF has factors "
                "alone. Merge into a model, and convert that."
            )
        for name, module in _modules(contents).items():
            _name(contents, module)
            heads = _heads(contents, module)
            rows = contents.base.checkpoint[name].shape[0]
            if heads is not None and rows % (2 * heads):
                raise UsageError(
                    f"The base's config.json says {heads} of the heads of {module.name}, which do "
                    f"not divide its {rows} rows, as rotary embeddings do. {_TOOL}"
                )

    def library(self, contents: Contents) -> str:
        """Return the library that loads the adapter."""
        return "llama.cpp"

    def usage(self, contents: Contents, folder: str) -> str:
        """Return instructions to load the adapter."""
        return f"Load it beside the model: `llama-cli -m MODEL.gguf --lora {folder}/{_FILE}`."


@dataclass(frozen=True)
class _GgufWriting(AdapterWriting):
    def assemble(self, r: int) -> dict[str, list[tuple[OutputTensor, str]]]:
        """Write all factors at rank r, with alpha = r, and delete the temporary folder."""
        import gguf  # noqa: PLC0415  (an extra)

        collected = open_checkpoint(self.folder.place(FACTORS))
        kind = _ARCHITECTURES[self.contents.base.config["model_type"]]
        writer = gguf.GGUFWriter(str(self.folder.place(_FILE)), kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))
        writer.add_string("starmerge.recipe", self.output.recipe)
        reads: list[Callable[[], Tensor]] = []
        for tensor in self.contents.tensors:
            place = self.where[tensor.source.name]
            if isinstance(place, Module):
                name, heads = _name(self.contents, place), _heads(self.contents, place)
                a, b = self.factors_at(r, tensor, place, collected)
                for end, (factor, read), turns, own in (
                    ("lora_a", a, place.is_embedding, None),
                    ("lora_b", b, False, heads),
                ):
                    shape = factor.shape[::-1] if turns else factor.shape
                    bits = np.dtype(np.uint8)
                    in_bytes = (*shape[:-1], shape[-1] * factor.dtype.itemsize)
                    writer.add_tensor_info(
                        f"{name}.{end}",
                        in_bytes,
                        bits,
                        factor.nbytes,
                        gguf.GGMLQuantizationType[_DTYPES[factor.dtype]],
                    )
                    reads.append(partial(_stored, read, turns=turns, heads=own))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for read in reads:
            writer.write_tensor_data(read().contiguous().view(torch.uint8).numpy())
        writer.close()
        del collected
        self.folder.delete(FACTORS)
        return {}


def _stored(read: Callable[[], Tensor], *, turns: bool, heads: int | None) -> Tensor:
    """Return a factor in GGUF's layout."""
    factor = read()
    if heads is not None:
        factor = interleaved(factor, heads)
    return factor.T if turns else factor


GgufOutput.writing = _GgufWriting


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q_proj or k_proj from Hugging Face's order to Meta's.

    Rotary embeddings rotate pairs of rows of a head. The rows of a pair are adjacent in Meta's
    order, and half a head apart in Hugging Face's.

    Args:
        rows: (heads · d, r).
        heads: Number of heads.
    """
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _modules(contents: Contents) -> dict[str, Module]:
    """Return the modules with factors, by the names of their weights."""
    places = places_of(contents)
    return {name: place for name, place in places.items() if isinstance(place, Module)}


def _name(contents: Contents, module: Module) -> str:
    """Return llama.cpp's name of a module's weight.

    Raises:
        UsageError: llama.cpp has no name for it.
    """
    config = contents.base.config
    kind, layers = _ARCHITECTURES[config["model_type"]], config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise UsageError(
            f"The base's config.json says {layers!r:.100} of num_hidden_layers, by which llama.cpp "
            f"names tensors. {_TOOL}"
        )
    names = _names(kind, layers)
    name: str | None = names.get_name(f"{module.name}.weight", try_suffixes=(".weight",))
    if name is None:
        raise UsageError(f"llama.cpp has no name for {module.name} of {kind}. {_TOOL}")
    return name


@lru_cache(maxsize=1)
def _names(kind: str, layers: int) -> Any:
    """Return the gguf library's names of the tensors of an architecture."""
    import gguf  # noqa: PLC0415  (an extra)

    architecture = next(a for a, own in gguf.MODEL_ARCH_NAMES.items() if own == kind)
    return gguf.get_tensor_name_map(architecture, layers)


def _heads(contents: Contents, module: Module) -> int | None:
    """Return the number of heads of a module whose rows are reordered; None for other modules.

    Raises:
        UsageError: The config does not contain it.
    """
    config = contents.base.config
    own = module.name.rpartition(".")[2]
    if _ARCHITECTURES[config["model_type"]] not in _INTERLEAVED or own not in ("q_proj", "k_proj"):
        return None
    heads = config.get("num_attention_heads")
    if own == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    if type(heads) is not int or heads < 1:
        raise UsageError(
            f"The base's config.json says {heads!r:.100} of the heads of {module.name}, on which "
            f"the order of its rows in GGUF depends. {_TOOL}"
        )
    return heads
