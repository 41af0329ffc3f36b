"""The store of a study: an append-only folder with the results of its runs.

- ``study.json``: the header: the study and everything that determines its scores: the hashes of
  base, models, tasks and code, the versions of packages, the device. All runs of a store have the
  same header.
- ``runs.jsonl``: a line for each run and task, or one line with the error for a failed run. The
  lines of a run are written together, after all its tasks are evaluated.

A line has ``kind``, ``models``, ``method``, ``parameters``, ``combination`` and ``n``, which define
the run; ``task``, ``metric``, ``score`` with ``low`` and ``high``, ``rows``, ``unparsed``,
``shortened``; ``seen``, the metric's values of each row (for accuracy 1 if the answer is right,
else 0), in the order of the rows; ``merging`` and ``asking``, the seconds for merging and
evaluation; and ``date``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import Interrupted, StarmergeError, UsageError
from starmerge_models.evaluation.results import without_nan
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.parsing import parse_json
from starmerge_models.reading import read_json
from starmerge_models.storage.leftovers import lock
from starmerge_models.storage.publishing import output_file
from starmerge_models.study.runs import Run

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
"""Version of the store's format; incremented when older readers would misread it."""

HEAD, RUNS = "study.json", "runs.jsonl"

_COMPARED = ("base", "models", "tasks", "asked", "seed", "code", "plugins", "versions", "device")
"""Keys of the header that must be equal for all runs of a store."""


@dataclass(frozen=True)
class Record:
    """The stored result of one run."""

    run: Run
    lines: tuple[Mapping[str, Any], ...]
    """One line for each task; a single line for a failed run."""

    @property
    def error(self) -> str | None:
        """The error of a failed run; None if it succeeded."""
        error: str | None = self.lines[0].get("error")
        return error

    @property
    def by_task(self) -> dict[str, Mapping[str, Any]]:
        """The lines by task; empty for a failed run."""
        return {} if self.error is not None else {line["task"]: line for line in self.lines}


class Store:
    """An open store; see :func:`open_store` and :func:`load_store`.

    Args:
        folder: The folder.
        head: The content of ``study.json``.
        records: The stored results, by the key of the run.
    """

    def __init__(
        self, folder: Path, head: Mapping[str, Any], records: Mapping[str, Record]
    ) -> None:
        self.folder, self.head = folder, head
        self._records = dict(records)

    def __repr__(self) -> str:
        failed = len(self.failures)
        return (
            f"<Store of {self.head['study']['name']}: {len(self._records)} runs"
            f"{f', {failed} of them failed' if failed else ''}>"
        )

    def __contains__(self, run: Run) -> bool:
        return run.key in self._records

    @property
    def records(self) -> tuple[Record, ...]:
        """Every run, in the order of execution."""
        return tuple(self._records.values())

    @property
    def failures(self) -> tuple[Record, ...]:
        """The runs that failed."""
        return tuple(record for record in self._records.values() if record.error is not None)

    def get(self, run: Run) -> Record | None:
        """Return the stored result of a run; None if there is none."""
        return self._records.get(run.key)

    def add(self, run: Run, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines of a run and fsync the file.

        Raises:
            StarmergeError: The disk is full, or fails otherwise.
        """
        whole = [_identity(run) | without_nan(line) for line in lines]
        texts = [json.dumps(line, ensure_ascii=False, default=str) for line in whole]
        file = self.folder / RUNS
        try:
            with file.open("ab") as stream:
                stream.write("".join(f"{text}\n" for text in texts).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StarmergeError(
                f"{file} cannot be written: {error}. All earlier runs are stored: run the same "
                "command again to continue."
            ) from error
        self._records[run.key] = Record(run, tuple(map(parse_json, texts)))

    def to_frame(self) -> pd.DataFrame:
        """Return the lines of successful runs as a pandas DataFrame."""
        import pandas as pd  # noqa: PLC0415

        lines = [
            {"label": record.run.label, **line}
            for record in self._records.values()
            for line in record.by_task.values()
        ]
        return pd.DataFrame(lines)


def score_line(task: str, score: Score) -> dict[str, Any]:
    """Return the part of a store's line for the score of a run on a task."""
    seen = score.computed_by.rows(score)
    is_single = all(len(row) == 1 for row in seen)
    return {
        "task": task,
        "metric": score.metric,
        "score": score.value,
        "low": score.low,
        "high": score.high,
        "rows": score.n,
        "unparsed": score.unparsed,
        "shortened": score.shortened,
        "seen": [_short(row[0]) if is_single else list(map(_short, row)) for row in seen],
    }


def _short(value: Any) -> Any:
    """Return a whole number as an int, for JSON without ".0"."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@contextmanager
def open_store(folder: Path, head: Mapping[str, Any], *, retry: bool = False) -> Iterator[Store]:
    """Open or create a store for appending, under an exclusive lock.

    The incomplete lines of an interrupted run are removed.

    Args:
        folder: The folder, which may not exist yet.
        head: The header: everything that determines the scores.
        retry: Delete failed runs, so that they are repeated.

    Raises:
        UsageError: The folder is not a store; its runs have another header (the message lists the
            changes); or another process has the lock.
        StarmergeError: The store is damaged, or the disk fails.
    """
    begun = _begin(folder, head)
    descriptor = lock(folder.resolve())
    if descriptor is None:
        raise UsageError(f"{folder} is in use by another run. Wait for it, or give another folder.")
    try:
        known = _read_head(folder)
        if not begun:
            check_compatible(folder, known, head)
        records, end = _read_runs(folder)
        if end is not None:
            with (folder / RUNS).open("r+b") as stream:
                stream.truncate(end)
        store = Store(folder, known, records)
        if retry and store.failures:
            _write_runs(folder, [r for r in store.records if r.error is None])
            store = Store(folder, known, {r.run.key: r for r in store.records if r.error is None})
        # The study may have more methods or numbers of models now.
        head = {**head, "begun": known["begun"]}
        if known != head:
            _write_head(folder, head)
            store = Store(folder, head, {record.run.key: record for record in store.records})
        yield store
    except Interrupted as interruption:
        interruption.kept.append(folder)
        raise
    finally:
        os.close(descriptor)


def load_store(folder: Path) -> Store:
    """Read a store without locking it.

    Raises:
        UsageError: The folder is not a store.
        StarmergeError: The store is damaged, or of a later version.
    """
    records, _ = _read_runs(folder)
    return Store(folder, _read_head(folder), records)


def is_store(folder: Path) -> bool:
    """Return whether a folder is a store."""
    return (folder / HEAD).is_file()


def _begin(folder: Path, head: Mapping[str, Any]) -> bool:
    """Create a store's folder and header unless they exist; return whether they were created."""
    if is_store(folder):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and is not the store of a study: it has no {HEAD}. Give another "
            "folder."
        )
    _write_head(folder, head)
    return True


