"""Runs an evaluation: a base, its fine-tunes and its merges on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import Record, ScoreCache, score_key
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE, Group, Update, check_backend, groups
from starmerge_models.evaluation.models.loading import device_kind, device_name, dtype_name
from starmerge_models.evaluation.prepared_tasks import AnyTask, PreparedTask, prepare
from starmerge_models.evaluation.provenance import ModelRecord, make_provenance, model_record, now
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.settings import Settings, check_settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.progress import SILENT, Progress, progress_bar
from starmerge_models.recipe import model_entries, paths_by_name, reference


def evaluate(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path | Update],
    tasks: Sequence[str | Path | AnyTask],
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    *,
    cache: ScoreCache | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a base, adapters on it, updates of it and whole models on the same rows of some tasks.

    A model with the same name as a task is that task's own fine-tune, the upper bound of the
    normalised average, and is evaluated on that task only. Every other model is evaluated on all
    tasks.

    The base is loaded once: PEFT switches adapters on and off, and updates in memory are added to
    the base's weights and removed again. Cached answers are reused. The result identifies models
    and rows by the hashes of their content.

    Args:
        base: The base: a folder or a Hub id.
        models: The models to score: folders or Hub ids of adapters and whole models, named by
            their last part or as ``NAME=PATH``; a mapping gives them names, and may hold updates of
            the base's tensors in memory.
        tasks: Names of tasks, paths of task files or rows, or tasks as objects.
        settings: Scorer, rows, device and other choices.
        cache: Cache of answers; None: no caching.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: A model cannot be found or loaded or is called "base", there is no task, two
            tasks have the same name, one has no rows or no answers to rank, or text and image tasks
            are mixed.
        StarmergeError: A model computes a NaN.

    Example:
        ``sm.evaluate("base", ["adapters/digits", "merged"], ["digits"])``
    """
    date = now()
    check_settings(settings)
    models = _by_name(models)
    with progress_bar("evaluating", None, show=progress) as bar:
        prepared = prepare_tasks(tasks, settings, progress=bar)
        bar.waits_for("finding the models")
        start = resolve_local(reference(base))
        sources = {
            name: resolve_local(model)
            for name, model in models.items()
            if not isinstance(model, Mapping)
        }
        subjects = groups(
            start.path,
            {**models, **{name: source.path for name, source in sources.items()}},
            kind=next(iter(prepared.values())).kind,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
        )
        sources[BASE] = start
        names = [BASE, *models]
        asked = {
            name: [one for task, one in prepared.items() if name == task or name not in prepared]
            for name in names
        }
        scores: dict[str, dict[str, Score]] = {}
        records: dict[str, ModelRecord] = {}
        bar.expects(sum(task.size for own in asked.values() for task in own))
        while subjects:
            group = subjects.pop(0)  # drops the last reference to the previous group's model
            gc.collect()  # models contain reference cycles
            for name in group.names:
                bar.waits_for(f"hashing {name}")
                records[name] = model_record(name, sources.get(name), group, settings)
                found = cached_answers(name, group, asked[name], settings, cache, bar)
                scores[name] = {
                    task.name: task.score(answered)
                    for task, answered in zip(asked[name], found, strict=True)
                }
    return Evaluation(
        settings.scorer,
        settings.mode,
        {name: scores[name] for name in names},
        {name: scores[name][name] for name in models if name in prepared},
        make_provenance(date, {name: records[name] for name in names}, prepared, settings),
    )


def _by_name(
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path | Update],
) -> dict[str, str | Update]:
    """Return references of models, and updates in memory, by their names."""
    if not isinstance(models, Mapping):
        return dict(paths_by_name(model_entries(models)))
    for name in models:
        if not isinstance(name, str):
            raise UsageError(f"A model is called {name!r}. Give a text as its name.")
    return {
        name: model if isinstance(model, Mapping) else reference(model)
        for name, model in models.items()
    }


def prepare_tasks(
    tasks: Sequence[str | Path | AnyTask],
    settings: Settings,
    prepare_one: Callable[[AnyTask, Settings], PreparedTask] = prepare,
    *,
    progress: Progress = SILENT,
) -> dict[str, PreparedTask]:
    """Read the rows of tasks, and make sure that one model can be evaluated on all of them.

    Args:
        tasks: Names of tasks, paths of files, or tasks as objects.
        settings: Scorer, rows, device and other choices.
        prepare_one: Reads the rows of a task; by default the rows to score.
        progress: Reports the task whose rows are being read.

    Raises:
        UsageError: There is no task, one is unknown, two have the same name, one has no rows or no
            answers to rank, text and image tasks are mixed, or the backend or device is
            unavailable.
    """
    if isinstance(tasks, str | Path) or not isinstance(tasks, Iterable):
        raise UsageError(f"The tasks are {tasks!r}. Give a list of them.")
    found = [_task_of(task) for task in tasks]
    if not found:
        raise UsageError("There is no task. Give at least one.")
    names = [task.name for task in found]
    twice = [task for task in names if names.count(task) > 1]
    if twice:
        raise UsageError(f"Two tasks are called {twice[0]!r}. Evaluate them one after the other.")
    prepared: dict[str, PreparedTask] = {}
    for task in found:
        progress.waits_for(f"reading the rows of {task.name}")
        prepared[task.name] = prepare_one(task, settings)
    if len({task.kind for task in prepared.values()}) != 1:
        raise UsageError("Give only text tasks or only image tasks: no model supports both.")
    check_backend(settings.backend, settings.device)
    return prepared


def _task_of(task: str | Path | AnyTask) -> AnyTask:
    if isinstance(task, str | Path):
        return find_task(str(task))
    if not isinstance(task, AnyTask):
        raise UsageError(
            f"A {type(task).__name__} stands where a task is wanted. Give the name of one, the "
            "path of a file, or a task as an object."
        )
    return task


def cached_answers(
    name: str,
    group: Group,
    tasks: Sequence[PreparedTask],
    settings: Settings,
    cache: ScoreCache | None,
    progress: Progress,
) -> list[list[Record]]:
    """Return one model's answers to some tasks, from the cache or by running the model.

    The progress advances by rows and names the step that is running.

    Raises:
        UsageError: The model cannot be loaded, or a task does not fit it.
        StarmergeError: The model computes a NaN.
    """
    found = []
    if cache is not None:
        progress.waits_for(f"hashing {name}")
    keys = [_key(name, group, task, settings) if cache is not None else None for task in tasks]
    with ExitStack() as stack:
        model = None
        for task, key in zip(tasks, keys, strict=True):
            records = cache.get(key) if cache is not None and key is not None else None
            if records is None:
                if model is None:
                    model = stack.enter_context(group.active(name, progress))
                progress.waits_for(f"asking {name}: {task.name}")
                try:
                    records = task.run(model, settings.batch_size, progress)
                except UsageError:
                    raise
                except StarmergeError as error:  # it names the base where the model is an adapter
                    raise StarmergeError(f"Model {name}, task {task.name}: {error}") from error
                # If the model's files changed during the run, the answers belong to no cache key.
                if cache is not None and key and key == _key(name, group, task, settings):
                    cache.put(key, records)
            else:
                progress(task.size)
            found.append(records)
    return found


def _key(name: str, group: Group, task: PreparedTask, settings: Settings) -> str:
    """Return the cache key of a model's answers to a task."""
    folders = group.folders(name)
    device = device_kind(settings.device)
    return score_key(
        folders,
        {**task.key_fields, "backend": settings.backend},
        device=device_name(settings.device),
        dtype=dtype_name(folders[0], settings.dtype, device),
        update=group.update(name),
    )
