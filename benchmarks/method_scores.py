"""What each method keeps: the demo's eight adapters merged with all methods, and scored.

Every method is taken with its defaults (a transform is followed by ``average``, a post-step follows
it), and the chains and parameters of ``CHAINS`` besides. Base, adapters and merges answer the same
held-out rows of the demo's tasks. A merge is written, asked and deleted before the next; one with
the same weights as an earlier one gets its scores. A method that makes a model for each task is
asked each task of that task's model.

The first table has the normalised averages, the best first, with 95 % intervals; the difference to
``star`` is paired, row by row, so that it may be clear where the intervals overlap. ``star`` is
always among the methods. The second table has the accuracies.

With ``--output``, a folder gets both tables, a chart and ``scores.json``, which grows with each
merge: ``pandas.DataFrame(json.load(open("scores.json"))["merges"])``, or ``["scores"]``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from common import parser_of, print_machine

from starmerge_models.demo_names import prepared_base
from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.evaluation.models.scorers import SCORERS
from starmerge_models.evaluation.prepared_tasks import AnyTask
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.merging.engine import merge
from starmerge_models.methods import METHODS, make_pipeline
from starmerge_models.study.figures import plot_methods
from starmerge_models_demo import ADAPTERS


@dataclass(frozen=True)
class Contestant:
    """A method or a chain, with the parameters that differ from its defaults."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """The parameters as people read them."""
        return ", ".join(f"{key}={value}" for key, value in self.parameters.items())

    @property
    def has_one_model(self) -> bool:
        """Whether what it makes is one model for all tasks."""
        return "model" in make_pipeline(self.method, self.parameters).merge.outputs

    @property
    def name(self) -> str:
        """What it is called among the models of the evaluation."""
        return f"{self.method} {self.settings}".rstrip()


REFERENCE = Contestant("star")

CHAINS = (
    Contestant("star", {"eta": 20}),
    Contestant("star", {"eta": 60}),
    Contestant("star+task_arithmetic"),
    Contestant("star+ties"),
    Contestant("star+own_response"),
    Contestant("dare+task_arithmetic"),
    Contestant("dare+ties"),
    Contestant("della+ties", {"k": 100}),
    Contestant("task_arithmetic", {"alpha": 0.2}),
    Contestant("task_arithmetic+svc"),
    Contestant("covariance+own_response"),
    Contestant("covariance+own_response", {"side": "output"}),
    Contestant("iso_c+own_response"),
    Contestant("iso_cts+own_response"),
    Contestant("tsv_m+own_response"),
    Contestant("pico+task_arithmetic+mean_norm"),
)
"""Chains and parameters worth seeing beside the methods with their defaults."""


@dataclass(frozen=True)
class Setting:
    """What the contestants merge, and how they are asked."""

    base: Path
    adapters: Mapping[str, Path]
    settings: Settings

    @property
    def tasks(self) -> list[AnyTask]:
        """The tasks, one for each adapter."""
        return [find_task(name) for name in self.adapters]

    def ask(self, model: Path, tasks: Sequence[AnyTask]) -> Mapping[str, Score]:
        """Score one model: as the base of an evaluation without others."""
        return evaluate(model, {}, tasks, self.settings).scores[BASE]


# ------------------------------------------------------------------------------ Merging and asking


class Arena:
    """Merges and asks one contestant after the other.

    Args:
        setting: What they merge.
        scratch: Folder for the merged models.
    """

    def __init__(self, setting: Setting, scratch: Path) -> None:
        self._setting = setting
        self._scratch = scratch
        self._known: dict[str, Mapping[str, Score]] = {}

    def scores(self, contestant: Contestant) -> tuple[Mapping[str, Score], float]:
        """Return a contestant's scores by task, and the seconds that the merge took.

        Raises:
            StarmergeError: The method does not merge these adapters.
        """
        setting, output = self._setting, self._scratch / "merged"
        pipeline = make_pipeline(contestant.method, contestant.parameters)
        begin = time.perf_counter()
        merge(setting.base, setting.adapters, pipeline, output=output)
        seconds = time.perf_counter() - begin
        try:
            if "model" not in pipeline.merge.outputs:
                return self._ask_each(output), seconds
            weights = digest(output)
            if weights not in self._known:
                self._known[weights] = setting.ask(output, setting.tasks)
            return self._known[weights], seconds
        finally:
            rmtree(output)

    def _ask_each(self, merged: Path) -> Mapping[str, Score]:
        """Make and ask each task's model."""
        setting, output = self._setting, self._scratch / "own"
        scores: dict[str, Score] = {}
        for task in setting.tasks:
            merge(setting.base, {task.name: merged / task.name}, "average", output=output)
            scores |= setting.ask(output, [task])
            rmtree(output)
        return scores


def digest(model: Path) -> str:
    """Return the SHA-256 of a model's weights."""
    weights = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        weights.update(file.read_bytes())
    return weights.hexdigest()


# ---------------------------------------------------------------------------------------- Printing


def record(contestant: Contestant, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """Return what is known of a merge, flat, for JSON and table."""
    average = evaluation.normalised(contestant.name)
    is_reference = contestant == REFERENCE
    gain = None if is_reference else evaluation.difference(contestant.name, REFERENCE.name)
    return {
        "model": contestant.name,
        "method": contestant.method,
        "parameters": dict(contestant.parameters),
        "settings": contestant.settings,
        "one_model": contestant.has_one_model,
        **flat("average", average),
        **flat("difference_to_star", gain),
        "merge_seconds": seconds,
    }


def flat(key: str, interval: Interval | Difference | None) -> dict[str, float | None]:
    """Return an interval as three entries of a record."""
    values = (None,) * 3 if interval is None else (interval.value, interval.low, interval.high)
    return dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))


