"""How much merges keep, by method and by the number of models: the study of docs/results.md.

``results.yaml`` describes it: pools of adapters, how many of them are merged, with which methods,
and how base, adapters and merges are asked. Of a pool of N models and for each number n, N // n
merges of n models each are made, no model in two of them, and each is asked the tasks of its own
models. Each line of ``results.jsonl`` has one merge's right (1) and wrong (0) answers, row by row.
n = 0 stands for the base, n = 1 for each task's own fine-tune.

    python benchmarks/results.py train --pools DIR     # adapters that are not there yet
    python benchmarks/results.py run --pools DIR       # merge, ask, add to the store
    python benchmarks/results.py tables                # from the store alone
    python benchmarks/results.py figures               # from the store alone

A run can be ended at any time, and goes on with what the store lacks. Pools whose adapters are not
all there are named and left out. After a change of a method, delete its lines from the store.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import torch
import yaml
from common import parser_of, print_machine
from method_scores import Contestant

from starmerge_models.calibration.text import Reading, TextGenerator
from starmerge_models.checkpoints.source import resolve
from starmerge_models.demo_names import prepared_base
from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE, Update
from starmerge_models.evaluation.models.loading import load_model
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.scoring.comparison import (
    Difference,
    Interval,
    difference,
    normalised_average,
)
from starmerge_models.evaluation.scoring.metrics import (
    RESAMPLES,
    Prediction,
    Score,
    percentiles,
    score,
)
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.merging.apply import apply
from starmerge_models.merging.task_vectors import TaskVectors, load_task_vectors
from starmerge_models.methods import make_pipeline
from starmerge_models.study.figures import plot_scores
from starmerge_models.study.figures.style import BASE_LINE, dot_of, line_of, styled
from starmerge_models.study.palette import plot_styles
from starmerge_models.training.finetuning import TrainingRecipe, finetune
from starmerge_models_demo import ADAPTERS

HERE = Path(__file__).parent
STUDY, STORE = HERE / "results.yaml", HERE / "results.jsonl"
FIGURES = HERE.parent / "docs" / "figures"
TUNED = "fine-tuned"
NEUTRAL = "neutral"
"""Stands in the store in place of a scorer where text of the base was read."""
REFERENCES = ("star", "average")
AUTO = "auto"
SHOWN = ("average", "star", AUTO)
"""Methods that are shown task by task."""

# ------------------------------------------------------------------------------------ The study


@dataclass(frozen=True)
class Pool:
    """Adapters of one base, one for each task."""

    name: str
    role: str
    """"development" or "held-out"."""
    about: str
    folder: str | None
    """Name of the folder that has the adapters; None: they come with the package."""
    recipes: Mapping[str, TrainingRecipe]
    """By task; of the pool's own adapters."""
    included: Pool | None
    """A pool whose adapters belong to this one too."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order in which they are divided."""
        return (*(self.included.tasks if self.included else ()), *self.recipes)

    def folders(self, pools: Path) -> dict[str, Path]:
        """Return where the adapters lie, by task."""
        own = ADAPTERS if self.folder is None else pools / self.folder
        others = self.included.folders(pools) if self.included else {}
        return others | {task: own / task for task in self.recipes}

    def groups(self, count: int) -> list[tuple[str, ...]]:
        """Return the tasks of each merge of ``count`` models; neighbours go to different ones."""
        number = len(self.tasks) // count
        return [self.tasks[start::number][:count] for start in range(number)]


@dataclass(frozen=True)
class Run:
    """Merges that are asked in one way."""

    pool: Pool
    scorer: str
    counts: Sequence[int]
    contestants: Sequence[Contestant]


