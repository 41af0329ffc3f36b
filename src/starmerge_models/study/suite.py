"""Runs a suite end to end: merges its fine-tunes, scores base, fine-tunes and merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import UsageError
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.flat import check_flat, write_flat
from starmerge_models.evaluation.results import check_results, without_nan, write_results
from starmerge_models.evaluation.runner import evaluate, prepare_tasks
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.table import report
from starmerge_models.evaluation.tasks import find_task, with_rows_of
from starmerge_models.evaluation.tasks.files import DataTask
from starmerge_models.evaluation.tasks.prompts import with_prompts_of
from starmerge_models.evaluation.tasks.suites import Suite
from starmerge_models.merging.engine import MergeResult, merge
from starmerge_models.methods.pipeline import Pipeline, as_pipeline
from starmerge_models.progress import progress_bar
from starmerge_models.storage.publishing import check_output
from starmerge_models.study.figures import plot_scores
from starmerge_models.study.names import model_name

RESULTS = "results"
"""Folder of the scores, next to the folders of the merges."""


@dataclass(frozen=True)
class SuiteResult:
    """The result of running a suite."""

    title: str
    """The suite's name, its number of fine-tunes and its base; no paths."""
    evaluation: Evaluation
    merges: dict[str, MergeResult]
    table: str
    """The scores in Markdown, the differences of the merges, and the published numbers."""
    remarks: list[str]
    """The origin of replaced prompts, and the published numbers."""
    results: Path
    """The folder of the scores."""
    chart: Path
    flat: Path | None = None
    """The folder of the scores in the paper's layout; None if not requested."""

    def to_json(self) -> dict[str, Any]:
        """Return the scores and where everything lies, as plain data without NaN."""
        return {
            "title": self.title,
            "merges": {
                label: {"output": str(merge.path), "summary": merge.report.summary()}
                for label, merge in self.merges.items()
            },
            "evaluation": without_nan(self.evaluation.to_json()),
            "remarks": self.remarks,
            "results": str(self.results),
            "chart": str(self.chart),
            "flat": None if self.flat is None else str(self.flat),
        }


def run_suite(
    suite: Suite,
    output: Path,
    *,
    methods: Sequence[str | Pipeline] = ("average", "star", "auto"),
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    rows_of: Mapping[str, Path] | None = None,
    prompts: str | None = None,
    flat: Path | None = None,
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    cache: ScoreCache | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> SuiteResult:
    """Merge a suite's fine-tunes by some methods, score everything, write table and chart.

    Args:
        suite: The suite.
        output: Folder for the results and for the merged models, one sub-folder each.
        methods: Names of methods or chains, or chains with parameters.
        base: The base, in place of the suite's.
        tasks: Some of the suite's tasks; only their fine-tunes are merged. None: all.
        rows_of: Files with the rows of some tasks, for datasets that cannot be downloaded.
        prompts: The package that replaces the tasks' prompts; None: their own.
        flat: Folder for the scores in the paper's layout; see
            :mod:`starmerge_models.evaluation.flat`.
        settings: Scorer, device and other choices.
        cache: Cache of answers; None: no caching.
        overwrite: Whether to replace the results of an earlier run in ``output``.
        progress: Whether to show progress bars.

    Raises:
        UsageError: A method or task is unknown, a folder exists, a dataset cannot be downloaded, or
            the prompts are not installed or do not fit.
        StarmergeError: A model cannot be downloaded, or is broken.
    """
    found = with_rows_of(_chosen(suite, tasks), rows_of or {})
    wording: list[str] = []
    if prompts is not None:
        found, note = with_prompts_of(prompts, found)
        wording = [note]
    pipelines = {pipeline.name: pipeline for pipeline in map(as_pipeline, methods)}
    if len(pipelines) < len(methods):
        raise UsageError("A method is given twice. Run the suite once for each of its settings.")
    check_results(output / RESULTS, overwrite=overwrite)
    for name in pipelines:
        check_output(output / name, overwrite=overwrite)
    if flat is not None:
        names = [task.name for task in found]
        check_flat(flat, [*names, *pipelines], names, overwrite=overwrite)
    with progress_bar("before merging", None, show=progress) as bar:
        prepare_tasks(found, settings, progress=bar)
    for task in found:
        if task.name not in suite.models:
            raise UsageError(f"The suite {suite.name} names no model for its task {task.name}.")
    start = resolve_local(suite.base if base is None else base).path
    models = {task.name: resolve_local(suite.models[task.name]).path for task in found}
    merges = {
        name: merge(
            start, models, pipeline, output=output / name, overwrite=overwrite, progress=progress
        )
        for name, pipeline in pipelines.items()
    }
    evaluation = evaluate(
        start,
        models | {name: output / name for name in merges},
        found,
        settings,
        cache=cache,
        progress=progress,
    )
    published = _published(suite) if tasks is None else ()
    table = "\n\n".join([report(evaluation), *wording, *published])
    results = output / RESULTS
    write_results(results, evaluation, table, overwrite=overwrite)
    chart = results / "chart.png"
    title = f"{suite.name}: {len(models)} fine-tunes of {model_name(base or suite.base)}"
    plot_scores(evaluation, chart, title=title)
    written = write_flat(flat, evaluation, overwrite=overwrite) if flat is not None else None
    remarks = [*wording, *published]
    return SuiteResult(title, evaluation, merges, table, remarks, results, chart, written)


def _chosen(suite: Suite, names: Sequence[str] | None) -> dict[str, DataTask]:
    """Return the chosen tasks, by the suite's own names."""
    tasks = {name: find_task(name) for name in suite.tasks}
    if names is None:
        return tasks
    short = {task.name: name for name, task in tasks.items()}
    full = [short.get(name.strip(), name.strip()) for name in names]
    for name in full:
        if name not in tasks:
            raise UsageError(f"{name!r} is not a task of {suite.name}: {', '.join(short)}.")
    return {name: tasks[name] for name in full}


def _published(suite: Suite) -> list[str]:
    """Return the published numbers as lines of text."""
    return [
        f"Published (arXiv 2502.10339, {of}; normalised averages in percent, read by the first "
        "substring): " + ", ".join(f"{name} {value:g}" for name, value in values.items()) + "."
        for of, values in suite.published.items()
    ]
