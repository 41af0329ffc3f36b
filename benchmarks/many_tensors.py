"""What a tensor costs: models of thousands of tiny ones, merged from files to files.

Llama-shaped bfloat16 bases of width 64, as deep as it takes, with three kinds of models to merge:
four adapters on q_proj and v_proj (two tensors in nine are merged by STAR, the others copied), four
adapters on all linear modules (seven in nine), and four full fine-tunes (all, by ``average``). The
merges are called in this process, in turns. A line is fitted to the seconds over the number of
tensors: its slope is what a tensor costs, its start what a merge costs without any; how far the
largest model lies off the line through the two smaller ones tells whether the cost is linear.

The overhead that the target is about is that of a tensor which is copied or averaged. The
decompositions of STAR are work, not overhead, however small the deltas: 0.3 to 0.5 ms each.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import median

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
from common import (
    Cost,
    file_system,
    parse_run,
    parser_of,
    print_machine,
    print_targets,
    scratch_folder,
    take_turns,
)
from synthetic import ALL_LINEAR, QUERY_VALUE, Llama, make_adapters, make_base, make_finetunes

import starmerge_models

MODELS = 4
TINY = Llama(hidden=64, intermediate=176, layers=0, vocabulary=256, key_value=16, head=16)
IN_LAYER = len(ALL_LINEAR) + 2
"""Tensors of a layer; two are norms."""
TARGET = 1.0
"""Greatest cost of a tensor in milliseconds of wall time."""


@dataclass(frozen=True)
class Kind:
    """A kind of models to merge."""

    title: str
    method: str
    make: Callable[[Path, Llama, int], dict[str, Path]]


KINDS = (
    Kind("adapters on q and v, `star`", "star", partial(make_adapters, targets=QUERY_VALUE)),
    Kind("adapters on all linear, `star`", "star", partial(make_adapters, targets=ALL_LINEAR)),
    Kind("full fine-tunes, `average`", "average", make_finetunes),
)


def tiny_model(tensors: int) -> Llama:
    """Return a model of about so many tensors."""
    return replace(TINY, layers=round((tensors - len(TINY.tensors)) / IN_LAYER))


def bench(counts: tuple[int, ...], options: argparse.Namespace) -> None:
    """Time all kinds on all sizes, print the table."""
    models = [tiny_model(count) for count in counts]
    wanted = sum(model.nbytes for model in models) * (3 + 3 * MODELS)
    with scratch_folder(options.scratch, wanted) as scratch:
        output = scratch / "output"
        contestants: dict[tuple[Kind, int], Callable[[], object]] = {}
        for model in models:
            count = len(model.tensors)
            base = make_base(scratch / f"base-{count}", model)
            for number, kind in enumerate(KINDS):
                inputs = kind.make(scratch / f"models-{number}-{count}", model, MODELS)
                contestants[kind, count] = partial(
                    starmerge_models.merge,
                    base,
                    inputs,
                    kind.method,
                    output=output,
                    threads=options.threads,
                )
        print(
            f"{', '.join(str(len(model.tensors)) for model in models)} tensors of up to "
            f"{TINY.largest} bytes, {MODELS} models; {file_system(scratch)}; {options.turns} turns"
        )
        costs = take_turns(contestants, options.turns, clean_up=lambda: rmtree(output))
    print("\n| | tensors | wall, s | CPU, s | wall, ms a tensor | CPU, ms a tensor |")
    print("|---|---:|---:|---:|---:|---:|")
    for (kind, count), mine in costs.items():
        wall, cpu = middle(mine, "wall"), middle(mine, "cpu")
        each = f"{1e3 * wall / count:.3f} | {1e3 * cpu / count:.3f}"
        print(f"| {kind.title} | {count} | {wall:.3f} | {cpu:.3f} | {each} |")
    print("\n| line through | wall, ms a tensor | CPU, ms a tensor | start, s | largest model |")
    print("|---|---:|---:|---:|---:|")
    for kind in KINDS:
        print(fitted(kind, {count: mine for (own, count), mine in costs.items() if own is kind}))
    print_targets([f"Target: < {TARGET:g} ms a tensor, beside its arithmetic"], full=options.full)


def fitted(kind: Kind, costs: dict[int, list[Cost]]) -> str:
    """Return the row of the table of lines for one kind."""
    counts = np.array(list(costs))
    wall = np.array([middle(mine, "wall") for mine in costs.values()])
    cpu = np.array([middle(mine, "cpu") for mine in costs.values()])
    slope, start = np.polyfit(counts, wall, 1)
    cells = [kind.title, f"{1e3 * slope:.3f}", f"{1e3 * np.polyfit(counts, cpu, 1)[0]:.3f}"]
    cells.append(f"{start:.2f}")
    before = np.polyfit(counts[:-1], wall[:-1], 1)
    cells.append(f"{wall[-1] / np.polyval(before, counts[-1]) - 1:+.0%}")
    return f"| {' | '.join(cells)} |"


def middle(costs: list[Cost], kind: str) -> float:
    """Return the median of the "wall" or "cpu" seconds."""
    return float(median(getattr(cost, kind) for cost in costs))


def main() -> int:
    """Run the benchmark."""
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=int, metavar="N", help="as of `starmerge merge`")
    options = parse_run(parser, small=2, full=3)
    print_machine()
    bench((1000, 3000, 10000) if options.full else (250, 500, 1000), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