class Study:
    """What ``results.yaml`` says.

    Args:
        content: As it is in the file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.scorers: Mapping[str, Mapping[str, int]] = content["scorers"]
        self.neutral: Mapping[str, int] = content["neutral"]
        self.contestants = [
            Contestant(entry["method"], entry.get("parameters", {})) for entry in content["methods"]
        ]
        self.pools: dict[str, Pool] = {}
        for name, pool in content["pools"].items():
            self.pools[name] = Pool(
                name,
                pool["role"],
                pool["about"],
                None if pool.get("shipped") else name,
                {task: _recipe(pool["options"] | own) for task, own in pool["models"].items()},
                self.pools[pool["includes"]] if "includes" in pool else None,
            )
        self.runs = [
            Run(
                self.pools[run["pool"]],
                run["scorer"],
                run["counts"],
                self.contestants[: run.get("first")],
            )
            for run in content["runs"]
        ]


def _recipe(options: Mapping[str, Any]) -> TrainingRecipe:
    return TrainingRecipe(**{**options, **_tuples(options)})


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) for key, value in options.items() if isinstance(value, list)}


# ------------------------------------------------------------------------------------ The store


Key = tuple[str, int, int, str, str]
"""Pool, number of models, which of its merges, method, scorer."""


class Store:
    """The JSONL file of what is known, a merge a line.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.records: dict[Key, dict[str, Any]] = {}
        for record in map(json.loads, lines):
            self.records[_key(record)] = record

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def add(self, record: dict[str, Any]) -> None:
        """Write a record, so that it is there whatever happens next."""
        self.records[_key(record)] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def places(self) -> list[tuple[str, str]]:
        """Return the pairs of pool and scorer of which there are merges, in the file's order."""
        found = ((k[0], k[4]) for k in self.records if k[1] > 1 and k[4] != NEUTRAL)
        return list(dict.fromkeys(found))

    def slice(self, pool: str, scorer: str, count: int) -> dict[str, list[dict[str, Any]]]:
        """Return the records of one number of models, by method."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (of_pool, of_count, _, method, of_scorer), record in self.records.items():
            if (of_pool, of_count, of_scorer) == (pool, count, scorer):
                found.setdefault(method, []).append(record)
        return found


def _key(record: Mapping[str, Any]) -> Key:
    return (
        record["pool"],
        record["n"],
        record["combination"],
        record["method"],
        record["scorer"],
    )


def as_bits(score: Score) -> str:
    """Return the right and wrong answers of a score."""
    return "".join(str(int(p.credit or 0)) for p in score.predictions)


def as_score(bits: str) -> Score:
    """Return the score of right and wrong answers."""
    rows = enumerate(bits)
    return score([Prediction(str(n), "", bit, "1", float(bit)) for n, bit in rows], "accuracy")


# ----------------------------------------------------------------------------------- Fine-tuning


def train(pool: Pool, pools: Path, base: Path) -> None:
    """Train the adapters of a pool that are not there, and say how each is made."""
    if pool.included:
        train(pool.included, pools, base)
    if pool.folder is None:
        print(f"{pool.name}: its adapters come with the package.")
        return
    source = resolve(base)
    for task, recipe in pool.recipes.items():
        output = pools / pool.folder / task
        command = as_command(task, recipe, output)
        print(command, flush=True)
        if not output.exists():
            finetune(
                source.path,
                find_task(task),
                output,
                recipe,
                base_name=source.name,
                command=command,
                progress=True,
            )


def as_command(task: str, recipe: TrainingRecipe, output: Path) -> str:
    """Return the ``starmerge finetune`` that trains an adapter."""
    default = TrainingRecipe()
    options = []
    for option in ("full", "seed", "rank", "alpha", "targets", "dtype"):
        value = getattr(recipe, option)
        if value is True:
            options.append(f"--{option}")
        elif option == "seed" or value != getattr(default, option):
            text = ",".join(value) if isinstance(value, tuple) else f"{value}"
            options += [f"--{option}", text]
    rest = shlex.join(["-t", task, "-o", str(output), *options])
    return f'starmerge finetune "$(starmerge demo prepare)" {rest}'


# ------------------------------------------------------------------------------- Merging, asking


class Laboratory:
    """Merges in memory, and asks what comes out.

    Args:
        study: What is done.
        store: Where it is kept.
        base: Folder of the base.
        pools: Folder of the pools' adapters.
    """

    def __init__(self, study: Study, store: Store, base: Path, pools: Path) -> None:
        self._study, self._store, self._base, self._pools = study, store, base, pools
        self._cache = ScoreCache()
        self._vectors: tuple[str, TaskVectors] | None = None

    def run(self, run: Run, *, neutral: bool) -> None:
        """Do of a run what the store lacks."""
        pool = run.pool
        absent = [str(f) for f in pool.folders(self._pools).values() if not f.is_dir()]
        if absent:
            print(f"{pool.name}: {len(absent)} adapters are not there, such as {absent[0]}.")
            return
        self._ask_bounds(pool, run.scorer)
        for count in run.counts:
            for contestant in run.contestants:
                for number, group in enumerate(pool.groups(count)):
                    wanted = [run.scorer, *([NEUTRAL] if neutral else [])]
                    key = (pool.name, count, number, contestant.name)
                    lacking = [scorer for scorer in wanted if (*key, scorer) not in self._store]
                    if lacking:
                        self._merge_and_ask(pool, key, group, contestant, lacking)

    def _ask_bounds(self, pool: Pool, scorer: str) -> None:
        """Ask the base and each task's own fine-tune."""
        if (pool.name, 1, 0, TUNED, scorer) in self._store:
            return
        tasks = pool.tasks
        found = self._evaluated(tasks, pool.folders(self._pools), scorer)
        for count, method, scores in ((0, BASE, found.scores[BASE]), (1, TUNED, found.tuned)):
            self._store.add(
                {
                    **_head((pool.name, count, 0, method), tasks, scorer),
                    "correct": {task: as_bits(scores[task]) for task in tasks},
                }
            )

    def _merge_and_ask(
        self,
        pool: Pool,
        key: tuple[str, int, int, str],
        group: Sequence[str],
        contestant: Contestant,
        scorers: Sequence[str],
    ) -> None:
        begin = time.perf_counter()
        refused = None
        try:
            pipeline = make_pipeline(contestant.method, contestant.parameters)
            update = self._vectors_of(pool).merge(pipeline, models=group, threads=1)
        except StarmergeError as error:
            refused = str(error)
        seconds = round(time.perf_counter() - begin, 2)
        for scorer in scorers:
            record = {**_head(key, group, scorer), "merge_seconds": seconds}
            if refused is not None:
                record["refused"] = refused
            elif scorer == NEUTRAL:
                record["nats"] = self._nats(update)
            else:
                scores = self._evaluated(group, {key[3]: update}, scorer).scores[key[3]]
                record["correct"] = {task: as_bits(scores[task]) for task in group}
            self._store.add(record)
        said = refused or f"{time.perf_counter() - begin:.0f} s"
        print(f"{time.strftime('%X')} {key} {', '.join(scorers)}: {said}", flush=True)

    def _vectors_of(self, pool: Pool) -> TaskVectors:
        if self._vectors is None or self._vectors[0] != pool.name:
            self._vectors = None  # let go of the pool before
            vectors = load_task_vectors(self._base, pool.folders(self._pools), any_base=True)
            self._vectors = (pool.name, vectors)
        return self._vectors[1]

    def _evaluated(
        self, tasks: Sequence[str], models: Mapping[str, Path | Update], scorer: str
    ) -> Evaluation:
        settings = Settings(scorer, rows=self._study.scorers[scorer]["rows"])
        found = [find_task(task) for task in tasks]
        return evaluate(self._base, models, found, settings, cache=self._cache)

    # ------------------------------------------------------------------------------ Neutral text

    def ask_base_neutral(self, pool: Pool) -> None:
        """Let the base read its own text."""
        key = (pool.name, 0, 0, BASE)
        if (*key, NEUTRAL) not in self._store:
            self._store.add({**_head(key, (), NEUTRAL), "nats": self._nats({})})

    @cached_property
    def _reader(self) -> tuple[Any, int, list[Reading]]:
        """The base, how many tokens each text begins with, and what it has written."""
        model, tokenizer = load_model(self._base)
        wanted = self._study.neutral
        generator = TextGenerator(model, tokenizer, seed=wanted["seed"], length=wanted["length"])
        texts = generator.own(wanted["sequences"], lambda done: None)
        return model, len(generator.beginning()), texts

    @torch.inference_mode()
    def _nats(self, update: Update) -> list[float]:
        """Return the mean −log p of a token of each text, in nats, with an update of the base."""
        model, start, texts = self._reader
        nats = []
        with apply(model, update):
            for text in texts:
                ids = torch.tensor([text.ids], device=model.device)
                logits = model(input_ids=ids).logits[0, start - 1 : -1].double()
                nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, start:])))
        return [round(value, 4) for value in nats]


