"""Matchers for closed sets of labels: the first label, or the label at the start."""

from __future__ import annotations

import re

from starmerge_models.evaluation.scoring.matching.matcher import Matcher, Reading, Rules
from starmerge_models.evaluation.scoring.matching.phrases import (
    OPEN_END,
    OPENING,
    Vocabulary,
    first_substring,
    fold,
    is_negated,
    vocabulary,
)


class WholeWord(Matcher):
    """The label that occurs first in the response."""

    name, labels = "whole-word", "needed"

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first label, unless it is negated."""
        text, known = fold(response, rules.case_sensitive), _vocabulary(rules)
        found = self._first(known, text)
        if found is None or is_negated(text, found):
            return Reading(None, 0.0)
        label = known.labels[found["phrase"]]
        return Reading(label, float(label == gold))

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first label in the task's order that is a substring."""
        label = first_substring(rules.words, response, at_start=False)
        return Reading(label, float(label == gold))

    def is_final(self, rules: Rules, text: str) -> bool:
        """Return whether the parsed label is final, whatever text follows."""
        text, known = fold(text, rules.case_sensitive), _vocabulary(rules)
        found = self._first(known, text)
        if found is not None:
            if OPEN_END.match(text, found.end()):
                return False
            last: int | None = found.start("phrase")
        else:
            last = self._last_start(text)
        if last is None:
            return False
        # An incomplete label that begins there or earlier would be parsed instead.
        rests = (text[start:] for start in range(last + 1))
        return not any(
            label.startswith(rest) and label != rest for rest in rests for label in known.labels
        )

    def _first(self, known: Vocabulary, text: str) -> re.Match[str] | None:
        return known.anywhere.search(text)

    def _last_start(self, text: str) -> int | None:
        """Return the last position where a label may begin; None: anywhere."""
        return None


class StartsWith(WholeWord):
    """The label at the start of the response."""

    name = "starts-with"

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first label in the task's order that the response starts with."""
        label = first_substring(rules.words, response, at_start=True)
        return Reading(label, float(label == gold))

    def _first(self, known: Vocabulary, text: str) -> re.Match[str] | None:
        return known.at_start.match(text)

    def _last_start(self, text: str) -> int | None:
        return len(text) - len(text.lstrip(OPENING))


def _vocabulary(rules: Rules) -> Vocabulary:
    return vocabulary(rules.words, rules.case_sensitive)
