"""Doing a study: each run that its store lacks is merged in memory, asked and written down."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from blake3 import blake3

from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.checkpoints.source import is_hub_id, resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import ScoreCache, blake3_of_model, versions
from starmerge_models.evaluation.models.loading import device_kind, dtype_name
from starmerge_models.evaluation.runner import answers, check
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.subjects import BASE, OnBase, groups
from starmerge_models.merging.executors.executor import Executor
from starmerge_models.merging.task_vectors import TaskVectors, load_task_vectors
from starmerge_models.progress import SILENT, Progress, progress_bar
from starmerge_models.study.runs import Run, runs_of
from starmerge_models.study.store import SCHEMA, Store, line_of, open_store
from starmerge_models.study.study_file import Study, pool_of

_ROOM = Path(__file__).parent.parent
_ASIDE = ("cli", "demo", "training", "calibration", "study")
"""Rooms of the package that no score depends on."""

_SAMPLE_ROWS = 8
"""Rows of each task that an estimate of the time asks."""


@dataclass(frozen=True)
class Estimate:
    """What a study has yet to do."""

    runs: int
    """All runs."""
    done: int
    """Those that the store has."""
    rows: int
    """That are yet to be asked, over all runs and tasks."""
    seconds: float | None
    """That this will take, as measured on a few rows; None where it was not measured."""

    def __str__(self) -> str:
        left = self.runs - self.done
        text = (
            f"{self.runs} runs, {self.done} of them done; {left} to do, which ask {self.rows} rows"
        )
        if self.seconds is None or not left:
            return text
        return f"{text}: about {duration(self.seconds)} on this machine"


def duration(seconds: float) -> str:
    """Write a time for people: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Laboratory:
    """A study with its models and rows at hand.

    Nothing is loaded before it is needed: a study that is done opens no model.

    Args:
        study: The study.
        settings: How models are asked.
        cache: Where answers are kept, too; None: nowhere.
        any_base: Accept models whose config names another base.

    Raises:
        UsageError: The study does not fit together, or a model or dataset cannot be had.
    """

    def __init__(
        self,
        study: Study,
        settings: Settings,
        *,
        cache: ScoreCache | None = None,
        any_base: bool = False,
    ) -> None:
        self.study, self.settings = study, settings
        self.pool = pool_of(study)
        self.runs = runs_of(study, self.pool)
        self.sheets = check(list(self.pool.tasks.values()), settings)
        self._cache, self._any_base = cache, any_base
        self._base = resolve_local(self.pool.base).path
        self._models = {name: resolve_local(path).path for name, path in self.pool.models.items()}
        (group,) = groups(
            self._base,
            {},
            kind=next(iter(self.sheets.values())).kind,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
        )
        assert isinstance(group, OnBase)  # of a base without whole models beside it
        self._group = group

    @cached_property
    def vectors(self) -> TaskVectors:
        """The task vectors of the pool, read when they are first needed."""
        return load_task_vectors(self._base, self._models, any_base=self._any_base)

    def head(self) -> dict[str, Any]:
        """Return all that decides the scores, for the head of a store."""
        device = device_kind(self.settings.device)
        return {
            "schema": SCHEMA,
            "study": self.study.model_dump(mode="json", exclude={"base", "models", "tasks"}),
            "base": {"name": _public(self.pool.base), "files": blake3_of_model(self._base)},
            "models": {
                name: {
                    "name": _public(self.pool.models[name]),
                    "task": self.pool.task_of[name],
                    "files": blake3_of_model(path),
                }
                for name, path in self._models.items()
            },
            "tasks": {
                name: {"rows": sheet.size, "asked": _hash(sheet.asked)}
                for name, sheet in self.sheets.items()
            },
            "asked": {
                "scorer": self.settings.scorer,
                "matching": self.settings.mode,
                "dtype": dtype_name(self._base, self.settings.dtype, device),
            },
            "seed": self.study.seed,
            "code": code_hash(),
            "plugins": {
                name: origin.record()
                for run in self.runs
                if run.kind == "merge"
                for name, origin in run.pipeline.plugins.items()
            },
            "versions": versions(),
            "device": device,
            "planned": len(self.runs),
            "python": platform.python_version(),
            "begun": _now(),
        }

    def estimate(self, store: Store | None) -> Estimate:
        """Tell how much there is to do, and how long it will take.

        What a row and a merge cost is taken from the runs that the store has, or else measured: the
        base is asked a few rows of each task, and each chain merges one set of models.

        Args:
            store: The store, if there is one.
        """
        left = [run for run in self.runs if store is None or run not in store]
        rows = sum(self._size(run) for run in left)
        if not left:
            return Estimate(len(self.runs), len(self.runs), 0, 0.0)
        done = [] if store is None else [r for r in store.records if r.error is None]
        merged = [record for record in done if record.run.kind == "merge"]
        if merged:
            lines = [record.lines for record in done]
            asked = sum(line["rows"] for own in lines for line in own)
            per_row = sum(own[0]["asking"] for own in lines) / asked
            per_merge: Mapping[str, float] = _mean_by(
                (record.run.method, record.lines[0]["merging"]) for record in merged
            )
        else:
            per_row, per_merge = self._measured(left)
        usual = max(per_merge.values(), default=0.0)
        merging = sum(per_merge.get(run.method, usual) for run in left if run.kind == "merge")
        seconds = rows * per_row + merging
        return Estimate(len(self.runs), len(self.runs) - len(left), rows, seconds)

    @contextmanager
    def opened(self, folder: Path, *, retry: bool = False) -> Iterator[Store]:
        """Open the study's store, or begin it; see :func:`starmerge_models.study.store.open_store`.

        Raises:
            UsageError: The folder lies in that of a model, whose content it would change; or as
                ``open_store`` says.
            StarmergeError: As ``open_store`` says.
        """
        for place in (self._base, *self._models.values()):
            if folder.resolve().is_relative_to(place.resolve()):
                raise UsageError(
                    f"{folder} lies in the model {place}, whose content the runs would change. "
                    "Give another folder."
                )
        with open_store(folder, self.head(), retry=retry) as store:
            yield store

    def run(
        self,
        store: Store,
        *,
        executor: AbstractContextManager[Executor] | None = None,
        progress: bool = False,
    ) -> None:
        """Do every run that the store lacks.

        A run that fails is written down with its error, and the others go on. A base that cannot
        be asked and a fine-tune that is broken end the study, as all runs rest on them.

        Args:
            store: Where to.
            executor: Who makes the runs, in other processes, each with a laboratory of its own;
                None: this process, one after the other. The store is written here in any case.
            progress: Whether to show a progress bar.

        Raises:
            UsageError: The base cannot be loaded or asked.
            StarmergeError: The base or a fine-tune is broken, or the store cannot be written.
        """
        left = [number for number, run in enumerate(self.runs) if run not in store]
        total = sum(self._size(self.runs[number]) for number in left)
        with progress_bar(f"study {self.study.name}", total, show=progress) as bar:
            if executor is None:
                self.get_ready(left)
                for number in left:
                    done = _Counted(bar)
                    store.add(self.runs[number], self.lines(number, done))
                    done(self._size(self.runs[number]) - done.count)
            elif left:
                job = _Runs(self.study, self.settings, self._cache, self._any_base, tuple(left))
                with executor as workers, closing(workers.run(job, left)) as made:
                    for number, lines in zip(left, made, strict=True):
                        store.add(self.runs[number], lines)
                        bar(self._size(self.runs[number]))

    def get_ready(self, numbers: Iterable[int]) -> None:
        """Read what some runs need of the fine-tunes, so that a broken one is said at once.

        Raises:
            StarmergeError: One is broken.
        """
        if any(self.runs[number].kind != "base" for number in numbers):
            _ = self.vectors

    def lines(self, number: int, progress: Progress = SILENT) -> list[dict[str, Any]]:
        """Make a run; return what the store keeps: a line for each task, or one with the error.

        Args:
            number: Of the run, in their order.
            progress: What is told of it.

        Raises:
            Exception: Of the base, without which there is no study.
        """
        run = self.runs[number]
        try:
            return self._lines(run, progress)
        except Exception as error:  # of methods and models of whatever kind
            if run.kind == "base":
                raise
            return [{"error": _said(error), "date": _now()}]

    def _lines(self, run: Run, progress: Progress) -> list[dict[str, Any]]:
        """Merge and ask the models of a run; return a line for each task."""
        begin = time.perf_counter()
        group, name = self._group, BASE
        if run.kind != "base":
            name = run.label
            progress.waits_for(f"merging {name}, n = {len(run.models)}")
            chain = run.pipeline if run.kind == "merge" else "average"
            update = self.vectors.merge(chain, models=run.models)
            group = group.with_updates({name: update})
        merged = time.perf_counter()
        sheets = [self.sheets[task] for task in run.tasks]
        found = answers(name, group, sheets, self.settings, self._cache, progress)
        asked = time.perf_counter()
        times = {"merging": merged - begin, "asking": asked - merged, "date": _now()}
        return [
            line_of(sheet.name, sheet.score(records)) | times
            for sheet, records in zip(sheets, found, strict=True)
        ]

    def _size(self, run: Run) -> int:
        """Return how many rows a run asks."""
        return sum(self.sheets[task].size for task in run.tasks)

    def _measured(self, runs: Sequence[Run]) -> tuple[float, dict[str, float]]:
        """Return the seconds that a row takes, and a merge by each chain of some runs."""
        parts = [sheet.part(0, min(_SAMPLE_ROWS, sheet.size)) for sheet in self.sheets.values()]
        for _ in range(2):  # the first time loads the model
            begin = time.perf_counter()
            answers(BASE, self._group, parts, self.settings, None, SILENT)
            per_row = (time.perf_counter() - begin) / sum(part.size for part in parts)
        per_merge: dict[str, float] = {}
        for run in runs:
            if run.kind == "merge" and run.method not in per_merge:
                begin = time.perf_counter()
                with suppress(StarmergeError):  # the study will say so
                    self.vectors.merge(run.pipeline, models=run.models)
                per_merge[run.method] = time.perf_counter() - begin
        return per_row, per_merge


