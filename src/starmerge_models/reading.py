"""Bounded reading of small untrusted files: JSON, YAML and text.

Only regular files of a bounded size are read, so that no file makes the reader wait forever or
exhaust its memory.
"""

from __future__ import annotations

from typing import Any

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.parsing import MOST_JSON_BYTES, parse_json, parse_yaml
from starmerge_models.storage import Place, storage_of

_MOST_YAML_BYTES = 2**20
"""Longest YAML file; parsing takes seconds per megabyte."""


def read_bytes(path: Place, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: There is no such file.
        StarmergeError: The file is larger, not a regular file, or unreadable.
    """
    with storage_of(path).stream(path) as raw:
        try:
            content = bytearray()
            while len(content) <= most and (part := raw.read(min(2**20, most + 1))):
                content += part
        except OSError as error:
            raise StarmergeError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > most:
        raise StarmergeError(
            f"{path} is longer than {most:,} bytes, the most that is read. Is it the right file?"
        )
    return bytes(content)


def read_text(path: Place, most: int = MOST_JSON_BYTES) -> str:
    """Read a regular file in UTF-8 of at most ``most`` bytes.

    Raises:
        StarmergeError: The file is missing, larger, not a regular file, or not UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except FileNotFoundError as error:
        raise StarmergeError(f"{path} is missing.") from error
    except UnicodeDecodeError as error:
        raise StarmergeError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error


def read_json(path: Place) -> dict[str, Any]:
    """Read a JSON object from a file, as :func:`parse_json` does.

    Raises:
        StarmergeError: The file is missing, too large, or does not contain a JSON object.
    """
    try:
        content = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except FileNotFoundError as error:
        raise StarmergeError(f"{path} is missing.") from error
    except ValueError as error:
        raise StarmergeError(f"{path} is not JSON: {error}. Is the file complete?") from error
    if not isinstance(content, dict):
        raise StarmergeError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def read_yaml(path: Place) -> list[Any]:
    """Read the documents of a YAML file, as :func:`parse_yaml` does.

    Raises:
        UsageError: The file is missing, too large, not a regular file, or not YAML.
    """
    try:
        return parse_yaml(read_text(path, _MOST_YAML_BYTES))
    except StarmergeError as error:
        raise UsageError(str(error).replace("is missing", "does not exist")) from error
    except ValueError as error:
        raise UsageError(f"{path} is not a readable YAML file: {error}") from error
