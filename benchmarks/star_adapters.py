"""What STAR costs on the adapters of SmolLM2-135M that come with the package.

Part A, the kernel. STAR of every adapted tensor in factor space, the result added to the base's
weight, against the plain way: form each delta s·B·A in float32, decompose it with
torch.linalg.svd, truncate and rescale, take the mean, add it. Both get factors and weights in
memory and give weights in the base's dtype; their results are compared.

Part B, the whole merge. From files to files, called in this process and run as
``python -m starmerge_models merge``, against ``cp -r`` of the base and an fsync of every file
copied, since a merge also ends with its files on the disk. The files are in the page cache for all.
What ``import torch`` alone takes is shown beside, as it is most of a short process.

Within a part the contestants take turns, so that a change of the machine's load meets all of them;
a ratio is taken between neighbours in time. This is a small model, so what a process takes before
it begins is most of Part B; copying.py has bases of gigabytes. ``--full`` takes all layers in Part
A, and two or three minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import TypeAlias

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import (
    add_models,
    copy_durably,
    find_models,
    megabytes,
    parse_run,
    parser_of,
    peak_memory,
    print_machine,
    run_process,
    scratch_folder,
    table,
    take_turns,
)
from torch import Tensor

import starmerge_models
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.deltas import LowRank
from starmerge_models.merging.fold import fold
from starmerge_models.methods import Deltas, TensorContext, as_pipeline

COPY = "`cp -r` of the base + fsync"
LAYERS = 3
"""Of Part A, by default."""
TOLERANCE = 1e-3
"""Largest difference of two merged deltas, relative to their norm, that counts as rounding."""


@dataclass(frozen=True)
class Case:
    """One tensor of the base and what the adapters change in it."""

    context: TensorContext
    weight: Tensor
    deltas: dict[int, LowRank]


@dataclass(frozen=True)
class Outcome:
    """What a kernel made of a case."""

    delta: Tensor | LowRank
    weight: Tensor
    ranks: list[int]


Kernel: TypeAlias = Callable[[Case, starmerge_models.Star], Outcome]


# ---------------------------------------------------------------------------- Part A: the kernel


def in_factor_space(case: Case, star: starmerge_models.Star) -> Outcome:
    """Merge one tensor with starmerge."""
    # What was computed of a delta is remembered as long as it lives, so these are new ones.
    inputs = Deltas.of({t: delta.scaled(1.0) for t, delta in case.deltas.items()})
    merged = as_pipeline(star).prepare(lambda look: iter(())).merge(inputs, case.context)
    assert isinstance(merged.delta, LowRank)
    weight = fold(case.weight, merged.delta, case.weight.dtype).weight
    return Outcome(merged.delta, weight, [merged.truncations[t].rank for t in case.deltas])


def densified(case: Case, star: starmerge_models.Star) -> Outcome:
    """Merge one tensor the plain way: every delta a matrix, every SVD by torch.linalg.svd."""
    mean = torch.zeros(case.weight.shape)
    ranks = []
    for delta in case.deltas.values():
        dense = delta.scale * (delta.B.float() @ delta.A.float())
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        cumulative = S.cumsum(0)
        r = int(torch.searchsorted(cumulative, cumulative[-1] * star.eta / 100)) + 1
        values = S[:r] * (cumulative[-1] / cumulative[r - 1])
        mean += (U[:, :r] * values) @ Vh[:r]
        ranks.append(r)
    mean /= len(case.context.tasks)
    return Outcome(mean, (case.weight.float() + mean).to(case.weight.dtype), ranks)


def load_cases(base_folder: Path, adapters: Sequence[Path], layers: int | None) -> list[Case]:
    """Read the base's adapted tensors and all factors into memory."""
    base = open_base(resolve(base_folder))
    models = [open_model(path.name, resolve(path), base) for path in adapters]
    names = [name for name in base.checkpoint if any(name in model.tensors for model in models)]
    cases = []
    for name in sorted(names, key=layer_of):
        if layers is not None and layer_of(name) >= layers:
            continue
        weight = base.checkpoint.read(name)
        found = {
            t: model.delta(name, weight) for t, model in enumerate(models) if name in model.tensors
        }
        deltas = {t: delta for t, delta in found.items() if isinstance(delta, LowRank)}
        context = TensorContext(
            name,
            tuple(weight.shape),
            base.is_embedding(name),
            tasks=tuple(model.name for model in models),
            weights=(1.0,) * len(models),
        )
        cases.append(Case(context, weight, deltas))
    return cases


