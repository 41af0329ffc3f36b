"""Where a model lies: a local folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starmerge.errors import StarmergeError, UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*")
"""What stands beside the weights: configs, tokenizer, chat template, code of the model, licence."""


@dataclass(frozen=True)
class Source:
    """A model's folder and what is known of its name."""

    reference: str
    """What the user wrote."""
    path: Path
    name: str | None
    """Hub id of the model, as far as it is known: asked for, or recorded in ``config.json``."""
    revision: str | None
    """Commit of a Hub repository."""

    def __str__(self) -> str:
        return self.reference


def resolve(reference: str | Path) -> Source:
    """Find a model by a local folder or by a Hub id ``org/name`` or ``org/name@revision``.

    A Hub repository is downloaded into the Hub's own cache, or found there: what stands at its top,
    with the weights in safetensors if it has them so.

    Raises:
        UsageError: There is no such folder, and it is no Hub id.
        StarmergeError: The Hub has no such repository or revision, or cannot be reached.
    """
    text = str(reference)
    if not text:
        raise UsageError("A model's path is empty. Give a folder or a Hub id.")
    path = Path(reference).expanduser()
    if path.is_dir():
        return Source(text, path, _recorded_name(path), None)
    if path.exists():
        raise UsageError(f"{text} is a file. Give the folder that holds the model or adapter.")
    if not _HUB_ID.fullmatch(text):
        raise UsageError(
            f"{text} does not exist. Give a folder, or a Hub id such as org/name or "
            "org/name@revision."
        )
    name, _, revision = text.partition("@")
    return Source(text, *_download(name, revision or None))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        StarmergeError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StarmergeError(f"{path} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StarmergeError(f"{path} is not JSON: {error}. Is the file complete?") from error
    if not isinstance(content, dict):
        raise StarmergeError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def _recorded_name(path: Path) -> str | None:
    config = path / "config.json"
    name = read_json(config).get("_name_or_path") if config.is_file() else None
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _download(name: str, revision: str | None) -> tuple[Path, str, str]:
    """Return folder, id and commit of a Hub repository."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, rarely needed)
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    def fetch(weights: str) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[weights, *SIDE_FILES],
            ignore_patterns=["*/*"],
        )
        return Path(folder)

    try:
        path = fetch("*.safetensors")
        if not any(path.glob("*.safetensors")):
            path = fetch("*.bin")
    except LocalEntryNotFoundError as error:
        raise StarmergeError(
            f"{name} is neither a folder here nor in the Hub's cache, and the Hub cannot be "
            f"reached. Check the path, the network, and HF_HUB_OFFLINE. ({error})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        wanted = f"{name}@{revision}" if revision else name
        raise StarmergeError(
            f"{wanted} is no folder here, and the Hub does not give it: {error}"
        ) from error
    return path, name, path.name