def _head(key: tuple[str, int, int, str], tasks: Sequence[str], scorer: str) -> dict[str, Any]:
    pool, count, number, method = key
    return {
        "pool": pool,
        "n": count,
        "combination": number,
        "method": method,
        "scorer": scorer,
        "tasks": list(tasks),
    }


# ------------------------------------------------------------------------------------ Statistics


@dataclass(frozen=True)
class Comparison:
    """All methods that merged all combinations of n models of a pool, scored in one way."""

    pool: str
    scorer: str
    count: int
    scores: Mapping[str, Mapping[str, Score]]
    """By method, without base and fine-tunes, and task."""
    base: Mapping[str, Score]
    tuned: Mapping[str, Score]
    refused: Mapping[str, str]
    """Why, by method."""

    def average(self, method: str) -> Interval:
        """Return the normalised average over all combinations."""
        found = normalised_average(self._of(method), self.tuned)
        assert found is not None, f"{self.pool}: a fine-tune has no answer right"
        return found

    def gain(self, method: str, other: str) -> Difference:
        """Return the paired difference of two methods."""
        found = difference(self._of(method), self._of(other), self.tuned)
        assert found is not None, f"{self.pool}: a fine-tune has no answer right"
        return found

    def best(self, *, without: str) -> str:
        """Return the method with the highest normalised average but one."""
        return max(self.scores.keys() - {without}, key=lambda m: self.average(m).value)

    def _of(self, method: str) -> Mapping[str, Score]:
        return self.base if method == BASE else self.scores[method]


