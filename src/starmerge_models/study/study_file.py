"""Study files: the pool of models, the methods, the numbers of models and the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from starmerge_models import plugins
from starmerge_models.demo_names import is_demo_name, path_text
from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.evaluation.models.loading import Dtype
from starmerge_models.evaluation.scoring.matching import Mode
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.files import DataTask
from starmerge_models.evaluation.tasks.sources import Data
from starmerge_models.evaluation.tasks.suites import Suite, find_suite
from starmerge_models.merging.in_memory import check_one_update
from starmerge_models.methods.pipeline import Pipeline, make_pipeline, map_chain
from starmerge_models.reading import read_yaml
from starmerge_models.storage import exists

FOLDER = Path(__file__).parent / "built_in"
"""The folder of the included studies."""

SEED = "seed"
"""Name of the seed parameter of random methods."""


class MethodEntry(Data):
    """A chain of methods, with fixed parameters and a grid of others."""

    method: str = Field(min_length=1)
    """The chain, such as "star+ties"."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Fixed parameters."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values of other parameters; every combination of values is a separate merge."""

    @model_validator(mode="after")
    def _parts_differ(self) -> MethodEntry:
        for key in self.grid:
            if key in self.parameters:
                raise ValueError(f"{key!r} stands in parameters and in grid: leave one out")
        return self

    def pipelines(self, seeds: tuple[int, ...]) -> list[Pipeline]:
        """Return the chain with each combination of the grid's values.

        A chain with a parameter ``seed`` that the entry does not set runs with each of ``seeds``.

        Raises:
            UsageError: There is no such method or parameter, a value is invalid, or the chain makes
                a model for each task or needs a metric.
        """
        grid = dict(self.grid)
        first = make_pipeline(self.method, self.parameters | {k: v[0] for k, v in grid.items()})
        given = self.parameters | grid
        for key in first.parameters():
            if key.rpartition(".")[2] == SEED and not {key, SEED} & given.keys():
                grid[key] = list(seeds)
        found = []
        for values in product(*grid.values()):
            pipeline = make_pipeline(
                self.method, self.parameters | dict(zip(grid, values, strict=True))
            )
            check_one_update(pipeline)
            if pipeline.needs_moments:
                raise UsageError(
                    f"{pipeline.name} needs a metric of the inputs, and a study has none. "
                    "Leave it out, or merge separately with `starmerge merge --metric`."
                )
            found.append(pipeline)
        return found


def _as_entry(value: object) -> object:
    """Convert the short notation of a method, its name alone, into the full one."""
    return {"method": value} if isinstance(value, str) else value


class PoolModel(Data):
    """A fine-tune of the pool."""

    path: str
    """A folder, relative to the study file, or a Hub id."""
    task: str | None = None
    """The name of its task; None: the model's name."""


def _as_model(value: object) -> object:
    """Convert the short notation of a model, its path alone, into the full one."""
    return {"path": value} if isinstance(value, str) else value


FigureKind = Literal["number", "parameter", "best", "one-shot", "tasks"]
"""Averages by the number of models, or by a parameter; a parameter's best value by the number of
models; the default against the best of a grid; shares by task."""


class FigureEntry(Data):
    """A figure of the runs."""

    figure: FigureKind
    title: str | None = None
    parameter: str | None = None
    """For "parameter" and "best": the parameter on the axis."""
    methods: tuple[str, ...] | None = None
    """The chains in the figure; None: all."""

    @model_validator(mode="after")
    def _parameter_fits(self) -> FigureEntry:
        if (self.parameter is None) == (self.figure in ("parameter", "best")):
            raise ValueError(
                "parameter belongs to the figures 'parameter' and 'best', and only to them"
            )
        return self


class Study(Data):
    """A study: a pool of fine-tunes, methods, numbers of models, and the evaluation of the merges.

    Example:
        .. code-block:: yaml

            suite: demo
            methods: [average, star, {method: star, grid: {eta: [20, 60]}}]
            numbers: [2, 4, all]
            combinations: 3
            scorer: rank
            rows: 60
    """

    name: str = Field(min_length=1)
    description: str = ""
    paper: str = ""
    """The figure or table of arXiv 2502.10339 that it reproduces."""
    suite: str | None = None
    """A suite with the defaults of base, models and tasks."""
    base: str | None = None
    """The base: a folder relative to the file, or a Hub id."""
    models: dict[
        str,
        Annotated[PoolModel, BeforeValidator(_as_model, json_schema_input_type=str | PoolModel)],
    ] = Field(default_factory=dict)
    """The pool, by name."""
    tasks: tuple[str, ...] = ()
    """The models' tasks: names, task files, FILE.py:NAME."""
    methods: Annotated[
        tuple[
            Annotated[
                MethodEntry, BeforeValidator(_as_entry, json_schema_input_type=str | MethodEntry)
            ],
            ...,
        ],
        Field(min_length=1),
    ]
    numbers: Annotated[
        tuple[Annotated[int, Field(ge=1, strict=True)] | Literal["all"], ...],
        Field(min_length=1),
    ] = ("all",)
    """How many models to merge; numbers above the size of the pool are ignored."""
    combinations: int = Field(default=1, ge=1)
    """Most sets of models for each number."""
    seed: int = 0
    """Seed of the draw of the combinations."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of random methods: each merge runs with each of them."""
    scorer: str = "rank"
    matching: Mode = "strict"
    rows: int | None = Field(default=None, ge=1)
    """Most rows of a task."""
    dtype: Dtype = "auto"
    figures: tuple[FigureEntry, ...] = (FigureEntry(figure="tasks"),)
    notes: str = ""

    def settings(self, *, batch_size: int | None = None, device: str | None = None) -> Settings:
        """Return the settings of the evaluation.

        Args:
            batch_size: Most rows of a batch; None: as many as fit.
            device: Device to run models on; None: the GPU if there is one.

        Raises:
            UsageError: The scorer is unknown.
        """
        return Settings(self.scorer, self.matching, self.rows, batch_size, device, self.dtype)


