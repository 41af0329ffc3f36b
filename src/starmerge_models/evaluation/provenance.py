"""Where scores come from: the models and rows by their content, and what computed the answers."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from starmerge_models.checkpoints.source import LocalSource
from starmerge_models.evaluation.cache import blake3_of_model, versions
from starmerge_models.evaluation.models.loading import device_kind, device_name, dtype_name
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.sheets import Sheet
from starmerge_models.evaluation.subjects import Group


@dataclass(frozen=True)
class ModelRecord:
    """Which model was asked."""

    path: str | None
    """Hub id, or the folder as it was given; None: an update of the base in memory."""
    revision: str | None
    """Commit of a Hub repository, where that is known."""
    blake3: str
    """Of the content of all files that have a part in its answers (for an adapter, its own files),
    or of the update."""
    dtype: str
    """Of the weights that computed the answers."""


@dataclass(frozen=True)
class TaskRecord:
    """Which rows were asked."""

    source: str
    """Where the rows come from: a dataset, a file, a generator."""
    blake3: str
    """Of the rows and of all that decides how they are asked and read."""
    rows: int
    """Rows that were scored."""
    held_out: int | None
    """Rows of a file that a hash holds out for scoring; None where rows are split otherwise."""
    training: int | None
    """Rows of that file that count as training rows."""
    match: str | None
    """The matcher; None for images and tasks of a harness."""
    metric: str
    plugins: Mapping[str, Mapping[str, str]]
    """Where matcher and metric come from, by name; empty where they are starmerge's."""


@dataclass(frozen=True)
class Provenance:
    """All that is needed to repeat an evaluation, or to tell that another was of something else."""

    date: str
    """When the evaluation began: UTC, ISO 8601."""
    models: Mapping[str, ModelRecord]
    """By name, the base first."""
    tasks: Mapping[str, TaskRecord]
    """By name."""
    rows: int | None
    """Rows of a task at most, as asked for; None: all of its sample."""
    batch_size: int | None
    device: str
    """"cpu", or the name of the GPU."""
    backend: str
    versions: Mapping[str, str]
    """Of Python and of the packages that compute answers."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


def now() -> str:
    """Return the date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def record_of(
    name: str, source: LocalSource | None, group: Group, settings: Settings
) -> ModelRecord:
    """Return the record of a model that is about to be asked; its files are hashed.

    Args:
        name: Its name.
        source: Where it lies; None: an update of the base in memory.
        group: The group that it is asked in.
        settings: How it is asked.
    """
    device = device_kind(settings.device)
    dtype = dtype_name(group.folders(name)[0], settings.dtype, device)
    if source is None:
        update = group.update(name)
        assert update is not None
        return ModelRecord(None, None, update, dtype)
    path = source.name or source.reference
    return ModelRecord(path, source.revision, blake3_of_model(source.path), dtype)


def gathered(
    date: str,
    models: Mapping[str, ModelRecord],
    sheets: Mapping[str, Sheet],
    settings: Settings,
) -> Provenance:
    """Put the provenance of an evaluation together."""
    return Provenance(
        date=date,
        models=dict(models),
        tasks={name: TaskRecord(**sheet.record()) for name, sheet in sheets.items()},
        rows=settings.rows,
        batch_size=settings.batch_size,
        device=device_name(settings.device),
        backend=settings.backend,
        versions={"python": platform.python_version(), **versions()},
    )
