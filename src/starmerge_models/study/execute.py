"""Executes a study: merges in memory and evaluates each run that is missing in its store."""

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
from starmerge_models.checkpoints.source import is_hub_id, place_named, resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import ScoreCache, blake3_of_model, versions
from starmerge_models.evaluation.model_groups import BASE, BaseGroup, groups
from starmerge_models.evaluation.models.loading import device_kind, dtype_name
from starmerge_models.evaluation.runner import cached_answers, prepare_tasks
from starmerge_models.evaluation.settings import Settings
from starmerge_models.merging.executors.executor import Executor
from starmerge_models.merging.task_vectors import TaskVectors, load_task_vectors
from starmerge_models.progress import SILENT, Progress, progress_bar
from starmerge_models.study.runs import Run, runs_of
from starmerge_models.study.store import SCHEMA, Store, open_store, score_line
from starmerge_models.study.study_file import Study, pool_of

_PACKAGE = Path(__file__).parent.parent
_WITHOUT_EFFECT = ("cli", "demo", "training", "calibration", "study")
"""Sub-packages that no score depends on."""

_SAMPLE_ROWS = 8
"""Rows of each task that a time estimate evaluates."""


@dataclass(frozen=True)
class Estimate:
    """The remaining work of a study."""

    runs: int
    """Total number of runs."""
    done: int
    """Number of runs in the store."""
    rows: int
    """Number of remaining rows, over all runs and tasks."""
    seconds: float | None
    """Estimated remaining time, from the measured time of a few rows; None: not measured."""

    def __str__(self) -> str:
        left = self.runs - self.done
        text = f"{self.runs} runs, {self.done} of them done; {left} to do, with {self.rows} rows"
        if self.seconds is None or not left:
            return text
        return f"{text}: about {duration(self.seconds)} on this machine"


