"""Chooses a merge method on a few rows: candidates race in memory, the winner becomes a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import Record, ScoreCache
from starmerge_models.evaluation.model_groups import BASE, Group, Update, groups
from starmerge_models.evaluation.prepared_tasks import AnyTask, PreparedTask, prepare_for_selection
from starmerge_models.evaluation.runner import cached_answers, prepare_tasks
from starmerge_models.evaluation.scoring.comparison import (
    Difference,
    Interval,
    difference,
    normalised_average,
    perfect_score,
)
from starmerge_models.evaluation.settings import Settings, check_settings
from starmerge_models.evaluation.tasks.selection import Origin
from starmerge_models.evaluation.text_tables import html_table, interval_cell, markdown_table
from starmerge_models.merging.task_vectors import TaskVectors, load_task_vectors
from starmerge_models.methods.method import Method
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.progress import progress_bar
from starmerge_models.recipe import Recipe, make_recipe, model_entries, reference
from starmerge_models.study.candidates import named_candidates
from starmerge_models.study.race import FIRST_ROWS, Outcome, Scores, race, round_sizes

if TYPE_CHECKING:
    import pandas as pd

ROWS = 64
"""Default number of rows of a task in the last round."""

_TUNED = "fine-tune of "
"""Prefix, before a task's name, of the name of its fine-tune during the race."""


@dataclass(frozen=True, repr=False)
class Choice:
    """The result of a race of candidates; made by :func:`choose`.

    A notebook shows the candidates as a table.
    """

    recipe: Recipe
    """The chosen merge: ``starmerge merge`` runs it."""
    outcome: Outcome
    is_normalised: bool
    """Whether averages are normalised by the fine-tunes' scores; otherwise they are mean scores."""
    base: Interval | None
    """The base's average on the rows that the chosen candidate answered."""
    gain: Difference | None
    """The chosen candidate's average − the base's, paired; None if one is undefined."""
    left_out: Mapping[str, str]
    """Candidates that cannot merge these models, with the reason."""
    notes: tuple[str, ...]
    """Caveats on the rows and the comparison."""

    @property
    def chosen(self) -> str:
        """The name of the chosen candidate."""
        return self.outcome.chosen

    @property
    def sentence(self) -> str:
        """The choice and its certainty, in a sentence."""
        ties, best = self.outcome.ties, self.outcome.best
        gap = next(s.gap for s in self.outcome.standings if s.name == self.chosen)
        unsure = [s.name for s in self.outcome.standings if s.stopped == "budget"]
        if len(ties) > 1:
            why = "the best"
            if gap is not None:
                why = (
                    f"given before the best, {best}, whose lead is as likely as not chance "
                    f"(p = {gap.p_value:.2g})"
                )
            verdict = f"No clear difference between {_listed(ties)}: took {self.chosen}, {why}."
        elif unsure:
            verdict = f"Took {best}, the best that the budget left."
        else:
            verdict = f"{best} is clearly better than all others: took it."
        if unsure:
            verdict += f" The budget stopped {_listed(unsure)}, not clearly behind."
        return verdict

    def __repr__(self) -> str:
        """Return a few lines: the verdict, and the candidates with the most rounds."""
        standings = self.outcome.standings
        lines = [f"Choice: {self.chosen} of {len(standings)} candidates", f"  {self.sentence}"]
        lines += [
            f"  {standing.name}: {interval_cell(standing.average)}, {standing.rows} rows"
            for standing in standings[:_SHOWN]
        ]
        if len(standings) > _SHOWN:
            lines.append(f"  … and {len(standings) - _SHOWN} more: to_frame() has all")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the verdict and the table of candidates for a notebook."""
        return html_table(self.cells(), self.sentence)

    @property
    def table(self) -> str:
        """The candidates as a Markdown table: those with the most rounds first, the base last."""
        head, *rows, base = self.cells()
        for row in rows:
            row[0] = f"**{row[0]}**" if row[0] == self.chosen else row[0]
        return markdown_table([head, *rows, [f"*{base[0]}*", *base[1:]]])

    def cells(self) -> list[list[str]]:
        """Return the candidates as text cells: the header first, the base last."""
        average = "normalised average" if self.is_normalised else "mean score"
        rows = [["candidate", "rounds", "rows", average, f"− {self.outcome.best}", "stopped"]]
        for standing in self.outcome.standings:
            rows.append(
                [
                    standing.name,
                    str(standing.rounds),
                    str(standing.rows),
                    interval_cell(standing.average),
                    _gap_cell(standing.gap),
                    _STOPPED[standing.stopped],
                ]
            )
        rows.append([BASE, "", "", interval_cell(self.base), "", ""])
        return rows

    @property
    def report(self) -> str:
        """The sentence, the table, its legend and the notes, in Markdown."""
        legend = (
            "Averages with their 95 % intervals on the rows that a candidate answered; "
            "differences are paired, on the same rows."
        )
        parts = [self.sentence, self.table, legend, *self.notes]
        if self.gain is None or not (self.gain.clear and self.gain.value > 0):
            parts.append(f"{self.chosen} is not clearly better than the base on these rows.")
        parts += [f"Left out: {name}. {reason}" for name, reason in self.left_out.items()]
        return "\n\n".join(parts)

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each candidate, with the columns of :meth:`to_records`."""
        import pandas as pd  # noqa: PLC0415  (slow to import)

        return pd.DataFrame(self.to_records())

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat JSON-serialisable record for each candidate."""
        return [
            {
                "candidate": standing.name,
                "chosen": standing.name == self.chosen,
                "tied": standing.name in self.outcome.ties,
                "rounds": standing.rounds,
                "rows": standing.rows,
                "stopped": standing.stopped,
                **_flat("average", standing.average),
                **_flat("difference", standing.gap),
            }
            for standing in self.outcome.standings
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data, with 95 % intervals."""
        return {
            "chosen": self.chosen,
            "best": self.outcome.best,
            "ties": list(self.outcome.ties),
            "sentence": self.sentence,
            "average": "normalised" if self.is_normalised else "mean",
            "candidates": self.to_records(),
            **_flat("base", self.base),
            **_flat("gain", self.gain),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "recipe": self.recipe.model_dump(),
        }


