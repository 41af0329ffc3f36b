"""Reading files of other people: JSON, YAML and text, strictly and within bounds.

Two readers may understand a sloppy file differently: where a key stands twice, say. So such files
are refused. And no file may make a reader wait, recurse or take memory without end: it must be a
regular file of a bounded size, with a bounded number of values that are nested to a bounded depth.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Hashable, Iterator
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import yaml

from starmerge.errors import StarmergeError, UsageError

MOST_JSON_BYTES = 100 * 10**6
"""Longest JSON file; that of the header of a safetensors file as well, by the library itself."""

_MOST_YAML_BYTES = 2**20
"""Longest YAML file: reading one takes seconds a megabyte."""

_MOST_ENTRIES = 2_000_000
"""Most commas in a JSON text, which are counted before it takes memory."""

_MOST_VALUES = 4_000_000
"""Most values that a file may hold; keys, lists and mappings count, and each use of an alias."""

_DEEPEST = 64
"""Most lists and mappings inside each other."""

_LONGEST_NUMBER = 300
"""Most digits of a whole number, so that every one of them fits into a float."""


def exists(path: Path) -> bool:
    """Tell whether a path exists, also one that the system does not take for a path at all."""
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def open_regular(path: Path) -> FileIO:
    """Open a file to read its bytes, unbuffered, if it is a regular one.

    A pipe or a device may never end, and opening a pipe may wait for ever.

    Raises:
        FileNotFoundError: There is no such file.
        StarmergeError: It is a folder, a pipe or a device, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StarmergeError(f"{path} cannot be opened: {reason}. Give another file.") from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return FileIO(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise StarmergeError(f"{path} is a folder. A file is wanted there.")
    raise StarmergeError(
        f"{path} is a pipe or a device, which may never end. Save its content as a file."
    )


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: There is no such file.
        StarmergeError: It is larger, no regular file, or cannot be read.
    """
    with open_regular(path) as raw:
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


def read_text(path: Path, most: int = MOST_JSON_BYTES) -> str:
    """Read a regular file in UTF-8 of at most ``most`` bytes.

    Raises:
        StarmergeError: It is missing, larger, no regular file, or not UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except FileNotFoundError as error:
        raise StarmergeError(f"{path} is missing.") from error
    except UnicodeDecodeError as error:
        raise StarmergeError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error


def parse_json(content: str | bytes) -> Any:
    """Return what a JSON text says.

    Args:
        content: The text; bytes are UTF-8, without a byte order mark.

    Raises:
        ValueError: It is not JSON (then a :class:`json.JSONDecodeError`), or not UTF-8; a key
            stands twice in one object; a number, the nesting or the number of values is beyond all
            bounds; a text holds half a character (a lone surrogate). The message says which.
    """
    text = content if isinstance(content, str) else content.decode()
    if text.count(",") > _MOST_ENTRIES:
        raise ValueError(f"it holds more than {_MOST_ENTRIES:,} entries")
    try:
        parsed = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_content(parsed)
    return parsed


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, as :func:`parse_json` does.

    Raises:
        StarmergeError: The file is missing, too large, or holds something else.
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


def read_yaml(path: Path) -> list[Any]:
    """Read the documents of a YAML file; an empty file has one, None.

    Dates are texts here. Keys are texts or whole numbers.

    Raises:
        UsageError: The file is missing, too large, no regular file, not YAML, or holds what
            :func:`parse_json` refuses as well.
    """
    try:
        text = read_text(path, _MOST_YAML_BYTES)
        documents = list(yaml.load_all(text, Loader=_Loader)) or [None]
        for document in documents:
            check_content(document)
    except StarmergeError as error:
        raise UsageError(str(error).replace("is missing", "does not exist")) from error
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        # Tags that do not fit their values raise whatever Python does: `!!bool maybe` a KeyError.
        reason = " ".join(str(error)[:1000].split())
        raise UsageError(f"{path} is not a readable YAML file: {reason}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not a readable YAML file: {_too_deep()}.") from error
    return documents


def check_content(content: Any) -> None:
    """Make sure that what a file says is within bounds, and made of what JSON is made of.

    Raises:
        ValueError: It is not; the message says what is wrong.
    """
    seen, level = 0, [content]
    for _ in range(_DEEPEST + 1):
        if not level:
            return
        seen += len(level)
        if seen > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        # An alias of YAML stands for all that it names, so the next level may be of any size.
        level = list(islice(chain.from_iterable(map(_members, level)), _MOST_VALUES - seen + 1))
    if level:
        raise ValueError(_too_deep())


def _members(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value)
    elif isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, int):
        if abs(value) >= 10**_LONGEST_NUMBER:
            raise ValueError(f"a number has more than {_LONGEST_NUMBER} digits")
    elif value is not None and not isinstance(value, float):
        raise ValueError(f"it holds a {type(value).__name__}. Write it as a text, in quotes")


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {text[:60]!a} holds half a character") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the name {twice[:200]!a} occurs twice in one object")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number has more than {_LONGEST_NUMBER} digits")
    return int(digits)


def _too_deep() -> str:
    return f"it is nested more than {_DEEPEST} levels deep"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes no key twice and knows no dates and no merge keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; refuse keys that are no texts and no numbers, and keys that recur."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag.endswith(":merge"):
                # Of merges of merges PyYAML makes lists that double at each step.
                self._refuse(key, "the merge key << is not read. Write out the keys it stands for")
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int) or isinstance(name, bool):
                shown = repr(name) if isinstance(name, bool | float | None) else type(name).__name__
                self._refuse(key, f"the key {shown} is no text: quote it")
            if str(name) in seen:
                self._refuse(key, f"the key {name!r} occurs twice")
            seen.add(str(name))
        return super().construct_mapping(node, deep=deep)

    def _refuse(self, node: Any, problem: str) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_number(self, node: Any) -> int | float:
        """Return a number; PyYAML takes for ever to read one of many parts, as 1:30:00 has."""
        if len(self.construct_scalar(node)) > _LONGEST_NUMBER:
            self._refuse(node, f"a number has more than {_LONGEST_NUMBER} digits")
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def is_url(path: str | Path) -> bool:
    """Tell whether a text is meant as a URL, such as ``s3://bucket/model``, and not as a path.

    Two slashes may have become one, as in paths.
    """
    return _URL.match(str(path)) is not None


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