@dataclass(frozen=True)
class _Runs:
    """The runs of a study, as a job for other processes, each with a laboratory of its own.

    Args:
        study: The study.
        settings: As for :class:`Laboratory`.
        cache: As for :class:`Laboratory`.
        any_base: As for :class:`Laboratory`.
        wanted: Numbers of the runs.
    """

    study: Study
    settings: Settings
    cache: ScoreCache | None
    any_base: bool
    wanted: tuple[int, ...]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
        """Yield what makes a run."""
        laboratory = Laboratory(self.study, self.settings, cache=self.cache, any_base=self.any_base)
        laboratory.get_ready(self.wanted)
        yield laboratory.lines

    def memory(self, number: int) -> int:
        """Return 0: each process holds the models all the time."""
        return 0

    def nbytes(self, number: int) -> None:
        """Return None: it is not known how long a run takes."""

    def announce(self, number: int) -> None:
        """Do nothing: the models are held."""

    def check(self) -> None:
        """Do nothing: the laboratory opens the models."""

    def label(self, number: int) -> str:
        """Return the number of a run."""
        return f"run {number + 1}"


class _Counted(Progress):
    """Passes on what a run tells, and counts the rows that are done.

    Args:
        bar: Where to.
    """

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self._shown, self.count = bar, 0

    def __call__(self, units: int) -> None:
        """Move on by some rows."""
        self.count += units
        self._shown(units)

    def waits_for(self, what: str) -> None:
        """Say what is being done now."""
        self._shown.waits_for(what)


