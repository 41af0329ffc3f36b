"""A matcher: the rules by which a response is read, and what the reading earns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from starmerge_models.evaluation.scoring.metrics import Metric
from starmerge_models.plugins import Registry

Mode = Literal["strict", "reference"]
"""``strict``: by the matcher's own rules. ``reference``: as the scripts of arXiv 2502.10339 read;
see :func:`read`."""


class Rules(Protocol):
    """The rules by which a task has its responses read; a task is an object of this kind."""

    @property
    def read_by(self) -> Matcher:
        """The matcher, which reads responses."""

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


class Matcher(ABC):
    """A way to read responses; a task names one by its ``match``.

    To define one, decorate a function with
    :func:`starmerge_models.evaluation.scoring.matching.matcher`.
    """

    name: str
    __qualname__: str
    labels: ClassVar[Literal["needed", "possible", "none"]]
    """Whether a task that is read so has a closed set of labels."""
    is_graded: bool = False
    """Whether a row may earn part of a point; else it earns 0 or 1."""
    reads_numbers: bool = False
    """Whether it reads numbers; right answers must then be numbers, and may have a range."""

    def check(self, *, closed: bool) -> None:
        """Make sure that a task can be read so.

        Args:
            closed: Whether it has labels.

        Raises:
            ValueError: It cannot.
        """
        if closed and self.labels == "none":
            raise ValueError(f"match {self.name!r} is for tasks without labels")
        if not closed and self.labels == "needed":
            raise ValueError(f"match {self.name!r} needs labels")

    def gold(self, text: str) -> str:
        """Return the right answer of a row without labels as responses are compared with it.

        Args:
            text: The right answer as the data has it.

        Raises:
            ValueError: It is no answer that can be given.
        """
        if not text.strip():
            raise ValueError("the right answer is empty")
        return text

    @abstractmethod
    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Read a response.

        Args:
            rules: The task.
            response: The text that the model wrote.
            gold: The right answer of the row that was asked.
        """

    def read_as_the_paper(self, rules: Rules, response: str, gold: str) -> Reading:
        """Read a response as the scripts of arXiv 2502.10339 do, where they have such a task."""
        return self.read(rules, response, gold)

    def is_final(self, rules: Rules, text: str) -> bool:
        """Tell whether the reading of a text stays, whatever is written after it."""
        return False


def _fault(thing: Any) -> str | None:
    """Return why something is no matcher that can be used."""
    if isinstance(thing, Matcher):
        return None
    if callable(thing):
        return 'it is not decorated. Write @matcher("name") above the function'
    return f"it is of the type {type(thing).__name__}, and a matcher is a decorated function"


MATCHERS: Registry[Matcher] = Registry("matcher", "starmerge_models.matchers", fault=_fault)
"""Every matcher by name; other packages and files have more."""


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
    label that contains an earlier one; and what cannot be read looks like a true 0. Matchers that
    the paper does not have, such as a plug-in's, read as they do otherwise.

    Args:
        rules: Say how to read: a task.
        response: What the model wrote, without its special tokens.
        gold: The right answer of the row that was asked.
        mode: ``strict``, or ``reference`` for comparison only.

    Returns:
        The reading. What is unreadable earns 0; no row earns anything towards a correlation.
    """
    matcher = rules.read_by
    how = matcher.read if mode == "strict" else matcher.read_as_the_paper
    reading = how(rules, response, gold)
    return reading if rules.scored_by.earns else replace(reading, credit=None)


def is_final(rules: Rules, text: str) -> bool:
    """Tell whether the strict reading of ``text`` stays as it is, whatever is written after it.

    Generation can stop there. With labels, that is as soon as one has been read and what follows
    it shows that it is neither part of a longer word or number nor the beginning of a longer
    label; with ``starts-with`` also as soon as no label can come any more. A number is final when
    no further digit can belong to it. Other responses are read as a whole, and are never final.
    """
    return rules.read_by.is_final(rules, text)
