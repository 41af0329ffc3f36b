"""Results folders: scores, every prediction and the table; written atomically, read by pandas.

- ``scores.json``: all scores, averages and differences (null where undefined), and their
  provenance: hashes of models and rows, device, versions, date
- ``scores.csv``: the scores, one a line
- ``predictions.parquet`` or ``predictions.jsonl``: every model's answer to every row
- ``table.md``: the scores as a Markdown table

The columns of the predictions are ``model``, ``task``, ``id``, ``response``, ``value`` (the answer
parsed from the response, as text; null if unreadable), ``number`` (the same as a number, where it
is one), ``gold``, ``credit`` and ``shortened``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import StarmergeError, UsageError, explain
from starmerge_models.evaluation.evaluation import SCHEMA, Evaluation, shortened
from starmerge_models.parsing import parse_json
from starmerge_models.reading import read_json
from starmerge_models.storage.publishing import Replaceable, check_output, output_folder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


_SCORES = "scores.json"
_CSV = "scores.csv"
_PARQUET = "predictions.parquet"
_JSONL = "predictions.jsonl"
_TABLE = "table.md"
_MEMBERS = (_SCORES, _CSV, _PARQUET, _JSONL, _TABLE, "chart.*")
_RESULTS = Replaceable("results folder", _SCORES, _MEMBERS)


@dataclass(frozen=True, repr=False)
class Results:
    """The content of a results folder: ``scores, predictions = load_results(folder)``.

    A notebook shows the scores as a table.
    """

    scores: pd.DataFrame
    """A row for each model and task."""
    predictions: pd.DataFrame
    """A row for each model, task and row of the task."""
    provenance: dict[str, Any] | None
    """Provenance of models and rows, as JSON data of
    :class:`starmerge_models.evaluation.provenance.Provenance`."""

    def __iter__(self) -> Iterator[pd.DataFrame]:
        """Yield scores and predictions."""
        yield self.scores
        yield self.predictions

    @property
    def table(self) -> pd.DataFrame:
        """The scores with a row for each task and a column for each model, in the file's order."""
        order = {name: list(dict.fromkeys(self.scores[name])) for name in ("task", "model")}
        wide = self.scores.pivot(index="task", columns="model", values="score")
        return wide.reindex(index=order["task"], columns=order["model"])

    def __repr__(self) -> str:
        """Return a few lines: the number of scores, the date, the tasks and the models."""
        made = "" if self.provenance is None else f", {self.provenance['date']}"
        return "\n".join(
            [
                f"Results: {len(self.scores)} scores, {len(self.predictions)} predictions{made}",
                f"  tasks: {shortened(list(self.scores['task'].unique()))}",
                f"  models: {shortened(list(self.scores['model'].unique()))}",
            ]
        )

    def _repr_html_(self) -> str:
        """Return the table of scores for a notebook."""
        drawn: str = self.table.to_html(float_format=lambda score: f"{score:.2f}", na_rep="")
        return drawn


def check_results(folder: Path, *, overwrite: bool) -> None:
    """Make sure that results may be written to ``folder``; callers check before they run models.

    Raises:
        UsageError: The path exists and may not be replaced. Only a results folder without other
            files is ever replaced.
    """
    check_output(folder, overwrite=overwrite, kind=_RESULTS)


def write_results(
    folder: Path,
    evaluation: Evaluation,
    table: str,
    *,
    predictions: Literal["parquet", "jsonl"] = "parquet",
    overwrite: bool = False,
) -> None:
    """Write an evaluation into a folder, atomically.

    Args:
        folder: The output folder.
        evaluation: The scores and predictions.
        table: The scores as a Markdown table.
        predictions: Format of the predictions.
        overwrite: Whether to replace existing results.

    Raises:
        UsageError: The path exists and may not be replaced.
        StarmergeError: The disk is full, or fails otherwise.
    """
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    check_results(folder, overwrite=overwrite)
    rows = list(_predictions(evaluation))
    with output_folder(folder, overwrite=overwrite, kind=_RESULTS) as made:
        made.put(_SCORES, json_bytes(without_nan(evaluation.to_json())))
        partial = made.path
        evaluation.to_frame().to_csv(partial / _CSV, index=False)
        if predictions == "parquet":
            pq.write_table(pa.Table.from_pylist(rows, _schema()), partial / _PARQUET)
        else:
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            text = "".join(f"{line}\n" for line in lines)
            (partial / _JSONL).write_text(text, encoding="utf-8", newline="\n")
        (partial / _TABLE).write_text(f"{table.rstrip()}\n", encoding="utf-8")


