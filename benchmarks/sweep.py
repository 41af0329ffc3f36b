"""What a sweep costs on a loaded model, beside merging files and loading the result at each point.

A sweep tries values of STAR's η, methods, or all models but one. At each point the merged weights
are wanted in a ``transformers`` model:

- in memory: ``load_task_vectors`` once, at each point ``with apply(model, vectors.merge(...))``;
  the base is loaded beforehand, and is the base again after each point;
- in memory, decomposed before: the same with the task vectors that a sweep before has read and
  decomposed;
- by files: at each point ``starmerge_models.merge`` and ``from_pretrained``, in at most two turns.

The models are the demo's. With --full there are more points, and an η-sweep of 20 adapters of all
linear modules of a synthetic base.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from statistics import median

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from common import (
    add_models,
    find_models,
    parse_run,
    parser_of,
    print_machine,
    scratch_folder,
    table,
    take_turns,
    timed,
)
from synthetic import ALL_LINEAR, RANK, llama_of, make_adapters, make_base
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import starmerge_models
from starmerge_models.methods import Pipeline, make_pipeline

IN_MEMORY = "in memory"
AGAIN = "in memory, decomposed before"
BY_FILES = "by files"
TURNS_BY_FILES = 2
"""At most so many: they are long, and vary little."""
SYNTHETIC = 1.5e9
"""Bytes of the synthetic base."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep."""

    method: Pipeline
    models: tuple[str, ...]


def sweeps(names: Sequence[str], *, full: bool) -> dict[str, list[Point]]:
    """Return the sweeps, by name."""
    everyone = tuple(names)
    methods = ["average", "star"]
    methods += ["ties", "task_arithmetic", "tsv_m", "iso_c", "knots", "star+ties"] if full else []
    left_out = everyone if full else everyone[:2]
    return {
        "η of STAR": [star(eta, everyone) for eta in (range(10, 91, 10) if full else (20, 50))],
        "methods": [Point(make_pipeline(method), everyone) for method in methods],
        "STAR of all models but one": [
            star(40, tuple(name for name in everyone if name != out)) for out in left_out
        ],
    }


def star(eta: float, models: tuple[str, ...]) -> Point:
    """Return a point of STAR."""
    return Point(make_pipeline("star", {"eta": eta}), models)


def bench(
    model: PreTrainedModel,
    base: Path,
    adapters: dict[str, Path],
    points: Sequence[Point],
    options: argparse.Namespace,
) -> None:
    """Time a sweep, print the table."""

    def try_all(vectors: starmerge_models.TaskVectors) -> None:
        for point in points:
            update = vectors.merge(point.method, models=point.models, threads=options.threads)
            with starmerge_models.apply(model, update, threads=options.threads):
                pass

    def by_files(target: Path) -> None:
        for point in points:
            chosen = {name: adapters[name] for name in point.models}
            starmerge_models.merge(
                base, chosen, point.method, output=target, threads=options.threads
            )
            load(target)
            rmtree(target)

    read = starmerge_models.load_task_vectors(base, adapters)
    nbytes = sum(file.stat().st_size for file in base.iterdir())
    with scratch_folder(options.scratch, 1.1 * nbytes) as scratch:
        contestants: dict[str, Callable[[], object]] = {
            IN_MEMORY: lambda: try_all(starmerge_models.load_task_vectors(base, adapters)),
            AGAIN: lambda: try_all(read),
            BY_FILES: lambda: by_files(scratch / "merged"),
        }
        fewer = {BY_FILES: min(options.turns, TURNS_BY_FILES)}
        costs = take_turns(contestants, options.turns, fewer=fewer)
    print(table(costs, reference=IN_MEMORY))
    each = {
        label: median(cost.wall for cost in mine) / len(points) for label, mine in costs.items()
    }
    print("\nA point: " + ", ".join(f"{label} {seconds:.3f} s" for label, seconds in each.items()))


def load(folder: Path) -> PreTrainedModel:
    """Load a model in the dtype of its files."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def print_pieces(model: PreTrainedModel, base: Path, adapters: dict[str, Path]) -> None:
    """Print what the steps of one point take, the first time and later."""
    vectors, cost = timed(lambda: starmerge_models.load_task_vectors(base, adapters))
    print(f"load_task_vectors: {cost.wall:.3f} s")
    for title, eta in (("first", 40), ("later", 20)):
        update, merging = timed(lambda eta=eta: vectors.merge(starmerge_models.Star(eta=eta)))
        applied, applying = timed(lambda update=update: starmerge_models.apply(model, update))
        _, restoring = timed(applied.restore)
        print(
            f"{title} point: merge {merging.wall:.3f} s, apply {applying.wall:.3f} s, "
            f"restore {restoring.wall:.3f} s"
        )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add_models(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="as of `starmerge merge`")
    return parse_run(parser, small=1, full=3)


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    logging.disable_progress_bar()
    print_machine()
    base, paths = find_models(options)
    adapters = {path.name: path for path in paths}
    model = load(base)
    print(f"\nThe demo's base, {model.num_parameters() / 1e6:.0f}M parameters in {model.dtype};")
    print(f"{len(adapters)} adapters; {options.turns} turns\n")
    print_pieces(model, base, adapters)
    for title, points in sweeps(list(adapters), full=options.full).items():
        print(f"\nSweep over {title}, {len(points)} points\n")
        bench(model, base, adapters, points, options)
    if options.full:
        llama = llama_of(SYNTHETIC)
        wanted = llama.nbytes + 20 * llama.adapter_bytes(ALL_LINEAR)
        with scratch_folder(options.scratch, wanted) as scratch:
            base = make_base(scratch / "base", llama)
            adapters = make_adapters(scratch / "adapters", llama, 20)
            model = load(base)
            print(f"\nA synthetic base, {llama.parameters / 1e6:.0f}M parameters in {model.dtype};")
            print(f"{len(adapters)} adapters of rank {RANK} of all linear modules\n")
            print_pieces(model, base, adapters)
            points = [star(eta, tuple(adapters)) for eta in (20, 50, 80)]
            print(f"\nSweep over η of STAR, {len(points)} points\n")
            bench(model, base, adapters, points, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
