"""The page of an inspection: task vectors, their conflicts, and how much merges keep of them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import starmerge_models
from starmerge_models.study.inspection import frames
from starmerge_models.study.inspection.findings import Topic
from starmerge_models.study.inspection.inspection import Inspection
from starmerge_models.study.inspection.totals import Record
from starmerge_models.study.page.charts import dots, heat_map, lines
from starmerge_models.study.page.page import Page, Section
from starmerge_models.study.page.parts import (
    Chart,
    Copy,
    Frame,
    KeyFigure,
    KeyFigures,
    Notes,
    Part,
    Provenance,
    Table,
    Text,
)
from starmerge_models.study.palette import plot_styles

KEYS = 8
"""Most models (the largest) with a key figure at the top of the page."""

PAIRS, TENSORS = 500, 1500
"""Most rows of the tables of pairs and of tensors, which keep a page below 5 MB."""

_ALL = "all modules"

_TRIES: dict[Topic, str] = {
    "kept": "A merge that keeps more of the tasks",
    "size": "A merge that equalises sizes",
    "rounding": "A merge without rounding loss",
    "noise": "A merge without the noise of stored weights",
    "pair": "A merge that separates conflicting tasks",
    "layers": "A merge with fewer directions where tasks clash most",
    "rank": "A merge with more directions",
}
"""By topic, the purpose of a finding's options."""

_SHARES = ".0%"


def inspection_page(inspection: Inspection) -> Page:
    """Make the page of an inspection."""
    count = len({record["tensor"] for record in inspection.tensors})
    title = f"{_counted(len(inspection.models), 'task vector')} of {inspection.base}"
    subtitle = (
        f"{_counted(count, 'tensor')} compared, from the weights alone: sizes, spectra, where "
        f"tasks clash. STAR's η is {inspection.eta:g}."
    )
    has_layers = any(record["conflict"] is not None for record in inspection.layers)
    merges = frames.kept(inspection)
    sections = [
        Section("Summary", _summary(inspection)),
        Section("Models", [_models(inspection)]),
        *(
            [
                Section("Rank map", _rank_map(inspection)),
                Section("Spectra", _spectra(inspection)),
            ]
            if frames.has_spectra(inspection)
            else ()
        ),
        *([Section("Conflicts", _conflicts(inspection))] if inspection.conflicts else ()),
        *([Section("Layers", _layers(inspection))] if has_layers else ()),
        *([Section("What merges keep", _kept(merges))] if len(merges) else ()),
        Section("All tensors", _tensors(inspection)),
        Section("How to read this", _reading(inspection)),
    ]
    return Page(title, subtitle, sections)


def _summary(inspection: Inspection) -> list[Part]:
    models = sorted(inspection.models, key=lambda record: -float(record["norm"]))[:KEYS]
    shown = plot_styles(record["model"] for record in models)
    figures = [
        KeyFigure(
            record["model"], f"{record['norm']:.3g}", _note(record), shown[record["model"]].colour
        )
        for record in models
    ]
    of = f"of the {KEYS} largest of {len(inspection.models)} models" if len(models) < len(
        inspection.models
    ) else "of each model"  # fmt: skip
    parts: list[Part] = [
        KeyFigures(figures),
        Text(f"The norm ‖τ‖ {of}, over all tensors that it changes."),
    ]
    if inspection.findings:
        parts.append(Notes([str(finding) for finding in inspection.findings]))
    return [*parts, *_commands(inspection)]


def _note(record: Record) -> str:
    said = []
    if record["relative_norm"] is not None:
        said.append(f"{record['relative_norm']:.1%} of the base's")
    if record["kept"] is not None:
        said.append(f"STAR keeps {record['kept']:.1f} of {record['rank']:.1f} directions")
    return "; ".join(said)


def _commands(inspection: Inspection) -> list[Part]:
    """Return commands that follow the findings' advice, without duplicates."""
    tries: dict[str, str] = {}
    for finding in inspection.findings:
        if finding.options is not None and finding.topic in _TRIES:
            tries.setdefault(finding.options, _TRIES[finding.topic])
    found: list[Part] = [
        Copy(label, f"starmerge merge BASE MODEL... {options} -o merged")
        for options, label in tries.items()
    ]
    race = "starmerge choose BASE MODEL... -t TASK,... -o recipe.yaml"
    return [*found, Copy("Which merge scores best on your tasks", race)]


