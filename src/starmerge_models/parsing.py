"""Strict and bounded parsers of JSON and YAML from untrusted sources.

Ambiguous files, for example with a key that occurs twice, are refused, because other readers may
understand them differently. The number of values and their nesting are bounded, so that no text
causes endless recursion or memory use.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml

MOST_JSON_BYTES = 100 * 10**6
"""Longest JSON file; the safetensors library has the same limit for a file's header."""

_MOST_ENTRIES = 2_000_000
"""Most commas in a JSON text, counted before it is parsed."""

_MOST_VALUES = 4_000_000
"""Most values in a file, including keys, lists, mappings, and each use of an alias."""

_DEEPEST = 64
"""Deepest nesting of lists and mappings."""

_LONGEST_NUMBER = 300
"""Most digits of an integer, so that every integer fits into a float."""

_TOO_LARGE = 10**_LONGEST_NUMBER


def parse_json(content: str | bytes) -> Any:
    """Parse a JSON text.

    Args:
        content: The text; bytes are UTF-8, without a byte order mark.

    Raises:
        ValueError: The text is not JSON (then a :class:`json.JSONDecodeError`) or not UTF-8; a key
            occurs twice in one object; a number, the nesting or the number of values exceeds its
            bound; a string contains a lone surrogate. The message names the problem.
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


def parse_yaml(text: str) -> list[Any]:
    """Parse the documents of a YAML text; an empty text has one document, None.

    Dates are parsed as strings. Keys must be strings or integers.

    Raises:
        ValueError: The text is not YAML, or contains something that :func:`parse_json` refuses too.
            The message names the problem.
    """
    try:
        documents = list(yaml.load_all(text, Loader=_Loader)) or [None]
        for document in documents:
            check_content(document)
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        # Tags that do not fit their values raise arbitrary errors: `!!bool maybe` a KeyError.
        raise ValueError(" ".join(str(error)[:1000].split())) from error
    except RecursionError as error:
        raise ValueError(f"{_too_deep()}.") from error
    return documents


def check_content(content: Any) -> None:
    """Check that parsed content is within the bounds and has JSON types only.

    Raises:
        ValueError: It is not; the message names the problem.
    """
    seen, level = 0, [content]
    for _ in range(_DEEPEST + 1):
        if not level:
            return
        seen += len(level)
        if seen > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        # A YAML alias repeats all of its values, so the next level may be of any size.
        level = _members(level, _MOST_VALUES - seen)
    if level:
        raise ValueError(_too_deep())


def _members(level: list[Any], enough: int) -> list[Any]:
    """Check values, and return what they hold, until it is more than enough."""
    found: list[Any] = []
    for value in level:
        if isinstance(value, str):
            if not value.isascii():
                _check_characters(value)
        elif isinstance(value, dict):
            found += value
            found += value.values()
        elif isinstance(value, list):
            found += value
        elif isinstance(value, int):
            if abs(value) >= _TOO_LARGE:
                raise ValueError(f"a number has more than {_LONGEST_NUMBER} digits")
        elif value is not None and not isinstance(value, float):
            raise ValueError(f"it holds a {type(value).__name__}. Write it as a text, in quotes")
        if len(found) > enough:
            break
    return found


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
    """PyYAML's safe loader without duplicate keys, dates and merge keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; refuse keys other than strings and numbers, and duplicate keys."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag.endswith(":merge"):
                # For nested merge keys PyYAML builds lists that double at each step.
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
        """Return a number; PyYAML takes very long for sexagesimal numbers such as 1:30:00."""
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
