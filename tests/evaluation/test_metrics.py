"""Scores and their intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge.evaluation.metrics import Score, accuracy, difference, normalised_average
from starmerge.evaluation.scoring import Answer


def _score(right: list[bool]) -> Score:
    return accuracy([Answer("", value, True) for value in right])


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_interval_is_wilsons(right: list[bool]) -> None:
    score = _score(right)
    n, p, z = len(right), sum(right) / len(right), 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert score.value == pytest.approx(p)
    assert (score.low, score.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_unparsed_answers_are_counted() -> None:
    answers = [Answer("", False, False), Answer("", True, True), Answer("", False, True)]
    assert accuracy(answers).unparsed == pytest.approx(1 / 3)


def test_normalised_average_is_the_mean_ratio_to_the_fine_tunes() -> None:
    tuned = {"a": _score([True] * 9 + [False]), "b": _score([True] * 5 + [False] * 5)}
    merged = {"a": _score([True] * 6 + [False] * 4), "b": _score([True] * 10)}
    average = normalised_average(merged, tuned)
    assert average is not None
    assert average.value == pytest.approx((6 / 9 + 10 / 5) / 2)
    assert average.low < average.value < average.high


def test_normalised_average_of_the_fine_tunes_themselves_is_one_without_doubt() -> None:
    tuned = {"a": _score([True, False] * 20), "b": _score([True] * 30 + [False] * 10)}
    average = normalised_average(tuned, tuned)
    assert average is not None
    assert (average.low, average.value, average.high) == (1, 1, 1)


def test_normalised_average_needs_every_fine_tune_and_a_nonzero_one() -> None:
    score = _score([True, False])
    assert normalised_average({"a": score, "b": score}, {"a": score}) is None
    assert normalised_average({"a": score}, {"a": _score([False, False])}) is None
    assert normalised_average({}, {}) is None


def test_resamples_without_a_right_answer_of_the_fine_tune_are_left_out() -> None:
    tuned = {"a": _score([True] + [False] * 19)}
    average = normalised_average(tuned, tuned)
    assert average is not None
    assert (average.low, average.value, average.high) == (1, 1, 1)


def test_bootstrap_interval_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    n = 2000
    tuned = {"a": _score([True] * n)}
    merged = {"a": _score(list(rng.random(n) < 0.6))}
    average = normalised_average(merged, tuned)
    assert average is not None
    p = merged["a"].value
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert average.high - average.low == pytest.approx(2 * half, rel=0.1)


def test_difference_is_paired() -> None:
    """Two models that differ on a few rows: the pairing takes the rows' common noise away."""
    rng = np.random.default_rng(2)
    right = list(rng.random(400) < 0.5)
    better = list(right)
    flipped = [row for row, value in enumerate(right) if not value][:20]
    for row in flipped:
        better[row] = True
    tuned = {"a": _score([True] * 400)}
    interval = difference({"a": _score(better)}, {"a": _score(right)}, tuned)
    assert interval is not None
    assert interval.value == pytest.approx(20 / 400)
    assert 0 < interval.low < interval.high < 0.09
    backwards = difference({"a": _score(right)}, {"a": _score(better)}, tuned)
    assert backwards is not None
    assert backwards.value == -interval.value
