"""The paper's claims on the embedded model: the studies of docs/studies.md, run and compared.

    python benchmarks/studies.py run [NAME...]     # what benchmarks/studies/NAME lacks, hours
    python benchmarks/studies.py claims            # the table of docs/studies.md, from the stores
    python benchmarks/studies.py figures           # docs/figures/studies, from the stores

A store that was made with other code takes no more runs: delete its folder, or run it elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from starmerge_models.demo_names import prepared_base
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.scoring.comparison import LEVEL, Difference
from starmerge_models.evaluation.text_tables import markdown_table
from starmerge_models.study.averages import Averages, RunAverage
from starmerge_models.study.execute import run_study
from starmerge_models.study.grids import best_of_grids, best_parameters, shift_of_best
from starmerge_models.study.outputs import FIGURES, write_figures, write_tables
from starmerge_models.study.store import is_store, load_store
from starmerge_models.study.study_file import find_study

HERE = Path(__file__).parent
STORES = HERE / "studies"
DRAWN = HERE.parent / "docs" / "figures" / "studies"
SHIPPED = ("numbers", "rescale", "eta", "dare", "best_eta", "one_shot", "tasks", "eta_by_task")
OWN = ("full", "many")
ROWS, COMBINATIONS = 40, 2

MARGIN = 0.03
"""Normalised averages that are surely less apart than this count as level: about as much as STAR is
above the average of the weights."""

Rows = Iterable[tuple[str, str, str]]
"""What is claimed, what was measured, and whether it holds."""


def run(names: Sequence[str]) -> None:
    """Do what the stores of some studies lack."""
    for name in names:
        study = find_study(str(STORES / f"{name}.yaml") if name in OWN else name)
        changes: dict[str, object] = {"base": str(prepared_base())}
        if name in SHIPPED:
            changes["rows"] = ROWS
            if study.combinations > 1:
                changes["combinations"] = COMBINATIONS
        store = run_study(
            study.model_copy(update=changes), STORES / name, cache=ScoreCache(), progress=True
        )
        print(write_tables(Averages(store)))


def averages_of(name: str) -> Averages | None:
    """Return the averages of a store; None where there is none."""
    return Averages(load_store(STORES / name)) if is_store(STORES / name) else None


def chosen(averages: Averages, label: str, n: int | None = None) -> list[RunAverage]:
    """Return the runs of a chain, of one number of models or all."""
    return [run for run in averages.runs if run.label == label and n in (None, run.n)]


def told(difference: Difference) -> str:
    """Write a difference with its interval."""
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def verdict(difference: Difference) -> str:
    """Say whether a difference that is claimed to be positive is so."""
    if not difference.clear:
        return "no clear difference"
    return "holds" if difference.value > 0 else "**does not hold**"


def level(difference: Difference, tests: int = 1) -> str:
    """Say whether two that are claimed to be level are so.

    That no difference is clear is no proof that there is none: level are two whose interval lies
    within the margin.

    Args:
        difference: Of the two.
        tests: Differences of which the claim says so; p-values are multiplied by it (Bonferroni).
    """
    if max(abs(difference.low), abs(difference.high)) < MARGIN:
        return f"holds (within ±{MARGIN:g})"
    if difference.clear and difference.p_value * tests < LEVEL:
        return "**does not hold**"
    return f"not settled: the interval goes beyond ±{MARGIN:g}"


def against_others(averages: Averages) -> Rows:
    """STAR is above the other methods that need no search, in the mean over all merges."""
    for label in ("average", "ties", "tall_masks", "metagpt"):
        found = averages.difference(chosen(averages, "star"), chosen(averages, label))
        yield f"STAR is above `{label}` (mean over n)", told(found), verdict(found)


def fades_slower(averages: Averages) -> Rows:
    """STAR loses less than the average when more models are merged: its lead grows."""
    fewest, most = min(r.n for r in averages.runs), max(r.n for r in averages.runs)
    many, few = (
        averages.difference(chosen(averages, "star", n), chosen(averages, "average", n))
        for n in (most, fewest)
    )
    if few.high < many.low:
        word = "holds"
    elif many.high < few.low:
        word = "**does not hold**"
    else:
        word = "not settled: the intervals overlap"
    yield (
        f"STAR's lead over `average` is larger at n = {most} than at n = {fewest}",
        f"{told(many)}; {told(few)}",
        word,
    )


def rescaling(averages: Averages) -> Rows:
    """Rescaling helps at low ranks."""
    for rank in (2, 4, 8, 12):
        label = f"star:rank={rank}"
        found = averages.difference(
            chosen(averages, label), chosen(averages, f"{label},rescale=false")
        )
        yield f"Rescaling helps at rank {rank}", told(found), verdict(found)


def insensitive(averages: Averages) -> Rows:
    """η matters little between 20 and 60; the k of TIES matters more."""
    for method, name, values in (
        ("star", "eta", (20, 30, 50, 60)),
        ("ties", "k", (10, 30, 40, 50)),
    ):
        usual = chosen(averages, method)
        for value in values:
            found = averages.difference(chosen(averages, f"{method}:{name}={value}"), usual)
            yield (
                f"`{method}` with {name} = {value} is level with its default",
                told(found),
                level(found, len(values)),
            )


def best_falls(averages: Averages) -> Rows:
    """The best η falls when more models are merged."""
    frame = best_parameters(averages, "eta")
    frame = frame[frame.label == "star"].sort_values("n")
    told_values = ", ".join(
        f"n = {row.n}: {row.best:g} [{row.low:g}, {row.high:g}]" for row in frame.itertuples()
    )
    few, many = int(frame.n.iloc[0]), int(frame.n.iloc[-1])
    shift = shift_of_best(averages, "eta", "star", (few, many))
    if shift.high < 0:
        word = "holds"
    elif shift.low > 0:
        word = "**does not hold**"
    else:
        word = "not settled"
    yield (
        f"The best η falls with n: at n = {many} it is lower than at n = {few}",
        f"{told_values}; {shift.value:+g} [{shift.low:+g}, {shift.high:+g}]",
        word,
    )


def near_the_grid(averages: Averages) -> Rows:
    """STAR's default is near the best of its grid, and near that of other methods' grids."""
    most = max(run.n for run in averages.runs)
    grids = {grid.method: grid for grid in best_of_grids(averages) if grid.n == most}
    star = grids["star"]
    for method in ("star", "ties", "task_arithmetic", "tall_masks"):
        grid = grids.get(method)
        if grid is None or star.default is None:
            continue
        best = chosen(averages, grid.best_label, most)
        found = averages.difference(chosen(averages, "star", most), best)
        held = f"{told(found)}; held out {star.default.value - grid.held_out:+.3f}"
        is_above = found.low > -MARGIN
        yield (
            f"STAR's η = 40 is level with the best of `{method}`'s {grid.points}, or above "
            f"(n = {most})",
            held,
            f"holds (at most {MARGIN:g} below)" if is_above else level(found),
        )


def dropping(averages: Averages) -> Rows:
    """DARE's p hardly matters until most entries are dropped."""
    usual = chosen(averages, "dare:p=0.1")
    for p in ("0.3", "0.5", "0.7", "0.9"):
        label = "dare" if p == "0.5" else f"dare:p={p}"
        found = averages.difference(chosen(averages, label), usual)
        yield f"DARE with p = {p} is level with p = 0.1", told(found), level(found, 4)


