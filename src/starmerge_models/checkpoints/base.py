"""The base model: its tensors, its config, and its side files."""

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
"""Parts of the names of embeddings that do not contain "embed"."""

_OUTPUTS = ("shared", "lm_head", "embed_out", "output_layer", "output", "predictions", "head")
"""Parts of the names of token tables that do not contain "embed"."""


@dataclass(frozen=True)
class Base:
    """The model that the fine-tunes were made from."""

    source: Source
    checkpoint: Checkpoint
    config: dict[str, Any]
    """``config.json``."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
    quantised: str | None = None
    """Format of quantised weights in the files, such as "GPTQ, 4 bits"; None for plain weights. The
    checkpoint and the config are those of plain weights in both cases."""

    head: str | None = None
    """The output layer, if the files tie it to the embedding and the merge does not."""
    replaced_files: Mapping[str, Place | bytes | None] = field(default_factory=dict)
    """Side files of the output that replace those of the base's folder, by name: a file to copy, or
    its content; None leaves the file out."""
    made_of: tuple[Place, ...] = ()
    """Files other than the weights on which the merge depends, such as tokenizers."""

    has_weights: ClassVar[bool] = True
    """Whether the checkpoint's tensors can be read."""

    @property
    def stem(self) -> str:
        """Prefix of the names of a merged model's weight files, which the loader expects."""
        names = {file.name for file in self.checkpoint.opened.files}
        is_diffusion = any(name.startswith(DIFFUSION_STEM) for name in names)
        return DIFFUSION_STEM if is_diffusion else "model"

    @property
    def settings(self) -> tuple[Place, ...]:
        """The config of quantised weights, on which their values depend; empty for plain ones."""
        return () if self.quantised is None else (self.source.path / "config.json",)

    @property
    def side_files(self) -> dict[str, Place | bytes]:
        """The side files of a merged model, by name relative to the folder.

        Raises:
            StarmergeError: A file is a link out of the base's folder, or has a name that is not
                UTF-8.
        """
        files = {**side_files(self.source.path), **self.replaced_files}
        return {name: file for name, file in files.items() if file is not None}

    def is_embedding(self, name: str) -> bool:
        """Return whether each row of a tensor belongs to a token or a position.

        This holds for the token tables, and for matrices whose name contains "embed", GPT-2's wte
        and wpe, or T5's relative_attention_bias.
        """
        named = any(map(is_embedding_name, name.lower().split(".")))
        return len(self.checkpoint[name].shape) == 2 and (named or name in self.token_matrices)

    def is_lookup_table(self, name: str) -> bool:
        """Return whether a tensor is the table of an embedding module, by the module's name.

        The output layer of a language model also has a row per token, but is a linear layer.
        """
        own = name.lower().removesuffix(".weight").rpartition(".")[2]
        return len(self.checkpoint[name].shape) == 2 and is_embedding_name(own)

    @cached_property
    def tied(self) -> list[str]:
        """Names of the tensors that the config ties to each other; the files may contain only one.

        They are tied unless ``tie_word_embeddings`` is false wherever the config contains it:
        transformers 4 leaves the key out of a config if it is true.
        """
        key = "tie_word_embeddings"
        configs = (self.config, self.config.get("text_config") or {})
        if any(key in config for config in configs) and not any(c.get(key) for c in configs):
            return []
        return self.token_matrices

    @cached_property
    def token_matrices(self) -> list[str]:
        """Names of the token tables that are matrices, without biases of output layers."""
        return [name for name in self.token_tables if len(self.checkpoint[name].shape) == 2]

    @cached_property
    def embedding(self) -> str | None:
        """Name of the input embedding's table, if it is known."""
        tables = sorted(self.token_matrices, key=lambda name: not self.is_lookup_table(name))
        return tables[0] if tables else None

    def untied(self, head: str, ties: Mapping[str, str]) -> Base:
        """Return the same model with a separate output layer that has the embedding's values.

        Args:
            head: The name of the output layer's weight; it is added if it is not stored.
            ties: The tied tensors of transformers' model, by name the name of the other tensor.
                Other tensors of the output layer, such as BERT's bias, are added too.

        Raises:
            UsageError: Models of this kind compute another function when the two are tied.
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
        """Whether some layers store their weight as (in, out), like GPT-2's Conv1D.

        The bias of such a layer has the length of the weight's columns, not of its rows.
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
        """Names of the tensors with a row or an entry for each token: embeddings, output layers.

        Other tensors may have the same number of rows by chance. If a tensor of a layer has it,
        token tables are recognised by their names instead.
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
        """Return whether the shape of another model's tensor fits that of the base.

        Token tables may have any number of rows, which are matched by the tokenizers.
        """
        own = self.checkpoint[name].shape
        return shape == own or (
            name in self.token_tables and shape[1:] == own[1:] and len(shape) > 0
        )


def _is_of_tokens(parts: list[str]) -> bool:
    """Return whether a name is that of an embedding or of an output layer."""
    return any(is_embedding_name(part) or part in _OUTPUTS for part in parts)


def _is_of_positions(parts: list[str]) -> bool:
    """Return whether a name is that of an embedding of positions or of segments."""
    return any("position" in part or "token_type" in part or part == "wpe" for part in parts)


def is_embedding_name(part: str) -> bool:
    """Return whether a part of a tensor's name is that of an embedding module."""
    return "embed" in part or part in _EMBEDDINGS


def open_base(source: Source) -> Base:
    """Open a base model; reads its config and the headers of its weights.

    Quantised weights appear in the checkpoint as plain weights, which are computed lazily.

    Raises:
        UsageError: The folder is an adapter, or a model with an unsupported quantisation.
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
    """Read a model's ``config.json``, and check the types of the values that are used.

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
    """Return the ``config.json`` of a local folder or a cached Hub model; empty if not available.

    Nothing is downloaded.
    """
    if name is None:
        return {}
    local = Path(name).expanduser() / "config.json"
    if is_file(local):
        return read_json(local)
    with suppress(ValueError):  # the name is not a Hub id
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