class Pool(Data):
    """The resolved base, models and tasks of a study."""

    base: str
    """Folder or Hub id."""
    models: dict[str, str]
    """Folders or Hub ids, by name."""
    task_of: dict[str, str]
    """The name of each model's task."""
    tasks: dict[str, DataTask]
    """The tasks of the models, by name."""

    def tasks_of(self, models: tuple[str, ...]) -> list[str]:
        """Return the tasks of some models, without duplicates, in the order of the models."""
        return list(dict.fromkeys(self.task_of[model] for model in models))


def load_study(file: Path) -> Study:
    """Read a study from a YAML file; the file's name is the default of ``name``.

    Paths of models and tasks that exist relative to the file are resolved against its folder.

    Raises:
        UsageError: The file is missing or broken, lacks a key or has an unknown one.
    """
    content, *more = read_yaml(file)
    if more or not isinstance(content, dict):
        raise UsageError(f"{file} is not a study: it holds keys such as suite and methods.")
    study = make_study({"name": file.stem, **content}, where=str(file))
    folder = file.parent

    def beside(text: str) -> str:
        is_there = not is_demo_name(text) and exists(folder / text)
        return path_text(folder / text) if is_there else text

    models = {
        name: model.model_copy(update={"path": beside(model.path)})
        for name, model in study.models.items()
    }
    methods = tuple(
        entry.model_copy(
            update={
                "method": map_chain(
                    entry.method, lambda part: plugins.absolute_reference(part, folder)
                )
            }
        )
        for entry in study.methods
    )
    tasks = tuple(plugins.absolute_reference(beside(task), folder) for task in study.tasks)
    places = {
        "base": None if study.base is None else beside(study.base),
        "suite": None if study.suite is None else beside(study.suite),
    }
    return study.model_copy(update={"models": models, "methods": methods, "tasks": tasks, **places})


def make_study(content: Mapping[str, Any], *, where: str = "The study") -> Study:
    """Make a study from the content of its file.

    Raises:
        UsageError: A key is missing or unknown, or a value does not fit.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        known = {
            key
            for part in (Study, MethodEntry, PoolModel, FigureEntry)
            for key in part.model_fields
        }
        raise UsageError(f"{where}: {explain(error, known)}") from error


@cache
def studies() -> dict[str, Study]:
    """Return the studies included in the package, by name."""
    return {file.stem: load_study(file) for file in sorted(FOLDER.glob("*.yaml"))}


def find_study(name: str) -> Study:
    """Find a study by its name, or read it from a YAML file.

    Raises:
        UsageError: There is no such study and no such file, or the file is broken.
    """
    if name in studies():
        return studies()[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_study(path)
    raise UsageError(f"No study is called {name!r}.{nearest(name, studies())}")


def pool_of(study: Study) -> Pool:
    """Resolve the base, models and tasks of a study.

    Raises:
        UsageError: There is no base or no model, or a model has no task.
    """
    suite = None if study.suite is None else find_suite(study.suite)
    base = study.base or (suite.base if suite else None)
    if base is None:
        raise UsageError(f"The study {study.name} names no base. Give it the key base, or a suite.")
    models = study.models or _of_suite(suite)
    if not models:
        raise UsageError(
            f"The study {study.name} names no models. Give it the key models, or a suite."
        )
    names = study.tasks or (suite.tasks if suite else ())
    tasks: dict[str, DataTask] = {}
    for task in map(find_task, names):
        if tasks.setdefault(task.name, task) != task:
            raise UsageError(
                f"The study {study.name} has two tasks called {task.name!r}. Rename one of them."
            )
    task_of = {name: model.task or name for name, model in models.items()}
    for name, own in task_of.items():
        if own not in tasks:
            hint = nearest(own, tasks) if tasks else " The study names no tasks."
            raise UsageError(
                f"The study {study.name}: the model {name} has the task {own!r}, which is not "
                f"among its tasks.{hint}"
            )
    return Pool(
        base=base,
        models={name: model.path for name, model in models.items()},
        task_of=task_of,
        tasks={name: task for name, task in tasks.items() if name in task_of.values()},
    )


def _of_suite(suite: Suite | None) -> dict[str, PoolModel]:
    """Return the fine-tunes of a suite's tasks."""
    if suite is None:
        return {}
    return {task: PoolModel(path=path) for task, path in suite.models.items()}
