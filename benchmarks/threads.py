"""What threads are worth: the same merges with 1, 2 and 4 of them, alone and beside a neighbour.

starmerge merges several tensors at once, each with one BLAS thread, and idle OpenMP threads sleep.
"Library defaults" is what a loop over the tensors gets: one tensor at a time, with as many BLAS
threads as there are cores, which spin while they wait for each other.

The neighbour keeps all cores busy with as many processes as there are. Then half of the machine is
a fair share, so a merge that used all cores should take twice as long; one that takes much longer
has collapsed. The CPU time shows what spinning costs, alone too.

Part A merges adapters of rank 16 on all linear modules, Part B full fine-tunes, whose matrices are
decomposed; both by STAR, from files to files. Each contestant has a process of its own that has its
libraries loaded. All take turns, alone and beside the neighbour. A merge that takes longer than 5
seconds, with --full 60, is given up.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from shutil import rmtree
from statistics import median

from common import (
    Cost,
    file_system,
    parse_run,
    parser_of,
    print_machine,
    scratch_folder,
    span,
    timed,
)
from synthetic import Llama, llama_of, make_adapters, make_base, make_finetunes

import starmerge_models
from starmerge_models.merging import engine
from starmerge_models.merging.executors.threads import Threads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ALONE, BESIDE = "alone", "beside a neighbour"
NEIGHBOUR = "x = 1.0\nwhile True: x = x * 1.0000001 % 7"


@dataclass(frozen=True, eq=False)
class Contestant:
    """A way to use threads."""

    title: str
    threads: int
    """Tensors at once."""
    workers: type[Threads]
    environment: Mapping[str, str]
    """What the process has in its environment beside the usual."""


class Unlimited(Threads):
    """Threads with as many BLAS threads each as the libraries take by themselves."""

    def __enter__(self) -> Threads:
        super().__enter__()
        self._pool = ThreadPoolExecutor(self.threads)  # the other has not begun a thread
        return self


PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""As starmerge's command line sets it."""

CONTESTANTS = (
    *(Contestant(f"`threads={count}`", count, Threads, PASSIVE) for count in (1, 2, 4)),
    Contestant(f"library defaults: 1 tensor, {CORES} BLAS threads", 1, Unlimited, {}),
)


def merge(base: Path, models: dict[str, Path], output: Path, contestant: Contestant) -> Cost:
    """Merge in this process; return what it cost."""
    engine.Threads = contestant.workers
    run = partial(
        starmerge_models.merge, base, models, "star", output=output, threads=contestant.threads
    )
    cost = timed(run)[1]
    rmtree(output)
    return cost


class Runner:
    """A process that merges for a contestant, in its environment."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._start()

    def merge(self, base: Path, models: dict[str, Path], output: Path, limit: float) -> Cost:
        """Return what a merge cost; infinity if it took longer than ``limit`` seconds."""
        work = self._pool.apply_async(merge, (base, models, output, self._contestant))
        try:
            return work.get(limit)
        except TimeoutError:
            self._pool.terminate()
            self._start()
            return Cost(math.inf, math.inf)

    def stop(self) -> None:
        """End the process, which is idle: to terminate it could wait for ever."""
        self._pool.close()
        self._pool.join()

    def _start(self) -> None:
        before = dict(os.environ)
        for key in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"):
            os.environ.pop(key, None)
        os.environ.update(self._contestant.environment)
        self._pool = get_context("spawn").Pool(1)
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def neighbour(condition: str) -> Iterator[None]:
    """Keep all cores busy, if that is the condition."""
    count = CORES if condition == BESIDE else 0
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def bench(base: Path, models: dict[str, Path], scratch: Path, options: argparse.Namespace) -> None:
    """Time all contestants alone and beside the neighbour, print the table."""
    limit = 60 if options.full else 5
    runners = {one: Runner(one) for one in CONTESTANTS}
    costs: dict[tuple[str, Contestant], list[Cost]] = {
        (condition, one): [] for condition in (ALONE, BESIDE) for one in CONTESTANTS
    }
    try:
        for one, runner in runners.items():  # fills the page cache and loads libraries
            runner.merge(base, models, scratch / f"first-{one.threads}", limit)
        for turn in range(options.turns):
            for condition in (ALONE, BESIDE):
                with neighbour(condition):
                    for number, (one, runner) in enumerate(runners.items()):
                        mine = costs[condition, one]
                        if any(cost.wall == math.inf for cost in mine):
                            continue
                        output = scratch / f"output-{condition}-{turn}-{number}"
                        mine.append(runner.merge(base, models, output, limit))
    finally:
        for runner in runners.values():
            runner.stop()
    print(table(costs, limit))


def table(costs: Mapping[tuple[str, Contestant], list[Cost]], limit: float) -> str:
    """Return the Markdown table of one part."""
    lines = [
        f"| | wall {ALONE}, s | CPU, s | wall {BESIDE}, s | CPU, s | wall, beside ÷ alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in CONTESTANTS:
        alone, beside = costs[ALONE, one], costs[BESIDE, one]
        cells = []
        for mine in (alone, beside):
            is_over = any(cost.wall == math.inf for cost in mine)
            for kind in ("wall", "cpu"):
                middle = median(getattr(cost, kind) for cost in mine)
                cells.append(
                    (f"> {limit:g}" if kind == "wall" else "–") if is_over else f"{middle:.3f}"
                )
        is_over = "–" in cells
        slower = [b.wall / a.wall for a, b in zip(alone, beside, strict=False)]
        lines.append(f"| {one.title} | {' | '.join(cells)} | {'–' if is_over else span(slower)} |")
    return "\n".join(lines)


def described(model: Llama) -> str:
    """Return a model's sizes in words."""
    return f"{model.nbytes / 1e6:.0f} MB, {model.layers} layers of {model.hidden}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=("A", "B"), help="only this part (default: both)")
    return parse_run(parser, small=1, full=3)


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    print_machine()
    print(f"Usable cores: {CORES}; {options.turns} turns")
    if options.part != "B":
        model, count = (
            (llama_of(0.3e9), 20) if options.full else (replace(llama_of(0), layers=3), 8)
        )
        wanted = 4.2 * model.nbytes + count * model.adapter_bytes(tuple(model.linear))
        with scratch_folder(options.scratch, wanted) as scratch:
            base = make_base(scratch / "base", model)
            adapters = make_adapters(scratch / "models", model, count)
            print(f"\nPart A: {count} adapters into {described(model)}; {file_system(scratch)}\n")
            bench(base, adapters, scratch, options)
    if options.part != "A":
        model, count = Llama(256, 704, 1, 1024, 128), 2
        if options.full:
            model, count = Llama(1024, 2816, 2, 8192, 256), 4
        with scratch_folder(options.scratch, (count + 4.2) * model.nbytes) as scratch:
            base = make_base(scratch / "base", model)
            models = make_finetunes(scratch / "models", model, count)
            print(f"\nPart B: {count} full fine-tunes of {described(model)}\n")
            bench(base, models, scratch, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
