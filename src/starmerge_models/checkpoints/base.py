"""The base model: its tensors, its config, the files that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from starmerge_models.checkpoints.opening import DIFFUSION_STEM, open_checkpoint
from starmerge_models.checkpoints.quantised import QUANTISATION, dequantised, settings_of
from starmerge_models.checkpoints.side_files import side_files
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.reading import read_json
from starmerge_models.storage import Place, exists, is_file

_EMBEDDINGS = ("wte", "wpe", "relative_attention_bias")
"""Parts of the names of embeddings that have no "embed" in them."""

_OUTPUTS = ("shared", "lm_head", "embed_out", "output_layer", "output", "predictions", "head")
"""Parts of the names of tables of tokens that have no "embed" in them."""


@dataclass(frozen=True)
class Base:
    """The model that the fine-tunes were made from."""

    source: Source
    checkpoint: Checkpoint
    config: dict[str, Any]
    """``config.json``."""
    notes: tuple[str, ...] = ()
    """Sentences on it that whoever merges into it should read."""
    quantised: str | None = None
    """What the files store the weights as, if not as they are: "GPTQ, 4 bits". The checkpoint and
    the config are those of plain weights."""

    head: str | None = None
    """The output layer, where the files tie it to the embedding and the merge does not."""
    beside: Mapping[str, Place | bytes | None] = field(default_factory=dict)
    """Files beside merged weights in place of those in the base's folder, by their names: a file to
    copy, or its content; None: it is left out."""
    made_of: tuple[Place, ...] = ()
    """Files beside the weights that decide what is merged, such as tokenizers."""

    has_weights: ClassVar[bool] = True
    """Whether the checkpoint's tensors can be read."""

    @property
    def stem(self) -> str:
        """What the names of a merged model's files with weights begin with, for what loads it."""
        names = {file.name for file in self.checkpoint.opened.files}
        is_diffusion = any(name.startswith(DIFFUSION_STEM) for name in names)
        return DIFFUSION_STEM if is_diffusion else "model"

    @property
    def settings(self) -> tuple[Place, ...]:
        """The config, where the weights are quantised: what they are depends on it."""
        return () if self.quantised is None else (self.source.path / "config.json",)

    @property
    def side_files(self) -> dict[str, Place | bytes]:
        """The files to put beside merged weights, by their names relative to the folder.

        Raises:
            StarmergeError: One is a link to a file outside of the base's folder, or has a name
                that is not UTF-8.
        """
        files = {**side_files(self.source.path), **self.beside}
        return {name: file for name, file in files.items() if file is not None}

    def is_embedding(self, name: str) -> bool:
        """Tell whether each row of a tensor stands for a token or a position.

        Such are the tables of tokens, and matrices with "embed", the GPT-2 names wte and wpe or
        T5's relative_attention_bias in their name.
        """
        named = any(map(is_embedding_name, name.lower().split(".")))
        return len(self.checkpoint[name].shape) == 2 and (named or name in self.token_matrices)

    def looks_up(self, name: str) -> bool:
        """Tell whether a tensor is the table of a module that looks rows up, by the module's name.

        The output layer of a language model has a row a token, too, and multiplies by all.
        """
        own = name.lower().removesuffix(".weight").rpartition(".")[2]
        return len(self.checkpoint[name].shape) == 2 and is_embedding_name(own)

    @cached_property
    def tied(self) -> list[str]:
        """Names of the tensors that the config ties to each other; the files may hold only one.

        They are tied unless ``tie_word_embeddings`` is false wherever it stands: a config that was
        saved by transformers 4 leaves it out where it is true.
        """
        key = "tie_word_embeddings"
        configs = (self.config, self.config.get("text_config") or {})
        if any(key in config for config in configs) and not any(c.get(key) for c in configs):
            return []
        return self.token_matrices

    @cached_property
    def token_matrices(self) -> list[str]:
        """Names of those of the token tables that are matrices: all but biases of output layers."""
        return [name for name in self.token_tables if len(self.checkpoint[name].shape) == 2]

    @cached_property
    def embedding(self) -> str | None:
        """Name of the table that tokens are looked up in, if it is known."""
        tables = sorted(self.token_matrices, key=lambda name: not self.looks_up(name))
        return tables[0] if tables else None

    def untied(self, head: str, ties: Mapping[str, str]) -> Base:
        """Return the same model with an output layer of its own, which has the embedding's values.

        Args:
            head: The name of its weight; it is stored already, or added.
            ties: What transformers ties in the model, by name the other's name; what the output
                layer has beside its weight, such as BERT's bias, is added likewise.

        Raises:
            UsageError: The model is of a kind that computes otherwise where the two are tied.
        """
        if self.config.get("is_encoder_decoder") or self.embedding is None:
            raise UsageError(
                f"{self.source} ties {', '.join(self.tied)} (tie_word_embeddings in config.json), "
                f"and {head} would be changed by itself; but models of this kind, of an encoder "
                "and a decoder, compute otherwise when they are not tied. Train both ends as one."
            )
        key, stored = "tie_word_embeddings", list(self.checkpoint.values())
        if head not in self.checkpoint:
            stored.append(self.checkpoint[self.embedding].renamed(head))
        for name, other in ties.items():
            is_beside = name != head and name.rpartition(".")[0] == head.rpartition(".")[0]
            if is_beside and name not in self.checkpoint and other in self.checkpoint:
                stored.append(self.checkpoint[other].renamed(name))
        config = self.config | {key: False}
        if config.get("text_config"):
            config["text_config"] = config["text_config"] | {key: False}
        note = (
            f"{head} is no longer tied to {self.embedding}, as a model changed one of them alone: "
            "it has weights of its own, and tie_word_embeddings is false."
        )
        view = self.checkpoint.viewed(stored)
        return replace(self, checkpoint=view, config=config, notes=(*self.notes, note), head=head)

    @cached_property
    def stores_input_first(self) -> bool:
        """Whether some layers hold their weight as (in, out), as GPT-2's Conv1D does.

        Such a weight is as wide, not as high, as its bias is long.
        """
        for name in self.checkpoint:
            bias = f"{name.removesuffix('.weight')}.bias"
            if name.endswith(".weight") and bias in self.checkpoint:
                shape, length = self.checkpoint[name].shape, self.checkpoint[bias].shape
                if len(shape) == 2 and shape[0] != shape[1] and length == shape[1:]:
                    return True
        return False

    @cached_property
    def token_tables(self) -> list[str]:
        """Names of the tensors with a row, or an entry, for each token: embeddings, output layers.

        Other tensors may have as many rows by chance. If some tensor of a layer has, names tell.
        """
        text = self.config.get("text_config") or self.config
        found = {
            name: name.lower().split(".")
            for name, info in self.checkpoint.items()
            if 0 < len(info.shape) < 3 and info.shape[0] == text.get("vocab_size")
        }
        found = {name: parts for name, parts in found.items() if not _is_of_positions(parts)}
        if any(part.isdecimal() for parts in found.values() for part in parts):
            return [name for name, parts in found.items() if _is_of_tokens(parts)]
        return list(found)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of another model has the shape of one of the base.

        Tables of tokens may have any number of rows: tokenizers tell which belong together.
        """
        own = self.checkpoint[name].shape
        return shape == own or (
            name in self.token_tables and shape[1:] == own[1:] and len(shape) > 0
        )


def _is_of_tokens(parts: list[str]) -> bool:
    """Tell whether a name is that of an embedding or of an output layer."""
    return any(is_embedding_name(part) or part in _OUTPUTS for part in parts)


def _is_of_positions(parts: list[str]) -> bool:
    """Tell whether a name is that of an embedding of positions or of segments."""
    return any("position" in part or "token_type" in part or part == "wpe" for part in parts)


def is_embedding_name(part: str) -> bool:
    """Tell whether a part of a tensor's name is that of a module that looks rows up."""
    return "embed" in part or part in _EMBEDDINGS


