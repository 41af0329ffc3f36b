"""The runs of a study: models, method and tasks of each, in the order of execution."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starmerge_models.errors import UsageError, nearest
from starmerge_models.methods.pipeline import Pipeline, make_pipeline
from starmerge_models.study.candidates import candidate_name
from starmerge_models.study.study_file import SEED, Pool, Study

RunKind = Literal["base", "fine-tune", "merge"]

_DRAWS = 1000
"""Drawing stops after this many consecutive shuffles of the pool without a new combination."""


@dataclass(frozen=True)
class Run:
    """A model of a study, and the tasks that it is evaluated on."""

    kind: RunKind
    models: tuple[str, ...]
    """The merged models; for a fine-tune, the fine-tune itself; for the base, empty."""
    tasks: tuple[str, ...]
    """Names of the tasks that the run evaluates."""
    method: str = ""
    """The chain of a merge."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """All parameters of the chain, including defaults."""
    combination: int = 0
    """Index of the combination among those of the same number of models."""

    @property
    def key(self) -> str:
        """The run's unique key in a study."""
        content = [self.kind, list(self.models), self.method, dict(self.parameters)]
        return json.dumps(content, sort_keys=True, default=str)

    @property
    def label(self) -> str:
        """The chain with its non-default parameters, without the seed."""
        if self.kind != "merge":
            return self.kind
        return label_of(self.method, self.parameters)

    @property
    def pipeline(self) -> Pipeline:
        """The chain of a merge."""
        return make_pipeline(self.method, self.parameters)


def label_of(method: str, parameters: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Return a chain with its non-default parameters: ``star:eta=60``.

    Args:
        method: The chain.
        parameters: Its parameters.
        without: Parameters to omit, in addition to the seed.
    """
    dropped = (SEED, *without)
    kept = {k: v for k, v in parameters.items() if k.rpartition(".")[2] not in dropped}
    return candidate_name(make_pipeline(method, kept))


def runs_of(study: Study, pool: Pool) -> list[Run]:
    """Return the runs of a study: the base, the fine-tunes, then the merges.

    The merges of the first combinations of all numbers come first, so that an interrupted study
    still compares all methods. The combinations of a number are independent of the other numbers,
    and the first ones of how many there are.

    Raises:
        UsageError: A method is invalid, a merge occurs twice, the pool is smaller than every number
            of models, or a figure shows a method or a parameter that no merge has.
    """
    names = tuple(pool.models)
    found = [Run("base", (), tuple(pool.tasks))]
    found += [Run("fine-tune", (name,), (pool.task_of[name],)) for name in names]
    pipelines = [p for entry in study.methods for p in entry.pipelines(study.seeds)]
    _check_figures(study, pipelines)
    sets = {
        number: combinations(names, number, study.combinations, study.seed)
        for number in numbers_of(study, len(names))
    }
    seen: set[str] = set()
    for turn in range(max(map(len, sets.values()))):
        for drawn in sets.values():
            for pipeline in pipelines if turn < len(drawn) else ():
                models = drawn[turn]
                run = Run(
                    "merge",
                    models,
                    tuple(pool.tasks_of(models)),
                    pipeline.name,
                    pipeline.parameters(),
                    turn,
                )
                if run.key in seen:
                    raise UsageError(
                        f"The study {study.name} has the merge {run.label} twice. Leave one out."
                    )
                seen.add(run.key)
                found.append(run)
    return found


def _check_figures(study: Study, pipelines: Sequence[Pipeline]) -> None:
    """Make sure that the figures can be drawn, before the merges, which may take hours.

    Raises:
        UsageError: A figure shows a method or a parameter that no merge has.
    """
    chains = {pipeline.name for pipeline in pipelines}
    for entry in study.figures:
        where = f"The study {study.name}: the figure {entry.figure!r} shows"
        for method in entry.methods or ():
            if method not in chains:
                raise UsageError(
                    f"{where} the method {method!r}, which is not among the study's methods."
                    f"{nearest(method, chains)}"
                )
        shown = [p for p in pipelines if entry.methods is None or p.name in entry.methods]
        known = {key.rpartition(".")[2] for pipeline in shown for key in pipeline.parameters()}
        if entry.parameter is not None and entry.parameter not in known:
            raise UsageError(
                f"{where} the parameter {entry.parameter!r}, which none of its methods has."
                f"{nearest(entry.parameter, known)}"
            )


def numbers_of(study: Study, size: int) -> list[int]:
    """Return the numbers of models that a study merges, without duplicates.

    Args:
        study: The study.
        size: Size of its pool. Larger numbers are ignored.

    Raises:
        UsageError: All numbers are larger than the pool.
    """
    wanted = [size if number == "all" else number for number in study.numbers]
    found = [number for number in dict.fromkeys(wanted) if number <= size]
    if not found:
        raise UsageError(
            f"The study {study.name} merges {min(wanted)} models or more, and its pool has {size}."
        )
    return found


def combinations(names: Sequence[str], number: int, most: int, seed: int) -> list[tuple[str, ...]]:
    """Draw different sets of models, such that each model is in about the same number of sets.

    The pool is repeatedly shuffled and cut into sets; duplicates are dropped. The models of a set
    are in the pool's order.

    Args:
        names: The pool.
        number: Models in a set.
        most: Most sets; fewer if there are not so many.
        seed: Seed of the draw.
    """
    generator = random.Random(f"{seed}/{number}")
    place = {name: n for n, name in enumerate(names)}
    found: dict[tuple[str, ...], None] = {}
    fruitless = 0
    while len(found) < most and fruitless < _DRAWS:
        before = len(found)
        shuffled = list(names)
        generator.shuffle(shuffled)
        for start in range(0, len(names) - number + 1, number):
            chosen = tuple(sorted(shuffled[start : start + number], key=place.__getitem__))
            if len(found) < most:
                found[chosen] = None
        fruitless = fruitless + 1 if len(found) == before else 0
    return list(found)
