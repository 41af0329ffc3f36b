"""Averages over runs against NumPy that resamples single rows, and against the evaluation's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.comparison import normalised_average
from starmerge_models.evaluation.scoring.metrics import METRICS, RESAMPLES, Prediction, Score, score
from starmerge_models.study.averages import SPLITS, Averages
from starmerge_models.study.grids import best_of_grids, best_parameters, shift_of_best
from starmerge_models.study.outputs import averages_of, named_figures
from starmerge_models.study.runs import Run
from starmerge_models.study.store import Record, Store, load_store, open_store, score_line
from starmerge_models.study.tables import by_task, grids, markdown, report
from tests.study.studies import ROWS, head_of, written_store

TASKS = ["past", "plural", "pos", "digits"]


def seen(record: Record, task: str) -> np.ndarray:
    return np.array(record.by_task[task]["seen"], np.float64)


def parts(store: Store) -> tuple[Record, dict[str, Record]]:
    base = next(r for r in store.records if r.run.kind == "base")
    return base, {r.run.models[0]: r for r in store.records if r.run.kind == "fine-tune"}


def ratio(own: Record, tuned: dict[str, Record], rows: dict[str, np.ndarray]) -> float:
    """Mean over the merge's tasks of score/fine-tune's score, on the rows of some numbers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(
            np.mean(
                [
                    seen(own, task)[rows[task]].mean() / seen(tuned[task], task)[rows[task]].mean()
                    for task in own.run.tasks
                ]
            )
        )