def duration(seconds: float) -> str:
    """Return a duration as text: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class StudyRunner:
    """Executes the runs of a study with its models and rows.

    Models are loaded lazily: a completed study opens no model.

    Args:
        study: The study.
        settings: Scorer, device and other choices.
        cache: Cache of answers, in addition to the store; None: no caching.
        any_base: Accept models whose config names another base.

    Raises:
        UsageError: The study is inconsistent, or a model or dataset cannot be downloaded.
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
        self.prepared = prepare_tasks(list(self.pool.tasks.values()), settings)
        self._cache, self._any_base = cache, any_base
        self._base = resolve_local(self.pool.base).path
        self._models = {name: resolve_local(path).path for name, path in self.pool.models.items()}
        (group,) = groups(
            self._base,
            {},
            kind=next(iter(self.prepared.values())).kind,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
        )
        assert isinstance(group, BaseGroup)  # there are no whole models
        self._group = group

    @cached_property
    def vectors(self) -> TaskVectors:
        """The task vectors of the pool, read lazily."""
        return load_task_vectors(self._base, self._models, any_base=self._any_base)

    def head(self) -> dict[str, Any]:
        """Return everything that determines the scores, as the header of a store."""
        device = device_kind(self.settings.device)
        return {
            "schema": SCHEMA,
            "study": self.study.model_dump(mode="json", exclude={"base", "models", "tasks"}),
            "base": {"name": _public_name(self.pool.base), "files": blake3_of_model(self._base)},
            "models": {
                name: {
                    "name": _public_name(self.pool.models[name]),
                    "task": self.pool.task_of[name],
                    "files": blake3_of_model(path),
                }
                for name, path in self._models.items()
            },
            "tasks": {
                name: {"rows": task.size, "asked": _hash(task.key_fields)}
                for name, task in self.prepared.items()
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
        """Estimate the remaining work and its duration.

        The time of a row and of a merge comes from the runs in the store; without any it is
        measured, by evaluating the base on a few rows of each task and merging once by each chain.

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
        """Open or create the study's store; see :func:`starmerge_models.study.store.open_store`.

        Raises:
            UsageError: The folder is inside a model's folder, whose content it would change; or as
                ``open_store``.
            StarmergeError: As ``open_store``.
        """
        for place in (self._base, *self._models.values()):
            if folder.resolve().is_relative_to(place.resolve()):
                raise UsageError(
                    f"{folder} is inside the model {place}, whose content the runs would change. "
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
        """Execute every run that is missing in the store.

        A failed run is stored with its error, and the study continues. A base that cannot be
        evaluated or a broken fine-tune ends the study, as all runs depend on them.

        Args:
            store: The store to write to.
            executor: Executes the runs in other processes, each with its own runner; None: this
                process executes them in order. This process always writes the store.
            progress: Whether to show a progress bar.

        Raises:
            UsageError: The base cannot be loaded or evaluated.
            StarmergeError: The base or a fine-tune is broken, or the store cannot be written.
        """
        left = [number for number, run in enumerate(self.runs) if run not in store]
        total = sum(self._size(self.runs[number]) for number in left)
        with progress_bar(f"study {self.study.name}", total, show=progress) as bar:
            if executor is None:
                self.load_vectors(left)
                for number in left:
                    done = _CountingProgress(bar)
                    store.add(self.runs[number], self.lines(number, done))
                    done(self._size(self.runs[number]) - done.count)
            elif left:
                job = _Runs(self.study, self.settings, self._cache, self._any_base, tuple(left))
                with executor as workers, closing(workers.run(job, left)) as made:
                    for number, lines in zip(left, made, strict=True):
                        store.add(self.runs[number], lines)
                        bar(self._size(self.runs[number]))

    def load_vectors(self, numbers: Iterable[int]) -> None:
        """Read the task vectors that some runs need, so that a broken fine-tune fails at once.

        Raises:
            StarmergeError: A fine-tune is broken.
        """
        if any(self.runs[number].kind != "base" for number in numbers):
            _ = self.vectors

    def lines(self, number: int, progress: Progress = SILENT) -> list[dict[str, Any]]:
        """Execute a run; return its lines for the store: one per task, or one with the error.

        Args:
            number: Index of the run.
            progress: Gets the completed rows and the current step.

        Raises:
            Exception: Any error of the run of the base, without which there is no study.
        """
        run = self.runs[number]
        try:
            return self._lines(run, progress)
        except Exception as error:  # methods and models may raise anything
            if run.kind == "base":
                raise
            return [{"error": _one_line(error), "date": _now()}]

    def _lines(self, run: Run, progress: Progress) -> list[dict[str, Any]]:
        """Merge and evaluate the models of a run; return a line for each task."""
        begin = time.perf_counter()
        group, name = self._group, BASE
        if run.kind != "base":
            name = run.label
            progress.waits_for(f"merging {name}, n = {len(run.models)}")
            chain = run.pipeline if run.kind == "merge" else "average"
            update = self.vectors.merge(chain, models=run.models)
            group = group.with_updates({name: update})
        merged = time.perf_counter()
        tasks = [self.prepared[task] for task in run.tasks]
        found = cached_answers(name, group, tasks, self.settings, self._cache, progress)
        asked = time.perf_counter()
        times = {"merging": merged - begin, "asking": asked - merged, "date": _now()}
        return [
            score_line(task.name, task.score(records)) | times
            for task, records in zip(tasks, found, strict=True)
        ]

    def _size(self, run: Run) -> int:
        """Return the number of rows of a run."""
        return sum(self.prepared[task].size for task in run.tasks)

    def _measured(self, runs: Sequence[Run]) -> tuple[float, dict[str, float]]:
        """Measure the seconds of a row, and of a merge by each chain of some runs."""
        parts = [task.part(0, min(_SAMPLE_ROWS, task.size)) for task in self.prepared.values()]
        for _ in range(2):  # the first time loads the model
            begin = time.perf_counter()
            cached_answers(BASE, self._group, parts, self.settings, None, SILENT)
            per_row = (time.perf_counter() - begin) / sum(part.size for part in parts)
        per_merge: dict[str, float] = {}
        for run in runs:
            if run.kind == "merge" and run.method not in per_merge:
                begin = time.perf_counter()
                with suppress(StarmergeError):  # the study will report it
                    self.vectors.merge(run.pipeline, models=run.models)
                per_merge[run.method] = time.perf_counter() - begin
        return per_row, per_merge


@dataclass(frozen=True)
class _Runs:
    """The runs of a study, as a job for other processes, each with its own runner.

    Args:
        study: The study.
        settings: As for :class:`StudyRunner`.
        cache: As for :class:`StudyRunner`.
        any_base: As for :class:`StudyRunner`.
        wanted: Indices of the runs.
    """

    study: Study
    settings: Settings
    cache: ScoreCache | None
    any_base: bool
    wanted: tuple[int, ...]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
        """Yield the function that executes a run."""
        runner = StudyRunner(self.study, self.settings, cache=self.cache, any_base=self.any_base)
        runner.load_vectors(self.wanted)
        yield runner.lines

    def memory(self, number: int) -> int:
        """Return 0: each process holds the models permanently, whatever the run."""
        return 0

    def nbytes(self, number: int) -> None:
        """Return None: the cost of a run is unknown."""

    def announce(self, number: int) -> None:
        """Do nothing: the models are in memory."""

    def check(self) -> None:
        """Do nothing: the runner opens and checks the models."""

    def label(self, number: int) -> str:
        """Return the label of a run."""
        return f"run {number + 1}"


class _CountingProgress(Progress):
    """A progress that forwards to a bar and counts the completed rows.

    Args:
        bar: The progress bar.
    """

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self._shown, self.count = bar, 0

    def __call__(self, units: int) -> None:
        """Advance by some rows."""
        self.count += units
        self._shown(units)

    def waits_for(self, what: str) -> None:
        """Show the current step."""
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
    """Execute the missing runs of a study, and return its store.

    Args:
        study: The study.
        folder: The folder of the store, which may not exist yet.
        settings: Scorer, device and other choices; None: those of the study.
        cache: Cache of answers, in addition to the store; None: no caching.
        any_base: Accept models whose config names another base.
        retry: Whether to repeat runs that failed before.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: The study is inconsistent, a model or dataset cannot be downloaded, or the
            store has runs of other models, tasks or code.
        StarmergeError: A model is broken, or the store cannot be written.
    """
    runner = StudyRunner(study, settings or study.settings(), cache=cache, any_base=any_base)
    with runner.opened(folder, retry=retry) as store:
        runner.run(store, progress=progress)
    return store


def code_hash() -> str:
    """Return a hash of the code that scores depend on."""
    files = sorted(
        file
        for file in _PACKAGE.rglob("*.py")
        if file.relative_to(_PACKAGE).parts[0] not in _WITHOUT_EFFECT
    )
    return _hash({str(file.relative_to(_PACKAGE)): cached_blake3_of(file) for file in files})


def _hash(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=16)


def _mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the numbers of each name."""
    found: dict[str, list[float]] = {}
    for name, number in pairs:
        found.setdefault(name, []).append(number)
    return {name: fmean(numbers) for name, numbers in found.items()}


def _one_line(error: Exception) -> str:
    """Return an error's message as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, StarmergeError) else f"{type(error).__name__}: {text}"


def _public_name(reference: str) -> str:
    """Return a Hub id unchanged, and only the name of a folder, so that stores have no paths."""
    if is_hub_id(reference) and not Path(reference).exists():
        return reference
    return place_named(reference).name


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