def comparisons(study: Study, store: Store) -> Iterator[Comparison]:
    """Yield what the store can compare, by pool and scorer, the smallest number of models first."""
    for name, scorer in store.places():
        pool = study.pools[name]
        bounds = {
            method: {task: as_score(bits) for task, bits in records[0]["correct"].items()}
            for count in (0, 1)
            for method, records in store.slice(name, scorer, count).items()
        }
        counts = {key[1] for key in store.records if key[0] == name and key[4] == scorer}
        for count in sorted(counts - {0, 1}):
            groups = pool.groups(count)
            tasks = {task for group in groups for task in group}
            scores, refused = {}, {}
            for method, records in store.slice(name, scorer, count).items():
                reasons = [record["refused"] for record in records if "refused" in record]
                if reasons:
                    refused[method] = reasons[0]
                elif len(records) == len(groups):
                    found = {t: b for record in records for t, b in record["correct"].items()}
                    scores[method] = {t: as_score(found[t]) for t in pool.tasks if t in tasks}
            order = [c.name for c in study.contestants if c.name in scores]
            yield Comparison(
                name,
                scorer,
                count,
                {method: scores[method] for method in order},
                {task: bounds[BASE][task] for task in pool.tasks if task in tasks},
                {task: bounds[TUNED][task] for task in pool.tasks if task in tasks},
                refused,
            )


def by_place(study: Study, store: Store) -> dict[tuple[str, str], list[Comparison]]:
    """Return the comparisons of each pool and scorer."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons(study, store):
        if comparison.scores:
            found.setdefault((comparison.pool, comparison.scorer), []).append(comparison)
    return found


# ---------------------------------------------------------------------------------------- Tables


def tables(study: Study, store: Store) -> str:
    """Return the Markdown tables of docs/results.md."""
    parts = []
    found = by_place(study, store)
    if found:
        parts += [
            "### auto beside star, average and the best other method",
            differences_table(found),
        ]
    for (name, scorer), columns in found.items():
        pool = study.pools[name]
        rows = next(iter(columns[0].tuned.values())).n
        parts.append(f"### {name}, scorer {scorer}, {rows} rows a task")
        parts.append(f"{pool.role}: {pool.about}.")
        parts.append(averages_table(columns))
        reasons = {m: why for column in columns for m, why in column.refused.items()}
        parts += [f"- {method} is refused: {why}" for method, why in reasons.items()]
    if found:
        parts.append("### Accuracy, task by task")
        parts += [accuracy_table(columns[-1]) for columns in found.values()]
    neutral = neutral_table(study, store)
    if neutral:
        parts += ["### Text that the base wrote itself, nats a token", neutral]
    return "\n\n".join(parts)


def averages_table(columns: Sequence[Comparison]) -> str:
    """Return the normalised averages: a row for each method, a column for each n."""
    lines = [_header("normalised average", columns)]
    for method in [*_methods(columns), BASE]:
        cells = [_shown(c.average(method)) if _has(c, method) else "–" for c in columns]
        lines.append(_line(method, cells))
    return "\n".join(lines)


def differences_table(found: Mapping[tuple[str, str], Sequence[Comparison]]) -> str:
    """Return auto's paired differences to the references, and to the best method of all others."""
    lines = [
        "| pool | scorer | n | "
        + "".join(f"{AUTO} − {reference} | " for reference in REFERENCES)
        + f"methods | best other | {AUTO} − best other |",
        "|---|---|---:|" + "---:|" * len(REFERENCES) + "---:|---|---:|",
    ]
    for (name, scorer), columns in found.items():
        for column in columns:
            if {AUTO, *REFERENCES} <= column.scores.keys():
                best = column.best(without=AUTO)
                gains = [_shown(column.gain(AUTO, other)) for other in (*REFERENCES, best)]
                cells = [scorer, column.count, *gains[:-1], len(column.scores), f"`{best}`"]
                lines.append(_line(name, [*cells, gains[-1]], code=False))
    return "\n".join(lines)