def open_base(source: Source) -> Base:
    """Open a base model; reads its config and the headers of its weights.

    Quantised weights stand in the checkpoint as plain ones, which are computed when they are read.

    Raises:
        UsageError: The folder is an adapter, or a model quantised in a way that is not read.
        StarmergeError: A file is missing or broken.
    """
    if is_file(source.path) or is_file(source.path / "adapter_config.json"):
        raise UsageError(
            f"{source} is an adapter, and stands where the base is wanted. Give the model that it "
            "was trained on; in a recipe for mergekit as base_model. Adapters alone are merged "
            "into one with --as adapter."
        )
    if not exists(source.path / "config.json"):
        raise StarmergeError(f"{source} has no config.json, so it is not a model's folder.")
    config = read_config(source.path)
    checkpoint = open_checkpoint(source.path)
    if settings_of(config) is None:
        return Base(source, checkpoint, config)
    plain = dequantised(checkpoint, config, str(source))
    return Base(source, plain.checkpoint, plain.config, (plain.note,), plain.format)


def read_config(folder: Place) -> dict[str, Any]:
    """Read a model's ``config.json``, and check the types of the values that are looked at.

    Raises:
        StarmergeError: The file is missing or broken, or a value has another type.
    """
    file = folder / "config.json"
    config = read_json(file)
    _check_value(file, config, "text_config", dict, "an object")
    for part in (config, config.get("text_config") or {}):
        for key in QUANTISATION:
            _check_value(file, part, key, dict, "an object")
        _check_value(file, part, "tie_word_embeddings", bool, "true or false")
    _check_value(file, config, "architectures", list, "a list")
    for name in config.get("architectures") or []:
        if not isinstance(name, str):
            raise StarmergeError(f"{file}: architectures has {name!r}, which names no class.")
    return config


def known_config(name: str | None) -> dict[str, Any]:
    """Return the ``config.json`` of a model by its folder or Hub id; nothing if it is not at hand.

    Nothing is fetched.
    """
    if name is None:
        return {}
    local = Path(name).expanduser() / "config.json"
    if is_file(local):
        return read_json(local)
    with suppress(ValueError):  # the name is no Hub id
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  (slow to import)

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return read_json(Path(cached))
    return {}


def _check_value(file: Place, config: Mapping[str, Any], key: str, kind: type, wanted: str) -> None:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise StarmergeError(
            f"{file}: {key} is {value!r:.200}, and must be {wanted}. Is the file that of a model?"
        )
