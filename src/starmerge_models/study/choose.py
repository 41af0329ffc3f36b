"""Choosing how to merge with a few rows: candidates race in memory, a recipe comes out."""

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
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.selection import Origin
from starmerge_models.evaluation.text_tables import html_table, interval_cell, markdown_table
from starmerge_models.merging.task_vectors import TaskVectors, load_task_vectors
from starmerge_models.methods.method import Method
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.progress import progress_bar
from starmerge_models.recipe import Recipe, make_recipe, model_entries, reference
from starmerge_models.study.candidates import named_candidates
from starmerge_models.study.race import START, Outcome, Scores, race, sizes

if TYPE_CHECKING:
    import pandas as pd

ROWS = 64
"""Rows of a task in the last round, unless the settings say otherwise."""

_TUNED = "fine-tune of "
"""What stands before a task's name in that of its fine-tune, beside which the candidates race."""


@dataclass(frozen=True, repr=False)
class Choice:
    """What came out of a race of candidates; made by :func:`choose`.

    A notebook shows it as a table.
    """

    recipe: Recipe
    """The chosen merge: ``starmerge merge`` runs it."""
    outcome: Outcome
    is_normalised: bool
    """Whether averages are normalised by the fine-tunes; else they are means of scores."""
    base: Interval | None
    """The base's average on the rows that the chosen candidate was asked."""
    gain: Difference | None
    """The chosen candidate's average less the base's, paired; None where one is undefined."""
    left_out: Mapping[str, str]
    """Candidates that do not merge these models, with the reason."""
    notes: tuple[str, ...]
    """What a reader must know of the rows and of what was compared."""

    @property
    def chosen(self) -> str:
        """The name of the chosen candidate."""
        return self.outcome.chosen

    @property
    def sentence(self) -> str:
        """What was chosen, and how sure that is."""
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
        """Return a few lines: the verdict, and the candidates that came farthest."""
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
        """The candidates in Markdown, those that came farthest first, the base last."""
        head, *rows, base = self.cells()
        for row in rows:
            row[0] = f"**{row[0]}**" if row[0] == self.chosen else row[0]
        return markdown_table([head, *rows, [f"*{base[0]}*", *base[1:]]])

    def cells(self) -> list[list[str]]:
        """Return the candidates as cells for people, the head first, the base last."""
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
        """The sentence, the table, and what belongs under it, in Markdown."""
        legend = (
            "Averages with their 95 % intervals on the rows that a candidate was asked; "
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
        """Return a flat record for each candidate, as plain data."""
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
        """Return everything as plain data; intervals are of 95 %."""
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
"""Candidates that ``repr`` names at most."""

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
    tasks: Sequence[str | AnyTask],
    candidates: Sequence[str | Method | Pipeline] | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    budget: int | None = None,
    any_base: bool = False,
    cache: ScoreCache | None = None,
    progress: bool = False,
) -> Choice:
    """Race merge candidates on a few rows, in memory, and return the recipe of the one to take.

    All models are merged by each candidate. Rounds ask 8, 16, 32 … rows of each task; a row is
    asked once. :func:`starmerge_models.study.race.race` says what stops a candidate, and which of
    those that the rows cannot tell apart is taken. A model called like a task is that task's
    fine-tune, the upper bound of the normalised average; where a task has none, or one that answers
    nothing right, means of scores are compared instead.

    The rows are no part of the task's sample, which ``starmerge evaluate`` scores, wherever the
    task has others: see :func:`starmerge_models.evaluation.tasks.selection.selection_rows`. The
    base is loaded once, and the task vectors are read and decomposed once. The update of each candidate
    stays in memory while the race goes on: little for adapters, as much as a float32 model for some
    merges of full fine-tunes.

    Args:
        base: The base: a folder or a Hub id.
        models: LoRA adapters and full fine-tunes, as folders or Hub ids; a mapping names them.
        tasks: Names of tasks, files, or tasks as objects.
        candidates: Methods, chains or their names, those to be preferred first; by default
            :func:`starmerge_models.study.candidates.default_candidates`.
        settings: How models are asked; ``rows`` of each task at most, by default 64.
        budget: Rows that may be asked of the candidates in all; by default nothing but the number
            of candidates, tasks and rows limits it.
        any_base: Accept adapters whose config names another base.
        cache: Where answers are kept; None: nowhere.
        progress: Whether to show progress bars.

    Raises:
        UsageError: Fewer than two candidates, two that are the same, one that is unknown or makes a
            model for each task; too few rows, too small a budget; a task without rows; a model that
            cannot be merged or asked. All but the last is found before a model is opened.
        StarmergeError: A model is broken or computes a NaN; fewer than two of the candidates merge
            these models.

    Example:
        ``sm.choose("base", ["adapters/past", "adapters/pos"], ["past", "pos"]).recipe``
    """
    pipelines = named_candidates(candidates)
    if settings.backend != "transformers":
        raise UsageError(
            "Candidates are added to the weights of a loaded model, which only the backend "
            "transformers allows. Leave the backend out."
        )
    prepared, origins = _prepare_tasks(tasks, settings, show=progress)
    ends = sizes(max(task.size for task in prepared.values()))
    costs = [_size(prepared, end) - _size(prepared, start) for start, end in pairwise([0, *ends])]
    _check_budget(budget, len(pipelines), costs[0])
    entries = model_entries(models)
    vectors = load_task_vectors(base, models, any_base=any_base)
    updates, left_out = _merged(vectors, pipelines, show=progress)
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
    asking = _Asking(group, prepared, ends, settings, cache, progress)
    ceilings, missing = _ceilings(asking, tuned)
    racing = [name for name in pipelines if name not in left_out]

    def ask(names: Sequence[str], number: int) -> Mapping[str, Scores]:
        label = f"round {number + 1} of {len(ends)}: {len(names)} candidates"
        return asking.ask({name: list(prepared) for name in names}, number, label)

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
    chosen, at_base = asking.scores(outcome.chosen, last), asking.scores(BASE, last)
    return Choice(
        recipe,
        outcome,
        not missing,
        normalised_average(at_base, ceilings[last]),
        difference(chosen, at_base, ceilings[last]),
        left_out,
        tuple(_notes(missing, origins, len(racing))),
    )


