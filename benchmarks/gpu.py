"""The card beside the CPU: decompositions, and whole merges of full fine-tunes.

1. Eight threads decompose a matrix each, as the first that this process does on the card: torch's
   CUDA linear algebra must be loaded by one of them alone.
2. The kernel for full-rank task vectors (see full_rank.py) on the card, on the CPU by one thread,
   and ``torch.linalg.svd(D, full_matrices=False)`` in float32 on the card, each from a matrix in
   the CPU's memory to the truncated triplets there, η = 40. They take turns; the CPU has one. Shown
   are seconds, the ranks, how far the card's singular values are from the CPU's at most, relative
   to the largest, and the card's memory: the peak of what torch allocates, and what was asked for.
3. The same with a card of 0.2 GB: its memory is full at once, and the CPU finishes the work.
4. Whole merges of three synthetic full fine-tunes, from files to files in float32: on the card, and
   with the card left out, which has one turn. The difference is the Frobenius distance of the
   merged weights, relative to the update.

Without a GPU it says so, and there is nothing to do. ``--full`` is meant to take less than three
minutes on an H100 with 16 cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import median
from threading import Barrier

import torch
from common import (
    Cost,
    parse_run,
    parser_of,
    print_machine,
    ratios,
    scratch_folder,
    span,
    table,
    take_turns,
    timed,
)
from safetensors import safe_open
from synthetic import Llama, make_base, make_finetunes
from torch import Tensor

import starmerge_models
from starmerge_models import device
from starmerge_models.deltas import Dense
from starmerge_models.spectral import SVD, Decomposition, kept_rank, svd_dense, with_exact_fallback

ETA = 40.0
THREADS = 8
FINETUNES = 3
METHODS = ("star", "tsv_m", "iso_c", "covariance")
SIZES = ((1024, 1024), (1024, 4096))
FULL = ((1024, 1024), (4096, 4096), (4096, 14336))
MODEL = Llama(hidden=1024, intermediate=2816, layers=1, vocabulary=8192, key_value=256, head=64)
FULL_MODEL = Llama(
    hidden=1024, intermediate=2816, layers=4, vocabulary=8192, key_value=256, head=64
)
SMALL_CARD = 2e8
"""Bytes of the card that is too small."""


class Watched(device.Accelerator):
    """The card, and the most that was asked for at once by one piece of work."""

    most = 0

    def visit(self, need: int) -> AbstractContextManager[None]:
        """Note what is asked for."""
        self.most = max(self.most, need)
        return super().visit(need)


class Told(logging.Handler):
    """Collects the warnings that work of the card was left to the CPU."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.warnings.append(record.getMessage())


@contextmanager
def without_card() -> Iterator[None]:
    """Leave all matrices to the CPU."""
    before, device.LARGE = device.LARGE, sys.maxsize
    try:
        yield
    finally:
        device.LARGE = before


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    """Make 32 directions above a floor of noise, as a fine-tune stored in bfloat16 has it."""
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator) for shape in ((m, 32), (32, n)))
    return B @ A / 32 + 0.1 * torch.randn(m, n, generator=generator)


def kernel(D: Tensor) -> tuple[Decomposition, SVD]:
    """Decompose by starmerge, and return what is kept."""
    decomposed = svd_dense(Dense(D))
    return decomposed, with_exact_fallback(
        decomposed, lambda sure: sure.first(kept_rank(sure.S, ETA))
    )