def test_a_value_is_the_mean_ratio_and_its_interval_resamples_rows(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    averages = Averages(store)
    _, tuned = parts(store)
    everything = {task: np.arange(ROWS) for task in TASKS}
    draw = np.random.default_rng(7)
    resamples = [{t: draw.integers(0, ROWS, ROWS) for t in TASKS} for _ in range(4000)]
    for average in averages.runs[::5]:
        assert average.value == pytest.approx(ratio(average.record, tuned, everything))
        samples = [ratio(average.record, tuned, rows) for rows in resamples]
        low, high = np.nanquantile(samples, [0.025, 0.975])
        own = averages.mean([average])
        # Two different draws of 2,000 and 4,000 resamples: their quantiles differ by chance.
        assert own.low == pytest.approx(low, abs=0.03)
        assert own.high == pytest.approx(high, abs=0.03)


def test_one_run_has_the_average_of_an_evaluation(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    averages = Averages(store)
    _, tuned = parts(store)

    def as_score(record: Record, task: str) -> Score:
        bits = enumerate(record.by_task[task]["seen"])
        return score([Prediction(str(n), "", b, "1", float(b)) for n, b in bits], "accuracy")

    for average in averages.runs[::7]:
        tasks = average.record.run.tasks
        expected = normalised_average(
            {task: as_score(average.record, task) for task in tasks},
            {task: as_score(tuned[task], task) for task in tasks},
        )
        assert expected is not None
        own = averages.mean([average])
        assert own.value == pytest.approx(expected.value)
        assert own.low == pytest.approx(expected.low, abs=0.03)
        assert own.high == pytest.approx(expected.high, abs=0.03)


def test_a_difference_is_paired_over_rows_and_combinations(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    averages = Averages(store)
    first = [run for run in averages.runs if run.label == "star" and run.n == 2]
    second = [run for run in averages.runs if run.label == "average" and run.n == 2]
    found = averages.difference(first, second)
    assert found.value == pytest.approx(
        np.mean([a.value for a in first]) - np.mean([b.value for b in second])
    )
    gaps = np.mean([a.samples - b.samples for a, b in zip(first, second, strict=True)], axis=0)
    assert (found.low, found.high) == tuple(np.nanquantile(gaps, [0.025, 0.975]))
    assert averages.difference(first, first).value == 0
    assert averages.difference(first, first).p_value == 1
    # What only one has is left out.
    assert averages.difference(first, second[:1]).value == pytest.approx(
        first[0].value - second[0].value
    )
    four = [run for run in averages.runs if run.n == 4]
    with pytest.raises(UsageError, match="no combination of models in common"):
        averages.difference(first, four[:1])


def changed(store: Store, rows: dict[tuple[str, int], int], label: str) -> Averages:
    """Return the averages of a store whose runs of one chain answer some rows as given."""
    records = {}
    for record in store.records:
        lines = record.lines
        if record.run.label in ("average", label):
            usual = [int(n % 3 > 0) for n in range(ROWS)]
            own = [dict(line) | {"seen": list(usual)} for line in lines]
            for (task, row), seen in rows.items() if record.run.label == label else ():
                for line in own:
                    if line["task"] == task:
                        line["seen"][row] = seen
            lines = tuple(line | {"score": sum(line["seen"]) / ROWS} for line in own)
        records[record.run.key] = Record(record.run, tuple(lines))
    return Averages(Store(store.folder, store.head, records))


@pytest.mark.parametrize(("differing", "is_clear"), [(5, False), (8, True)])
def test_few_rows_that_differ_are_no_clear_difference(
    tmp_path: Path, differing: int, is_clear: bool
) -> None:
    _, store = written_store(tmp_path / "s")
    wrong = [(task, row) for row in (0, 3) for task in TASKS]
    averages = changed(store, dict.fromkeys(wrong[:differing], 1), "star")
    chosen = [[r for r in averages.runs if r.label == name] for name in ("star", "average")]
    found = averages.difference(*chosen)
    # Each row counts once, though its task stands in the merges of two and in that of four.
    assert found.n == ROWS * len(TASKS)
    assert found.low > 0
    assert found.p_value >= 2.0 ** (1 - differing)
    assert found.clear == is_clear


def without(store: Store, *keys: str) -> Averages:
    kept = {r.run.key: r for r in store.records if r.run.key not in keys}
    return Averages(Store(store.folder, store.head, kept))


def test_points_are_compared_on_combinations_that_all_have(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    two = [r.run for r in store.records if r.run.kind == "merge" and len(r.run.models) == 2]
    lost = next(run for run in two if run.label == "star:eta=60" and run.combination == 1)
    averages = without(store, lost.key)
    grid = {(g.method, g.n): g for g in best_of_grids(averages)}["star", 2]
    first = without(store, *(run.key for run in two if run.combination == 1))
    alone = {(g.method, g.n): g for g in best_of_grids(first)}["star", 2]
    assert grid == alone
    table = markdown(averages)
    marked = [line.split("|")[1].strip() for line in table.splitlines() if "] \\*" in line]
    assert marked == ["star:eta=60"]
    assert "fewer combinations" in table
    assert "fewer combinations" not in markdown(Averages(store))


def test_several_fine_tunes_of_a_task_are_its_bound_together(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    _, store = written_store(folder)
    head = store.head
    line = store.records[0].by_task["past"]

    def with_share(right: int) -> dict[str, object]:
        bits = [1] * right + [0] * (ROWS - right)
        return dict(line) | {"task": "past", "seen": bits, "score": right / ROWS}

    records = [
        Record(Run("base", (), ("past",)), (with_share(3),)),
        Record(Run("fine-tune", ("a",), ("past",)), (with_share(12),)),
        Record(Run("fine-tune", ("b",), ("past",)), (with_share(6),)),
        Record(Run("merge", ("a", "b"), ("past",), "average", {}), (with_share(9),)),
    ]
    (average,) = Averages(Store(folder, head, {r.run.key: r for r in records})).runs
    assert average.value == pytest.approx(9 / 9)
    assert average.base == pytest.approx(3 / 9)


@pytest.mark.parametrize("metric", ["f1", "spearman"])
def test_metrics_of_all_rows_together_are_resampled_too(tmp_path: Path, metric: str) -> None:
    _, store = written_store(tmp_path / "s")
    labels = ["x", "y"] if metric == "f1" else []
    gold = ["x", "y", "y", "x", "y", "x"] if labels else ["1", "2", "3", "4", "5", "6"]
    better = [*gold[:4], *reversed(gold[4:])]

    def line(answers: list[str]) -> dict[str, object]:
        rows = [
            Prediction(str(n), a, a if labels else float(a), g, float(a == g))
            for n, (a, g) in enumerate(zip(answers, gold, strict=True))
        ]
        return {"date": "", **score_line("past", score(rows, metric, labels))}

    worst = ["x"] * 6 if labels else ["3", "1", "2", "6", "4", "5"]
    merged = line(better)
    records = [
        Record(Run("base", (), ("past",)), (line(worst),)),
        Record(Run("fine-tune", ("past",), ("past",)), (line(gold),)),
        Record(Run("merge", ("past",), ("past",), "average", {}), (merged,)),
    ]
    store = Store(store.folder, store.head, {r.run.key: r for r in records})
    (average,) = Averages(store).runs
    assert average.value == pytest.approx(merged["score"])
    assert average.samples.shape == (RESAMPLES,)
    assert METRICS.find(metric).name == metric
    low, high = Averages(store).mean([average]).low, Averages(store).mean([average]).high
    assert low < average.value <= high


def test_resamples_in_which_the_fine_tune_scores_nothing_are_left_out(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    records = {record.run.key: record for record in store.records}
    key = Run("fine-tune", ("pos",), ("pos",)).key
    (line,) = records[key].lines
    seen_once = {"seen": [1] + [0] * (ROWS - 1), "score": 1 / ROWS}
    records[key] = Record(records[key].run, (dict(line) | seen_once,))
    averages = Averages(Store(store.folder, store.head, records))
    without = [run for run in averages.runs if "pos" not in run.record.run.models]
    having = [run for run in averages.runs if "pos" in run.record.run.models]
    assert not np.isnan([run.samples for run in without]).any()
    # A draw of ROWS rows misses one of them with (1 − 1/ROWS)^ROWS.
    missed = np.isnan(having[0].samples).mean()
    assert missed == pytest.approx((1 - 1 / ROWS) ** ROWS, abs=0.05)
    found = averages.mean(having[:1])
    assert found.left_out == np.isnan(having[0].samples).sum()
    assert np.isfinite([found.value, found.low, found.high]).all()


def test_of_equally_good_values_the_middle_one_is_the_best(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    merges = {r.run.models: r for r in store.records if r.run.label == "star"}
    records = {
        r.run.key: Record(r.run, merges[r.run.models].lines) if r.run.method == "star" else r
        for r in store.records
    }
    averages = Averages(Store(store.folder, store.head, records))
    frame = best_parameters(averages, "eta")
    assert set(frame.n) == {2, 4}
    assert (frame[["best", "low", "high"]] == 40).all(axis=None)


def test_the_shift_of_the_best_value_pairs_the_resamples(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s", seed=3)
    averages = Averages(store)
    found = shift_of_best(averages, "eta", "star", (2, 4))
    best = {}
    for n in (2, 4):
        runs = [r for r in averages.runs if r.n == n and r.record.run.method == "star"]
        etas = sorted({r.record.run.parameters["eta"] for r in runs})
        means = np.array(
            [
                np.mean(
                    [[r.value, *r.samples] for r in runs if r.record.run.parameters["eta"] == e], 0
                )
                for e in etas
            ]
        )
        tops = [np.flatnonzero(column == column.max()) for column in means.T]
        best[n] = np.array([etas[top[(len(top) - 1) // 2]] for top in tops])
    shift = best[4] - best[2]
    assert found.value == shift[0]
    assert [found.low, found.high] == pytest.approx(np.quantile(shift[1:], [0.025, 0.975]))
    same = shift_of_best(averages, "eta", "star", (4, 4))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_grid_is_compared_with_the_default_and_chosen_on_other_rows(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s", seed=3)
    averages = Averages(store)
    _, tuned = parts(store)
    found = {(grid.method, grid.n): grid for grid in best_of_grids(averages)}
    star = found["star", 4]
    assert star.points == 3
    points = [run for run in averages.runs if run.n == 4 and run.record.run.method == "star"]
    values = [run.value for run in points]
    assert star.best.value == max(values)
    assert star.best_label == points[int(np.argmax(values))].label
    assert star.default is not None
    assert star.default.value == next(run.value for run in points if run.label == "star")
    # The mean over other random splits, to four standard errors of the mean over as many as here.
    generator = np.random.default_rng(5)
    splits = []
    for _ in range(400):
        order = {task: generator.permutation(ROWS) for task in TASKS}
        halves = [{task: order[task][part::2] for task in TASKS} for part in (0, 1)]
        table = np.array([[ratio(run.record, tuned, half) for half in halves] for run in points])
        chosen = table.argmax(axis=0)
        splits.append((table[chosen[0], 1] + table[chosen[1], 0]) / 2)
    error = np.std(splits) / np.sqrt(SPLITS)
    assert star.held_out == pytest.approx(np.mean(splits), abs=4 * error)
    assert star.held_out < star.best.value  # the chosen one looks better than it is
    assert found["average", 4].points == 1
    frame = best_parameters(averages, "eta").set_index(["label", "n"])
    etas = [run.record.run.parameters["eta"] for run in points]
    assert frame.loc["star", 4].best == etas[int(np.argmax(values))]
    assert frame.loc["star", 4].low <= frame.loc["star", 4].best <= frame.loc["star", 4].high
    assert set(best_parameters(averages, "k").columns) == {
        "label", "n", "best", "low", "high", "value",
    }  # fmt: skip
    assert best_parameters(averages, "k").empty
    assert "held out" in grids(best_of_grids(averages))


def test_tables_have_every_chain_and_number(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    averages = Averages(store)
    table = markdown(averages).split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "method", "n = 2 (2 combinations)", "n = 4",
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "*base*", "average", "star:eta=20", "star", "star:eta=60",
    ]  # fmt: skip
    assert sum(line.count("**") // 2 for line in table) == 2
    assert len(by_task(averages).splitlines()) == 2 + 2 + 2 + 4
    frame = averages.to_frame(without=["eta"])
    assert set(frame.label) == {"average", "star"}
    assert frame.combinations.tolist() == [2 if n == 2 else 1 for n in frame.n]
    runs = averages.runs_to_frame()
    assert len(runs) == len(averages.runs)
    assert (runs.low <= runs.value).all()
    assert (runs.value <= runs.high).all()
    assert "Scores, n = 4" in report(Averages(load_store(store.folder)))


def test_without_a_base_or_fine_tunes_there_is_no_average(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    base, _ = parts(store)
    no_base = {r.run.key: r for r in store.records if r is not base}
    with pytest.raises(UsageError, match="no scores of the base yet"):
        Averages(Store(store.folder, store.head, no_base))
    with pytest.raises(UsageError, match="has no merge yet"):
        Averages(Store(store.folder, store.head, {base.run.key: base}))


def test_merges_with_a_task_that_no_fine_tune_can_do_are_counted(tmp_path: Path) -> None:
    _, store = written_store(tmp_path / "s")
    records = {record.run.key: record for record in store.records}
    key = Run("fine-tune", ("pos",), ("pos",)).key
    (line,) = records[key].lines
    records[key] = Record(records[key].run, (dict(line) | {"seen": [0] * ROWS, "score": 0.0},))
    averages = Averages(Store(store.folder, store.head, records))
    merges = [r for r in records.values() if r.run.kind == "merge"]
    assert averages.left_out == tuple(r for r in merges if "pos" in r.run.tasks) != ()
    assert len(averages.runs) == len(merges) - len(averages.left_out)
    said = f"{len(averages.left_out)} of {len(merges)} merges are left out: no fine-tune has"
    assert said in report(averages)


def test_what_failed_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    runs = [(record.run, record.lines) for record in store.records]
    failed = next(run for run, _ in runs if run.models == ("past",))
    with open_store(tmp_path / "one", head_of(study)) as one:
        for run, lines in runs:
            one.add(run, [{"error": "it broke"}] if run == failed else lines)
    text = report(Averages(one))
    without = [run for run, _ in runs if run.kind == "merge" and "past" in run.models]
    merges = [run for run, _ in runs if run.kind == "merge"]
    assert (
        f"{len(without)} of {len(merges)} merges are left out: no fine-tune has a score above 0 on "
        "past." in text
    )
    assert "- fine-tune past: it broke" in text
    assert "left out" not in report(Averages(store))
    with open_store(tmp_path / "all", head_of(study)) as every:
        for run, lines in runs:
            every.add(run, [{"error": "it broke"}] if run.kind == "merge" else lines)
    with pytest.raises(UsageError, match=r"no merge yet[\s\S]*- average, star.*: it broke"):
        averages_of(every)


def test_figures_that_nothing_is_there_for_yet_are_left_out(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    figures = [
        {"figure": "best", "parameter": "eta"},
        {"figure": "parameter", "parameter": "eta"},
        {"figure": "tasks", "methods": ["star"]},
        {"figure": "tasks"},
        {"figure": "tasks", "methods": ["average"]},
    ]
    head = head_of(study)
    head["study"]["figures"] = figures
    for methods, stems in (
        (("", "average"), ["tasks", "tasks_2"]),
        (("", "average", "star"), ["best_eta", "parameter_eta", "tasks", "tasks_2", "tasks_3"]),
    ):
        with open_store(tmp_path / str(len(methods)), head) as part:
            for record in store.records:
                if record.run.method in methods:
                    part.add(record.run, record.lines)
        assert list(named_figures(Averages(part))) == stems


def test_values_that_are_no_numbers_have_no_place_on_an_axis(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    head = head_of(study)
    head["study"]["figures"] = [
        {"figure": "best", "parameter": "eta"},
        {"figure": "parameter", "parameter": "eta"},
        {"figure": "parameter", "parameter": "rescale"},
    ]
    with open_store(tmp_path / "t", head) as other:
        for record in store.records:
            run = record.run
            if run.parameters.get("eta") == 60:
                run = replace(run, parameters={**run.parameters, "eta": {"*": 60}})
            other.add(run, record.lines)
    assert list(named_figures(Averages(other))) == ["best_eta", "parameter_eta"]
    assert set(best_parameters(Averages(other), "eta").best) <= {20, 40}
