"""Matchers that compare a response with the right answer: exact, contains, token-f1."""

from __future__ import annotations

import re
import string
from collections import Counter

from starmerge_models.evaluation.scoring.matching.matcher import Matcher, Reading, Rules
from starmerge_models.evaluation.scoring.matching.phrases import (
    first_substring,
    fold,
    is_negated,
    trim,
    vocabulary,
)


class Exact(Matcher):
    """The response is a label, or the right answer."""

    name, labels = "exact", "possible"

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Compare the response with each label, or with the right answer."""
        known = vocabulary(rules.words or ((gold,),), rules.case_sensitive)
        answer = trim(fold(response, rules.case_sensitive))
        same = (
            label for phrase, label in known.labels.items() if answer and trim(phrase) == answer
        )
        label = next(same, None)
        if label is not None or rules.words:
            return Reading(label, float(label == gold))
        return Reading(trim(response) or None, 0.0)

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Parse the first label that is a substring, or look for the right answer as one."""
        if not rules.words:
            return _paper_substring(response, gold)
        label = first_substring(rules.words, response, at_start=False)
        return Reading(label, float(label == gold))


class Contains(Matcher):
    """The right answer occurs in the response, as whole words."""

    name, labels = "contains", "none"

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Look for the right answer; parse a wrong one by the task's pattern of answers."""
        text = fold(response, rules.case_sensitive)
        places = vocabulary(((gold,),), rules.case_sensitive).anywhere.finditer(text)
        if not all(is_negated(text, place) for place in places):
            return Reading(gold, 1.0)
        other = re.search(rules.answer, response)
        return Reading(other[0] if other else None, 0.0)

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Look for the right answer as a substring."""
        return _paper_substring(response, gold)


class TokenF1(Matcher):
    """F1 of the tokens that response and right answer share."""

    name, labels = "token-f1", "none"
    is_graded = True

    def read(self, rules: Rules, response: str, gold: str) -> Reading:
        """Compare the tokens as SQuAD counts them."""
        tokens = _squad_tokens(fold(response, rules.case_sensitive))
        credit = _f1(tokens, _squad_tokens(fold(gold, rules.case_sensitive)))
        return Reading(response.strip() if tokens else None, credit)

    def read_reference(self, rules: Rules, response: str, gold: str) -> Reading:
        """Compare the set of the response's words with that of the right answer's characters."""
        text = response.strip().lower()
        credit = _f1(Counter(set(text.split())), Counter(set(gold.lower())))
        return Reading(text or None, credit)


def _paper_substring(response: str, gold: str) -> Reading:
    text = response.strip().lower()
    return Reading(gold, 1.0) if gold.lower() in text else Reading(text or None, 0.0)


def _squad_tokens(text: str) -> Counter[str]:
    words = text.translate(str.maketrans("", "", string.punctuation)).split()
    return Counter(word for word in words if word not in ("a", "an", "the"))


def _f1(tokens: Counter[str], right: Counter[str]) -> float:
    """F1 of two multisets: 2 |A ∩ B| / (|A| + |B|); 0 if both are empty."""
    return 2 * (tokens & right).total() / max(1, tokens.total() + right.total())
