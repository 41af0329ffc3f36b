"""Scores and their intervals."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics import (
    RESAMPLES,
    Prediction,
    Score,
    percentiles,
    resample,
    score,
)

LABELS = ("yes", "no", "maybe")


def _credits(credits_: Sequence[float | bool | None]) -> list[Prediction]:
    return [Prediction(f"test/{i}", "", "x", "x", c) for i, c in enumerate(credits_)]


def _answers(
    golds: Sequence[Any], values: Sequence[Any], *, right: bool = True
) -> list[Prediction]:
    """Rows with gold and value; right or wrong as 1 or 0, or no credit at all."""
    return [
        Prediction(f"test/{i}", "", value, str(gold), float(value == gold) if right else None)
        for i, (gold, value) in enumerate(zip(golds, values, strict=True))
    ]


def _wilson(p: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def _numbers(n: int = 40, noise: float = 1.0, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=n)
    return list(gold), list(gold + noise * rng.normal(size=n))


# Accuracy.


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_accuracy_has_wilsons_interval(right: list[bool]) -> None:
    result = score(_credits(right), "accuracy")
    p = sum(right) / len(right)
    assert result.value == pytest.approx(p)
    assert (result.low, result.high) == pytest.approx(_wilson(p, len(right)), abs=1e-9)


def test_one_row_has_a_wide_interval() -> None:
    result = score(_credits([1]), "accuracy")
    assert (result.value, result.n) == (1, 1)
    assert (result.low, result.high) == pytest.approx(_wilson(1, 1))


def test_unreadable_and_shortened_rows_are_counted() -> None:
    rows = _answers(["yes"] * 4, ["yes", None, "no", "yes"])
    result = score([*rows[:3], replace(rows[3], shortened=True)], "accuracy")
    assert (result.value, result.unparsed, result.shortened) == (0.5, 0.25, 1)


@pytest.mark.parametrize("credit", [0.5, None])
def test_accuracy_needs_rows_that_are_right_or_wrong(credit: float | None) -> None:
    with pytest.raises(UsageError, match=r"'test/1' has the credit .* accuracy needs 0 or 1"):
        score(_credits([1, credit, 0]), "accuracy")


# F1.


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])),
        min_size=1,
        max_size=30,
    )
)
def test_macro_f1_is_scikit_learns(rows: list[tuple[str, str | None]]) -> None:
    golds, values = [g for g, _ in rows], [v for _, v in rows]
    expected = f1_score(
        golds,
        [v or "unreadable" for v in values],
        labels=[label for label in LABELS if label in golds],
        average="macro",
    )
    assert score(_answers(golds, values), "f1", LABELS).value == pytest.approx(expected)


def test_an_unreadable_answer_is_a_miss_of_its_label_and_a_prediction_of_none() -> None:
    golds = ["yes", "yes", "no", "no"]
    result = score(_answers(golds, ["yes", None, "no", "yes"]), "f1", ["yes", "no"])
    # yes: one hit, one missed, one too many: 2/(2 + 1 + 1); no: one hit, one missed: 2/(2 + 1).
    assert result.value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.unparsed == 0.25


def test_a_label_without_rows_does_not_cost() -> None:
    assert score(_answers(["yes", "no"], ["yes", "no"]), "f1", LABELS).value == 1


def test_a_prediction_of_a_label_without_rows_is_a_miss_of_the_right_one() -> None:
    result = score(_answers(["yes", "no"], ["maybe", "no"]), "f1", LABELS)
    assert result.value == pytest.approx((0 + 1) / 2)


def test_a_constant_answer_has_the_f1_of_one_label() -> None:
    result = score(_answers(["yes", "no"] * 10, ["yes"] * 20), "f1", ["yes", "no"])
    assert result.value == pytest.approx((2 * 10 / (10 + 20) + 0) / 2)


def test_f1_of_unreadable_answers_alone_is_0_with_wilsons_interval() -> None:
    result = score(_answers(["yes", "no"] * 5, [None] * 10), "f1", LABELS)
    assert (result.value, result.unparsed) == (0, 1)
    assert (result.low, result.high) == pytest.approx(_wilson(0, 10))


def test_f1_of_right_answers_alone_is_not_certain() -> None:
    result = score(_answers(["yes", "no"] * 5, ["yes", "no"] * 5), "f1", LABELS)
    assert result.value == 1
    assert (result.low, result.high) == pytest.approx(_wilson(1, 10))


def test_a_gold_answer_outside_the_labels_is_named() -> None:
    with pytest.raises(UsageError, match="'test/1' has the answer 'perhaps', which is no label"):
        score(_answers(["yes", "perhaps"], ["yes", "no"]), "f1", LABELS)


def test_f1_without_labels_is_the_mean_credit() -> None:
    result = score(_credits([0.5, 1, 0, 2 / 3]), "f1")
    assert result.value == pytest.approx((0.5 + 1 + 2 / 3) / 4)
    assert result.low < result.value < result.high


def test_f1_without_labels_needs_credits() -> None:
    with pytest.raises(UsageError, match="'test/0' has the credit None, and f1 needs"):
        score(_credits([None]), "f1")


# Correlations.

HALVES = st.integers(-10, 10).map(lambda number: number / 2)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(HALVES, HALVES), min_size=3, max_size=25))
def test_correlations_are_scipys(rows: list[tuple[float, float]]) -> None:
    golds, values = [g for g, _ in rows], [v for _, v in rows]
    predictions = _answers(golds, values, right=False)
    constant = len(set(golds)) == 1 or len(set(values)) == 1
    for metric, oracle in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = math.nan if constant else oracle(golds, values).statistic
        value = score(predictions, metric).value
        assert value == pytest.approx(expected, nan_ok=True, abs=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_an_unreadable_answer_takes_the_mean_of_the_readable_ones(metric: str) -> None:
    result = score(_answers([1, 2, 3, 4, 5], [1, None, 3, None, 5], right=False), metric)
    # Deviations (or ranks') -2 0 0 0 2 (-1 0 0 0 1) against -2 -1 0 1 2.
    assert result.value == pytest.approx(8 / math.sqrt(8 * 10))
    assert result.unparsed == 0.4


def test_unreadable_answers_of_half_of_equal_rows_cost_the_root_of_half() -> None:
    golds, values = _numbers()
    result = score(_answers(golds * 2, values + [None] * len(values), right=False), "pearson")
    whole = stats.pearsonr(golds, values).statistic
    assert result.value == pytest.approx(whole * math.sqrt(1 / 2))


def test_spearman_does_not_mind_the_scale_of_the_answers() -> None:
    golds, values = _numbers()
    some = [None if row % 3 == 0 else value for row, value in enumerate(values)]
    scaled = [None if value is None else math.exp(3 * value) for value in some]
    first = score(_answers(golds, some, right=False), "spearman")
    second = score(_answers(golds, scaled, right=False), "spearman")
    assert (first.value, first.low, first.high) == (second.value, second.low, second.high)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("golds", "values"),
    [
        pytest.param([1, 2, 3, 4], [2.5] * 4, id="constant answers"),
        pytest.param([1, 2, 3, 4], [0.1, None, 0.1, 0.1], id="constant where readable"),
        pytest.param([3] * 4, [1, 2, 3, 4], id="constant gold"),
        pytest.param([1, 2, 3, 4], [1, 2, None, None], id="two readable"),
        pytest.param([1, 2, 3, 4], [None] * 4, id="none readable"),
        pytest.param([1], [1], id="one row"),
    ],
)
def test_a_correlation_that_is_undefined_is_nan(
    metric: str, golds: list[float], values: list[float | None]
) -> None:
    result = score(_answers(golds, values, right=False), metric)
    assert all(math.isnan(number) for number in (result.value, result.low, result.high))
    assert result.n == len(golds)


def test_a_perfect_correlation_has_no_interval() -> None:
    result = score(_answers(range(20), range(20), right=False), "pearson")
    assert result.value == pytest.approx(1)
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_a_gold_answer_that_is_no_number_is_named() -> None:
    with pytest.raises(UsageError, match="'test/1' has 'much' where a correlation needs a number"):
        score(_answers([1, "much", 3], [1, 2, 3], right=False), "pearson")


# The bootstrap.


def _task(metric: str, n: int, seed: int) -> tuple[list[Prediction], tuple[str, ...]]:
    """Rows of random answers, one in five unreadable where the metric allows it."""
    rng = np.random.default_rng(seed)
    if metric == "token-f1":
        return _credits([float(c) for c in rng.choice([0, 0.4, 1], n)]), ()
    read = rng.random(n) < 0.8
    if metric == "macro-f1":
        golds = rng.choice(LABELS, n)
        values = np.where(rng.random(n) < 0.5, golds, rng.choice(LABELS, n))
        pairs = [str(v) if r else None for v, r in zip(values, read, strict=True)]
        return _answers([str(g) for g in golds], pairs), LABELS
    gold = rng.integers(0, 11, n) / 2
    noisy = np.round(gold + rng.normal(size=n))
    values_ = [float(v) if r else None for v, r in zip(noisy, read, strict=True)]
    return _answers([float(g) for g in gold], values_, right=False), ()


KINDS = {"token-f1": "f1", "macro-f1": "f1", "spearman": "spearman", "pearson": "pearson"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resample_has_the_score_of_its_rows(kind: str) -> None:
    """The draws are seen through scores of which each has one row right."""
    n = 12
    predictions, labels = _task(kind, n, seed=3)
    whole = score(predictions, KINDS[kind], labels)
    markers = [score(_credits([j == i for j in range(n)]), "accuracy") for i in range(n)]
    samples, *shares = resample([whole, *markers])
    counts = np.rint(np.stack(shares, axis=1) * n).astype(int)
    assert (counts.sum(axis=1) == n).all()
    for sample, times in zip(samples[:60], counts[:60], strict=True):
        rows = [p for p, many in zip(predictions, times, strict=True) for _ in range(many)]
        expected = score(rows, KINDS[kind], labels).value
        assert sample == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("metric", "statistic"),
    [
        ("f1", lambda gold, value: np.mean(value)),
        ("pearson", lambda gold, value: stats.pearsonr(gold, value).statistic),
        ("spearman", lambda gold, value: stats.spearmanr(gold, value).statistic),
    ],
)
def test_the_interval_is_scipys(metric: str, statistic: Any) -> None:
    """Within the noise of 2000 draws: a bound's standard error is 0.06 of the statistic's.

    √(0.025·0.975/2000) over the normal density at 1.96, 0.058. Two bounds that are independent
    differ by √2 of that, and four standard errors are allowed.
    """
    golds, values = _numbers(60)
    if metric == "f1":
        values = list(1 / (1 + np.exp(values)))
    rows = [
        Prediction(f"test/{i}", "", value, str(gold), value if metric == "f1" else None)
        for i, (gold, value) in enumerate(zip(golds, values, strict=True))
    ]
    result = score(rows, metric)
    expected = stats.bootstrap(
        (golds, values),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=1,
    )
    tolerance = 4 * math.sqrt(2) * 0.06 * expected.standard_error
    interval = expected.confidence_interval
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), abs=tolerance)


def test_the_interval_covers_the_truth_19_times_in_20() -> None:
    """Of means of 200 rows: the t distribution puts the coverage at 94.7 %, not 95.

    300 trials have a binomial standard error of 1.3 %, and three of them are allowed.
    """
    rng = np.random.default_rng(0)
    n, trials, grid = 200, 300, np.array([0, 0.25, 0.5, 0.75, 1])
    shares = np.array([0.3, 0.1, 0.2, 0.1, 0.3])
    hits = 0
    for _ in range(trials):
        result = score(_credits(list(rng.choice(grid, n, p=shares))), "f1")
        hits += result.low <= shares @ grid <= result.high
    width = stats.t.cdf(1.96 * math.sqrt((n - 1) / n), n - 1)
    coverage = 2 * width - 1
    standard_error = math.sqrt(coverage * (1 - coverage) / trials)
    assert hits / trials == pytest.approx(coverage, abs=3 * standard_error)


def test_resamples_without_a_value_are_left_out_and_counted() -> None:
    """One answer of four differs: a resample has no correlation when it lacks that row, or all
    others. Four standard errors of the binomial are allowed."""
    result = score(_answers([1, 2, 3, 4], [1, 1, 1, 2], right=False), "pearson")
    share = (3 / 4) ** 4 + (1 / 4) ** 4
    error = math.sqrt(share * (1 - share) / RESAMPLES)
    assert result.left_out / RESAMPLES == pytest.approx(share, abs=4 * error)
    assert result.low <= result.value <= result.high


def test_a_resample_with_fewer_than_three_readable_answers_is_left_out() -> None:
    """Of ten rows three are readable: k of them are drawn with binomial probability, and k ≥ 3
    draws are of one and the same row with probability 3·3^(−k)."""
    result = score(_answers(range(10), [1, 2, 3] + [None] * 7, right=False), "spearman")
    share = sum(
        math.comb(10, k) * 0.3**k * 0.7 ** (10 - k) * (1 if k < 3 else 3 ** (1 - k))
        for k in range(11)
    )
    error = math.sqrt(share * (1 - share) / RESAMPLES)
    assert result.left_out / RESAMPLES == pytest.approx(share, abs=4 * error)


def test_without_defined_resamples_there_is_no_interval() -> None:
    low, high, left_out = percentiles(np.full(7, np.nan))
    assert math.isnan(low)
    assert math.isnan(high)
    assert left_out == 7


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 50), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(kind: str, seed: int, random: Any) -> None:
    predictions, labels = _task(kind, 25, seed)
    shuffled = list(predictions)
    random.shuffle(shuffled)
    first, second = (score(rows, KINDS[kind], labels) for rows in (predictions, shuffled))
    assert _numbers_of(first) == pytest.approx(_numbers_of(second), rel=1e-12)


def _numbers_of(result: Score) -> tuple[float, ...]:
    return result.value, result.low, result.high, result.unparsed, result.left_out


def test_zeros_of_both_signs_are_one_number() -> None:
    golds = [0, 1, 0, 0, 3, 1, 2]
    rows = _answers(golds, [0.0, 2.0, -1.0, -0.0, 3.0, 0.0, 2.0], right=False)
    backwards = score(rows[::-1], "pearson")
    assert _numbers_of(score(rows, "pearson")) == pytest.approx(_numbers_of(backwards), rel=1e-12)


# Asked wrongly.


def test_no_predictions_are_an_error() -> None:
    with pytest.raises(UsageError, match="no predictions"):
        score([], "accuracy")


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UsageError, match="No metric is called 'bleu'"):
        score(_credits([1]), "bleu")