_SHOWN = 8
"""Most candidates that ``repr`` lists."""

_STOPPED = {None: "", "behind": "clearly behind", "budget": "by the budget"}


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _gap_cell(gap: Difference | None) -> str:
    return "" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _flat(key: str, interval: Interval | Difference | None) -> dict[str, float | None]:
    values = (None,) * 3 if interval is None else (interval.value, interval.low, interval.high)
    return dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))


def choose(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    tasks: Sequence[str | Path | AnyTask],
    candidates: Sequence[str | Method | Pipeline] | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    budget: int | None = None,
    any_base: bool = False,
    cache: ScoreCache | None = None,
    progress: bool = False,
) -> Choice:
    """Race merge candidates on a few rows, in memory, and return the recipe of the winner.

    Each candidate merges all models. The rounds evaluate 8, 16, 32 … rows of each task, each row
    once. :func:`starmerge_models.study.race.race` defines when a candidate stops, and how ties are
    broken. A model with the same name as a task is that task's fine-tune, the upper bound of the
    normalised average; if a task has no fine-tune, or one with score 0, mean scores are compared
    instead.

    If a task has other rows than the sample that ``starmerge evaluate`` scores, these are used: see
    :func:`starmerge_models.evaluation.tasks.selection.selection_rows`. The base is loaded once, and
    the task vectors are read and decomposed once. The update of each candidate stays in memory
    during the race: it is small for adapters, and as large as a float32 model for some merges of
    full fine-tunes.

    Args:
        base: The base: a folder or a Hub id.
        models: LoRA adapters and full fine-tunes, as folders or Hub ids; a mapping names them.
        tasks: Names of tasks, paths of files, or tasks as objects.
        candidates: Methods, chains or their names, in the order of preference for ties; by default
            :func:`starmerge_models.study.candidates.default_candidates`.
        settings: Scorer, device and other choices; ``rows`` is the most rows of each task, by
            default 64.
        budget: Most rows that all candidates together may answer; None: no limit.
        any_base: Accept adapters whose config names another base.
        cache: Cache of answers; None: no caching.
        progress: Whether to show progress bars.

    Raises:
        UsageError: There are fewer than two candidates, two are the same, or one is unknown or
            makes a model for each task; there are too few rows or too small a budget; a task has
            no rows; a model cannot be merged or loaded. Only the last error needs an open model.
        StarmergeError: A model is broken or computes a NaN, or fewer than two of the candidates can
            merge these models.

    Example:
        ``sm.choose("base", ["adapters/past", "adapters/pos"], ["past", "pos"]).recipe``
    """
    pipelines = named_candidates(candidates)
    check_settings(settings)
    if settings.backend != "transformers":
        raise UsageError(
            "Candidates are added to the weights of a loaded model, which only the backend "
            "transformers allows. Leave the backend out."
        )
    prepared, origins = _prepare_tasks(tasks, settings, show=progress)
    ends = round_sizes(max(task.size for task in prepared.values()))
    costs = [_size(prepared, end) - _size(prepared, start) for start, end in pairwise([0, *ends])]
    _check_budget(budget, len(pipelines), costs[0])
    entries = model_entries(models)
    vectors = load_task_vectors(base, models, any_base=any_base)
    updates, left_out = _merge_all(vectors, pipelines, show=progress)
    tuned = {task: f"{_TUNED}{task}" for task in prepared if task in vectors.names}
    updates |= {name: vectors.merge("average", models=[task]) for task, name in tuned.items()}
    (group,) = groups(
        base,
        updates,
        kind=next(iter(prepared.values())).kind,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
    )
    evaluator = _Evaluator(group, prepared, ends, settings, cache, progress)
    ceilings, missing = _ceilings(evaluator, tuned)
    racing = [name for name in pipelines if name not in left_out]

    def ask(names: Sequence[str], number: int) -> Mapping[str, Scores]:
        label = f"round {number + 1} of {len(ends)}: {len(names)} candidates"
        return evaluator.evaluate({name: list(prepared) for name in names}, number, label)

    outcome = race(racing, ask, ceilings, costs, budget)
    chain = pipelines[outcome.chosen]
    recipe = make_recipe(
        {
            "base": reference(base),
            "models": entries,
            "method": chain.name,
            "parameters": chain.parameters(),
            "any_base": any_base,
        }
    )
    last = outcome.standings[0].rounds - 1
    chosen, at_base = evaluator.scores(outcome.chosen, last), evaluator.scores(BASE, last)
    return Choice(
        recipe,
        outcome,
        not missing,
        normalised_average(at_base, ceilings[last]),
        difference(chosen, at_base, ceilings[last]),
        left_out,
        tuple(_notes(missing, origins, len(racing))),
    )


