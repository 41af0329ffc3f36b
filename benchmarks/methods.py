"""What each method costs: seconds and memory for one large matrix.

Part A merges 8 LoRA adapters of rank 16, Part B 20 of them, of a 4096 × 4096 weight; Part C merges
4 full-rank task vectors. Adapters have bfloat16 factors as in the wild: A as PEFT initialises it,
B small, with a spectrum that decays. Full-rank task vectors are float32: a decaying part of low
rank and noise.

Every method goes through ``starmerge_models.merge_state`` with its defaults: a transform is
followed by ``average``, a post-step follows it. Each has a process of its own. The memory is the
peak of the process during the merge minus what it had with the inputs loaded: what the merge itself
needs, its result included. The median of ``--repeat`` merges counts; one that takes longer than a
minute is not repeated.

In Part C the methods that decompose take float64 SVDs, minutes each at 4096 × 4096: think of
``--dense-size 1024``, ``--only`` and ``--skip``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import Cost, parser_of, print_machine, timed
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import METHODS, make_pipeline

Result = TypeVar("Result")

REFERENCE = "average"
SIZE = 4096
RANK = 16
LONG = 60
"""Seconds after which a merge is not repeated."""
DECAY = 0.7
"""Ratio of neighbouring singular values; in the demo's adapters the first has half of the sum."""


@dataclass(frozen=True)
class Measured:
    """What merging with one method took."""

    costs: list[Cost]
    memory: int | None
    """Bytes; None where the system does not tell."""

    def median(self, kind: str) -> float:
        """Return the median of the "wall" or "cpu" seconds."""
        return float(median(getattr(cost, kind) for cost in self.costs))


# --------------------------------------------------------------------------------- The task vectors


def adapters(count: int) -> list[Delta]:
    """Return the deltas of some LoRA adapters of a SIZE × SIZE weight."""
    return [adapter(torch.Generator().manual_seed(seed)) for seed in range(count)]


def adapter(generator: torch.Generator) -> LowRank:
    """Return the delta of one adapter, alpha/r = 2."""
    # kaiming_uniform_ with a = √5, which is what nn.Linear and PEFT do.
    A = (2 * torch.rand(RANK, SIZE, generator=generator) - 1) / SIZE**0.5
    B = decaying(SIZE, RANK, generator) @ torch.randn(RANK, RANK, generator=generator)
    return LowRank((1e-3 * B).bfloat16(), A.bfloat16(), scale=2.0)


def full(count: int, size: int) -> list[Delta]:
    """Return the deltas of some full fine-tunes of a size × size weight."""
    return [finetuned(size, torch.Generator().manual_seed(seed)) for seed in range(count)]


def finetuned(size: int, generator: torch.Generator) -> Dense:
    """Return the delta of one full fine-tune."""
    delta = torch.randn(size, size, generator=generator).mul_(1e-4)
    right = torch.randn(RANK, size, generator=generator)
    return Dense(delta.addmm_(decaying(size, RANK, generator), right, alpha=1e-3))


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix whose columns get smaller."""
    return torch.randn(rows, columns, generator=generator) * DECAY ** torch.arange(columns)


# --------------------------------------------------------------------------------------- Measuring


def measure(make: Callable[[], list[Delta]], method: str, repeat: int, threads: int) -> Measured:
    """Merge one matrix some times, in a process that does nothing else.

    Raises:
        UsageError: The method does not merge such inputs in memory.
    """
    torch.set_num_threads(threads)
    merge = partial(merge_state, method=make_pipeline(method))
    models = [{"weight": delta} for delta in make()]
    merge([{"weight": corner(model["weight"])} for model in models])  # loads what libraries need
    before = reset_peak_memory()
    costs: list[Cost] = []
    while not costs or (len(costs) < repeat and costs[-1].wall < LONG):
        costs.append(timed(partial(merge, models))[1])
    return Measured(costs, None if before is None else memory("VmHWM") - before)


def corner(delta: Delta) -> Delta:
    """Return the upper left corner of a delta."""
    if isinstance(delta, LowRank):
        return LowRank(delta.B[:RANK], delta.A[:, :RANK], delta.scale)
    return Dense(delta.tensor[:RANK, :RANK])


def reset_peak_memory() -> int | None:
    """Let the peak of this process start anew; return its resident memory, None if not on Linux."""
    gc.collect()
    peaks = Path("/proc/self/clear_refs")
    if not peaks.is_file():
        return None
    # What the inputs' making left in the heap would be used again, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    peaks.write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    """Return a number of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def in_own_process(work: Callable[[], Result], start: Literal["spawn", "fork"] = "spawn") -> Result:
    """Call a function in a new process.

    Args:
        work: The function.
        start: "fork" saves the imports, where this process has computed nothing and its threads'
            settings are those of the new one.

    Raises:
        BrokenProcessPool: The process was killed.
    """
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work).result()


