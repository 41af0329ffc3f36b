"""What is drawn from a written store: frames, files, titles."""

import numpy as np
import pandas as pd
import pytest

from starmerge_models.study.averages import Averages
from starmerge_models.study.frames import (
    best_by_number,
    by_number,
    by_parameter,
    one_shot,
    shares_by_task,
)
from starmerge_models.study.outputs import figure_entries, title_of, write_figures, write_tables
from starmerge_models.study.store import Store
from tests.study.studies import written_store

pytestmark = pytest.mark.usefixtures("small_fonts")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return written_store(tmp_path_factory.mktemp("study") / "s")[1]


def _value(store: Store, run) -> float:
    """Return a merge's normalised average, from the lines of the store."""
    tuned = {
        record.run.models[0]: record.lines[0]["score"]
        for record in store.records
        if record.run.kind == "fine-tune"
    }
    own = {line["task"]: line["score"] for line in store.get(run).lines}
    return float(np.mean([score / tuned[task.rpartition("/")[2]] for task, score in own.items()]))


def test_frames_by_number_and_by_parameter_are_those_of_the_runs(store: Store) -> None:
    averages = Averages(store)
    merges = [record.run for record in store.records if record.run.kind == "merge"]
    means, runs = by_number(averages, ("star",))
    assert set(means.label) == {"star:eta=20", "star", "star:eta=60"}
    assert len(runs) == 9
    for row in means.itertuples():
        own = [run for run in merges if run.label == row.label and len(run.models) == row.n]
        assert row.value == pytest.approx(np.mean([_value(store, run) for run in own]))
        assert row.combinations == len(own) == (2 if row.n == 2 else 1)
    means, runs = by_parameter(averages, "eta", None)
    assert set(means.label) == set(runs.label) == {"star"}
    places = [(row.n, row.parameters["eta"]) for row in means.itertuples()]
    assert places == [(n, eta) for n in (2, 4) for eta in (20, 40, 60)]


def test_the_best_parameter_and_the_default_stand_in_their_frames(store: Store) -> None:
    averages = Averages(store)
    means, _ = by_parameter(averages, "eta", None)
    best = best_by_number(averages, "eta", None)
    assert list(best.n) == [2, 4]
    for row in best.itertuples():
        own = means[means.n == row.n].sort_values("value", ascending=False)
        assert row.best in {p["eta"] for p, v in zip(own.parameters, own.value, strict=True)
                            if v == own.value.iloc[0]}  # fmt: skip
        assert row.low <= row.best <= row.high
    assert not len(best_by_number(averages, "eta", ("average",)))
    frame, defaults = one_shot(averages, None)
    assert set(frame.label) == {"average", "star"}
    assert defaults["star"]["eta"] == 40
    assert dict(defaults["average"]) == dict(frame[frame.label == "average"].parameters.iloc[0])


def test_shares_by_task_are_of_the_most_models(store: Store) -> None:
    averages = Averages(store)
    shares = shares_by_task(averages, ("average",))
    assert list(dict.fromkeys(shares.label)) == ["base", "average"]
    (run,) = [r for r in averages.runs if r.label == "average" and r.n == 4]
    for row in shares[shares.label == "average"].itertuples():
        score = run.record.by_task[row.task]["score"]
        assert row.share == pytest.approx(score / averages.tuned_score(row.task))


def test_tables_and_figures_are_written_into_the_folder(store: Store) -> None:
    table = write_tables(Averages(store))
    write_figures(Averages(store))
    assert (store.folder / "table.md").read_text(encoding="utf-8") == f"{table}\n"
    written = pd.read_csv(store.folder / "averages.csv")
    expected = Averages(store).to_frame()
    assert written.value.to_list() == pytest.approx(expected.value.to_list())
    stems = ("number", "parameter_eta", "best_eta", "one_shot", "tasks")
    names = {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".pdf")}
    figures = store.folder / "figures"
    assert {file.name for file in figures.iterdir()} == names
    assert all(file.stat().st_size > 4000 for file in figures.iterdir())


def test_figures_without_runs_are_left_out_and_titles_name_models(store: Store) -> None:
    entries = figure_entries(Averages(store))
    assert [entry.figure for entry in entries] == [
        "number", "parameter", "best", "one-shot", "tasks",
    ]  # fmt: skip
    titles = [title_of(store, entry) for entry in entries]
    assert titles[0] == "By number"
    assert titles[1] == "Sensitivity to eta: 4 fine-tunes of org/base"
    assert not any(str(store.folder.parent) in title for title in titles)