def _models(inspection: Inspection) -> Table:
    frame = inspection.to_frame("models")
    if frame["kind"].nunique() == 1:
        frame = frame.drop(columns="kind")
    return Table(
        _known(frame), "Task vectors by model",
        formats={
            "norm": ".3g", "nuclear": ".3g", "relative_norm": ".2%", "times_others": ".2f",
            "rank": ".1f", "kept": ".1f", "effective_rank": ".1f", "stable_rank": ".1f",
            "others_on_it": ".2f",
            **dict.fromkeys(("top_share", "top_energy", "noise", "apart", "survived"), _SHARES),
            "outvoted": _SHARES,
        },
        titles=_TITLES | {"times_others": "× others", "others_on_it": "others on it"},
        choices=("kind",),
    )  # fmt: skip


_TITLES = {
    "nuclear": "nuclear norm",
    "relative_norm": "of the base's norm",
    "kept": "STAR keeps",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "top_share": "first σ",
    "top_energy": "first σ²",
    "survived": "survives rounding",
    "noise": "below the noise",
    "sign_conflict": "sign conflict",
    "overlap_in": "overlap of inputs",
    "overlap_out": "overlap of outputs",
    "chance_in": "by chance, in",
    "chance_out": "by chance, out",
    "energy_share": "share of ‖τ‖²",
}


def _rank_map(inspection: Inspection) -> list[Part]:
    frame = frames.rank_maps(inspection).rename(columns={"kept": "rank kept"})
    several = frame["model"].nunique() > 1
    about = "A row for each layer, a column for each module. "
    chosen = "Select a model below the map; all share the colour scale. " if several else ""
    return [
        Chart(
            heat_map(
                frame if several else frame.drop(columns="model"),
                "module", "layer", "rank kept",
                choice="model" if several else None, form=".3~g",
            ),
            f"Rank that STAR keeps at η = {inspection.eta:g}",
            f"{about}{chosen}Brighter tensors need more directions for η percent of their nuclear "
            "norm.",
        )
    ]  # fmt: skip


def _spectra(inspection: Inspection) -> list[Part]:
    import pandas as pd  # noqa: PLC0415

    frame = frames.spectra_by_module(inspection)
    # In the tail of a spectrum every fourth point is enough for the same line.
    frame = frame[(frame["index"] <= 32) | (frame["index"] % 4 == 0)]
    mean = frame.groupby(["model", "index"], observed=True, as_index=False)["share"].mean()
    frame = pd.concat([mean.assign(module=_ALL), frame], ignore_index=True)
    frame = frame.assign(share=frame["share"].round(4)).rename(
        columns={
            "model": "label",
            "index": "singular values",
            "share": "share of the nuclear norm",
        }
    )
    return [
        Chart(
            lines(
                frame, "singular values", "share of the nuclear norm", choice="module",
                level=(inspection.eta / 100, f"η = {inspection.eta:g}"),
            ),
            "Share of the nuclear norm in the first singular values",
            "A line for each model, the mean over its matrices; select a module below the chart. "
            "STAR keeps the singular values up to the dashed line and removes the rest. Click a "
            "name in the legend to bring its line forward.",
        )
    ]  # fmt: skip


def _conflicts(inspection: Inspection) -> list[Part]:
    parts: list[Part] = [
        Text(
            "Conflicts of pairs of models, over all tensors that both change. A task's inputs are "
            "estimated from its update: no data was run through the models."
        )
    ]
    for measure in frames.MEASURES:
        frame = frames.conflict_matrix(inspection, measure)
        if frame["value"].notna().any():
            frame = frame.rename(columns={"value": measure.name})
            chart = heat_map(frame, "column", "row", measure.name, diverging=measure.is_diverging)
            parts.append(Chart(chart, measure.title, measure.about))
    pairs = inspection.to_frame("conflicts")
    order = pairs[["a_on_b", "b_on_a"]].astype(float).max(axis=1).sort_values(ascending=False)
    pairs = pairs.loc[order.index]
    said = _first(len(pairs), PAIRS, "pairs", "those with the largest responses to each other")
    bounds = {f"{x}_reach_of_bound_on_{y}": f"{x} on {y}: reach of its bound" for x, y in _WAYS}
    table = Table(
        _known(pairs.head(PAIRS)), "Pairs of models",
        formats={"sign_conflict": _SHARES} | dict.fromkeys(bounds, ".2g"),
        titles=_TITLES
        | {f"{x}_on_{y}": f"{x} on {y}" for x, y in _WAYS}
        | {f"{x}_along_{y}": f"{x} along {y}" for x, y in _WAYS}
        | {f"{x}_acting_on_{y}": f"{x} acting on {y}" for x, y in _WAYS}
        | bounds,
        choices=("a", "b") if len(inspection.models) > 3 else (),
    )  # fmt: skip
    return [*parts, *said, table]