def accuracy_table(column: Comparison) -> str:
    """Return the accuracies of base, fine-tunes and merges: a row for each task."""
    names = [m for m in SHOWN if m in column.scores]
    lines = [
        f"| {column.pool}, {column.scorer}, n = {column.count} | {BASE} | {TUNED} | "
        + " | ".join(names)
        + " |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for task in column.tuned:
        scores = [column.base, column.tuned, *(column.scores[m] for m in names)]
        lines.append(_line(task, [f"{s[task].value:.2f}" for s in scores], code=False))
    return "\n".join(lines)


def neutral_table(study: Study, store: Store) -> str:
    """Return the mean nats a token of the base's own text, and by how much merges raise it."""
    lines = []
    for name in study.pools:
        base = store.slice(name, NEUTRAL, 0).get(BASE)
        counts = sorted({k[1] for k in store.records if k[0] == name and k[4] == NEUTRAL} - {0})
        for count in counts if base else []:
            before = np.array(base[0]["nats"])
            found = store.slice(name, NEUTRAL, count)
            for method in [c.name for c in study.contestants if c.name in found]:
                nats = [record["nats"] for record in found[method] if "nats" in record]
                if nats:
                    rise = np.mean(nats, axis=0) - before
                    low, high = _of_texts(rise)
                    shown = f"{rise.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
                    cells = [count, f"`{method}`", f"{np.mean(nats):.3f}", shown]
                    lines.append(_line(name, cells, code=False))
            lines.append(_line(name, [count, "*base*", f"{before.mean():.3f}", ""], code=False))
    head = ["| pool | n | method | nats a token | − base |", "|---|---:|---|---:|---:|"]
    return "\n".join([*head, *lines]) if lines else ""


def _of_texts(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over texts."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return percentiles(values[drawn].mean(1))[:2]


def _methods(columns: Sequence[Comparison]) -> list[str]:
    """Return the methods of any column; the first column that has a method places it."""
    return list(dict.fromkeys(m for column in columns for m in column.scores))


def _has(column: Comparison, method: str) -> bool:
    return method == BASE or method in column.scores


def _header(title: str, columns: Sequence[Comparison]) -> str:
    counts = " | ".join(f"n = {column.count}" for column in columns)
    return f"| {title} | {counts} |\n|---|" + "---:|" * len(columns)


def _line(first: str, cells: Sequence[object], *, code: bool = True) -> str:
    name = f"*{BASE}*" if first == BASE else f"`{first}`" if code else first
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _shown(value: Interval | Difference) -> str:
    if isinstance(value, Interval):
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
    text = f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
    return f"**{text}**" if value.clear else text


# --------------------------------------------------------------------------------------- Figures

DRAWN = plot_styles(["average", "star", AUTO, "tsv_m", "covariance+own_response"])
"""Methods with a look of their own; the others are thin and grey."""


def figures(study: Study, store: Store, folder: Path) -> None:
    """Draw the three figures of docs/results.md."""
    found = by_place(study, store)
    with styled():
        plot_counts(found, folder / "results_by_count.png")
        plot_gains(found, folder / "results_differences.png")
    whole = [c for cs in found.values() for c in cs if all(m in c.scores for m in SHOWN)]
    column = max(whole, key=lambda c: (c.count, c.scorer == "rank"))
    shown = {BASE: column.base} | {method: column.scores[method] for method in SHOWN}
    plot_scores(
        Evaluation(column.scorer, "strict", shown, column.tuned),
        folder / "results_by_task.png",
        title=f"Pool {column.pool}, one merge of {column.count} adapters, scorer {column.scorer}",
    )


def plot_counts(found: Mapping[tuple[str, str], Sequence[Comparison]], path: Path) -> None:
    """Draw the normalised average against n, a panel for each pool that was ranked."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import)

    panels = {name: columns for (name, scorer), columns in found.items() if scorer == "rank"}
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(3.6 * across + 2.8, 3.6 * down),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, (name, columns) in zip(axes.flat, panels.items(), strict=False):
        methods = _methods(columns)
        # The coloured ones last, so that they lie above the others.
        for place, method in enumerate(sorted(methods, key=lambda m: m in DRAWN)):
            shown = [(c.count, c.average(method)) for c in columns if method in c.scores]
            shift = 1 + 0.012 * (place - len(methods) / 2)
            values = np.array([(a.value, a.value - a.low, a.high - a.value) for _, a in shown])
            panel.errorbar(
                [count * shift for count, _ in shown],
                values[:, 0],
                yerr=values[:, 1:].T if method in DRAWN else None,
                **line_of(DRAWN[method])
                if method in DRAWN
                else {"color": "#c3cad1", "marker": "o"},
                linewidth=2.2 if method == AUTO else 1.3,
                elinewidth=0.8,
                markersize=5 if method in DRAWN else 3,
                label=method if method in DRAWN else "other methods",
            )
        panel.plot(
            [column.count for column in columns],
            [column.average(BASE).value for column in columns],
            **BASE_LINE,
            label=BASE,
        )
        counts = [column.count for column in columns]
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set_xlabel("models in a merge")
        panel.set_title(name, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("normalised average, 95 % interval")
    lines = {
        text: line
        for panel in axes.flat
        for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gains(found: Mapping[tuple[str, str], Sequence[Comparison]], path: Path) -> None:
    """Draw the paired differences to star, a block for each pool, scorer and n."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import)

    blocks = [c for columns in found.values() for c in columns if "star" in c.scores]
    rows = [(c, m) for c in blocks for m in c.scores if m in DRAWN and m != "star"]
    figure, axes = plt.subplots(
        figsize=(7.5, 0.21 * (len(rows) + len(blocks)) + 1), layout="constrained"
    )
    places, names, place = [], [], 0.0
    for number, (column, method) in enumerate(rows):
        if not number or rows[number - 1][0] is not column:
            places.append(place)
            names.append(f"{column.pool}, {column.scorer}, n = {column.count}")
            place += 1
        gain = column.gain(method, "star")
        axes.errorbar(
            gain.value,
            place,
            xerr=[[gain.value - gain.low], [gain.high - gain.value]],
            **dot_of(DRAWN[method]),
            markersize=6 if method == AUTO else 4.5,
            linewidth=1.4,
        )
        places.append(place)
        names.append(method)
        place += 1
    axes.axvline(0, color=DRAWN["star"].colour, linewidth=1, zorder=0)
    axes.set_yticks(places, names, fontsize=9)
    for label in axes.get_yticklabels():
        if label.get_text() not in DRAWN:
            label.set_fontweight("bold")
    axes.set_ylim(place - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("normalised average − that of star, paired 95 % interval")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------- Command line


def parse_options(study: Study) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        "train": "train the adapters that are missing, and print the command of each",
        "run": "merge, ask, and add to the store what it lacks",
        "tables": "print the tables of docs/results.md",
        "figures": "draw the figures of docs/results.md",
    }
    for name, text in made.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name in ("train", "run"):
            command.add_argument(
                "pool", nargs="*", help=f"of {', '.join(study.pools)} (default: all)"
            )
            command.add_argument(
                "--pools",
                type=Path,
                required=True,
                metavar="DIR",
                help="folder with a sub-folder for each pool, and in it one for each adapter",
            )
        if name == "run":
            command.add_argument(
                "--neutral",
                action="store_true",
                help="also let each merge read text that the base wrote",
            )
        if name == "figures":
            command.add_argument(
                "--output", type=Path, default=FIGURES, help="folder (default: docs/figures)"
            )
        if name != "train":
            command.add_argument(
                "--store", type=Path, default=STORE, help=f"(default: {STORE.name} beside this)"
            )
    options = parser.parse_args()
    unknown = sorted(set(getattr(options, "pool", ())) - study.pools.keys())
    if unknown:
        parser.error(f"there is no pool {unknown[0]!r} among {', '.join(study.pools)}")
    return options


def main() -> int:
    """Do what the command line says."""
    study = Study(yaml.safe_load(STUDY.read_text(encoding="utf-8")))
    options = parse_options(study)
    if options.command == "train":
        for name in options.pool or study.pools:
            train(study.pools[name], options.pools, prepared_base())
        return 0
    store = Store(options.store)
    if options.command == "tables":
        print(tables(study, store))
    elif options.command == "figures":
        figures(study, store, options.output)
    else:
        print_machine()
        laboratory = Laboratory(study, store, prepared_base(), options.pools)
        for run in study.runs:
            if not options.pool or run.pool.name in options.pool:
                if options.neutral:
                    laboratory.ask_base_neutral(run.pool)
                laboratory.run(run, neutral=options.neutral)
                gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
