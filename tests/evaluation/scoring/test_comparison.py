"""Models that answered the same rows, compared."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.comparison import (
    Difference,
    by_task,
    difference,
    in_words,
    is_clearly_worse,
    normalised_average,
    paired,
    perfect_score,
)
from starmerge_models.evaluation.scoring.metrics import RESAMPLES, Prediction, Score, score


def _accuracy(right: Sequence[bool | int]) -> Score:
    rows = [Prediction(f"test/{i}", "", "x", "x", float(c)) for i, c in enumerate(right)]
    return score(rows, "accuracy")


def _token_f1(credits_: Sequence[float]) -> Score:
    rows = [Prediction(f"test/{i}", "", "x", "x", c) for i, c in enumerate(credits_)]
    return score(rows, "f1")


def _macro_f1(golds: Sequence[str], values: Sequence[str | None]) -> Score:
    rows = [
        Prediction(f"test/{i}", "", value, gold, float(value == gold))
        for i, (gold, value) in enumerate(zip(golds, values, strict=True))
    ]
    return score(rows, "f1", sorted(set(golds)))


def _spearman(golds: Sequence[float], values: Sequence[float | None]) -> Score:
    rows = [
        Prediction(f"test/{i}", "", value, str(gold), None)
        for i, (gold, value) in enumerate(zip(golds, values, strict=True))
    ]
    return score(rows, "spearman")


# Normalised averages.


def test_normalised_average_is_the_mean_ratio_to_the_fine_tunes() -> None:
    tuned = {"a": _accuracy([1] * 9 + [0]), "b": _accuracy([1] * 5 + [0] * 5)}
    merged = {"a": _accuracy([1] * 6 + [0] * 4), "b": _accuracy([1] * 10)}
    average = normalised_average(merged, tuned)
    assert average is not None
    assert average.value == pytest.approx((6 / 9 + 10 / 5) / 2)
    assert average.low < average.value < average.high


def test_normalised_average_takes_every_metric() -> None:
    golds, half = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 7, 6, 5, 4]
    tuned = {
        "accuracy": _accuracy([1, 1, 1, 0]),
        "token": _token_f1([0.5, 1, 1, 1]),
        "macro": _macro_f1(["a", "a", "b", "b"], ["a", "a", "b", "a"]),
        "rank": _spearman(golds, golds),
    }
    merged = {
        "accuracy": _accuracy([1, 0, 1, 1]),
        "token": _token_f1([0.5, 0, 0.5, 1]),
        "macro": _macro_f1(["a", "a", "b", "b"], ["a", "a", None, "a"]),
        "rank": _spearman(golds, half),
    }
    average = normalised_average(merged, tuned)
    assert average is not None
    # Spearman without ties: 1 − 6·Σd²/(n(n² − 1)).
    rank = 1 - 6 * sum((g - h) ** 2 for g, h in zip(golds, half, strict=True)) / (8 * 63)
    macro = ((2 * 2 / (2 + 3)) + 0) / 2, ((2 * 2 / (2 + 3)) + 2 * 1 / (2 + 1)) / 2
    assert average.value == pytest.approx((1 + 2 / 3.5 + macro[0] / macro[1] + rank) / 4)
    assert average.low < average.value < average.high


def test_normalised_average_of_the_fine_tunes_themselves_is_one_without_doubt() -> None:
    tuned = {"a": _accuracy([1, 0] * 20), "b": _spearman([1, 2, 3, 4, 5], [1, 2, 4, 3, 5])}
    average = normalised_average(tuned, tuned)
    assert average is not None
    assert (average.low, average.value, average.high) == (1, 1, 1)


def test_normalised_average_needs_every_fine_tune_and_a_positive_one() -> None:
    one = _accuracy([1, 0])
    assert normalised_average({"a": one, "b": one}, {"a": one}) is None
    assert normalised_average({"a": one}, {"a": _accuracy([0, 0])}) is None
    assert normalised_average({}, {}) is None
    ordered = _spearman([1, 2, 3], [1, 2, 3])
    assert normalised_average({"a": ordered}, {"a": _spearman([1, 2, 3], [3, 2, 1])}) is None
    assert normalised_average({"a": ordered}, {"a": _spearman([1, 2, 3], [2, 2, 2])}) is None


def test_a_constant_answer_counts_as_0_and_a_wrong_order_below() -> None:
    golds = list(range(30))
    tuned = {"a": _spearman(golds, golds), "b": _accuracy([1] * 30)}
    constant = {"a": _spearman(golds, [3] * 30), "b": _accuracy([1] * 30)}
    average = normalised_average(constant, tuned)
    assert average is not None
    assert (average.low, average.value, average.high, average.left_out) == (0.5, 0.5, 0.5, 0)
    backwards = normalised_average({**constant, "a": _spearman(golds, golds[::-1])}, tuned)
    assert backwards is not None
    assert backwards.value == pytest.approx(0)


def test_resamples_without_a_right_answer_of_the_fine_tune_are_left_out_and_counted() -> None:
    """A row of 20 is missed by a share of (19/20)^20 of the resamples, with binomial noise."""
    tuned = {"a": _accuracy([1] + [0] * 19)}
    average = normalised_average(tuned, tuned)
    assert average is not None
    assert (average.low, average.value, average.high) == (1, 1, 1)
    share = (19 / 20) ** 20
    error = math.sqrt(share * (1 - share) / RESAMPLES)
    assert average.left_out / RESAMPLES == pytest.approx(share, abs=4 * error)


def test_its_interval_agrees_with_the_delta_method() -> None:
    """The width of 2000 resamples has a standard error of 2 %: each bound's 0.06 of 3.92 (they
    are nearly independent, times √2); four are allowed."""
    n = 2000
    tuned = {"a": _accuracy([1] * n)}
    merged = {"a": _accuracy(np.random.default_rng(1).random(n) < 0.6)}
    average = normalised_average(merged, tuned)
    assert average is not None
    p = merged["a"].value
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert average.high - average.low == pytest.approx(2 * half, rel=4 * math.sqrt(2) * 0.06 / 3.92)


def test_its_difference_is_paired() -> None:
    """Two models that differ on 20 rows of 400: the common noise of the rows is taken away."""
    right = list(np.random.default_rng(2).random(400) < 0.5)
    better = list(right)
    for row in [row for row, value in enumerate(right) if not value][:20]:
        better[row] = True
    first, second, tuned = ({"a": _accuracy(r)} for r in (better, right, [True] * 400))
    result = difference(first, second, tuned)
    assert result is not None
    assert result.value == pytest.approx(20 / 400)
    assert 0 < result.low < result.high < 0.09
    assert (result.clear, result.n) == (True, 400)
    assert result.p_value == pytest.approx(2 / (RESAMPLES + 1))
    backwards = difference(second, first, tuned)
    assert backwards is not None
    assert backwards.value == -result.value


def test_a_difference_needs_averages_of_the_same_tasks() -> None:
    one = _accuracy([1, 0])
    tuned = {"a": one, "b": one}
    assert difference({"a": one}, {"b": one}, tuned) is None
    assert difference({"a": one}, {"c": one}, tuned) is None


# Pairs of scores.


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_accuracies_have_mcnemars_exact_p_value(rows: list[tuple[bool, bool]]) -> None:
    first, second = ([row[side] for row in rows] for side in (0, 1))
    result = paired(_accuracy(first), _accuracy(second))
    gains = sum(a and not b for a, b in rows)
    losses = sum(b and not a for a, b in rows)
    m = gains + losses
    tail = sum(math.comb(m, k) for k in range(min(gains, losses) + 1)) / 2**m
    assert result.p_value == pytest.approx(min(1, 2 * tail))
    assert result.value == pytest.approx((gains - losses) / len(rows))
    assert result.test == "McNemar, exact"


def test_mcnemar_by_hand() -> None:
    """Eight rows won and two lost: 2·(1 + 10 + 45)/1024."""
    agreed = [1, 0] * 10
    result = paired(
        _accuracy([1] * 8 + [0] * 2 + agreed),
        _accuracy([0] * 8 + [1] * 2 + agreed),
    )
    assert result.p_value == pytest.approx(0.109375)
    assert not result.clear


def test_an_accuracys_interval_agrees_with_the_variance_of_paired_proportions() -> None:
    """Each bound within four standard errors of 2000 draws (0.06 of the difference's).

    The normal approximation itself is off by 1/n at most: the difference moves in such steps.
    """
    n, gains, losses = 1000, 90, 50
    agreed = [1] * (n - gains - losses)
    result = paired(
        _accuracy([1] * gains + [0] * losses + agreed),
        _accuracy([0] * gains + [1] * losses + agreed),
    )
    error = math.sqrt(gains + losses - (gains - losses) ** 2 / n) / n
    expected = [(gains - losses) / n + z * error for z in (-1.96, 1.96)]
    assert [result.low, result.high] == pytest.approx(expected, abs=4 * 0.06 * error + 1 / n)


def test_models_that_agree_on_every_row_are_not_told_apart() -> None:
    golds = [float(g) for g in range(20)]
    for one in (_accuracy([1, 0] * 10), _token_f1([0.5, 1] * 10), _spearman(golds, golds[::-1])):
        result = paired(one, one)
        assert (result.value, result.low, result.high, result.p_value) == (0, 0, 0, 1)
        assert not result.clear


@pytest.mark.parametrize("kind", ["token", "macro", "spearman"])
def test_other_metrics_are_told_apart_by_the_bootstrap(kind: str) -> None:
    rng = np.random.default_rng(4)
    golds = [float(number) for number in rng.permutation(100)]
    words = [("a", "b")[int(gold) % 2] for gold in golds]
    good, bad = {
        "token": (_token_f1([0.9, 0.8] * 50), _token_f1([0.5, 0.6] * 50)),
        "macro": (_macro_f1(words, words), _macro_f1(words, ["a"] * 100)),
        "spearman": (_spearman(golds, golds), _spearman(golds, list(rng.normal(size=100)))),
    }[kind]
    result = paired(good, bad)
    assert result.value == good.value - bad.value
    assert result.low < result.value < result.high
    assert result.test == "paired bootstrap"
    assert result.p_value == pytest.approx(2 / (RESAMPLES + 1))
    assert result.clear
    assert paired(bad, good).value == -result.value


def test_one_row_decides_nothing() -> None:
    result = paired(_accuracy([1]), _accuracy([0]))
    assert (result.value, result.p_value, result.clear) == (1, 1, False)


def test_an_undefined_score_is_not_compared() -> None:
    golds = [1.0, 2.0, 3.0, 4.0]
    result = paired(_spearman(golds, golds), _spearman(golds, [None] * 4))
    assert all(map(math.isnan, (result.value, result.low, result.high, result.p_value)))
    assert not result.clear


def test_equals_are_called_different_once_in_twenty() -> None:
    """Both models draw their credits alike, so the p-value falls below 0.05 by chance alone.

    The bootstrap lacks the n/(n − 1) of the variance and the t distribution's tails: at 100 rows
    that makes 5.4 % of the nominal 5. 300 trials have a binomial error of 1.3 %, times three.
    """
    from scipy.stats import t

    rng = np.random.default_rng(5)
    n, trials = 100, 300
    draws = rng.choice([0, 0.5, 1], (trials, 2, n))
    low = [paired(_token_f1(list(a)), _token_f1(list(b))).p_value < 0.05 for a, b in draws]
    expected = 2 * t.sf(1.96 * math.sqrt((n - 1) / n), n - 1)
    error = math.sqrt(expected * (1 - expected) / trials)
    assert np.mean(low) == pytest.approx(expected, abs=3 * error)


# Rows are matched by id.


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(20)), st.sampled_from(["accuracy", "spearman"]))
def test_the_order_of_the_rows_does_not_matter(order: list[int], metric: str) -> None:
    rng = np.random.default_rng(6)
    if metric == "accuracy":
        first, second = (_accuracy(rng.random(20) < 0.6) for _ in range(2))
    else:
        golds = list(rng.normal(size=20))
        first, second = (_spearman(golds, list(rng.normal(size=20))) for _ in range(2))
    shuffled = replace(second, predictions=tuple(second.predictions[row] for row in order))
    assert paired(first, shuffled) == paired(first, second)
    assert normalised_average({"a": shuffled}, {"a": first}) == normalised_average(
        {"a": second}, {"a": first}
    )


def test_a_row_that_only_one_model_answered_is_named() -> None:
    long, short = _accuracy([1, 0, 1]), _accuracy([1, 0])
    for first, second in ((long, short), (short, long)):
        with pytest.raises(UsageError, match="'test/2' is in one score but not in the other"):
            paired(first, second)
        with pytest.raises(UsageError, match="'test/2' is in one score but not in the other"):
            normalised_average({"a": first}, {"a": second})


def test_a_row_that_comes_twice_is_named() -> None:
    one = _accuracy([1, 0])
    twice = replace(one, predictions=(*one.predictions, one.predictions[1]))
    for first, second in ((one, twice), (twice, one), (twice, twice)):
        with pytest.raises(UsageError, match="'test/1' is twice"):
            paired(first, second)


def test_a_row_with_two_right_answers_is_named() -> None:
    with pytest.raises(UsageError, match=r"'test/1' has the right answers '3' and '2'"):
        paired(_spearman([1, 2, 4], [1, 2, 4]), _spearman([1, 3, 4], [1, 2, 4]))


def test_scores_of_two_metrics_are_not_compared() -> None:
    with pytest.raises(UsageError, match=r"accuracy.*f1"):
        paired(_token_f1([1, 0]), _accuracy([1, 0]))


# Many tasks, and words.


def test_p_values_of_many_tasks_are_benjamini_and_hochbergs() -> None:
    """Each is multiplied by tasks/rank, and none exceeds a later one."""
    second = {f"task{m}": _accuracy([0] * m + [1] * (20 - m)) for m in (5, 7, 9, 0)}
    first = {task: _accuracy([1] * 20) for task in second}
    raw = {5: 2 / 2**5, 7: 2 / 2**7, 9: 2 / 2**9, 0: 1}
    expected = {9: 4 * raw[9], 7: 2 * raw[7], 5: 4 / 3 * raw[5], 0: 1}
    results = by_task(first, second)
    assert list(results) == list(first)
    for m, p_value in expected.items():
        assert results[f"task{m}"].p_value == pytest.approx(p_value)
        assert results[f"task{m}"].test == "McNemar, exact; Benjamini-Hochberg over 4 tasks"


def test_undefined_tasks_and_those_of_one_model_are_not_corrected_for() -> None:
    golds = [1.0, 2.0, 3.0, 4.0]
    first = {"a": _accuracy([1] * 9), "b": _spearman(golds, golds), "c": _accuracy([1])}
    second = {"a": _accuracy([0] * 9), "b": _spearman(golds, [1] * 4)}
    results = by_task(first, second)
    assert list(results) == ["a", "b"]
    assert results["a"] == paired(first["a"], second["a"])
    assert math.isnan(results["b"].p_value)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_few_rows_prove_nothing_whatever_the_metric(n: int) -> None:
    def all_alike(credit: float) -> Score:
        rows = [Prediction(str(row), "", "x", "y", credit) for row in range(n)]
        return score(rows, "f1")

    found = paired(all_alike(1.0), all_alike(0.0))
    assert found.p_value >= 2.0 ** (1 - n)
    assert found.clear == (n == 6)
    whole = difference({"a": all_alike(1.0)}, {"a": all_alike(0.0)}, {"a": all_alike(1.0)})
    assert whole is not None
    assert whole.clear == (n == 6)


def test_words_name_the_better_model() -> None:
    words = in_words(paired(_accuracy([0] * 30), _accuracy([1] * 30)), "ties", "star")
    assert words == (
        "ties − star: -1.000, paired 95 % interval [-1.000, -1.000], p = 1.9e-09 "
        "(McNemar, exact; n = 30): star is better."
    )


@pytest.mark.parametrize(
    ("low", "high", "p_value"), [(-0.01, 0.05, 0.01), (0.01, 0.05, 0.06), (0, 0.05, 0.04)]
)
def test_words_say_when_rows_cannot_tell(low: float, high: float, p_value: float) -> None:
    unclear = Difference(0.03, low, high, p_value, "paired bootstrap", 50)
    assert in_words(unclear, "a", "b").endswith("no clear difference.")


def test_words_say_when_a_score_is_undefined() -> None:
    golds = [1.0, 2.0, 3.0]
    words = in_words(paired(_spearman(golds, golds), _spearman(golds, [1] * 3)), "a", "b")
    assert words == "a − b: not comparable, a score is undefined."


@pytest.mark.parametrize("seed", range(4))
def test_behind_is_what_the_normal_distribution_says_of_the_paired_differences(seed: int) -> None:
    generator = np.random.default_rng(seed)
    hits = generator.random((2, 60)) < [[0.4], [0.7]]
    first, second = ({"t": _accuracy([int(hit) for hit in own])} for own in hits)
    gaps = hits[0].astype(float) - hits[1]
    z = gaps.mean() / (gaps.std(ddof=1) / 60**0.5)
    ceiling = {"t": perfect_score(first["t"])}
    # Resamples give a standard error that is itself off by 1/√(2 · RESAMPLES); four times that.
    off = 4 / (2 * RESAMPLES) ** 0.5
    larger, smaller = 2 * norm.cdf(z / (1 + off)), 2 * norm.cdf(z / (1 - off))
    assert 2.0 ** (1 - np.count_nonzero(gaps)) < smaller
    assert is_clearly_worse(first, second, ceiling, level=larger)
    assert not is_clearly_worse(first, second, ceiling, level=smaller)
    assert not is_clearly_worse(second, first, ceiling, level=0.999)


def test_few_differing_rows_put_nobody_behind() -> None:
    for n in range(1, 12):
        first, second = {"t": _accuracy([0] * n)}, {"t": _accuracy([1] * n)}
        behind = is_clearly_worse(first, second, {"t": perfect_score(first["t"])}, level=0.01)
        assert behind == (2.0 ** (1 - n) <= 0.01)


@pytest.mark.parametrize("metric", ["accuracy", "spearman"])
def test_a_perfect_score_makes_a_normalised_average_the_mean_score(metric: str) -> None:
    one = _accuracy([0, 1, 1, 0]) if metric == "accuracy" else _spearman([1, 2, 3, 4], [1, 3, 2, 4])
    average = normalised_average({"t": one}, {"t": perfect_score(one)})
    assert average is not None
    assert average.value == pytest.approx(one.value)