def layer_of(name: str) -> int:
    """Return the number of a tensor's layer: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def run_all(kernel: Kernel, cases: Sequence[Case]) -> list[Outcome]:
    """Merge all tensors with one kernel."""
    star = starmerge_models.Star()
    return [kernel(case, star) for case in cases]


def bench_kernel(cases: Sequence[Case], turns: int) -> bool:
    """Time both kernels, print the table, compare the results; tell whether they agree."""
    kernels = {"STAR in factor space": in_factor_space, "densify + torch.linalg.svd": densified}
    for kernel in kernels.values():
        run_all(kernel, cases[:1])  # loads libraries
    outcomes: dict[str, list[Outcome]] = {}

    def run(label: str) -> None:
        outcomes[label] = run_all(kernels[label], cases)

    # Both without a turn before the first: the plain way takes a while.
    costs = take_turns(
        {label: partial(run, label) for label in kernels},
        turns,
        fewer=dict.fromkeys(kernels, turns),
    )
    agree = compare(*outcomes.values())
    print(table(costs, reference="STAR in factor space"))
    return agree


def compare(ours: Sequence[Outcome], plain: Sequence[Outcome]) -> bool:
    """Print how far the kernels' results lie apart; tell whether that is rounding."""
    differences, ranks, entries, changed = [], 0, 0, 0
    for mine, other in zip(ours, plain, strict=True):
        assert isinstance(mine.delta, LowRank) and isinstance(other.delta, Tensor)
        distance = torch.linalg.vector_norm(mine.delta.to_dense() - other.delta)
        differing = sum(a != b for a, b in zip(mine.ranks, other.ranks, strict=True))
        ranks += differing
        if not differing:
            differences.append(float(distance / torch.linalg.vector_norm(other.delta)))
        entries += mine.weight.numel()
        changed += int((mine.weight != other.weight).sum())
    kept = [rank for outcome in ours for rank in outcome.ranks]
    print(f"Ranks kept: mean {sum(kept) / len(kept):.2f}, differing: {ranks} of {len(kept)}")
    print(f"Merged deltas: max relative difference {max(differences):.1e} (Frobenius norm)")
    print(f"Merged weights: {changed / entries:.4%} of {entries} entries rounded differently\n")
    return max(differences) < TOLERANCE


# ----------------------------------------------------------------------- Part B: the whole merge


def bench_merge(
    base: Path, adapters: Sequence[Path], scratch: Path, options: argparse.Namespace
) -> None:
    """Time the whole merge and the copy, print the table and the peak memory."""
    target = scratch / "output"
    models = {path.name: path for path in adapters}
    command = [sys.executable, "-m", "starmerge_models", "merge", str(base), *map(str, adapters)]
    command += ["-o", str(target), "--threads", str(options.threads)]

    def in_process() -> object:
        return starmerge_models.merge(
            base, models, starmerge_models.Star(), output=target, threads=options.threads
        )

    contestants: dict[str, Callable[[], object]] = {
        COPY: lambda: copy_durably(base, target),
        "`starmerge_models.merge(...)`": in_process,
        "`python -m starmerge_models merge`": lambda: run_process(command),
        "`python -c 'import torch'`": lambda: run_process([sys.executable, "-c", "import torch"]),
    }
    costs = take_turns(
        contestants, options.turns, clean_up=lambda: rmtree(target, ignore_errors=True)
    )
    print(table(costs, reference=COPY))
    peak = peak_memory(command)
    rmtree(target)
    floor = peak_memory([*command, "--dry-run"])
    print("\n| peak memory, MB | anonymous | resident |\n|---|---:|---:|")
    for label, seen in (("merge", peak), ("the same with --dry-run", floor)):
        print(f"| {label} | {megabytes(seen.anonymous)} | {megabytes(seen.resident)} |")


# ------------------------------------------------------------------------------ Setting and options


def print_setting(base: Path, adapters: Sequence[Path], options: argparse.Namespace) -> None:
    """Print what the numbers depend on."""
    print_machine()
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in (base, *adapters)]
    print(f"Threads: {options.threads}; {options.turns} turns")
    print(
        f"Base: {base.name}, {sizes[0] / 1e6:.1f} MB; {len(adapters)} adapters, "
        f"{sum(sizes[1:]) / 1e6:.1f} MB: {', '.join(path.name for path in adapters)}"
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add_models(parser)
    parser.add_argument(
        "--layers",
        type=int,
        metavar="L",
        help=f"Part A: only the first L layers (default: {LAYERS}, with --full all)",
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--part", choices=("A", "B"), help="only this part (default: both)")
    options = parse_run(parser, small=2)
    if options.layers is None and not options.full:
        options.layers = LAYERS
    if options.threads < 1 or (options.layers or 1) < 1:
        parser.error("--threads and --layers must be at least 1")
    return options


def main() -> int:
    """Run the benchmark; return 1 if the kernels' results differ."""
    options = parse_options()
    base, adapters = find_models(options)
    torch.set_num_threads(options.threads)
    print_setting(base, adapters, options)

    agree = True
    if options.part != "B":
        cases = load_cases(base, adapters, options.layers)
        shapes = sorted({case.context.shape for case in cases}, reverse=True)
        print(
            f"\nPart A: {len(cases)} tensors of "
            + " and ".join("×".join(map(str, shape)) for shape in shapes)
            + f", {sum(len(case.deltas) for case in cases)} deltas of rank "
            + "/".join(
                map(str, sorted({delta.rank for case in cases for delta in case.deltas.values()}))
            )
            + f", η = {starmerge_models.Star().eta:g} %"
        )
        agree = bench_kernel(cases, options.turns)
    if options.part != "A":
        print("\nPart B: from files to files")
        nbytes = sum(file.stat().st_size for file in base.iterdir())
        with scratch_folder(options.scratch, 1.1 * nbytes) as scratch:
            bench_merge(base, adapters, scratch, options)
    if not agree:
        print("\nFAILED: the kernels' results differ by more than rounding.", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