def run_study(
    study: Study,
    folder: Path,
    *,
    settings: Settings | None = None,
    cache: ScoreCache | None = None,
    any_base: bool = False,
    retry: bool = False,
    progress: bool = False,
) -> Store:
    """Do what a study's store lacks, and return the store.

    Args:
        study: The study.
        folder: The store, which may not be there yet.
        settings: How models are asked; None: as the study says.
        cache: Where answers are kept, too; None: nowhere.
        any_base: Accept models whose config names another base.
        retry: Make the runs again that failed before.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: The study does not fit together, a model or dataset cannot be had, or the store
            holds runs of other models, tasks or code.
        StarmergeError: A model is broken, or the store cannot be written.
    """
    laboratory = Laboratory(study, settings or study.settings(), cache=cache, any_base=any_base)
    with laboratory.opened(folder, retry=retry) as store:
        laboratory.run(store, progress=progress)
    return store


def code_hash() -> str:
    """Return a hash of the package's code that scores depend on."""
    files = sorted(
        file for file in _ROOM.rglob("*.py") if file.relative_to(_ROOM).parts[0] not in _ASIDE
    )
    return _hash({str(file.relative_to(_ROOM)): cached_blake3_of(file) for file in files})


def _hash(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=16)


def _mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the numbers that stand beside each name."""
    found: dict[str, list[float]] = {}
    for name, number in pairs:
        found.setdefault(name, []).append(number)
    return {name: fmean(numbers) for name, numbers in found.items()}


def _said(error: Exception) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, StarmergeError) else f"{type(error).__name__}: {text}"


def _public(reference: str) -> str:
    """Return a Hub id as it is, and of a folder its name: a store tells nobody's folders."""
    return (
        reference if is_hub_id(reference) and not Path(reference).exists() else Path(reference).name
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