# ---------------------------------------------------------------------------------------- Printing


def bench(
    make: Callable[[], list[Delta]], methods: Sequence[str], repeat: int, threads: int
) -> None:
    """Measure all methods on the same inputs; print the table as it grows."""
    print("\n| method | wall, s | CPU, s | wall, × average | memory, MiB |")
    print("|---|---:|---:|---:|---:|", flush=True)
    reference = 0.0
    refused = {}
    for method in methods:
        try:
            measured = in_own_process(partial(measure, make, method, repeat, threads))
        except (StarmergeError, BrokenProcessPool) as error:
            refused[method] = str(error).removeprefix(f"{method}: ")
            print(f"| {method} | – | – | – | – |", flush=True)
            continue
        wall = measured.median("wall")
        reference = reference or wall  # the reference comes first
        peak = "–" if measured.memory is None else f"{measured.memory / 2**20:.0f}"
        row = (method, digits(wall), digits(measured.median("cpu")), digits(wall / reference), peak)
        print(f"| {' | '.join(row)} |", flush=True)
    if refused:
        print()
    for method, reason in refused.items():
        print(f"- {method}: {reason}")


def digits(value: float) -> str:
    """Return a number with three digits, more where they stand before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        help="these methods or chains, such as star+ties (default: all methods)",
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="METHOD", help="not these")
    parser.add_argument("--part", choices=("A", "B", "C"), help="only this part (default: all)")
    parser.add_argument(
        "--dense-size",
        type=int,
        default=SIZE,
        metavar="N",
        help=f"Part C: rows and columns of the weight (default: {SIZE})",
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="merges (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    options = parser.parse_args()
    if options.repeat < 1 or options.threads < 1 or options.dense_size < 1:
        parser.error("--repeat, --threads and --dense-size must be at least 1")
    kinds = ("transform", "merge", "post-step")
    known = sorted(METHODS, key=lambda name: (kinds.index(METHODS[name].kind), name))
    try:
        for method in options.only or []:
            make_pipeline(method)
    except UsageError as error:
        parser.error(str(error))
    chosen = [name for name in options.only or known if name not in {REFERENCE, *options.skip}]
    options.methods = [REFERENCE, *chosen]
    return options


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes to come
    print_machine()
    print(f"Threads: {options.threads}; repetitions: {options.repeat}, of which medians")
    size = options.dense_size
    parts = {
        "A": (f"8 adapters of rank {RANK}, {SIZE} × {SIZE}", partial(adapters, 8)),
        "B": (f"20 adapters of rank {RANK}, {SIZE} × {SIZE}", partial(adapters, 20)),
        "C": (f"4 full-rank task vectors, {size} × {size}", partial(full, 4, size)),
    }
    for part, (title, make) in parts.items():
        if options.part in (None, part):
            print(f"\nPart {part}: {title}")
            bench(make, options.methods, options.repeat, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
