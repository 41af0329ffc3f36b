r"""Reading: which answer a model's response gives, and what that earns.

How a response is read is a task's ``match``. With a closed set of labels, each has several words:

- ``whole-word``: the label that stands first in the response, the longest where two start at one
  place. A word is a whole: "no" is not in "know" nor in "not", "acceptable" not in "unacceptable",
  ``pair_conn`` not in ``pair_conn_anaphora``; a number is one too: 1 is not in 10, 1.5 or -1.
- ``starts-with``: the same, where it opens the response; brackets, quotes and asterisks may stand
  before it.
- ``exact``: the response is a label's word, but for quotes around it and punctuation at its end.

Without labels:

- ``contains``: the right answer stands in the response, as whole words.
- ``exact``: the response is the right answer, as above.
- ``number``: the first number. One outside the task's range is no answer.
- ``token-f1``: F1 of the tokens that response and right answer share, as SQuAD counts them
  (arXiv 1606.05250, its evaluation script 1.1): without case, ASCII punctuation and articles.

Whitespace is all the same, 12,345 is 12345, and case counts only where the task says so.

**Negation.** A label straight after "not", "no", "never", "neither", "n't" or their like is not
what the response says ("does not entail", "not an acceptable sentence"), and what it says instead
would be a guess. So a response whose first label is negated is unreadable, unless negation and all
are a label ("not plausible"); a right answer that stands only negated is not contained. Subtler
turns ("hardly acceptable") are not seen.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from starmerge.evaluation.scoring.metrics import Metric

Match = Literal["whole-word", "exact", "starts-with", "contains", "number", "token-f1"]
"""How a response is read: see above."""

Mode = Literal["strict", "reference"]
"""``strict``: as above. ``reference``: as the scripts of arXiv 2502.10339; see :func:`read`."""


class Rules(Protocol):
    """The rules by which a task has its responses read; a task is an object of this kind."""

    @property
    def match(self) -> Match:
        """How responses are read."""

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The words of each label, in their order; none without labels."""

    @property
    def answer(self) -> str:
        """For ``contains``: regular expression of what counts as an answer at all."""

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and greatest answer, for ``number``."""

    @property
    def case_sensitive(self) -> bool:
        """Whether case counts."""

    @property
    def scored_by(self) -> Metric:
        """The metric, which says whether single rows earn anything."""


@dataclass(frozen=True)
class Reading:
    """What was read in a response."""

    value: str | float | None
    """The label (its first word), text or number; None: the response is unreadable."""
    credit: float | None
    """What the row earns, 0 to 1; None where only all rows together have a score."""


def read(rules: Rules, response: str, gold: str, mode: Mode = "strict") -> Reading:
    """Read a response.

    Mode ``reference`` is for comparison with numbers published with arXiv 2502.10339, and for
    nothing else. It reads as that paper's scripts do, and without case, which the script of
    Flan-T5 alone counts (it looks for each label in two spellings): of a closed set of labels, the
    first in the task's order one of whose words is a substring of the response, or its beginning
    (``starts-with``); a right answer is given if it is a substring; a number loses its sign if it
    has no decimals, is clipped to the range, and is 0 if there is none; ``token-f1`` compares the
    set of the response's words with the set of the right answer's *characters*. That finds "no" in
    "not" and "know", "entail" in "does not entail" and "a" in almost anything; it never finds a
    label that contains an earlier one; and what cannot be read looks like a true 0.

    Args:
        rules: Say how to read: a task.
        response: What the model wrote, without its special tokens.
        gold: The right answer of the row that was asked.
        mode: ``strict``, or ``reference`` for comparison only.

    Returns:
        The reading. What is unreadable earns 0; no row earns anything towards a correlation.
    """
    how = _read_strictly if mode == "strict" else _read_like_the_paper
    value, credit = how(rules, response, gold)
    return Reading(value, credit if rules.scored_by.earns else None)


def is_final(rules: Rules, text: str) -> bool:
    """Tell whether the strict reading of ``text`` stays as it is, whatever is written after it.

    Generation can stop there. With labels, that is as soon as one has been read and what follows
    it shows that it is neither part of a longer word or number nor the beginning of a longer
    label; with ``starts-with`` also as soon as no label can come any more. A number is final when
    no further digit can belong to it. Other responses are read as a whole, and are never final.
    """
    if rules.match == "number":
        number = _NUMBER.search(text)
        return number is not None and _AFTER_A_NUMBER.match(text, number.end()) is not None
    if rules.match not in ("whole-word", "starts-with"):
        return False
    text = _fold(text, rules.case_sensitive)
    found = _first(rules, text)
    if found is not None:
        if _OPEN_END.match(text, found.end()):
            return False
        last = found.start("phrase")
    elif rules.match == "starts-with":
        last = len(text) - len(text.lstrip(_OPENING))
    else:
        return False
    # A label that begins there or earlier, and is not complete yet, would be read instead.
    labels = _vocabulary(rules.words, rules.case_sensitive).labels
    rests = (text[start:] for start in range(last + 1))
    return not any(label.startswith(rest) and label != rest for rest in rests for label in labels)


def _read_strictly(rules: Rules, response: str, gold: str) -> tuple[str | float | None, float]:
    if rules.match == "number":
        number = _first_number(response, rules.range)
        return number, float(number == float(gold))
    text = _fold(response, rules.case_sensitive)
    if rules.match == "token-f1":
        tokens = _squad_tokens(text)
        credit = _f1(tokens, _squad_tokens(_fold(gold, rules.case_sensitive)))
        return response.strip() if tokens else None, credit
    label = _label(rules, text, rules.words or ((gold,),))
    if label is not None or rules.words:
        return label, float(label == gold)
    if rules.match == "exact":
        return _trim(response) or None, 0.0
    other = re.search(rules.answer, response)
    return other[0] if other else None, 0.0


def _read_like_the_paper(
    rules: Rules, response: str, gold: str
) -> tuple[str | float | None, float]:
    text = response.strip().lower()
    if rules.words:
        for words in rules.words:
            for word in map(str.lower, words):
                if text.startswith(word) if rules.match == "starts-with" else word in text:
                    return words[0], float(words[0] == gold)
        return None, 0.0
    if rules.match == "number":
        found = re.search(r"([-+]?\d*\.)?\d+", text)
        low, high = rules.range or (-math.inf, math.inf)
        number = min(max(float(found[0]), low), high) if found else 0.0
        return number, float(number == float(gold))
    if rules.match == "token-f1":
        return text or None, _f1(Counter(set(text.split())), Counter(set(gold.lower())))
    return (gold, 1.0) if gold.lower() in text else (text or None, 0.0)


# Labels and other phrases. Texts and phrases are folded, and then compared letter by letter, so
# that a text's folding begins with the folding of its beginning, as `is_final` needs it.

_OPENING = " \"'`“‘«([{<*"
"""What may stand before a label that opens a response (after folding)."""

_BEFORE = (
    r"(?<!\w(?=[\w+-]))"  # not inside a word, nor the sum 5+1
    r"(?<!\w'(?=\w))"  # not the d of "I'd"
    r"(?<!\d[.,](?=\d))"  # not the decimals of a number
    r"(?<!(?<!\w)-(?=\d))"  # not a number without its sign
)
_AFTER = r"(?!(?<=\w)\w)(?!(?<=\d)[.,]\d)"

_OPEN_END = re.compile(r"(?<=\w)\Z|(?<=\d)[.,]\Z")
"""The text ends before ``_AFTER`` is settled."""

_NEGATION = re.compile(
    r"(?<!\w)(?:not|never|no|non|nor|neither|cannot|\w*n't)(?: an?| the)?"
    rf"(?:-|[{re.escape(_OPENING)}]+)\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Vocabulary:
    labels: dict[str, str]
    """Every spelling of every word, folded, and its label; the longest first."""
    anywhere: re.Pattern[str]
    at_start: re.Pattern[str]


@lru_cache(maxsize=1024)
def _vocabulary(words: tuple[tuple[str, ...], ...], case_sensitive: bool) -> _Vocabulary:
    owners = {
        spelling: synonyms[0]
        for synonyms in words
        for word in synonyms
        for spelling in _spellings(_fold(word.strip(), case_sensitive))
    }
    labels = {phrase: owners[phrase] for phrase in sorted(owners, key=len, reverse=True)}
    phrase = f"{_BEFORE}(?P<phrase>{'|'.join(map(re.escape, labels))}){_AFTER}"
    opening = f"[{re.escape(_OPENING)}]*?"
    return _Vocabulary(labels, re.compile(phrase), re.compile(opening + phrase))


def _fold(text: str, case_sensitive: bool) -> str:
    text = re.sub(r"\s+", " ", text).replace("’", "'").replace("−", "-")
    return text if case_sensitive else text.casefold()


def _spellings(word: str) -> tuple[str, str]:
    """Return a word with its numbers written like 12345 and like 12,345."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word)
    return plain, re.sub(r"(?<=\d)(?=(\d{3})+(?!\d))", ",", plain)


