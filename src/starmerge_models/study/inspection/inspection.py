"""The result of an inspection: tables, findings, JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from starmerge_models.errors import UsageError
from starmerge_models.study.inspection import text
from starmerge_models.study.inspection.findings import Finding, findings_of
from starmerge_models.study.inspection.module_names import module_names
from starmerge_models.study.inspection.tensor_measures import TensorMeasures
from starmerge_models.study.inspection.totals import (
    ModelInfo,
    Record,
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
"""Version of the JSON; incremented when older readers would misread it."""

Table: TypeAlias = Literal[
    "models", "conflicts", "layers", "tensors", "pairs", "spectra", "kept", "kept_tensors"
]


@dataclass(frozen=True, repr=False)
class Inspection:
    """Measures of the task vectors of some models and of their conflicts; made by :func:`inspect`.

    Each table is a list of records, one per row; :meth:`to_frame` converts it to a DataFrame.
    Undefined values, such as the overlap of vectors, are None. docs/inspect.md lists the columns.
    """

    base: str
    """The base's name."""
    dtype: str
    """The dtype of most bytes of the base's weights."""
    eta: float
    """STAR's η, in percent."""
    models: list[Record]
    """A record for each model."""
    conflicts: list[Record]
    """A record for each pair of models, over all tensors."""
    layers: list[Record]
    """A record for each layer and module."""
    tensors: list[Record]
    """A record for each tensor and model."""
    kept: list[Record]
    """A record for each merge and model."""
    kept_tensors: list[Record]
    """A record for each merge, tensor and model."""
    findings: tuple[Finding, ...]
    sampled: int
    """Number of tensors whose signs and rounding were measured on a sample of the rows."""
    notes: tuple[str, ...]
    """Notes on base and models."""
    _measures: tuple[TensorMeasures, ...]
    """The measures of each tensor."""

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return [record["model"] for record in self.models]

    @property
    def pairs(self) -> list[Record]:
        """A record for each tensor and pair of models that change it.

        The records are computed on access: 50 models and 300 tensors have 370,000.
        """
        infos = [ModelInfo(record["model"], record["kind"]) for record in self.models]
        return pair_records(
            self._measures, infos, module_names(tensor.name for tensor in self._measures)
        )

    @property
    def spectra(self) -> list[Record]:
        """A record for each singular value: ``tensor``, ``model``, ``index`` from 1, ``value``.

        ``cumulative`` is the share of the nuclear norm up to and including the value.
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
        """Return a table as a DataFrame.

        Args:
            table: "models", "conflicts" (pairs of models), "layers", "tensors", "pairs" (of models
                in a tensor), "spectra", "kept" (merges and tasks) or "kept_tensors".

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
        """Return everything as JSON-serialisable data."""
        own = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("findings", "notes", "_measures")
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
        """The tables of models, pairs and merges, and the findings, in Markdown."""
        return text.markdown(self._tables, self.findings, self.all_notes)

    def __repr__(self) -> str:
        """Return a line on the models and tensors, and the findings."""
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
        """The meaning of the columns of the report's tables, a paragraph for each table."""
        return [table.legend for table in self._tables]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, including one on sampled tensors."""
        if not self.sampled:
            return self.notes
        noun = "1 large tensor" if self.sampled == 1 else f"{self.sampled} large tensors"
        sampled = f"signs and rounding of {noun} were measured on evenly spaced rows."
        return (sampled, *self.notes)


def make_inspection(
    measures: Sequence[TensorMeasures],
    infos: Sequence[ModelInfo],
    *,
    base: str,
    dtype: str,
    eta: float,
    notes: Sequence[str] = (),
) -> Inspection:
    """Aggregate the measures of all tensors.

    Args:
        measures: The measures of each tensor.
        infos: The models.
        base: The base's name.
        dtype: The dtype of its weights.
        eta: STAR's η.
        notes: Notes on base and models.
    """
    labels = module_names([tensor.name for tensor in measures])
    sums = Sums(measures, len(infos))
    models = model_records(measures, infos, sums)
    conflicts = conflict_records(infos, sums)
    layers = layer_records(measures, labels, sums)
    tensors = tensor_records(measures, infos, labels)
    kept, kept_tensors = kept_records(measures, infos, labels)
    by_layer, by_module = defaultdict(list), defaultdict(list)
    for tensor in measures:
        by_module[labels[tensor.name]].append(tensor)
        if tensor.layer is not None:
            by_layer[f"layer {tensor.layer}"].append(tensor)
    findings = findings_of(
        models,
        conflicts,
        tensors,
        kept,
        conflict=grouped_conflict(measures),
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
        sampled=sum(tensor.entries.step > 1 for tensor in measures),
        notes=tuple(notes),
        _measures=tuple(measures),
    )
