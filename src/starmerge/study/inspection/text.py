"""An inspection for people: one screen of Markdown, or HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from starmerge.evaluation.table import aligned
from starmerge.study.inspection.totals import Record

if TYPE_CHECKING:
    from starmerge.study.inspection.inspection import Inspection

_MOST_MODELS = 20
_MOST_PAIRS = 8
_MOST_NAMES = 8

_LEGEND = (
    "norm: ‖τ‖; × others: over the median of the others' norms; rank, STAR keeps, effective rank: "
    "means over matrices; first σ: its mean share of the nuclear norm; survives: share of the "
    "update that is left when it is added to the base and rounded; outvoted: share of its "
    "magnitude against the sign of the tasks' sum; others on it: how strongly the sum of the "
    "others would answer to its inputs, over its own answer, if they had nothing in common."
)
_PAIR_LEGEND = (
    "a on b: how strongly a answers to b's inputs, over b's own answer; along: the part of it that "
    "does what b does; overlap: of input and output directions, by chance in brackets; signs: "
    "share of Σ|τ_a τ_b| with different signs, ½ by chance. Inputs are known by the updates "
    "alone: nothing was run."
)
_KEPT_LEGEND = (
    "coefficient: ⟨M, τ⟩/‖τ‖²; own: how much of the task the merge does on the task's inputs, 1 is "
    "all; others: how strongly it does something else there, over the task's own answer; error: "
    "both together."
)


def report(inspection: Inspection) -> str:
    """Return tables and findings in Markdown."""
    parts = []
    for rows, legend, more in _tables(inspection):
        parts += [aligned(rows) + (f"\n\n{more}" if more else ""), legend]
    parts += [f"- {finding}" for finding in inspection.findings]
    if inspection.sampled:
        parts.append(
            f"Signs and rounding of {inspection.sampled} large tensors were looked at on some of "
            "their rows, evenly spread."
        )
    parts += [f"Note: {note}" for note in inspection.notes]
    return "\n\n".join(parts)


def html(inspection: Inspection) -> str:
    """Return tables and findings in HTML."""
    parts = []
    for rows, legend, more in _tables(inspection):
        head, *body = rows
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body
        )
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>")
        parts.append(f"<p>{escape(f'{more} {legend}' if more else legend)}</p>")
    found = "".join(f"<li>{escape(str(finding))}</li>" for finding in inspection.findings)
    return f"<div>{''.join(parts)}<ul>{found}</ul></div>"


def shortened(names: Sequence[str]) -> str:
    """Return names in a line, of many the first."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _tables(inspection: Inspection) -> Iterator[tuple[list[list[str]], str, str]]:
    """Yield the tables: rows, the first the head; a legend; and what is left out."""
    yield _models(inspection.models), _LEGEND, _left(inspection.models, _MOST_MODELS, "models")
    if inspection.conflicts:
        ranked = sorted(inspection.conflicts, key=_clash, reverse=True)
        yield _pairs(ranked[:_MOST_PAIRS]), _PAIR_LEGEND, _left(ranked, _MOST_PAIRS, "pairs")
    if inspection.kept:
        yield _kept(inspection.kept), _KEPT_LEGEND, ""


def _models(records: Sequence[Record]) -> list[list[str]]:
    ordered = sorted(records, key=lambda record: -float(record["norm"]))
    rows = [
        ["model", "kind", "tensors", "norm", "of base", "× others", "rank", "STAR keeps"]
        + ["effective rank", "first σ", "survives", "outvoted", "others on it"]
    ]
    for record in ordered[:_MOST_MODELS]:
        rows.append(
            [
                record["model"],
                record["kind"],
                str(record["tensors"]),
                f"{record['norm']:.3g}",
                _percent(record["relative_norm"], 2),
                _number(record["times_others"], 2),
                _number(record["rank"], 1),
                _number(record["kept"], 1),
                _number(record["effective_rank"], 1),
                _percent(record["top_share"]),
                _percent(record["survived"]),
                _percent(record["outvoted"]),
                _number(record["others_on_it"], 2),
            ]
        )
    return rows


def _clash(pair: Record) -> float:
    return max(float(pair["a_on_b"] or 0), float(pair["b_on_a"] or 0), -float(pair["cosine"] or 0))


def _pairs(records: Sequence[Record]) -> list[list[str]]:
    rows = [
        ["a", "b", "cosine", "a on b", "along", "b on a", "along", "inputs", "outputs", "signs"]
    ]
    for pair in records:
        rows.append(
            [
                pair["a"],
                pair["b"],
                _number(pair["cosine"], 3),
                _number(pair["a_on_b"], 2),
                _number(pair["a_along_b"], 2),
                _number(pair["b_on_a"], 2),
                _number(pair["b_along_a"], 2),
                *(
                    "–"
                    if pair[f"overlap_{side}"] is None
                    else f"{pair[f'overlap_{side}']:.2f} ({pair[f'chance_{side}']:.3f})"
                    for side in ("in", "out")
                ),
                _percent(pair["sign_conflict"]),
            ]
        )
    return rows


def _kept(records: Sequence[Record]) -> list[list[str]]:
    keys = ("coefficient", "own", "others", "error")
    rows = [["merge", "model", *keys]]
    for record in records:
        rows.append(
            [record["merge"], record["model"], *(_number(record[key], 2) for key in keys)]
        )
    return rows


def _left(records: Sequence[Any], most: int, what: str) -> str:
    return f"… and {len(records) - most} more {what}." if len(records) > most else ""


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"