class _Evaluator:
    """Evaluates models in memory on a growing number of rows, each row once.

    Args:
        group: The base, and the updates of the candidates and the fine-tunes.
        prepared: The tasks with all their rows.
        ends: The total number of rows of a task after each round.
        settings: Scorer, device and other choices.
        cache: Cache of answers, with an entry for each round.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        group: Group,
        prepared: Mapping[str, PreparedTask],
        ends: Sequence[int],
        settings: Settings,
        cache: ScoreCache | None,
        progress: bool,
    ) -> None:
        self._group, self._tasks, self._ends = group, prepared, ends
        self._settings, self._cache, self._progress = settings, cache, progress
        self._records: dict[tuple[str, str], list[Record]] = {}
        self.tasks, self.rounds = list(prepared), len(ends)

    def evaluate(
        self, tasks_of: Mapping[str, Sequence[str]], number: int, label: str
    ) -> dict[str, Scores]:
        """Evaluate models on the rows up to a round that they have not answered; return scores.

        Args:
            tasks_of: The tasks, by the model's name.
            number: Index of the round.
            label: Label of the progress bar.
        """
        parts = {
            name: [part for task in tasks for part in self._remaining(name, task, number)]
            for name, tasks in tasks_of.items()
        }
        total = sum(part.size for own in parts.values() for part in own)
        with progress_bar(label, total, show=self._progress) as bar:
            for name, own in parts.items():
                found = cached_answers(name, self._group, own, self._settings, self._cache, bar)
                for part, records in zip(own, found, strict=True):
                    self._records.setdefault((name, part.name), []).extend(records)
        return {name: self.scores(name, number) for name in tasks_of}

    def scores(self, name: str, number: int) -> Scores:
        """Return a model's scores on all rows up to a round."""
        found = {}
        for task, prepared in self._tasks.items():
            if (name, task) in self._records:
                part = prepared.part(0, self._ends[number])
                found[task] = part.score(self._records[name, task][: part.size])
        return found

    def _remaining(self, name: str, task: str, number: int) -> Iterator[PreparedTask]:
        """Yield the parts of a task, one for each round, that a model has not answered."""
        prepared, asked = self._tasks[task], len(self._records.get((name, task), ()))
        for start, end in pairwise([0, *self._ends[: number + 1]]):
            if asked <= start < prepared.size:
                yield prepared.part(start, end)