class _Score(BaseModel):
    """The fields that identify a score in a file."""

    model_config = ConfigDict(strict=True)
    task: str
    model: str


class _Provenance(BaseModel):
    model_config = ConfigDict(strict=True)
    date: str


class _Content(BaseModel):
    """The parts of ``scores.json`` that the loader validates."""

    scores: list[_Score] = Field(min_length=1)
    provenance: _Provenance | None = None

    @field_validator("scores")
    @classmethod
    def _check_once(cls, scores: list[_Score]) -> list[_Score]:
        if len({(score.task, score.model) for score in scores}) < len(scores):
            raise ValueError("a model has two scores on one task")
        return scores


def load_results(folder: str | Path) -> Results:
    """Read the folder that ``starmerge evaluate -o`` or :func:`write_results` has written.

    Raises:
        UsageError: ``folder`` is no results folder.
        StarmergeError: A file of it is missing or broken, or another version wrote it.
    """
    import pandas as pd  # noqa: PLC0415

    if not isinstance(folder, str | os.PathLike):
        raise UsageError(
            f"A {type(folder).__name__} stands where a results folder is wanted. Give its path."
        )
    folder = Path(folder)
    content = read_scores(folder)
    scores = [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in content["scores"]
    ]
    predictions = _read_predictions(folder).to_pandas()
    return Results(pd.DataFrame(scores), predictions, content.get("provenance"))


def read_scores(folder: Path) -> dict[str, Any]:
    """Read ``scores.json`` of a results folder unchanged: an undefined value is None.

    Raises:
        UsageError: ``folder`` is no results folder.
        StarmergeError: The file is broken, or another version wrote it.
    """
    if not (folder / _SCORES).is_file():
        raise UsageError(f"{folder} holds no {_SCORES}, so it is not a results folder.")
    content = read_json(folder / _SCORES)
    version = content.get("schema_version")
    if version != SCHEMA:
        of = "no schema version: an older starmerge wrote it"
        if version is not None:
            of = f"the schema version {version!r}: another starmerge wrote it"
        raise StarmergeError(
            f"{folder / _SCORES} has {of}, and this one reads version {SCHEMA}. Evaluate again, or "
            "load it with the starmerge that wrote it."
        )
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        raise StarmergeError(
            f"{folder / _SCORES} holds no list of scores: {explain(error)}. Was it changed?"
        ) from error
    return content


def without_nan(content: Any) -> Any:
    """Return content for JSON with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _predictions(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for model, scores in evaluation.scores.items():
        for task, score in scores.items():
            for prediction in score.predictions:
                value = prediction.value
                yield {
                    "model": model,
                    "task": task,
                    "id": prediction.id,
                    "response": prediction.response,
                    "value": None if value is None else str(value),
                    "number": without_nan(value) if isinstance(value, int | float) else None,
                    "gold": prediction.gold,
                    "credit": without_nan(prediction.credit),
                    "shortened": prediction.shortened,
                }


def _schema() -> pa.Schema:
    import pyarrow as pa  # noqa: PLC0415

    texts = ("model", "task", "id", "response", "value")
    return pa.schema(
        [
            *((name, pa.string()) for name in texts),
            ("number", pa.float64()),
            ("gold", pa.string()),
            ("credit", pa.float64()),
            ("shortened", pa.bool_()),
        ]
    )


def _read_predictions(folder: Path) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    file = folder / (_PARQUET if (folder / _PARQUET).is_file() else _JSONL)
    try:
        if file.name == _PARQUET:
            return pq.ParquetFile(file).read()
        with file.open(encoding="utf-8") as lines:
            return pa.Table.from_pylist([parse_json(line) for line in lines], _schema())
    except FileNotFoundError as error:
        raise StarmergeError(f"{folder} holds neither {_PARQUET} nor {_JSONL}.") from error
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise StarmergeError(f"{file} cannot be read: {error}") from error