def _write_head(folder: Path, head: Mapping[str, Any]) -> None:
    with output_file(folder / HEAD, overwrite=True) as partial:
        partial.write_bytes(json_bytes(dict(head)))


def _write_runs(folder: Path, records: Sequence[Record]) -> None:
    with output_file(folder / RUNS, overwrite=True) as partial:
        lines = [line for record in records for line in record.lines]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8", newline="\n")


def _read_head(folder: Path) -> dict[str, Any]:
    if not is_store(folder):
        raise UsageError(f"{folder} is not the store of a study: it has no {HEAD}.")
    head = read_json(folder / HEAD)
    if head.get("schema") != SCHEMA:
        raise StarmergeError(
            f"{folder / HEAD} has the schema {head.get('schema')!r}, and this version reads "
            f"{SCHEMA}. Read it with the version that wrote it "
            f"({head.get('versions', {}).get('starmerge', 'unknown')})."
        )
    for key in ("study", "base", "models", "tasks", "asked"):
        if not isinstance(head.get(key), dict):
            raise StarmergeError(f"{folder / HEAD} lacks the key {key!r}. Restore the file.")
    return head


def check_compatible(folder: Path, known: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Make sure that runs with two headers may be in the same store.

    Raises:
        UsageError: They may not; the message lists the first differences.
    """
    changed = []
    for key in _COMPARED:
        old, new = known.get(key), json.loads(json.dumps(head[key]))
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            changed.append(f"{key} ({', '.join(parts[:3])}{', …' if len(parts) > 3 else ''})")
        else:
            changed.append(key)
    if changed:
        raise UsageError(
            f"{folder} has runs from before a change of: {', '.join(changed)}. Their scores are "
            "not comparable with new ones. Give another folder with -o; or show the existing runs "
            f"alone: starmerge study {folder}"
        )


def _read_runs(folder: Path) -> tuple[dict[str, Record], int | None]:
    """Return the runs of a store, and the offset of an incomplete last run, None if complete.

    Raises:
        StarmergeError: A line before the last run cannot be read.
    """
    file = folder / RUNS
    if not file.is_file():
        return {}, None
    records: dict[str, Record] = {}
    pending: list[dict[str, Any]] = []
    begin = end = 0
    content = file.read_bytes()
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        end += len(raw)
        try:
            line = parse_json(raw)
            run = _run_of(line)
            _check_follows(line, run, pending)
        except (ValueError, KeyError, TypeError) as error:
            if end == len(content) and not raw.endswith(b"\n"):
                return records, begin
            raise StarmergeError(
                f"{file}, line {number} is no line of a store ({error}). Restore the file, or "
                "delete the line and the others of its run."
            ) from error
        if not raw.endswith(b"\n"):
            return records, begin
        pending.append(line)
        if "error" in line or len(pending) == len(run.tasks):
            records[run.key] = Record(run, tuple(pending))
            pending, begin = [], end
    return records, begin if pending else None


def _check_follows(line: Mapping[str, Any], run: Run, pending: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that a line is the next line of its run.

    Args:
        line: The line.
        run: Its run.
        pending: The preceding lines of an incomplete run.

    Raises:
        ValueError: It is not; the message has the reason.
    """
    if pending and _run_of(pending[0]).key != run.key:
        raise ValueError("the run before it lacks a line")
    if "error" in line:
        if pending:
            raise ValueError("its run has scores and an error")
        return
    if line["task"] != run.tasks[len(pending)]:
        raise ValueError(f"its task is {line['task']!r}, not {run.tasks[len(pending)]!r}")
    if not line["rows"] == len(line["seen"]) > 0:
        raise ValueError(f"it says {line['rows']} rows and has {len(line['seen'])}")


def _identity(run: Run) -> dict[str, Any]:
    """Return the fields of a line that define its run."""
    return {
        "kind": run.kind,
        "method": run.method,
        "parameters": dict(run.parameters),
        "n": len(run.models) if run.kind != "base" else 0,
        "combination": run.combination,
        "models": list(run.models),
        "tasks": list(run.tasks),
    }


def _run_of(line: Mapping[str, Any]) -> Run:
    if not isinstance(line["parameters"], dict):
        raise ValueError("its parameters are no JSON object")
    return Run(
        line["kind"],
        tuple(line["models"]),
        tuple(line["tasks"]),
        line["method"],
        line["parameters"],
        line["combination"],
    )