def _prepare_tasks(
    tasks: Sequence[str | Path | AnyTask], settings: Settings, *, show: bool
) -> tuple[dict[str, PreparedTask], dict[str, Origin]]:
    """Read the rows of the tasks; return the prepared tasks and the origins of their rows."""
    origins: dict[str, Origin] = {}
    settings = replace(settings, rows=ROWS if settings.rows is None else settings.rows)
    if settings.rows is not None and settings.rows < FIRST_ROWS:
        raise UsageError(
            f"{settings.rows} rows of a task are too few to compare candidates. Give at least "
            f"{FIRST_ROWS}; the default is {ROWS}."
        )

    def prepare_one(task: AnyTask, settings: Settings) -> PreparedTask:
        prepared, origins[task.name] = prepare_for_selection(task, settings)
        return prepared

    with progress_bar("choosing", None, show=show) as bar:
        return prepare_tasks(tasks, settings, prepare_one, progress=bar), origins


def _size(prepared: Mapping[str, PreparedTask], end: int) -> int:
    """Return the number of rows of all tasks, at most ``end`` of each."""
    return sum(min(task.size, end) for task in prepared.values())


def _check_budget(budget: int | None, count: int, cost: int) -> None:
    """Make sure that a budget is enough for the first round of all candidates."""
    if budget is not None and budget < count * cost:
        raise UsageError(
            f"The budget is {budget} rows, and the first round alone needs {count * cost}: {cost} "
            f"for each of {count} candidates. Raise the budget, or give fewer candidates."
        )


def _merge_all(
    vectors: TaskVectors, pipelines: Mapping[str, Pipeline], *, show: bool
) -> tuple[dict[str, Update], dict[str, str]]:
    """Merge by each candidate; return the updates, and the reasons of the failed candidates."""
    updates: dict[str, Update] = {}
    left_out: dict[str, str] = {}
    with progress_bar("merging", len(pipelines), show=show) as bar:
        for name, pipeline in pipelines.items():
            bar.waits_for(name)
            try:
                updates[name] = vectors.merge(pipeline)
            except UsageError:
                raise
            except StarmergeError as error:
                left_out[name] = str(error)
            bar(1)
    if len(updates) < 2:
        reasons = " ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise StarmergeError(
            f"Only {len(updates)} of the candidates can merge these models, and a race needs two. "
            f"{reasons}"
        )
    return updates, left_out


def _ceilings(evaluator: _Evaluator, tuned: Mapping[str, str]) -> tuple[list[Scores], str | None]:
    """Return the fine-tunes' scores in each round; or perfect scores, and why they are used.

    Args:
        evaluator: Evaluates the base and the fine-tunes.
        tuned: The names of the fine-tunes in the race, by task.
    """
    rounds, tasks = range(evaluator.rounds), evaluator.tasks
    alone = {name: [task] for task, name in tuned.items()} if len(tuned) == len(tasks) else {}
    label = "base and fine-tunes" if alone else "base"
    evaluator.evaluate({BASE: tasks, **alone}, rounds[-1], label)
    at_base = [evaluator.scores(BASE, number) for number in rounds]
    right: list[Scores] = [
        {task: perfect_score(score) for task, score in scores.items()} for scores in at_base
    ]
    bare = [task for task in tasks if task not in tuned]
    if bare:
        return right, f"No model has the name of the task {bare[0]}, so it has no fine-tune."
    found: list[Scores] = [
        {task: evaluator.scores(name, number)[task] for task, name in tuned.items()}
        for number in rounds
    ]
    for task, score in found[-1].items():
        if not score.value > 0:
            return right, f"The fine-tune of {task} has no right answer on {score.n} rows."
    return found, None


def _notes(missing: str | None, origins: Mapping[str, Origin], count: int) -> Iterator[str]:
    """Yield caveats on the rows and the comparison."""
    if missing is not None:
        yield f"{missing} The averages are mean scores, not normalised."
    for origin, said in _ORIGINS.items():
        tasks = [task for task, own in origins.items() if own == origin]
        if tasks:
            yield f"Rows of {', '.join(tasks)}: {said}"
    yield (
        f"The chosen candidate is the best of {count} on these rows, so its average is optimistic. "
        "Score the merged model on others with `starmerge evaluate`."
    )


_ORIGINS: Mapping[Origin, str] = {
    "held out": "held out, and not in the sample that `starmerge evaluate` scores.",
    "training": "from the training split, which `starmerge evaluate` does not score. Fine-tunes "
    "may have memorised them, so merges that keep more of a fine-tune look better than they are.",
    "scored": "those that `starmerge evaluate` scores, as the task has no others: its scores of "
    "the chosen merge will be optimistic.",
}
