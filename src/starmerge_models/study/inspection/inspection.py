"""What an inspection found: tables, findings, JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from starmerge_models.errors import UsageError
from starmerge_models.study.inspection import text
from starmerge_models.study.inspection.findings import Finding, findings_of
from starmerge_models.study.inspection.look import TensorLook
from starmerge_models.study.inspection.places import modules
from starmerge_models.study.inspection.totals import (
    Record,
    Subject,
    Sums,
    conflict_records,
    grouped_conflict,
    kept_records,
    layer_records,
    model_records,
    pair_records,
    tensor_records,
)

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
"""Of the JSON: raised when a reader of an earlier one would misread it."""

Table: TypeAlias = Literal[
    "models", "conflicts", "layers", "tensors", "pairs", "spectra", "kept", "kept_tensors"
]


@dataclass(frozen=True, repr=False)
class Inspection:
    """The task vectors of some models, and what they do to each other; made by :func:`inspect`.

    Each table is a list of records, one a row, as :meth:`to_frame` gives it to pandas. Something
    that is not defined, as the overlap of vectors, is None. docs/inspect.md has the columns.
    """

    base: str
    """The base's name."""
    dtype: str
    """The dtype of the base's weights: of most bytes of them."""
    eta: float
    """STAR's η, in percent."""
    models: list[Record]
    """One for each model."""
    conflicts: list[Record]
    """One for each pair of models, over all tensors."""
    layers: list[Record]
    """One for each layer and module."""
    tensors: list[Record]
    """One for each tensor and model."""
    kept: list[Record]
    """One for each merge and model."""
    kept_tensors: list[Record]
    """One for each merge, tensor and model."""
    findings: tuple[Finding, ...]
    sampled: int
    """Tensors of which some rows alone were looked at for signs and rounding."""
    notes: tuple[str, ...]
    """Sentences on base and models that a reader should know."""
    _looks: tuple[TensorLook, ...]
    """What was measured, tensor by tensor."""

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return [record["model"] for record in self.models]

    @property
    def pairs(self) -> list[Record]:
        """A record for each tensor and pair of models that change it.

        Of 50 models, 300 tensors make 370,000 records; so they are made when they are asked for.
        """
        subjects = [Subject(record["model"], record["kind"]) for record in self.models]
        return pair_records(self._looks, subjects, modules(look.name for look in self._looks))

    @property
    def spectra(self) -> list[Record]:
        """A record for each singular value: ``tensor``, ``model``, ``index`` from 1, ``value``.

        ``cumulative`` is the share of the nuclear norm that it and those before it hold.
        """
        records = []
        for own in self.tensors:
            total = 0.0
            for index, value in enumerate(own["spectrum"], 1):
                total += value
                where = {key: own[key] for key in ("tensor", "layer", "module", "model")}
                share = total / own["nuclear"] if own["nuclear"] else None
                records.append(where | {"index": index, "value": value, "cumulative": share})
        return records

    def to_frame(self, table: Table = "tensors") -> pd.DataFrame:
        """Return one of the tables for pandas.

        Args:
            table: "models", "conflicts" (pairs of models), "layers", "tensors", "pairs" (of models
                in a tensor), "spectra", "kept" (what merges keep) or "kept_tensors".

        Raises:
            UsageError: There is no such table.
        """
        import pandas as pd  # noqa: PLC0415  (slow to import)

        if table not in get_args(Table):
            raise UsageError(f"There is no table {table!r}: {', '.join(get_args(Table))}.")
        records: list[Record] = getattr(self, table)
        frame = pd.DataFrame(records)
        return frame.drop(columns="spectrum") if "spectrum" in frame else frame

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        own = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("findings", "notes", "_looks")
        }
        return {
            "schema": SCHEMA,
            **own,
            "pairs": self.pairs,
            "findings": [finding.record() for finding in self.findings],
            "notes": list(self.notes),
        }

    @property
    def report(self) -> str:
        """The tables of models, pairs and merges, and the findings, in Markdown: one screen."""
        return text.markdown(self._tables, self.findings, self.all_notes)

    def __repr__(self) -> str:
        """Return a line on what was inspected, and the findings."""
        count = len({record["tensor"] for record in self.tensors})
        first = f"<Inspection of {text.shortened(self.names)}: {count} tensors, η = {self.eta:g}>"
        return "\n".join([first, *(f"- {finding.text}" for finding in self.findings[:10])])

    def _repr_html_(self) -> str:
        """Return the report for notebooks."""
        return text.html(self._tables, self.findings, self.all_notes)

    @property
    def _tables(self) -> list[text.TextTable]:
        return text.tables(self.models, self.conflicts, self.kept)

    @property
    def legends(self) -> list[str]:
        """What the columns of the tables in the report mean, a paragraph for each table."""
        return [table.legend for table in self._tables]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, and whether tensors were looked at in part."""
        if not self.sampled:
            return self.notes
        noun = "1 large tensor" if self.sampled == 1 else f"{self.sampled} large tensors"
        sampled = f"of {noun} some rows, evenly spread, were looked at for signs and rounding."
        return (sampled, *self.notes)


def make_inspection(
    looks: Sequence[TensorLook],
    subjects: Sequence[Subject],
    *,
    base: str,
    dtype: str,
    eta: float,
    notes: Sequence[str] = (),
) -> Inspection:
    """Put the measures of all tensors together.

    Args:
        looks: What was measured, tensor by tensor.
        subjects: The models.
        base: The base's name.
        dtype: The dtype of its weights.
        eta: STAR's η.
        notes: Sentences on base and models.
    """
    labels = modules([look.name for look in looks])
    sums = Sums(looks, len(subjects))
    models = model_records(looks, subjects, sums)
    conflicts = conflict_records(subjects, sums)
    layers = layer_records(looks, labels, sums)
    tensors = tensor_records(looks, subjects, labels)
    kept, kept_tensors = kept_records(looks, subjects, labels)
    by_layer, by_module = defaultdict(list), defaultdict(list)
    for look in looks:
        by_module[labels[look.name]].append(look)
        if look.layer is not None:
            by_layer[f"layer {look.layer}"].append(look)
    findings = findings_of(
        models,
        conflicts,
        tensors,
        kept,
        conflict=grouped_conflict(looks),
        by_layer={name: grouped_conflict(own) or 0.0 for name, own in by_layer.items()},
        by_module={name: grouped_conflict(own) or 0.0 for name, own in by_module.items()},
        eta=eta,
        dtype=dtype,
    )
    return Inspection(
        base=base,
        dtype=dtype,
        eta=eta,
        models=models,
        conflicts=conflicts,
        layers=layers,
        tensors=tensors,
        kept=kept,
        kept_tensors=kept_tensors,
        findings=tuple(findings),
        sampled=sum(look.entries.step > 1 for look in looks),
        notes=tuple(notes),
        _looks=tuple(looks),
    )
