"""An evaluation: a base, its fine-tunes and its merges, each asked the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import Record, ScoreCache, score_key
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.models.loading import device_kind, device_name, dtype_name
from starmerge_models.evaluation.provenance import ModelRecord, gathered, now, record_of
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.sheets import AnyTask, Sheet, prepare
from starmerge_models.evaluation.subjects import BASE, Group, Update, check_backend, groups
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.progress import SILENT, Progress, progress_bar
from starmerge_models.recipe import model_entries, paths_by_name


def evaluate(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path | Update],
    tasks: Sequence[str | AnyTask],
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    *,
    cache: ScoreCache | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a base, adapters on it, updates of it and whole models on the same rows of some tasks.

    A model called like one of the tasks is that task's own fine-tune, the upper bound of the
    normalised average, and is asked that task only. Every other model is asked all tasks.

    The base is loaded once: adapters are switched on and off by PEFT, updates in memory are added
    to its weights and taken back. What the cache knows is not asked again. The files of each model
    are hashed: the result says by their content which models and rows these were.

    Args:
        base: The base: a folder or a Hub id.
        models: The models to score: folders or Hub ids of adapters and whole models, named by
            their last part or as ``NAME=PATH``; a mapping gives them names, and may hold updates of
            the base's tensors in memory.
        tasks: Names of tasks, task files or rows, or tasks as objects.
        settings: How they are asked.
        cache: Where answers are kept; None: nowhere.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: A model that cannot be found or loaded, a model called "base", two tasks of one
            name, a task without rows or without answers to rank, tasks of text and of images.
        StarmergeError: A model computes a NaN.

    Example:
        ``sm.evaluate("base", ["adapters/digits", "merged"], ["digits"])``
    """
    date = now()
    if not isinstance(models, Mapping):
        models = paths_by_name(model_entries(models))
    with progress_bar("evaluating", None, show=progress) as bar:
        sheets = check(tasks, settings, progress=bar)
        bar.waits_for("finding the models")
        start = resolve_local(base)
        sources = {
            name: resolve_local(model)
            for name, model in models.items()
            if not isinstance(model, Mapping)
        }
        subjects = groups(
            start.path,
            {**models, **{name: source.path for name, source in sources.items()}},
            kind=next(iter(sheets.values())).kind,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
        )
        sources[BASE] = start
        names = [BASE, *models]
        asked = {
            name: [sheet for task, sheet in sheets.items() if name == task or name not in sheets]
            for name in names
        }
        scores: dict[str, dict[str, Score]] = {}
        records: dict[str, ModelRecord] = {}
        bar.expects(sum(sheet.size for own in asked.values() for sheet in own))
        while subjects:
            group = subjects.pop(0)  # what the one before has loaded goes with it
            gc.collect()  # models hold themselves in circles
            for name in group.names:
                bar.waits_for(f"hashing {name}")
                records[name] = record_of(name, sources.get(name), group, settings)
                found = answers(name, group, asked[name], settings, cache, bar)
                scores[name] = {
                    sheet.name: sheet.score(answered)
                    for sheet, answered in zip(asked[name], found, strict=True)
                }
    return Evaluation(
        settings.scorer,
        settings.mode,
        {name: scores[name] for name in names},
        {name: scores[name][name] for name in models if name in sheets},
        gathered(date, {name: records[name] for name in names}, sheets, settings),
    )


def check(
    tasks: Sequence[str | AnyTask],
    settings: Settings,
    prepared: Callable[[AnyTask, Settings], Sheet] = prepare,
    *,
    progress: Progress = SILENT,
) -> dict[str, Sheet]:
    """Read the rows of tasks, and make sure that they can be asked together.

    Args:
        tasks: Names of tasks, files, or tasks as objects.
        settings: How they are asked.
        prepared: Reads the rows of a task; by default those to score.
        progress: Is told which task's rows are read.

    Raises:
        UsageError: An unknown task, two tasks of one name, a task without rows or without answers
            to rank, tasks of text and of images, a backend or device that is not there.
    """
    found = [find_task(task) if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in found]
    twice = [task for task in names if names.count(task) > 1]
    if twice:
        raise UsageError(f"Two tasks are called {twice[0]!r}. Evaluate them one after the other.")
    sheets: dict[str, Sheet] = {}
    for task in found:
        progress.waits_for(f"reading the rows of {task.name}")
        sheets[task.name] = prepared(task, settings)
    if len({sheet.kind for sheet in sheets.values()}) != 1:
        raise UsageError("Give tasks, all of text or all of images: no model can do both.")
    check_backend(settings.backend, settings.device)
    return sheets


def answers(
    name: str,
    group: Group,
    sheets: Sequence[Sheet],
    settings: Settings,
    cache: ScoreCache | None,
    progress: Progress,
) -> list[list[Record]]:
    """Return what one model answers to some sheets: from the cache, or by asking it.

    The progress moves on by rows, and is told what is waited for.

    Raises:
        UsageError: The model cannot be loaded, or the sheet does not fit it.
        StarmergeError: It computes a NaN.
    """
    found = []
    if cache is not None:
        progress.waits_for(f"hashing {name}")
    keys = [_key(name, group, sheet, settings) if cache is not None else None for sheet in sheets]
    with ExitStack() as stack:
        model = None
        for sheet, key in zip(sheets, keys, strict=True):
            records = cache.get(key) if cache is not None and key is not None else None
            if records is None:
                if model is None:
                    model = stack.enter_context(group.active(name, progress))
                progress.waits_for(f"asking {name}: {sheet.name}")
                try:
                    records = sheet.ask(model, settings.batch_size, progress)
                except UsageError:
                    raise
                except StarmergeError as error:  # a NaN, for example: adapters bear the base's name
                    raise StarmergeError(f"Model {name}, task {sheet.name}: {error}") from error
                # What was rewritten while it was asked is kept under no key.
                if cache is not None and key and key == _key(name, group, sheet, settings):
                    cache.put(key, records)
            else:
                progress(sheet.size)
            found.append(records)
    return found


def _key(name: str, group: Group, sheet: Sheet, settings: Settings) -> str:
    """Return the key of a model's answers to a task."""
    folders = group.folders(name)
    device = device_kind(settings.device)
    return score_key(
        folders,
        {**sheet.asked, "backend": settings.backend},
        device=device_name(settings.device),
        dtype=dtype_name(folders[0], settings.dtype, device),
        update=group.update(name),
    )