_WAYS = (("a", "b"), ("b", "a"))


def _layers(inspection: Inspection) -> list[Part]:
    frame = frames.conflict_map(inspection)
    chart = heat_map(frame[["layer", "module", "conflict"]], "module", "layer", "conflict")
    first = ["layer", "module", "conflict"]
    rest = [column for column in frame.columns if column not in first]
    table = frame[[*first, *rest]].sort_values("conflict", ascending=False)
    return [
        Chart(
            chart,
            "Where tasks clash",
            "A task's response to another's inputs over the other's own response: the root mean "
            "square over the pairs, for each layer and module. Bright cells are clashes.",
        ),
        Table(
            _known(table), "Layers and modules, largest conflicts first",
            formats={
                "sign_conflict": _SHARES, "top_share": _SHARES, "energy_share": ".1%",
                **dict.fromkeys(("rank", "kept", "effective_rank", "stable_rank"), ".1f"),
            },
            titles=_TITLES, choices=("layer", "module"),
        ),
    ]  # fmt: skip


def _kept(frame: Frame) -> list[Part]:
    drawn = frame.rename(columns={"model": "row", "merge": "label"})
    own = drawn[["row", "label", "own"]].rename(columns={"own": "value"})
    others = drawn[["row", "label", "others"]].rename(columns={"others": "value"})
    return [
        Text("On the task's own inputs, estimated from its update. Neither number is a score."),
        Chart(
            dots(own, title="of the task itself (1: all)"),
            "How much of each task a merge keeps",
            "A row for each model, a dot for each merge. At 1 the merge keeps all of the task's "
            "response to its own inputs.",
        ),
        Chart(
            dots(others, title="something else, over the task's own answer"),
            "A merge's other response there",
            "A row for each model, a dot for each merge. At 1 other tasks respond as strongly as "
            "the task itself.",
        ),
        Table(frame, "What merges keep of each model", choices=("merge", "model")),
    ]


def _tensors(inspection: Inspection) -> list[Part]:
    frame = inspection.to_frame("tensors").sort_values("norm", ascending=False)
    said = _first(len(frame), TENSORS, "rows", "those with the largest updates")
    shown = [
        "tensor", "model", "layer", "module", "shape", "norm", "relative_norm", "survived",
        "outvoted", "rank", "kept", "effective_rank", "stable_rank", "top_share", "noise",
    ]  # fmt: skip
    frame = frame.head(TENSORS)[shown].astype({"layer": "Int64"})
    table = Table(
        _known(frame), "Every tensor and model",
        formats={
            "norm": ".3g", "relative_norm": ".2%", "effective_rank": ".1f", "stable_rank": ".1f",
            **dict.fromkeys(("survived", "outvoted", "top_share", "noise"), _SHARES),
        },
        titles=_TITLES, choices=("model", "module"),
    )  # fmt: skip
    return [*said, table]


def _reading(inspection: Inspection) -> list[Part]:
    merges = list(dict.fromkeys(record["merge"] for record in inspection.kept))
    content: dict[str, Any] = {
        "base": inspection.base,
        "dtype": inspection.dtype,
        "eta": inspection.eta,
        "models": {record["model"]: record["kind"] for record in inspection.models},
        "merges": merges,
        "versions": {
            "starmerge": starmerge_models.__version__,
            "python": platform.python_version(),
        },
    }
    return [
        Notes([*inspection.legends, *inspection.all_notes]),
        Provenance(content, "Where the numbers come from"),
    ]


def _known(frame: Frame) -> Frame:
    """Return a frame without its empty columns."""
    return frame.dropna(axis="columns", how="all")


def _first(count: int, most: int, noun: str, which: str) -> Sequence[Part]:
    """Return a sentence on the rows of a table, if it does not have all."""
    return [Text(f"The first {most} of {count} {noun}, {which}.")] if count > most else []


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