def auto_above(averages: Averages) -> Rows:
    """Beyond the paper: auto is above STAR and the average."""
    for label in ("star", "average"):
        found = averages.difference(chosen(averages, "auto"), chosen(averages, label))
        yield f"`auto` is above `{label}` (mean over n)", told(found), verdict(found)


CLAIMS: dict[str, tuple[Callable[[Averages], Rows], ...]] = {
    "numbers": (against_others, fades_slower, auto_above),
    "rescale": (rescaling,),
    "eta": (insensitive,),
    "best_eta": (best_falls,),
    "one_shot": (near_the_grid,),
    "dare": (dropping,),
    "full": (auto_above,),
    "many": (auto_above,),
}


def claims() -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: study, claim, measured, verdict."""
    for name, checks in CLAIMS.items():
        averages = averages_of(name)
        for check in checks if averages is not None else ():
            for row in check(averages):  # type: ignore[arg-type]
                yield (f"`{name}`", *row)


def figures() -> None:
    """Draw the figures of every store into the manual."""
    DRAWN.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, *OWN):
        if is_store(STORES / name):
            store = load_store(STORES / name)
            averages = Averages(store)
            write_tables(averages)
            write_figures(averages)
            for file in sorted((store.folder / FIGURES).glob("*.png")):
                shutil.copyfile(file, DRAWN / f"{name}_{file.name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "claims", "figures"])
    parser.add_argument("names", nargs="*", help="studies to run; by default those shipped")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.names or SHIPPED)
    elif arguments.what == "figures":
        figures()
    else:
        rows = list(claims())
        print(markdown_table([("study", "claim", "measured", "here"), *rows]))
        print(
            f"\n{len(rows)} claims, each with an interval of 95 % over rows: of claims without "
            "substance, one in twenty would be called clear by chance."
        )


if __name__ == "__main__":
    main()
