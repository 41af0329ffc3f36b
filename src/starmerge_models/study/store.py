"""The store of a study: a folder that holds what each run came to, and can be added to.

- ``study.json``: the study, and all that decides its scores: the hashes of base, models, tasks and
  code, the versions of packages, the device. A store takes runs under one such head only.
- ``runs.jsonl``: a line for each run and task; of a run that failed, one line with the error. The
  lines of a run are written at once, after all its tasks have been asked.

A line has ``kind``, ``models``, ``method``, ``parameters``, ``combination`` and ``n``, which say
how to repeat the run; ``task``, ``metric``, ``score`` with ``low`` and ``high``, ``rows``,
``unparsed``, ``shortened``; ``seen``, what the metric sees of each row (for accuracy 1 where the
answer is right, else 0), in the order of the rows; ``merging`` and ``asking``, in seconds; and
``date``.
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
"""Of the store: raised when a reader of an earlier one would misread it."""

HEAD, RUNS = "study.json", "runs.jsonl"

_COMPARED = ("base", "models", "tasks", "asked", "seed", "code", "plugins", "versions", "device")
"""Keys of the head that must be the same for runs to stand in one store."""


@dataclass(frozen=True)
class Record:
    """What a store has of one run."""

    run: Run
    lines: tuple[Mapping[str, Any], ...]
    """One for each task; of a run that failed, one."""

    @property
    def error(self) -> str | None:
        """Why the run failed; None if it did not."""
        error: str | None = self.lines[0].get("error")
        return error

    @property
    def by_task(self) -> dict[str, Mapping[str, Any]]:
        """The lines by task; none of a run that failed."""
        return {} if self.error is not None else {line["task"]: line for line in self.lines}


class Store:
    """A store that is open; see :func:`open_store` and :func:`load_store`.

    Args:
        folder: The folder.
        head: The content of ``study.json``.
        records: What it has, by the key of the run.
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
        """Every run, in the order in which they were made."""
        return tuple(self._records.values())

    @property
    def failures(self) -> tuple[Record, ...]:
        """The runs that failed."""
        return tuple(record for record in self._records.values() if record.error is not None)

    def get(self, run: Run) -> Record | None:
        """Return what the store has of a run; None if it has nothing."""
        return self._records.get(run.key)

    def add(self, run: Run, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of a run, so that they are there whatever happens next.

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
                f"{file} cannot be written: {error}. All runs before this one are there: run the "
                "same command again to go on."
            ) from error
        self._records[run.key] = Record(run, tuple(map(parse_json, texts)))

    def to_frame(self) -> pd.DataFrame:
        """Return the lines as a pandas DataFrame, without those of runs that failed."""
        import pandas as pd  # noqa: PLC0415

        lines = [
            {"label": record.run.label, **line}
            for record in self._records.values()
            for line in record.by_task.values()
        ]
        return pd.DataFrame(lines)


def line_of(task: str, score: Score) -> dict[str, Any]:
    """Return what a store keeps of the score of a run on a task."""
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
    """Return a number without a needless ".0"."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@contextmanager
def open_store(folder: Path, head: Mapping[str, Any], *, retry: bool = False) -> Iterator[Store]:
    """Open a store to add to, or begin one; while it is open no other process can.

    Lines of a run that was cut off are removed.

    Args:
        folder: The folder, which may not be there yet.
        head: All that decides the scores.
        retry: Forget the runs that failed, so that they are made again.

    Raises:
        UsageError: The folder holds something else, or runs under another head; the message says
            what has changed. Or another process adds to it.
        StarmergeError: The store is damaged, or the disk fails.
    """
    begun = _begin(folder, head)
    descriptor = lock(folder.resolve())
    if descriptor is None:
        raise UsageError(f"{folder} is in use by another run. Wait for it, or give another folder.")
    try:
        known = _read_head(folder)
        if not begun:
            check_same(folder, known, head)
        records, end = _read_runs(folder)
        if end is not None:
            with (folder / RUNS).open("r+b") as stream:
                stream.truncate(end)
        store = Store(folder, known, records)
        if retry and store.failures:
            _write_runs(folder, [r for r in store.records if r.error is None])
            store = Store(folder, known, {r.run.key: r for r in store.records if r.error is None})
        # The study may have grown: other methods, more numbers of models.
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
    """Read a store, to look at it.

    Raises:
        UsageError: The folder is no store.
        StarmergeError: It is damaged, or of a later version.
    """
    records, _ = _read_runs(folder)
    return Store(folder, _read_head(folder), records)


def is_store(folder: Path) -> bool:
    """Tell whether a folder is a store."""
    return (folder / HEAD).is_file()


def _begin(folder: Path, head: Mapping[str, Any]) -> bool:
    """Make a store's folder and its head unless they are there; tell whether they were made."""
    if is_store(folder):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and is no store of a study: it has no {HEAD}. Give another folder."
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
        raise UsageError(f"{folder} is no store of a study: it has no {HEAD}.")
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


def check_same(folder: Path, known: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Make sure that runs under two heads may stand in one store.

    Raises:
        UsageError: They may not; names the first differences.
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
            f"{folder} holds runs that were made with others than now: {', '.join(changed)}. "
            "Scores of two kinds must not be mixed. Give another folder with -o; or look at these "
            f"runs alone: starmerge study {folder}"
        )


def _read_runs(folder: Path) -> tuple[dict[str, Record], int | None]:
    """Return the runs of a store, and where a run begins that was cut off, if the last one was.

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
    """Make sure that a line is the next one of its run.

    Args:
        line: The line.
        run: Its run.
        pending: The lines before it, of a run that is not complete.

    Raises:
        ValueError: It is not; the message says why.
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
    """Return what says how to repeat a run."""
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
