"""Labels and other phrases in a text: whole words, their spellings, negation.

Texts and phrases are folded, and then compared letter by letter, so that a text's folding begins
with the folding of its beginning: a reading can then be final before the text ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

OPENING = " \"'`“‘«([{<*"
"""What may stand before a label that opens a response (after folding)."""

_BEFORE = (
    r"(?<!\w(?=[\w+-]))"  # not inside a word, nor the sum 5+1
    r"(?<!\w'(?=\w))"  # not the d of "I'd"
    r"(?<!\d[.,](?=\d))"  # not the decimals of a number
    r"(?<!(?<!\w)-(?=\d))"  # not a number without its sign
)
_AFTER = r"(?!(?<=\w)\w)(?!(?<=\d)[.,]\d)"

OPEN_END = re.compile(r"(?<=\w)\Z|(?<=\d)[.,]\Z")
"""The text ends before ``_AFTER`` is settled."""

_NEGATION = re.compile(
    r"(?<!\w)(?:not|never|no|non|nor|neither|cannot|\w*n't)(?: an?| the)?"
    rf"(?:-|[{re.escape(OPENING)}]+)\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Vocabulary:
    """What is looked for in a text."""

    labels: dict[str, str]
    """Every spelling of every word, folded, and its label; the longest first."""
    anywhere: re.Pattern[str]
    at_start: re.Pattern[str]


@lru_cache(maxsize=1024)
def vocabulary(words: tuple[tuple[str, ...], ...], case_sensitive: bool) -> Vocabulary:
    """Return what finds labels by their words.

    Args:
        words: The words of each label.
        case_sensitive: Whether case counts.
    """
    owners = {
        spelling: synonyms[0]
        for synonyms in words
        for word in synonyms
        for spelling in _spellings(fold(word.strip(), case_sensitive))
    }
    labels = {phrase: owners[phrase] for phrase in sorted(owners, key=len, reverse=True)}
    phrase = f"{_BEFORE}(?P<phrase>{'|'.join(map(re.escape, labels))}){_AFTER}"
    opening = f"[{re.escape(OPENING)}]*?"
    return Vocabulary(labels, re.compile(phrase), re.compile(opening + phrase))


def fold(text: str, case_sensitive: bool) -> str:
    """Return a text with plain spaces, apostrophes and minus signs, and without case."""
    text = re.sub(r"\s+", " ", text).replace("’", "'").replace("−", "-")
    return text if case_sensitive else text.casefold()


def _spellings(word: str) -> tuple[str, str]:
    """Return a word with its numbers written like 12345 and like 12,345."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word)
    return plain, re.sub(r"(?<=\d)(?=(\d{3})+(?!\d))", ",", plain)


def is_negated(text: str, found: re.Match[str]) -> bool:
    """Tell whether a negation stands straight before a phrase that was found."""
    return _NEGATION.search(text, 0, found.start("phrase")) is not None


def trim(text: str) -> str:
    """Return a text without quotes around it and punctuation at its end."""
    quotes = "\\s\"'`“”‘’«»"
    return re.sub(rf"^[{quotes}]+|[{quotes}.,;:!?…]+$", "", text)


def first_substring(words: tuple[tuple[str, ...], ...], text: str, *, at_start: bool) -> str | None:
    """Return the label that the scripts of arXiv 2502.10339 find in a text, without case.

    Args:
        words: The words of each label, in their order.
        text: The text.
        at_start: Whether a word must stand at its beginning.

    Returns:
        The first label, in their order, that has a word which is a substring of the text.
    """
    text = text.strip().lower()
    for own in words:
        for word in map(str.lower, own):
            if text.startswith(word) if at_start else word in text:
                return own[0]
    return None
