"""The interface of matchers, their registry, and parsing by a task's matcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from starmerge_models.evaluation.scoring.metrics import Metric
from starmerge_models.plugins import Registry

Mode = Literal["strict", "reference"]
"""``strict``: by the matcher's own rules. ``reference``: by those of the scripts of arXiv
2502.10339; see :func:`read`."""


class Rules(Protocol):
    """The parsing rules of a task; tasks implement this protocol."""

    @property
    def read_by(self) -> Matcher:
        """The matcher that parses responses."""

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The words of each label, in order; empty without labels."""

    @property
    def answer(self) -> str:
        """For ``contains``: regular expression of a readable answer."""

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and greatest answer, for ``number``."""

    @property
    def case_sensitive(self) -> bool:
        """Whether case counts."""

    @property
    def scored_by(self) -> Metric:
        """The metric, which determines whether single rows have a credit."""


@dataclass(frozen=True)
class Reading:
    """The answer parsed from a response."""

    value: str | float | None
    """The label (its first word), text or number; None: the response is unreadable."""
    credit: float | None
    """The row's credit, 0 to 1; None where the metric is defined only for all rows together."""


class Matcher(ABC):
    """A way to parse responses; a task names its matcher in ``match``.

    To define one, decorate a function with
    :func:`starmerge_models.evaluation.scoring.matching.matcher`.
    """

    name: str
    __qualname__: str
    labels: ClassVar[Literal["needed", "possible", "none"]]
    """Whether the matcher is for tasks with a closed set of labels."""
    is_graded: bool = False
    """Whether credits may be fractional; otherwise they are 0 or 1."""
    reads_numbers: bool = False
    """Whether the matcher parses numbers; right answers must then be numbers."""

    def check(self, *, closed: bool) -> None:
        """Make sure that the matcher fits a task.

        Args:
            closed: Whether the task has labels.

        Raises:
            ValueError: The matcher does not fit.
        """
        if closed and self.labels == "none":
            raise ValueError(f"match {self.name!r} is for tasks without labels")
        if not closed and self.labels == "needed":
            raise ValueError(f"match {self.name!r} needs labels")

    def gold(self, text: str) -> str:
        """Normalise the right answer of a row without labels, for the comparison with responses.

        Args:
            text: The right answer in the data.

        Raises:
            ValueError: No response could give this answer.
        """
        if not text.strip():
            raise ValueError("the right answer is empty")
        return text

    @abstractmethod
    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse a response.

        Args:
            rules: The task.
            response: The model's response.
            gold: The row's right answer.
        """

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse a response like the scripts of arXiv 2502.10339, if they have such tasks."""
        return self.read(rules, response, gold)

    def is_final(self, rules: Rules, text: str) -> bool:
        """Return whether the parsed answer is final, whatever text follows."""
        return False


def _fault(thing: Any) -> str | None:
    """Return why an object is not a usable matcher; None if it is one."""
    if isinstance(thing, Matcher):
        return None
    if callable(thing):
        return 'it is not decorated. Write @matcher("name") above the function'
    return f"it is of the type {type(thing).__name__}, and a matcher is a decorated function"


MATCHERS: Registry[Matcher] = Registry("matcher", "starmerge_models.matchers", fault=_fault)
"""Every matcher by name; other packages and files can add matchers."""


def read(rules: Rules, response: str, gold: str, mode: Mode = "strict") -> Reading:
    """Parse a response by the matcher of a task.

    Mode ``reference`` is only for comparison with numbers published with arXiv 2502.10339. It
    parses like that paper's scripts, but ignores case (only the Flan-T5 script is case-sensitive,
    and it tries two spellings of each label):

    - of a closed set of labels, the first in the task's order with a word that is a substring of
      the response, or its beginning (``starts-with``);
    - a right answer counts as given if it is a substring;
    - a number loses its sign if it has no decimals, is clipped to the range, and is 0 if there is
      none;
    - ``token-f1`` compares the set of the response's words with the set of the right answer's
      *characters*.

    This finds "no" in "not" and "know", "entail" in "does not entail" and "a" in almost anything;
    it never finds a label that contains an earlier one; and an unreadable number is
    indistinguishable from a true 0. Matchers that the paper does not have, such as plug-ins, are
    the same in both modes.

    Args:
        rules: The task.
        response: The model's response, without special tokens.
        gold: The row's right answer.
        mode: ``strict``, or ``reference`` for comparison only.

    Returns:
        The answer and its credit: 0 if unreadable, None if the metric is a correlation.
    """
    matcher = rules.read_by
    how = matcher.read if mode == "strict" else matcher.read_reference
    reading = how(rules, response, gold)
    return reading if rules.scored_by.has_row_credits else replace(reading, credit=None)


def is_final(rules: Rules, text: str) -> bool:
    """Return whether the strict reading of ``text`` is final, whatever text follows.

    Generation can stop there. A label is final when the text after it shows that it is neither
    part of a longer word or number nor the beginning of a longer label; with ``starts-with``, an
    unreadable text is final when no label can follow any more. A number is final when no further
    digit can belong to it. Other matchers need the whole response, so it is never final.
    """
    return rules.read_by.is_final(rules, text)