class _Asking:
    """Models in memory that are asked more and more rows, none of them twice.

    Args:
        group: The base, the candidates' updates and the fine-tunes'.
        prepared: The tasks with all their rows.
        ends: How many rows of a task have been asked after each round.
        settings: How they are asked.
        cache: Where answers are kept, those of each round by themselves.
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

    def ask(
        self, tasks_of: Mapping[str, Sequence[str]], number: int, label: str
    ) -> dict[str, Scores]:
        """Ask models all rows up to a round that they have not been asked; return their scores.

        Args:
            tasks_of: The tasks to ask, by the model's name.
            number: Of the round.
            label: Stands before the progress bar.
        """
        parts = {
            name: [part for task in tasks for part in self._left(name, task, number)]
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

    def _left(self, name: str, task: str, number: int) -> Iterator[PreparedTask]:
        """Yield the parts of a task, one for each round, that a model has not been asked."""
        prepared, asked = self._tasks[task], len(self._records.get((name, task), ()))
        for start, end in pairwise([0, *self._ends[: number + 1]]):
            if asked <= start < prepared.size:
                yield prepared.part(start, end)


def _prepare_tasks(
    tasks: Sequence[str | AnyTask], settings: Settings, *, show: bool
) -> tuple[dict[str, PreparedTask], dict[str, Origin]]:
    """Read the rows of the tasks, and tell where those of each come from."""
    origins: dict[str, Origin] = {}
    settings = replace(settings, rows=ROWS if settings.rows is None else settings.rows)
    if settings.rows is not None and settings.rows < START:
        raise UsageError(
            f"{settings.rows} rows of a task tell no candidates apart. Give {START} at least; "
            f"{ROWS} is the default."
        )
    if not tasks:
        raise UsageError("There is no task to choose by. Give one at least.")

    def prepare_one(task: AnyTask, settings: Settings) -> PreparedTask:
        prepared, origins[task.name] = prepare_for_selection(task, settings)
        return prepared

    found = [find_task(task) if isinstance(task, str) else task for task in tasks]
    with progress_bar("choosing", None, show=show) as bar:
        return prepare_tasks(found, settings, prepare_one, progress=bar), origins


def _size(prepared: Mapping[str, PreparedTask], end: int) -> int:
    """Return the number of rows of all tasks, of each at most so many."""
    return sum(min(task.size, end) for task in prepared.values())


def _check_budget(budget: int | None, count: int, cost: int) -> None:
    """Make sure that a budget pays for the first round of some candidates."""
    if budget is not None and budget < count * cost:
        raise UsageError(
            f"The budget is {budget} rows, and the first round alone asks {count * cost}: {cost} "
            f"of each of {count} candidates. Give that many at least, or fewer candidates."
        )


def _merged(
    vectors: TaskVectors, pipelines: Mapping[str, Pipeline], *, show: bool
) -> tuple[dict[str, Update], dict[str, str]]:
    """Merge by each candidate; tell why those that do not merge these models do not."""
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


def _ceilings(asking: _Asking, tuned: Mapping[str, str]) -> tuple[list[Scores], str | None]:
    """Return the scores of the fine-tunes in each round, or perfect ones and why.

    Args:
        asking: What asks the base and the fine-tunes.
        tuned: The names under which the fine-tunes are asked, by task.
    """
    rounds, tasks = range(asking.rounds), asking.tasks
    alone = {name: [task] for task, name in tuned.items()} if len(tuned) == len(tasks) else {}
    label = "base and fine-tunes" if alone else "base"
    asking.ask({BASE: tasks, **alone}, rounds[-1], label)
    at_base = [asking.scores(BASE, number) for number in rounds]
    right: list[Scores] = [
        {task: perfect_score(score) for task, score in scores.items()} for scores in at_base
    ]
    bare = [task for task in tasks if task not in tuned]
    if bare:
        return right, f"No model is called like the task {bare[0]}, so it has no fine-tune."
    found: list[Scores] = [
        {task: asking.scores(name, number)[task] for task, name in tuned.items()}
        for number in rounds
    ]
    for task, score in found[-1].items():
        if not score.value > 0:
            return right, f"The fine-tune of {task} answers nothing right on {score.n} rows."
    return found, None


def _notes(missing: str | None, origins: Mapping[str, Origin], count: int) -> Iterator[str]:
    """Yield what a reader must know of the rows and of what was compared."""
    if missing is not None:
        yield f"{missing} What is compared is the mean of the scores, not normalised."
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
    "training": "of the training part, which `starmerge evaluate` does not score. Fine-tunes that "
    "were trained on them know them, so merges that keep more of a fine-tune look better than they "
    "are.",
    "scored": "those that `starmerge evaluate` scores, for want of others: its scores of the "
    "chosen merge will be optimistic on them.",
}
