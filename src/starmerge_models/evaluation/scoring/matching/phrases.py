"""Search for labels and other phrases in a text: whole words, spellings, negation.

Texts and phrases are folded (case, whitespace, apostrophes) and then compared character by
character. The folding of a prefix is a prefix of the text's folding, so that a parsed answer can
be final before the text ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

OPENING = " \"'`“‘«([{<*"
"""Characters that may precede a label at the start of a response (after folding)."""

_BEFORE = (
    r"(?<!\w(?=[\w+-]))"  # not inside a word, nor the sum 5+1
    r"(?<!\w'(?=\w))"  # not the d of "I'd"
    r"(?<!\d[.,](?=\d))"  # not the decimals of a number
    r"(?<!(?<!\w)-(?=\d))"  # not a number without its sign
)
_AFTER = r"(?!(?<=\w)\w)(?!(?<=\d)[.,]\d)"

OPEN_END = re.compile(r"(?<=\w)\Z|(?<=\d)[.,]\Z")
"""Matches where the text ends before ``_AFTER`` can be decided."""

_NEGATION = re.compile(
    r"(?<!\w)(?:not|never|no|non|nor|neither|cannot|\w*n't)(?: an?| the)?"
    rf"(?:-|[{re.escape(OPENING)}]+)\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Vocabulary:
    """Compiled patterns of the labels' spellings."""

    labels: dict[str, str]
    """The label of every folded spelling of every word; the longest spelling first."""
    anywhere: re.Pattern[str]
    at_start: re.Pattern[str]


@lru_cache(maxsize=1024)
def vocabulary(words: tuple[tuple[str, ...], ...], case_sensitive: bool) -> Vocabulary:
    """Compile the patterns that find labels by their words.

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
    """Normalise the spaces, apostrophes, minus signs and, unless it counts, the case of a text."""
    text = re.sub(r"\s+", " ", text).replace("’", "'").replace("−", "-")
    return text if case_sensitive else text.casefold()


def _spellings(word: str) -> tuple[str, str]:
    """Return a word with its numbers written as 12345 and as 12,345."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word)
    return plain, re.sub(r"(?<=\d)(?=(\d{3})+(?!\d))", ",", plain)


def is_negated(text: str, found: re.Match[str]) -> bool:
    """Return whether a negation directly precedes a phrase that was found."""
    return _NEGATION.search(text, 0, found.start("phrase")) is not None


def trim(text: str) -> str:
    """Return a text without quotes around it and punctuation at its end."""
    quotes = "\\s\"'`“”‘’«»"
    return re.sub(rf"^[{quotes}]+|[{quotes}.,;:!?…]+$", "", text)


def first_substring(words: tuple[tuple[str, ...], ...], text: str, *, at_start: bool) -> str | None:
    """Return the label that the scripts of arXiv 2502.10339 find in a text, ignoring case.

    Args:
        words: The words of each label, in order.
        text: The text.
        at_start: Whether the text must start with the word.

    Returns:
        The first label with a word that is a substring of the text.
    """
    text = text.strip().lower()
    for own in words:
        for word in map(str.lower, own):
            if text.startswith(word) if at_start else word in text:
                return own[0]
    return None
