"""The page of a choice: the candidates of a race after each round, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.study.choose import Choice
from starmerge_models.study.names import model_name
from starmerge_models.study.page.charts import dots
from starmerge_models.study.page.page import Page, Section
from starmerge_models.study.page.parts import (
    Chart,
    Copy,
    KeyFigure,
    KeyFigures,
    Notes,
    Part,
    Table,
    Text,
)
from starmerge_models.study.palette import BASE_COLOUR, plot_styles

_STOPPED = {None: "–", "behind": "clearly behind", "budget": "by the budget"}


def choice_title(base: str | Path, choice: Choice) -> str:
    """Return a title that names the base and says how many models are merged."""
    count = len(choice.recipe.models)
    return f"How to merge {count} fine-tune{'s' if count > 1 else ''} of {model_name(base)}"


def choice_page(choice: Choice, *, title: str) -> Page:
    """Make the page of a choice.

    Args:
        choice: The result of the race.
        title: The title; it should name models, not folders.
    """
    standings = choice.outcome.standings
    rounds = max(standing.rounds for standing in standings)
    subtitle = (
        f"{len(standings)} candidates raced for {rounds} round{'s' if rounds > 1 else ''}; taken: "
        f"{choice.chosen}."
    )
    sections = [
        Section("Choice", _verdict(choice)),
        Section("Standings", _standings(choice)),
        Section("Rounds", _rounds(choice)),
        Section("Recipe", _recipe(choice)),
        Section("How to read this", [Notes(_notes(choice))]),
    ]
    return Page(title, subtitle, sections)


def _average(choice: Choice) -> str:
    return "normalised average" if choice.is_normalised else "mean score"


def _verdict(choice: Choice) -> list[Part]:
    colour = plot_styles(standing.name for standing in choice.outcome.standings)[
        choice.chosen
    ].colour
    chosen = next(s for s in choice.outcome.standings if s.name == choice.chosen)
    figures = [
        KeyFigure(f"{choice.chosen}: {_average(choice)}", *_figure(chosen.average), colour=colour),
        KeyFigure(f"base: {_average(choice)}", *_figure(choice.base), colour=BASE_COLOUR),
    ]
    if choice.gain is not None:
        sure = "clear" if choice.gain.clear else "not clear"
        value, note = _figure(choice.gain, "+.3f")
        figures.append(KeyFigure(f"{choice.chosen} − base", value, f"{note}, {sure}"))
    return [KeyFigures(figures), Notes([choice.sentence])]


def _figure(interval: Interval | Difference | None, form: str = ".3f") -> tuple[str, str]:
    if interval is None:
        return "–", "undefined"
    value, low, high = (
        format(number, form).replace("-", "−")
        for number in (interval.value, interval.low, interval.high)
    )
    return value, f"95 % interval [{low}, {high}]"


def _standings(choice: Choice) -> list[Part]:
    average = _average(choice)
    rows: list[dict[str, Any]] = []
    for standing in choice.outcome.standings:
        rows.append(
            {
                "candidate": standing.name,
                "chosen": "✓" if standing.name == choice.chosen else "",
                "rounds": standing.rounds,
                "rows": standing.rows,
                **_ends(average, standing.average),
                **_ends("− best", standing.gap),
                "stopped": _STOPPED[standing.stopped],
            }
        )
    frame = pd.DataFrame(rows)
    drawn = [
        {"row": row["candidate"], "label": row["candidate"], "rows": row["rows"]}
        | {"value": row[average], "low": row["low"], "high": row["high"]}
        for row in rows
    ]
    if choice.base is not None:
        base = choice.base
        for row in list(drawn):
            drawn.append(
                {"row": row["row"], "label": BASE, "value": base.value}
                | {"low": base.low, "high": base.high}
            )
    parts: list[Part] = []
    if frame[average].notna().any():
        parts.append(
            Chart(
                dots(pd.DataFrame(drawn), title=f"{average}, 95 % interval"),
                "The candidates after their last round",
                "A row for each candidate, those with the most rounds on top. Candidates that "
                "stopped earlier answered fewer rows and have wider intervals. The dashed line is "
                "the base on the rows that the chosen candidate answered.",
            )
        )
    table = Table(
        frame, "Candidates, those with the most rounds first",
        intervals={average: ("low", "high"), "− best": ("− best low", "− best high")},
        formats={"− best": "+.3f"},
        choices=("stopped",),
    )  # fmt: skip
    return [*parts, table]


def _ends(key: str, interval: Interval | Difference | None) -> dict[str, float | None]:
    prefix = f"{key} " if key.startswith("−") else ""
    if interval is None:
        return {key: None, f"{prefix}low": None, f"{prefix}high": None}
    return {key: interval.value, f"{prefix}low": interval.low, f"{prefix}high": interval.high}


def _rounds(choice: Choice) -> list[Part]:
    frame = pd.DataFrame(
        [
            {
                "row": f"round {number}",
                "label": standing.name,
                "value": None if average is None else average.value,
                "low": None if average is None else average.low,
                "high": None if average is None else average.high,
            }
            for number in range(1, 1 + max(s.rounds for s in choice.outcome.standings))
            for standing in choice.outcome.standings
            if number <= len(standing.averages)
            for average in [standing.averages[number - 1]]
        ]
    )
    table = Table(
        frame.rename(columns={"row": "round", "label": "candidate", "value": _average(choice)}),
        "Averages after each round, on all rows so far",
        intervals={_average(choice): ("low", "high")},
        choices=("round",),
    )
    if frame.value.isna().all():
        return [table]
    return [
        Text(
            "Each round doubles the number of rows. A candidate that is clearly behind the best of "
            "a round stops."
        ),
        Chart(
            dots(frame, title=f"{_average(choice)}, 95 % interval"),
            "The candidates after each round",
            "A row for each round, with a dot for each candidate that was still in the race.",
        ),
        table,
    ]


def _recipe(choice: Choice) -> list[Part]:
    return [
        Copy("The chosen merge, as a file recipe.yaml", choice.recipe.to_yaml()),
        Copy("The command that merges it", "starmerge merge recipe.yaml -o merged"),
    ]


def _notes(choice: Choice) -> list[str]:
    lines = [
        "Averages have 95 % intervals on the rows that a candidate answered; differences are "
        "paired, on the same rows.",
        *choice.notes,
    ]
    if choice.gain is None or not (choice.gain.clear and choice.gain.value > 0):
        lines.append(f"{choice.chosen} is not clearly better than the base on these rows.")
    return lines + [f"Left out: {name}. {reason}" for name, reason in choice.left_out.items()]
