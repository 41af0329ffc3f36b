"""The tokenizer of a model: its tokens and chat templates, read as plain JSON.

The format of ``tokenizer.json`` is that of github.com/huggingface/tokenizers: ``model.vocab`` has
the vocabulary that was trained, ``added_tokens`` the tokens that were added to it since. The other
files are those of github.com/huggingface/transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.checkpoints.side_files import TEMPLATES, matches, side_files
from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import StarmergeError
from starmerge_models.parsing import parse_json
from starmerge_models.reading import read_json, read_text
from starmerge_models.storage import Place, is_file, storage_of

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"

TEMPLATE_FILES = (TEMPLATE, "chat_template.json", f"{TEMPLATES}/*.jinja")
"""Patterns of the files of chat templates."""

FILES = (
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", ADDED, "*.model", "*.spm"),
    *("*.tiktoken", "vocab*", "merges.txt", "*.bpe", "bpe.codes", "dict.txt", "tekken.json"),
    *("prophetnet.tokenizer", "emoji.json", "normalizer.json", *TEMPLATE_FILES),
)
"""Patterns of a tokenizer's files, including its chat templates."""

ROLES = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
"""Keys of special tokens in a tokenizer's config."""

_LOOKED_FOR = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
"""Default options for matching an added token in a text."""

_SPELLED = ("content", *_LOOKED_FOR)
"""Keys of a token in a tokenizer's config, in which the id is stored separately."""

_TEMPLATE_NAME = re.compile(r"\w[\w. -]{0,99}")

_MOST_BYTES = 2**20
"""Longest chat template."""

_MOST_LISTED = 64 * 2**20
"""Longest list of tokens in bytes."""

_MOST_TOKENS = 10**7
"""Upper bound of ids. The largest vocabularies have a million tokens."""

_LONGEST_ID = 18
"""Most digits of an id."""

_SHOWN = 6
"""Most tokens that a message names."""


@dataclass(frozen=True)
class Tokenizer:
    """The files of a tokenizer, which are read lazily.

    Every property raises a :class:`StarmergeError` if a file is broken or has invalid content.
    """

    folder: Place
    names: tuple[str, ...]
    """The files, relative to the folder."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """``tokenizer.json``; empty if it does not exist."""
        return _object(self.folder / TOKENIZER)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``; empty if it does not exist."""
        return _object(self.folder / CONFIG)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token of the trained vocabulary; empty if no JSON file contains it."""
        return _vocabulary(self.folder / TOKENIZER, self.content)

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added tokens by their text, with ``id`` and options for matching."""
        return _added(self.folder, self.content, self.config)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Ids of all tokens."""
        return {**self.vocabulary, **{text: own["id"] for text, own in self.added.items()}}

    @cached_property
    def _listed(self) -> set[str]:
        """Tokens in the files of a slow tokenizer, of byte pairs or word pieces."""
        found = set(_object(self.folder / "vocab.json"))
        if is_file(self.folder / "vocab.txt"):
            found.update(read_text(self.folder / "vocab.txt", _MOST_LISTED).split("\n"))
        return found

    @cached_property
    def roles(self) -> dict[str, str]:
        """Special tokens by purpose, such as ``eos_token``."""
        special = _object(self.folder / "special_tokens_map.json")
        return {
            role: token
            for part in (special, self.config)
            for role in ROLES
            if (token := _text(part.get(role))) is not None
        }

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name; the unnamed one is called "default"."""
        return _templates(self.folder, self.names, self.config)

    @cached_property
    def _digests(self) -> dict[str, str]:
        """BLAKE3 of the files with tokens, by name."""
        return {file.name: cached_blake3_of(file) for file in self.token_files}

    @property
    def token_files(self) -> list[Place]:
        """The files with tokens: ``tokenizer.json``, or all files without it."""
        own = [TOKENIZER] if TOKENIZER in self.names else self.names
        return [self.folder / name for name in own if not matches(name, TEMPLATE_FILES)]

    @property
    def template_files(self) -> list[Place]:
        """The files with chat templates."""
        own = (CONFIG, *TEMPLATE_FILES)
        return [self.folder / name for name in self.names if matches(name, own)]

    def has_same_files(self, other: Tokenizer) -> bool:
        """Return whether another tokenizer has the same files with tokens."""
        return self._digests == other._digests

    def tells(self, other: Tokenizer) -> bool:
        """Return whether the tokens of both tokenizers are known well enough to compare them."""
        return self.has_same_files(other) or bool(self.vocabulary and other.vocabulary)

    def lacks(self, other: Tokenizer) -> dict[str, int]:
        """Return the tokens of another tokenizer that this one lacks, with the other's ids.

        If the vocabulary of one of them is unknown, only added tokens are compared, without those
        in the other's trained vocabulary, if that is known.
        """
        ours = {*self.tokens, *(() if self.vocabulary else self._listed)}
        if self.has_same_files(other) or not (ours or other.vocabulary):
            return {}
        theirs = other.tokens
        if not (self.vocabulary and other.vocabulary):
            theirs = {t: own["id"] for t, own in other.added.items() if t not in other.vocabulary}
        return {token: number for token, number in theirs.items() if token not in ours}

    def moved(self, other: Tokenizer) -> dict[str, int]:
        """Return the tokens with a different id in another tokenizer, with the other's ids."""
        if self.has_same_files(other):
            return {}
        ours = self.tokens
        return {t: number for t, number in other.tokens.items() if ours.get(t, number) != number}


