"""The matcher of numbers: the first number of a response."""

from __future__ import annotations

import math
import re

from starmerge_models.evaluation.scoring.matching.matcher import Matcher, Reading, Rules


class Number(Matcher):
    """The first number; a number outside of the task's range is not an answer."""

    name, labels = "number", "none"
    reads_numbers = True

    def gold(self, text: str) -> str:
        """Return the right answer in Python's float format."""
        return number_of(text)

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first number."""
        number = _first_number(response, rules.range)
        return Reading(number, float(number == float(gold)))

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first digits, clipped to the range; 0 if there are none."""
        found = re.search(r"([-+]?\d*\.)?\d+", response.strip().lower())
        low, high = rules.range or (-math.inf, math.inf)
        number = min(max(float(found[0]), low), high) if found else 0.0
        return Reading(number, float(number == float(gold)))

    def is_final(self, rules: Rules, text: str) -> bool:
        """Return whether no further digit can belong to the first number."""
        number = _NUMBER.search(text)
        return number is not None and _AFTER_A_NUMBER.match(text, number.end()) is not None


def number_of(text: str) -> str:
    """Return a right answer that is a number in Python's float format.

    Raises:
        ValueError: It is not a finite number.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the right answer {text!r} is no number")
    return repr(number)


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