def _first(rules: Rules, text: str) -> re.Match[str] | None:
    vocabulary = _vocabulary(rules.words, rules.case_sensitive)
    if rules.match == "starts-with":
        return vocabulary.at_start.match(text)
    return vocabulary.anywhere.search(text)


def _label(rules: Rules, text: str, words: tuple[tuple[str, ...], ...]) -> str | None:
    vocabulary = _vocabulary(words, rules.case_sensitive)
    if rules.match == "exact":
        answer = _trim(text)
        same = (phrase for phrase in vocabulary.labels if answer and _trim(phrase) == answer)
        phrase = next(same, None)
    elif rules.match == "contains":
        places = vocabulary.anywhere.finditer(text)
        phrase = next((place["phrase"] for place in places if not _is_negated(text, place)), None)
    else:
        found = _first(rules, text)
        phrase = found["phrase"] if found and not _is_negated(text, found) else None
    return None if phrase is None else vocabulary.labels[phrase]


def _is_negated(text: str, found: re.Match[str]) -> bool:
    return _NEGATION.search(text, 0, found.start("phrase")) is not None


def _trim(text: str) -> str:
    quotes = "\\s\"'`“”‘’«»"
    return re.sub(rf"^[{quotes}]+|[{quotes}.,;:!?…]+$", "", text)


# Numbers and tokens.

_NUMBER = re.compile(
    r"(?<![\w.])(?<!\d,)[-+−]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?!\w)(?![.,]\d)"
)
_AFTER_A_NUMBER = re.compile(r"[^.,]|[.,].", re.DOTALL)


def _first_number(text: str, limits: tuple[float, float] | None) -> float | None:
    found = _NUMBER.search(text)
    if found is None:
        return None
    number = float(found[0].replace(",", "").replace("−", "-"))
    low, high = limits or (-math.inf, math.inf)
    return number if math.isfinite(number) and low <= number <= high else None


def _squad_tokens(text: str) -> Counter[str]:
    words = text.translate(str.maketrans("", "", string.punctuation)).split()
    return Counter(word for word in words if word not in ("a", "an", "the"))


def _f1(tokens: Counter[str], right: Counter[str]) -> float:
    """F1 of two multisets: 2 |A ∩ B| / (|A| + |B|); 0 if both are empty."""
    return 2 * (tokens & right).total() / max(1, tokens.total() + right.total())
