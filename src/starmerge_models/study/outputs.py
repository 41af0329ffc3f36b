"""Writes the tables and figures of a study into its store's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from starmerge_models.errors import UsageError
from starmerge_models.storage.publishing import output_file
from starmerge_models.study.averages import Averages
from starmerge_models.study.figures import (
    plot_against_number,
    plot_against_parameter,
    plot_best_parameter,
    plot_grid,
    plot_heat_map,
)
from starmerge_models.study.figures.style import save
from starmerge_models.study.frames import (
    best_by_number,
    by_number,
    by_parameter,
    one_shot,
    shares_by_task,
)
from starmerge_models.study.grids import value_of
from starmerge_models.study.store import Store
from starmerge_models.study.study_file import FigureEntry, FigureKind
from starmerge_models.study.tables import failures, report

TABLE, AVERAGES, FIGURES = "table.md", "averages.csv", "figures"


def averages_of(store: Store) -> Averages:
    """Return the averages of a store, for its tables, figures and page.

    Raises:
        UsageError: It has no averages yet; the message lists the failed runs.
    """
    try:
        return Averages(store)
    except UsageError as error:
        raise UsageError("\n".join([str(error), *failures(store)])) from error


def write_tables(averages: Averages) -> str:
    """Write the tables of a store into its folder, and return them in Markdown.

    Raises:
        StarmergeError: The disk is full, or fails otherwise.
    """
    store = averages.store
    table = report(averages)
    with output_file(store.folder / TABLE, overwrite=True) as partial:
        partial.write_text(f"{table}\n", encoding="utf-8")
    with output_file(store.folder / AVERAGES, overwrite=True) as partial:
        averages.to_frame().to_csv(partial, index=False)
    return table


def write_figures(averages: Averages) -> None:
    """Draw the figures that a store's study names into its folder.

    Raises:
        StarmergeError: The disk is full, or fails otherwise.
    """
    store = averages.store
    (store.folder / FIGURES).mkdir(exist_ok=True)
    for stem, entry in named_figures(averages).items():
        path = store.folder / FIGURES / stem
        save(_PLOTS[entry.figure](averages, entry, Path(f"{path}.png")), Path(f"{path}.pdf"))


def figure_entries(averages: Averages) -> list[FigureEntry]:
    """Return the study's figures that can be drawn from the store's runs."""
    named = averages.store.head["study"]["figures"]
    entries = [FigureEntry.model_validate(entry) for entry in named]
    return [entry for entry in entries if _can_be_drawn(averages, entry)]


def named_figures(averages: Averages) -> dict[str, FigureEntry]:
    """Return the figures of :func:`figure_entries` by file name, without suffix."""
    found: dict[str, FigureEntry] = {}
    for entry in figure_entries(averages):
        stem = "_".join(filter(None, [entry.figure.replace("-", "_"), entry.parameter]))
        same = sum(
            (e.figure, e.parameter) == (entry.figure, entry.parameter) for e in found.values()
        )
        found[f"{stem}_{same + 1}" if same else stem] = entry
    return found


def _can_be_drawn(averages: Averages, entry: FigureEntry) -> bool:
    if entry.figure == "best":
        return len(best_by_number(averages, _parameter(entry), entry.methods)) > 0
    if entry.figure == "tasks":
        return bool(shares_by_task(averages, entry.methods).share.notna().any())
    methods = entry.methods
    runs = [run for run in averages.runs if methods is None or run.record.run.method in methods]
    if entry.parameter is not None:
        runs = [run for run in runs if value_of(run, entry.parameter) is not None]
    return bool(runs)


def title_of(store: Store, entry: FigureEntry) -> str:
    """Return the title of a figure: the study's own, or a default with pool and base."""
    pool = f"{len(store.head['models'])} fine-tunes of {store.head['base']['name']}"
    about = _ABOUT[entry.figure].format(parameter=entry.parameter)
    return entry.title or f"{about}: {pool}"


_ABOUT: dict[FigureKind, str] = {
    "number": "Performance against the number of models",
    "parameter": "Sensitivity to {parameter}",
    "best": "The best {parameter} against the number of models",
    "one-shot": "Without a search, and the best of a grid",
    "tasks": "Share of the fine-tune's score that is kept",
}


def _plot_number(averages: Averages, entry: FigureEntry, path: Path) -> Figure:
    means, runs = by_number(averages, entry.methods)
    return plot_against_number(means, path, title=title_of(averages.store, entry), runs=runs)


def _plot_parameter(averages: Averages, entry: FigureEntry, path: Path) -> Figure:
    parameter = _parameter(entry)
    means, runs = by_parameter(averages, parameter, entry.methods)
    return plot_against_parameter(
        means, parameter, path, title=title_of(averages.store, entry), runs=runs
    )


def _plot_best(averages: Averages, entry: FigureEntry, path: Path) -> Figure:
    parameter = _parameter(entry)
    best = best_by_number(averages, parameter, entry.methods)
    return plot_best_parameter(best, parameter, path, title=title_of(averages.store, entry))


def _plot_one_shot(averages: Averages, entry: FigureEntry, path: Path) -> Figure:
    means, defaults = one_shot(averages, entry.methods)
    return plot_grid(means, defaults, path, title=title_of(averages.store, entry))


def _plot_tasks(averages: Averages, entry: FigureEntry, path: Path) -> Figure:
    shares = shares_by_task(averages, entry.methods)
    return plot_heat_map(shares, path, title=title_of(averages.store, entry), value="share")


def _parameter(entry: FigureEntry) -> str:
    if entry.parameter is None:
        raise UsageError(f"The figure {entry.figure!r} needs the key parameter.")
    return entry.parameter


_PLOTS: dict[FigureKind, Callable[[Averages, FigureEntry, Path], Figure]] = {
    "number": _plot_number,
    "parameter": _plot_parameter,
    "best": _plot_best,
    "one-shot": _plot_one_shot,
    "tasks": _plot_tasks,
}