def kernel_on_cpu(D: Tensor) -> tuple[Decomposition, SVD]:
    """Do the same on the CPU, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_card():
            return kernel(D)
    finally:
        torch.set_num_threads(threads)


def plain(D: Tensor) -> SVD:
    """Do the same by torch.linalg.svd on the card."""
    U, S, Vh = torch.linalg.svd(D.cuda(), full_matrices=False)
    r = kept_rank(S, ETA)
    return SVD(U[:, :r].cpu(), S[:r].cpu(), Vh[:r].T.cpu())


# ---------------------------------------------------------------------------------- Decompositions


def first_use() -> None:
    """Decompose in eight threads that start at once."""
    start = Barrier(THREADS)

    def work(seed: int) -> None:
        D = matrix(1024, 1024, seed)
        start.wait()
        kernel(D)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    print(f"\nFirst use by {THREADS} threads at once: done.")


def bench(m: int, n: int, turns: int, card: Watched) -> bool:
    """Print a line of the table; tell whether rank and values are the CPU's to their errors."""
    D = matrix(m, n)
    contestants: dict[str, Callable[[], object]] = {
        "card": partial(kernel, D),
        "svd": partial(plain, D),
    }
    costs: dict[str, list[Cost]] = take_turns(contestants, turns)
    card.most = 0
    torch.cuda.reset_peak_memory_stats()
    on_card, kept = kernel(D)
    peak = torch.cuda.max_memory_allocated()
    (on_cpu, right), cost = timed(partial(kernel_on_cpu, D))
    apart = (on_card.S - on_cpu.S).abs()
    cells = [
        f"{m} × {n}",
        str(turns),
        *(f"{median(cost.wall for cost in costs[label]):.3f}" for label in contestants),
        f"{cost.wall:.3f}",
        span(ratios(costs["svd"], costs["card"], "wall")),
        *(str(len(found.S)) for found in (kept, right)),
        f"{float(apart.max() / on_cpu.S[0]):.0e}",
        f"{peak / 1e6:.0f}",
        f"{card.most / 1e6:.0f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    known = bool((apart <= on_card.error + on_cpu.error).all())
    return len(kept.S) == len(right.S) and known


def too_small(m: int, n: int) -> bool:
    """Decompose with a card whose memory is full; tell whether the result is the CPU's."""
    D = matrix(m, n)
    torch.cuda.empty_cache()
    share = SMALL_CARD / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        (_, found), cost = timed(partial(kernel, D))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    right = kernel_on_cpu(D)[1]
    same = len(found.S) == len(right.S) and bool(torch.allclose(found.S, right.S, rtol=1e-10))
    said = "as the CPU's" if same else "NOT the CPU's"
    print(f"\n{m} × {n} with a card of {SMALL_CARD / 1e9} GB: {cost.wall:.2f} s, result {said}.")
    return same


# ------------------------------------------------------------------------------------ Whole merges


def bench_merges(folder: Path, model: Llama, turns: int) -> None:
    """Merge by each method on the card and on the CPU; print tables."""
    base = make_base(folder / "base", model)
    models = make_finetunes(folder / "models", model, FINETUNES)
    print(f"\n{FINETUNES} full fine-tunes of {model.parameters / 1e6:.0f} million parameters")
    for method in METHODS:
        outputs = {"card": folder / "on-card", "CPU": folder / "on-cpu"}

        def merge(label: str, method: str = method, outputs: dict[str, Path] = outputs) -> None:
            starmerge_models.merge(
                base, models, method, output=outputs[label], dtype="float32", overwrite=True
            )

        def on_cpu(merge: Callable[[str], None] = merge) -> None:
            with without_card():
                merge("CPU")

        torch.cuda.reset_peak_memory_stats()
        costs = take_turns({"card": partial(merge, "card"), "CPU": on_cpu}, turns, fewer={"CPU": 1})
        peak = torch.cuda.max_memory_allocated()
        print(f"\n`{method}`\n\n{table(costs, reference='card')}\n")
        print(
            f"Peak of the card's memory: {peak / 1e6:.0f} MB. "
            f"Difference: {difference(outputs['card'], outputs['CPU'], base):.0e}",
            flush=True,
        )
        for output in outputs.values():
            rmtree(output)


def difference(one: Path, other: Path, base: Path) -> float:
    """Return ‖one − other‖ / ‖other − base‖ over all tensors."""
    apart = update = 0.0
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (one, other, base)]
    for name in files[0].keys():  # noqa: SIM118  (it is no mapping)
        mine, theirs, before = (file.get_tensor(name).double() for file in files)
        apart += float((mine - theirs).square().sum())
        update += float((theirs - before).square().sum())
    return (apart / update) ** 0.5


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    return parse_run(parser_of(__doc__), small=1, full=3)


def main() -> int:
    """Run the benchmark; return 1 if the card failed, or a result of it is not the CPU's."""
    options = parse_options()
    print_machine()
    if not torch.cuda.is_available():
        print("\nTorch finds no GPU here: there is nothing to measure.")
        return 0
    told = Told()
    logging.getLogger("starmerge_models.device").addHandler(told)
    card = Watched()
    device.ACCELERATOR = card
    print(f"Card: {torch.cuda.get_device_name(0)}, {card.free_memory() / 1e9:.0f} GB free")
    first_use()
    print()
    heads = ["size", "turns", "card, s", "svd on the card, s", "CPU, s", "svd / card (min – max)"]
    heads += ["rank", "CPU's", "values differ by", "peak, MB", "asked, MB"]
    print(f"| {' | '.join(heads)} |\n|---|" + "---:|" * (len(heads) - 1))
    right = [bench(m, n, options.turns, card) for m, n in (FULL if options.full else SIZES)]
    right.append(too_small(2048, 2048))
    model = FULL_MODEL if options.full else MODEL
    with scratch_folder(options.scratch, 3 * (FINETUNES + 5) * model.nbytes) as folder:
        bench_merges(folder, model, options.turns)
    if not all(right):
        print("\nFAILED: a result of the card is not the CPU's.", file=sys.stderr)
    for warning in told.warnings:
        print(f"\nFAILED: {warning}", file=sys.stderr)
    return 0 if all(right) and not told.warnings else 1


if __name__ == "__main__":
    sys.exit(main())
