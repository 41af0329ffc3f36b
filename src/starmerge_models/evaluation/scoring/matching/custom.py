"""Custom matchers: decorated functions that parse a response."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.scoring.matching.matcher import MATCHERS, Matcher, Reading, Rules
from starmerge_models.evaluation.scoring.matching.numbers import number_of

Function = Callable[[str, str, tuple[str, ...]], Any]
"""From the response, the right answer and the labels to the parsed answer."""


def matcher(
    name: str, *, numbers: bool = False, graded: bool = False
) -> Callable[[Function], Matcher]:
    """Make the decorated function a matcher called ``name``.

    The function gets the response, the right answer of the row, and the labels of the task: the
    first word of each, an empty tuple for a task without labels. It returns the parsed answer, a
    text or a number, or None if the response is unreadable. The row's credit is 1 if the parsed
    answer equals the right answer, else 0. To set another credit the function returns a pair: the
    parsed answer and the credit.

    For a task with labels it must return one of them, so that scores of labels (F1) can count them.

    Args:
        name: The matcher's name in task files.
        numbers: Whether the function parses numbers. The right answers of its tasks must then be
            numbers, and correlations can score them.
        graded: Whether credits may be fractional: the function then returns pairs with a credit
            from 0 to 1, and metric ``f1`` is the mean credit.

    Raises:
        UsageError: The name is taken.

    Example:
        .. code-block:: python

            @matcher("json_field")
            def json_field(response: str, gold: str, labels: tuple[str, ...]) -> str | None:
                found = re.search(r'"answer": *"([^"]*)"', response)
                return found[1] if found else None
    """

    def register(function: Function) -> Matcher:
        made = _CustomMatcher(name, function, numbers=numbers, graded=graded)
        MATCHERS.add(name, made)
        return made

    return register


class _CustomMatcher(Matcher):
    """A matcher that calls a user's function."""

    labels = "possible"

    def __init__(self, name: str, function: Function, *, numbers: bool, graded: bool) -> None:
        self.name, self._function = name, function
        self.reads_numbers, self.is_graded = numbers, graded
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__qualname__ = function.__qualname__

    def check(self, *, closed: bool) -> None:
        super().check(closed=closed)
        if closed and self.reads_numbers:
            raise ValueError(f"match {self.name!r} reads numbers: it is for tasks without labels")

    def gold(self, text: str) -> str:
        return number_of(text) if self.reads_numbers else super().gold(text)

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        labels = tuple(words[0] for words in rules.words)
        try:
            returned = self._function(response, gold, labels)
        except Exception as error:  # whatever the plug-in's own code raises
            raise StarmergeError(
                f"The matcher {self.name!r} failed at the response {response[:200]!r}: "
                f"{type(error).__name__}: {error}."
            ) from error
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        value, credit = returned if is_pair else (returned, None)
        value = self._value(value, labels, response)
        right = float(gold) if self.reads_numbers else gold
        return Reading(value, self._credit(float(value == right) if credit is None else credit))

    def _value(self, value: Any, labels: tuple[str, ...], response: str) -> str | float | None:
        """Return the parsed answer, if it has the type that the task needs."""
        if value is None:
            return None
        if labels and value not in labels:
            wanted = f"one of the labels ({', '.join(labels)})"
        elif self.reads_numbers:
            if isinstance(value, int | float) and math.isfinite(value):
                return float(value)
            wanted = "a finite number"
        elif not isinstance(value, str):
            wanted = "a text"
        else:
            return value
        raise StarmergeError(
            f"The matcher {self.name!r} reads {value!r} in the response {response[:200]!r}. It "
            f"must return {wanted}, or None."
        )

    def _credit(self, credit: Any) -> float:
        fits = isinstance(credit, int | float) and 0 <= credit <= 1
        if not fits or (credit not in (0, 1) and not self.is_graded):
            wanted = "from 0 to 1" if self.is_graded else "0 or 1 (else: graded=True)"
            raise StarmergeError(
                f"The matcher {self.name!r} gives a row {credit!r}. It must give {wanted}."
            )
        return float(credit)
