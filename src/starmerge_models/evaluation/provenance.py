"""Provenance of scores: hashes of models and rows, versions of the packages, the device."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from starmerge_models.checkpoints.source import LocalSource
from starmerge_models.evaluation.cache import blake3_of_model, versions
from starmerge_models.evaluation.model_groups import Group
from starmerge_models.evaluation.models.loading import device_kind, device_name, dtype_name
from starmerge_models.evaluation.prepared_tasks import PreparedTask
from starmerge_models.evaluation.settings import Settings


@dataclass(frozen=True)
class ModelRecord:
    """Provenance of a model."""

    path: str | None
    """Hub id, or the folder as the caller gave it; None: an update of the base in memory."""
    revision: str | None
    """Commit of a Hub repository, if known."""
    blake3: str
    """Hash of all files that affect its answers (for an adapter, the adapter's own files), or of
    the update."""
    dtype: str
    """Dtype of the weights during the evaluation."""


@dataclass(frozen=True)
class TaskRecord:
    """Provenance of a task's rows."""

    source: str
    """The dataset, file or generator."""
    blake3: str
    """Hash of the rows and of everything that determines prompts and parsing."""
    rows: int
    """Rows that were scored."""
    held_out: int | None
    """Rows of a file held out for scoring by hash; None where rows are split in another way."""
    training: int | None
    """Rows of the file that count as training rows."""
    match: str | None
    """The matcher; None for images and tasks of lm-evaluation-harness."""
    metric: str
    plugins: Mapping[str, Mapping[str, str]]
    """Origin of matcher and metric by name, where they are plug-ins."""


@dataclass(frozen=True)
class Provenance:
    """Everything needed to repeat an evaluation, or to see how two evaluations differ."""

    date: str
    """Start of the evaluation: UTC, ISO 8601."""
    models: Mapping[str, ModelRecord]
    """By name, the base first."""
    tasks: Mapping[str, TaskRecord]
    """By name."""
    rows: int | None
    """The requested limit on the rows of a task; None: the whole sample."""
    batch_size: int | None
    device: str
    """"cpu", or the name of the GPU."""
    backend: str
    versions: Mapping[str, str]
    """Versions of Python and of the packages that compute answers."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable data."""
        return asdict(self)


def now() -> str:
    """Return the date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def model_record(
    name: str, source: LocalSource | None, group: Group, settings: Settings
) -> ModelRecord:
    """Hash a model's files and return its record, before the model runs.

    Args:
        name: The model's name.
        source: The model's location; None: an update of the base in memory.
        group: The model's group.
        settings: Device and dtype.
    """
    device = device_kind(settings.device)
    dtype = dtype_name(group.folders(name)[0], settings.dtype, device)
    if source is None:
        update = group.update(name)
        assert update is not None
        return ModelRecord(None, None, update, dtype)
    path = source.name or source.reference
    return ModelRecord(path, source.revision, blake3_of_model(source.path), dtype)


def make_provenance(
    date: str,
    models: Mapping[str, ModelRecord],
    prepared: Mapping[str, PreparedTask],
    settings: Settings,
) -> Provenance:
    """Build the provenance of an evaluation."""
    return Provenance(
        date=date,
        models=dict(models),
        tasks={name: TaskRecord(**task.record()) for name, task in prepared.items()},
        rows=settings.rows,
        batch_size=settings.batch_size,
        device=device_name(settings.device),
        backend=settings.backend,
        versions={"python": platform.python_version(), **versions()},
    )
