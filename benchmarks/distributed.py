"""What more machines are worth: merges by workers of Ray, measured here and simulated beyond.

**Measured.** Adapters of rank 16 on all linear modules, and full fine-tunes, whose matrices are
decomposed, both merged by STAR, by 1 and 2 threads and by 1 and 2 workers of a Ray cluster of this
machine. All take turns. Workers have been started before: how long that takes is told on its own.

**Simulated** (``cluster_model.py``). Unit costs of one core are measured here: operations in
float64 and float32, entries, bytes hashed and written; so is the driver's time for a group. The
counts of each tensor are those of ``on_paper.py``, its memory is what a plan estimates. First the
merges above, to compare; then a base of 405B with adapters and with full fine-tunes on nodes of a
cluster, whose processors, storage and network are options: no measurement, and the defaults are
those of nodes of 32 cores with 25 Gbit/s and a storage that gives 20 GB/s and takes 10.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree

import on_paper
import torch
from blake3 import blake3
from cluster_model import Cluster, Outcome, Tensor, simulate
from common import (
    file_system,
    parse_run,
    parser_of,
    print_machine,
    scratch_folder,
    span,
    table,
    take_turns,
)
from on_paper import ENTRY, MODELS, Rates, Work, duration
from synthetic import RANK, Llama, llama_of, make_adapters, make_base, make_finetunes

from starmerge_models import Pipeline, Star
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.executor import Executor, FunctionJob
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.fold import fold_bytes
from starmerge_models.merging.plan import make_plan
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.recipe import make_recipe

KEPT = 3
"""Triplets that STAR keeps of an adapter of rank 16, more or less."""
SHARE = 0.17
"""Of the triplets of a full fine-tune's matrix."""
GROUPS = 300


@dataclass(frozen=True)
class Units:
    """What one core does in a second, here, and the driver's seconds for a group."""

    rates: Rates
    write: float
    """Bytes a second into the page cache."""
    driver: float

    def tensor(self, work: Work, memory: float) -> Tensor:
        """Return what a tensor takes of a cluster."""
        seconds = self.rates.core_seconds(work) + work.written / self.write
        return Tensor(work.read, seconds, work.written, memory)


def best(work: Callable[[], object], times: int = 5) -> float:
    """Return the seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def measure(scratch: Path, driver: float) -> Units:
    """Measure what one core of this machine does in a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n = 1024
    A = torch.randn(n, n, dtype=torch.float64)
    B = A.float()
    entries = torch.randn(2**22).bfloat16()
    content = bytes(2**25)
    file = os.open(scratch / "unit", os.O_CREAT | os.O_WRONLY)
    moved = torch.ones(2**24, dtype=torch.float64)
    rates = Rates(
        disk_read=1.0,
        disk_write=1.0,
        cores=1,
        float64=2 * n**3 / best(lambda: A @ A),
        float32=2 * n**3 / best(lambda: B @ B),
        memory=moved.nbytes / best(moved.sum),
        entries=len(entries) / best(lambda: entries.float().add_(1.0).bfloat16()),
        hashing=len(content) / best(lambda: blake3(content, max_threads=1).digest()),
    )
    write = len(content) / best(lambda: os.pwrite(file, content, 0))
    os.close(file)
    torch.set_num_threads(threads)
    return Units(rates, write, driver)


def work_of(m: int, n: int, is_linear: bool, kind: str, count: int) -> Work:
    """Return the counts of a tensor of a merge by STAR."""
    work = Work(read=ENTRY * m * n, written=ENTRY * m * n)
    if kind == "adapters" and is_linear:
        work += on_paper.adapters(m, n, count, RANK, KEPT)
    elif kind == "full fine-tunes":
        work += on_paper.finetunes(m, n, count, SHARE if is_linear else None)
    return work


def memory_of(m: int, n: int, is_linear: bool, kind: str, count: int) -> int:
    """Return the bytes that merging a tensor by STAR takes, as a plan estimates them."""
    if kind == "adapters" and not is_linear:
        return 0
    rank = RANK if kind == "adapters" else None
    shape = (m,) if n == 1 else (m, n)
    is_embedding = n > 1 and not is_linear
    tensor = TensorShape(shape, is_embedding, (DeltaShape(rank),) * count, tasks=count)
    chain = Pipeline.of([Star()])
    held = tensor.factors(tensor.total_rank, ENTRY)  # factors, as they are stored
    return held + chain.memory(tensor) + fold_bytes(m, n, chain.result(tensor).rank or 0)


def simulated(model: Llama, kind: str, count: int, units: Units, cluster: Cluster) -> Outcome:
    """Simulate a merge by STAR."""
    tensors = [
        units.tensor(work_of(*matrix, kind, count), memory_of(*matrix, kind, count))
        for matrix in on_paper.matrices(model)
    ]
    return simulate(tensors, cluster)


def merge(
    base: Path, models: dict[str, Path], output: Path, executor: AbstractContextManager[Executor]
) -> None:
    """Merge by STAR; the output is deleted by the caller."""
    entries = [{"path": str(path), "name": name} for name, path in models.items()]
    recipe = make_recipe({"base": str(base), "models": entries, "method": "star"})
    run(make_plan(recipe, output), executor)


