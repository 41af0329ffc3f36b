"""An inspection as text: one screen of Markdown, or HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from starmerge_models.evaluation.text_tables import html_table, markdown_table
from starmerge_models.study.inspection.findings import Finding
from starmerge_models.study.inspection.totals import Record

_MOST_MODELS = 20
_MOST_PAIRS = 8
_MOST_NAMES = 8

_MODELS_LEGEND = (
    "norm: ‖τ‖, also relative to the base's norm in the same tensors and to the other models' "
    "median; ranks: means over matrices; first σ: its share of the nuclear norm; survives: share "
    "of the update's energy that survives rounding to the base's dtype; others on it: the others' "
    "response to its inputs over its own, if they were summed and uncorrelated."
)
_PAIRS_LEGEND = (
    "a on b: a's response to b's inputs over b's own response; inputs, outputs: overlap of their "
    "directions (by chance); signs: share of Σ|τ_a τ_b| where signs differ, ½ by chance. A task's "
    "inputs are estimated from its update: no model was run."
)
_KEPT_LEGEND = (
    "For each merge: the share of the task's response on the task's own inputs that it keeps (1 is "
    "all), and in brackets its other response there, over the task's own."
)


@dataclass(frozen=True)
class TextTable:
    """A table of text cells."""

    rows: list[list[str]]
    """The cells; the first row is the header."""
    legend: str
    left_out: str = ""
    """A sentence on omitted rows."""


def tables(
    models: Sequence[Record], conflicts: Sequence[Record], kept: Sequence[Record]
) -> list[TextTable]:
    """Return the tables of an inspection that fit a screen.

    Args:
        models: A record for each model.
        conflicts: A record for each pair of models.
        kept: A record for each merge and model.
    """
    ordered = sorted(models, key=lambda record: -float(record["norm"]))
    shown = ordered[:_MOST_MODELS]
    found = [TextTable(_models(shown), _MODELS_LEGEND, _left(ordered, _MOST_MODELS, "models"))]
    if conflicts:
        ranked = sorted(conflicts, key=_clash, reverse=True)
        left = _left(ranked, _MOST_PAIRS, "pairs")
        found.append(TextTable(_pairs(ranked[:_MOST_PAIRS]), _PAIRS_LEGEND, left))
    if kept:
        names = [record["model"] for record in shown]
        left = _left(ordered, _MOST_MODELS, "models")
        found.append(TextTable(_kept(kept, names), _KEPT_LEGEND, left))
    return found


def markdown(shown: Sequence[TextTable], findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return tables, findings and notes in Markdown."""
    parts = []
    for table in shown:
        parts.append(markdown_table(table.rows))
        parts.append(" ".join(filter(None, [table.left_out, table.legend])))
    parts.append("\n".join(f"- {finding}" for finding in findings))
    return "\n\n".join(filter(None, [*parts, *(f"Note: {note}" for note in notes)]))


def html(shown: Sequence[TextTable], findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return tables, findings and notes in HTML, for notebooks."""
    parts = []
    for table in shown:
        parts.append(html_table(table.rows))
        parts.append(f"<p>{escape(f'{table.left_out} {table.legend}'.strip())}</p>")
    parts.append(f"<ul>{''.join(f'<li>{escape(str(finding))}</li>' for finding in findings)}</ul>")
    parts += [f"<p>Note: {escape(note)}</p>" for note in notes]
    return f"<div>{''.join(parts)}</div>"


def shortened(names: Sequence[str]) -> str:
    """Return names on one line, only the first of many."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _models(records: Sequence[Record]) -> list[list[str]]:
    has_kinds = len({record["kind"] for record in records}) > 1
    head = ["model", *(["kind"] if has_kinds else []), "tensors", "norm", "of base", "× others"]
    rows = [[*head, "rank", "STAR keeps", "effective", "first σ", "survives", "others on it"]]
    for record in records:
        rows.append(
            [
                record["model"],
                *([record["kind"]] if has_kinds else []),
                str(record["tensors"]),
                f"{record['norm']:.3g}",
                _percent(record["relative_norm"], 2),
                _number(record["times_others"], 2),
                _number(record["rank"], 1),
                _number(record["kept"], 1),
                _number(record["effective_rank"], 1),
                _percent(record["top_share"]),
                _percent(record["survived"]),
                _number(record["others_on_it"], 2),
            ]
        )
    return rows


def _clash(pair: Record) -> float:
    return max(float(pair["a_on_b"] or 0), float(pair["b_on_a"] or 0), -float(pair["cosine"] or 0))


def _pairs(records: Sequence[Record]) -> list[list[str]]:
    rows = [["a", "b", "cosine", "a on b", "b on a", "inputs", "outputs", "signs"]]
    for pair in records:
        overlaps = [
            "–"
            if pair[f"overlap_{side}"] is None
            else f"{pair[f'overlap_{side}']:.2f} ({pair[f'chance_{side}']:.3f})"
            for side in ("in", "out")
        ]
        rows.append(
            [
                pair["a"],
                pair["b"],
                _number(pair["cosine"], 3),
                _number(pair["a_on_b"], 2),
                _number(pair["b_on_a"], 2),
                *overlaps,
                _percent(pair["sign_conflict"]),
            ]
        )
    return rows


def _kept(records: Sequence[Record], models: Sequence[str]) -> list[list[str]]:
    merges = list(dict.fromkeys(record["merge"] for record in records))
    cells = {(record["merge"], record["model"]): _kept_cell(record) for record in records}
    return [
        ["model", *merges],
        *([model, *(cells.get((merge, model), "–") for merge in merges)] for model in models),
    ]


def _kept_cell(record: Record) -> str:
    if record["own"] is None:
        return "–"
    return f"{record['own']:.2f} ({record['others']:.2f})"


def _left(records: Sequence[Record], most: int, what: str) -> str:
    return f"… and {len(records) - most} more {what}." if len(records) > most else ""


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"