def averages(
    records: Sequence[Mapping[str, Any]], base: Interval | None, refused: Iterable[str]
) -> str:
    """Return the Markdown table of normalised averages, the best first."""
    rows = sorted(records, key=lambda record: -(record["average"] or 0))
    lines = ["| method | parameters | normalised average | − star |", "|---|---|---:|---:|"]
    lines += [
        f"| {row['method']} | {row['settings']}{'' if row['one_model'] else '*a model a task*'} "
        f"| {cell(row, 'average')} | {cell(row, 'difference_to_star', '+')} |"
        for row in rows
    ]
    lines.append(f"| *base* | | {cell(flat('average', base), 'average')} | |")
    lines += [f"| {name} | | – | – |" for name in refused]
    return "\n".join(lines)


def cell(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    """Return an interval of a record for people."""
    if row[key] is None:
        return "–"
    value, low, high = (f"{row[key + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def accuracies(evaluation: Evaluation, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of accuracies: a row for each model, a column for each task."""
    tasks = evaluation.tasks
    names = [record["model"] for record in sorted(records, key=lambda r: -(r["average"] or 0))]
    rows = {"*fine-tuned*": evaluation.tuned} | {name: evaluation.scores[name] for name in names}
    rows["*base*"] = evaluation.scores[BASE]
    lines = [f"| | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    lines += [
        f"| {name} | {' | '.join(f'{scores[task].value:.2f}' for task in tasks)} |"
        for name, scores in rows.items()
    ]
    shown = [score for scores in rows.values() for score in scores.values()]
    widest = max((score.high - score.low) / 2 for score in shown)
    lines.append(f"\nThe 95 % intervals of these accuracies reach at most {widest:.2f} each way.")
    return "\n".join(lines)


def tables(
    evaluation: Evaluation, records: Sequence[Mapping[str, Any]], refused: Mapping[str, str]
) -> str:
    """Return both tables, and between them why some methods are not merged."""
    parts = [averages(records, evaluation.normalised(BASE), refused)]
    if refused:
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in refused.items()))
    return "\n\n".join([*parts, accuracies(evaluation, records)])


def write_json(path: Path, evaluation: Evaluation, rows: int, records: Sequence[Any]) -> None:
    """Write what is known so far."""
    content = {
        "scorer": evaluation.scorer,
        "rows": rows,
        "merges": records,
        "scores": evaluation.to_records(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def contestants(only: Iterable[str] | None) -> list[Contestant]:
    """Return who takes part, the reference first."""
    everyone = [Contestant(name) for name in sorted(METHODS)] + list(CHAINS)
    chosen = [c for c in everyone if only is None or c.method in only]
    return [REFERENCE, *(contestant for contestant in chosen if contestant != REFERENCE)]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        help="these methods and chains (default: all methods, and the chains of this file)",
    )
    parser.add_argument(
        "--scorer", choices=sorted(SCORERS), default="generate", help="(default: generate)"
    )
    parser.add_argument(
        "--rows", type=int, default=100, metavar="N", help="held-out rows a task (default: 100)"
    )
    parser.add_argument("--output", type=Path, help="folder for tables, chart and scores.json")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for the merges, about 0.6 GB at a time (default: the system's for temporary "
        "files)",
    )
    options = parser.parse_args()
    if options.rows < 1:
        parser.error("--rows must be at least 1")
    known = {contestant.method for contestant in contestants(None)}
    unknown = sorted(set(options.only or ()) - known)
    if unknown:
        parser.error(f"--only: there is no {unknown[0]!r} among {', '.join(sorted(known))}")
    return options


def main() -> int:
    """Merge, score, print."""
    options = parse_options()
    adapters = {path.name: path for path in sorted(ADAPTERS.iterdir()) if path.is_dir()}
    setting = Setting(prepared_base(), adapters, Settings(options.scorer, rows=options.rows))
    print_machine()
    print(
        f"{len(adapters)} adapters of {setting.base.name}; scorer: {options.scorer}, "
        f"{options.rows} rows a task"
    )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate(setting.base, adapters, setting.tasks, setting.settings)
    records: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        arena = Arena(setting, Path(scratch))
        for contestant in contestants(options.only):
            name = contestant.name
            try:
                scores, seconds = arena.scores(contestant)
            except StarmergeError as error:
                refused[name] = str(error).removeprefix(f"{name}: ")
                continue
            evaluation = replace(evaluation, scores={**evaluation.scores, name: scores})
            records.append(record(contestant, evaluation, seconds))
            print(f"{name}: {cell(records[-1], 'average')}", file=sys.stderr, flush=True)
            if options.output is not None:
                write_json(options.output / "scores.json", evaluation, options.rows, records)
    text = tables(evaluation, records, refused)
    print(f"\n{text}")
    if options.output is not None:
        (options.output / "scores.md").write_text(text + "\n", encoding="utf-8")
        title = f"{len(adapters)} adapters of SmolLM2-135M-Instruct"
        plot_methods(evaluation, options.output / "scores.png", title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