def started(stack: ExitStack) -> tuple[dict[int, RayExecutor], float, float]:
    """Start workers; return them by their number, the seconds it took, and those of a group."""
    import ray  # noqa: PLC0415  (an extra)

    begin = time.perf_counter()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as RayExecutor sets it
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    stack.callback(ray.shutdown)
    found = {count: stack.enter_context(RayExecutor(threads=count)) for count in (1, 2)}
    nothing: FunctionJob[int] = FunctionJob(lambda number: number, lambda number: 0)
    for executor in found.values():
        list(executor.run(nothing, range(GROUPS)))
    seconds = time.perf_counter() - begin
    group = best(lambda: list(found[2].run(nothing, range(GROUPS))), 3) / GROUPS
    return found, seconds, group


def measured(options: argparse.Namespace, scratch: Path) -> Units:
    """Measure merges here, and compare them with the simulation; return the unit costs."""
    model = llama_of(2e9 if options.full else 1.5e8)
    base = make_base(scratch / "base", model)
    kinds = {
        "adapters": make_adapters(scratch / "adapters", model, 16),
        "full fine-tunes": make_finetunes(scratch / "finetunes", model, 2),
    }
    with ExitStack() as stack:
        workers, seconds, group = started(stack)
        units = measure(scratch, group)
        print(
            f"Ray and its workers started in {seconds:.1f} s; the driver needs "
            f"{1e3 * group:.1f} ms a group.\n"
            f"A core here: {units.rates.float64 / 1e9:.1f} GFLOP/s in float64, "
            f"{units.rates.float32 / 1e9:.1f} in float32, {1e9 / units.rates.entries:.2f} ns an "
            f"entry, {units.rates.hashing / 1e9:.2f} GB/s hashed, {units.write / 1e9:.2f} GB/s "
            f"written, {units.rates.memory / 1e9:.1f} GB/s read from memory\n"
        )
        for kind, models in kinds.items():
            output = scratch / "output"
            contestants = {
                f"{count} {name}{'s' * (count > 1)}": partial(merge, base, models, output, who)
                for count in (1, 2)
                for name, who in (("thread", Threads(count)), ("worker", _Lent(workers[count])))
            }
            costs = take_turns(contestants, options.turns, clean_up=partial(rmtree, output))
            print(f"{len(models)} {kind}, base {model_bytes(model) / 1e9:.2f} GB\n")
            print(table(costs, reference="1 worker"))
            gains = {
                name: [
                    one.wall / two.wall
                    for one, two in zip(costs[f"1 {name}"], costs[f"2 {name}s"], strict=True)
                ]
                for name in ("thread", "worker")
            }
            one, two = (
                simulated(
                    model, kind, len(models), units, Cluster(1, count, driver=units.driver)
                ).seconds
                for count in (1, 2)
            )
            print(
                f"\n2 workers against 1: {span(gains['worker'])} times as fast, threads "
                f"{span(gains['thread'])}; simulated {one / two:.2f}. One worker, simulated: "
                f"{one:.2f} s.\n"
            )
    return units


class _Lent:
    """An executor that a merge may enter and leave as often as it likes.

    Args:
        executor: Workers that stay.
    """

    def __init__(self, executor: RayExecutor) -> None:
        self._executor = executor

    def __enter__(self) -> RayExecutor:
        return self._executor

    def __exit__(self, *error: object) -> None:
        pass


def model_bytes(model: Llama) -> float:
    """Return the bytes of a model."""
    return sum(ENTRY * m * n for m, n, _ in on_paper.matrices(model))


def curve(options: argparse.Namespace, units: Units) -> str:
    """Return the Markdown table of simulated merges."""
    lines = [
        "| merge | nodes | time | speed-up | bottleneck | busy | groups |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for kind, count in (("adapters", options.adapters), ("full fine-tunes", options.finetunes)):
        first = None
        for nodes in options.nodes:
            cluster = Cluster(
                nodes,
                options.cores,
                storage_read=1e9 * options.storage_read,
                storage_write=1e9 * options.storage_write,
                network=1e9 * options.network,
                driver=units.driver,
                memory=1e9 * options.memory / 4,
            )
            found = simulated(MODELS[options.model], kind, count, units, cluster)
            first = first or found.seconds
            lines.append(
                f"| {count} {kind} | {nodes} | {duration(found.seconds)} "
                f"| {first / found.seconds:.1f} | {found.bottleneck} | {found.used:.0%} "
                f"| {found.groups} |"
            )
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="405B", help="that is simulated (default: 405B)")
    add("--adapters", type=int, default=50, metavar="T", help="default: 50")
    add("--finetunes", type=int, default=4, metavar="F", help="default: 4")
    add("--nodes", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="default: 1 8 64")
    add("--cores", type=int, default=32, help="of a node (default: 32)")
    add("--memory", type=float, default=512, metavar="GB", help="of a node (default: 512)")
    add("--network", type=float, default=3, metavar="GB/s", help="of a node (default: 3)")
    add("--storage-read", type=float, default=20, metavar="GB/s", help="default: 20")
    add("--storage-write", type=float, default=10, metavar="GB/s", help="default: 10")
    return parse_run(parser)


def main() -> int:
    """Measure, simulate, print."""
    options = parse_options()
    print_machine()
    with scratch_folder(options.scratch, 8e9 if options.full else 2e9) as scratch:
        print(f"Scratch: {file_system(scratch)}\n")
        units = measured(options, scratch)
    print(
        f"{options.model}, simulated with the unit costs above: nodes of {options.cores} cores, "
        f"{options.memory:g} GB, of which tensors take a quarter, and {options.network:g} GB/s of "
        f"network; storage {options.storage_read:g} GB/s read, {options.storage_write:g} GB/s "
        "written\n"
    )
    print(curve(options, units))
    return 0


if __name__ == "__main__":
    sys.exit(main())