def open_tokenizer(folder: Place) -> Tokenizer | None:
    """Return the tokenizer of a folder without reading its files; None if there is none.

    An adapter that is a single file has no tokenizer.
    """
    storage = storage_of(folder)
    if not storage.is_folder(folder):
        return None
    names = [name for name in storage.names(folder) if matches(name, FILES)]
    if storage.is_folder(folder / TEMPLATES):
        names += [f"{TEMPLATES}/{name}" for name in storage.names(folder / TEMPLATES)]
    return Tokenizer(folder, tuple(names)) if names else None


def _vocabulary(file: Place, content: Mapping[str, Any]) -> dict[str, int]:
    """Return the trained vocabulary of a ``tokenizer.json``, as ids by token.

    Unigram models have a list of tokens with scores, in the order of the ids.

    Raises:
        StarmergeError: The vocabulary is neither a mapping nor a list.
    """
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(
        isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary
    ):
        return {entry[0]: number for number, entry in enumerate(vocabulary)}
    if isinstance(vocabulary, dict) and all(map(_is_id, vocabulary.values())):
        return vocabulary
    if vocabulary is None:
        return {}
    raise StarmergeError(f"{file}: 'vocab' of 'model' is no vocabulary. Fetch it again.")


def named(tokens: Iterable[str]) -> str:
    """Return a text that names the first few of some tokens."""
    listed = list(tokens)
    shown = ", ".join(repr(token)[1:-1] for token in listed[:_SHOWN])
    return shown + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def files_of(folder: Place) -> dict[str, Place]:
    """Return a tokenizer's files, by name relative to the folder.

    Raises:
        StarmergeError: A file is a link out of the folder, or has a name that is not UTF-8.
    """
    return {name: file for name, file in side_files(folder).items() if matches(name, FILES)}


def with_tokens(
    tokenizer: Tokenizer, entries: Sequence[Mapping[str, Any]]
) -> dict[str, Place | bytes | None]:
    """Return the files of a tokenizer that change when tokens are added, by name.

    Args:
        tokenizer: The tokenizer.
        entries: The tokens in the format of ``tokenizer.json``: ``id``, ``content`` and options for
            matching; the ids continue those of the tokenizer.
    """
    ordered = sorted(({**_LOOKED_FOR, **entry} for entry in entries), key=lambda own: own["id"])
    listed = [*(tokenizer.content.get("added_tokens") or []), *ordered]
    files = {TOKENIZER: json_bytes({**tokenizer.content, "added_tokens": listed})}
    decoder = tokenizer.config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        more = {
            str(own["id"]): {key: own[key] for key in _SPELLED if key in own} for own in ordered
        }
        config = {**tokenizer.config, "added_tokens_decoder": {**decoder, **more}}
        files[CONFIG] = json_bytes(config)
    if ADDED in tokenizer.names:
        more_ids = {own["content"]: own["id"] for own in ordered}
        files[ADDED] = json_bytes({**_object(tokenizer.folder / ADDED), **more_ids})
    return dict(files)


def with_templates(
    files: Mapping[str, Place | bytes], templates: Mapping[str, str]
) -> dict[str, Place | bytes | None]:
    """Return the files that change when a tokenizer gets other chat templates, by name.

    Args:
        files: The side files of the output.
        templates: Chat templates by name.

    Raises:
        StarmergeError: A name is not valid for a file.
    """
    changed: dict[str, Place | bytes | None] = {
        name: None for name in files if matches(name, TEMPLATE_FILES)
    }
    for name, template in templates.items():
        if not _TEMPLATE_NAME.fullmatch(name):
            raise StarmergeError(
                f"A chat template is called {name[:60]!a}, which cannot be the name of its file. "
                "Rename it in the tokenizer's config, or give a Jinja file."
            )
        file = TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja"
        changed[file] = template.encode()
    config = files.get(CONFIG)
    if config is not None:
        content = read_json(config) if isinstance(config, Place) else parse_json(config)
        if "chat_template" in content:
            own = {key: value for key, value in content.items() if key != "chat_template"}
            changed[CONFIG] = json_bytes(own)
    return changed


def _added(
    folder: Place, content: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the added tokens of all files that contain some."""
    found: dict[str, dict[str, Any]] = {}
    for token, number in _object(folder / ADDED).items():
        found[token] = {"id": number, "content": token}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and number.isdecimal():
            own = {key: value for key, value in entry.items() if key != "__type"}
            is_short = len(number) <= _LONGEST_ID
            found[str(entry.get("content"))] = {**own, "id": int(number) if is_short else number}
    listed = content.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            found[str(entry.get("content"))] = entry
    for token, entry in found.items():
        if not _is_id(entry.get("id")):
            raise StarmergeError(
                f"{folder}: the tokenizer's token {token[:60]!a} has the id "
                f"{str(entry.get('id'))[:60]!a}, which is no row. Fetch its files again."
            )
    return found


def _templates(folder: Place, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; files take precedence over the config."""
    found: dict[str, str] = {}
    for part in (_object(folder / "chat_template.json"), config):
        given = part.get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        for entry in given if isinstance(given, list) else ():
            if isinstance(entry, dict):
                found[str(entry.get("name"))] = str(entry.get("template"))
    for name in names:
        if matches(name, (TEMPLATE, f"{TEMPLATES}/*.jinja")):
            own = "default" if name == TEMPLATE else PurePosixPath(name).stem
            found[own] = read_text(folder / name, _MOST_BYTES)
    return {name: template for name, template in found.items() if template.strip()}


def _is_id(number: Any) -> bool:
    return type(number) is int and 0 <= number < _MOST_TOKENS


def _text(token: Any) -> str | None:
    """Return the text of a token, given as text or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(file: Place) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    return read_json(file) if is_file(file) else {}
