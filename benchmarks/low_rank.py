"""What STAR costs on adapters: exact in their factors, against a randomised SVD of each delta.

One layer of Mistral-7B (q, k, v, o, gate, up, down; bfloat16) and 20 adapters of rank 16 on all of
it. Their singular values decay by 0.7 from one to the next, so that STAR at η = 40 keeps 2 of 16;
of the demo's trained adapters it keeps 1.4 on average. What is added costs in proportion to that:
see ``--decay``. Both contestants have weights and factors in memory, merge one matrix after the
other, and give it in bfloat16:

- "starmerge": the SVD of each delta in factor space, the kept triplets of all adapters side by
  side, added to the weight in one pass.
- "densify + randomised SVD": the way of the paper's script (github.com/IBM/STAR, with its option
  ``--known_rank 16``): each delta multiplied out in float32, ``torch.svd_lowrank`` with q = rank +
  5, truncated, rescaled, multiplied out again, averaged, added. It is the script's faster way: by
  default it does not know the rank, and makes the full SVD of each delta.

They take turns; a ratio is taken between neighbours in time. A turn of starmerge is the median of
five merges, as one is short. The results are compared with each other, and for the smallest matrix
with the truth: ``torch.linalg.svd`` of each delta in float64. The layer is small by default, a
quarter of each side; ``--full`` takes it in its true size, and some five minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeAlias

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import (
    Cost,
    cpu_seconds,
    parse_run,
    parser_of,
    print_machine,
    print_targets,
    ratios,
    table,
    timed,
)
from synthetic import DECAY, FACTOR, RANK, WEIGHT, Llama
from torch import Tensor

import starmerge_models
from starmerge_models.deltas import LowRank
from starmerge_models.merging.fold import fold
from starmerge_models.methods import Deltas, TensorContext, as_pipeline
from starmerge_models.spectral import kept_rank, svd

STAR = starmerge_models.Star(eta=40)
ADAPTERS = 20
LAYER = Llama(hidden=4096, intermediate=14336, layers=1, vocabulary=32000, key_value=1024)
QUARTER = Llama(hidden=1024, intermediate=3584, layers=1, vocabulary=32000, key_value=256)
OURS, PAPER = "starmerge", "densify + randomised SVD"
REPEATS = {OURS: 5, PAPER: 1}
"""Merges in a turn."""
TARGET = 150
"""Least CPU time of the paper's way, over ours."""
TOLERANCE = 1e-3
"""Largest difference of two merged deltas, relative to their norm, that counts as rounding."""


@dataclass(frozen=True, eq=False)
class Case:
    """One matrix of the base and what the adapters change in it."""

    name: str
    weight: Tensor
    deltas: list[LowRank]


@dataclass(frozen=True)
class Outcome:
    """What a contestant made of a case."""

    delta: Tensor | LowRank
    weight: Tensor
    ranks: list[int]


class Parts:
    """The CPU seconds of each part of the work, merge by merge."""

    def __init__(self) -> None:
        self.merges: list[Counter[str]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside as a part of the merge."""
        start = cpu_seconds()
        yield
        self.merges[-1][name] += cpu_seconds() - start


Contestant: TypeAlias = Callable[[Case, Parts], Outcome]


# ---------------------------------------------------------------------------------- The contestants


def in_factor_space(case: Case, parts: Parts) -> Outcome:
    """Merge one matrix with starmerge."""
    # What was computed of a delta is remembered as long as it lives, so these are new ones.
    deltas = dict(enumerate(delta.scaled(1.0) for delta in case.deltas))
    tasks = tuple(map(str, deltas))
    tensor = TensorContext(
        case.name, tuple(case.weight.shape), False, tasks=tasks, weights=(1.0,) * len(tasks)
    )
    prepared = as_pipeline(STAR).prepare(lambda look: iter(()))
    with parts.part("factors"):
        merged = prepared.merge(Deltas.of(deltas), tensor)
    with parts.part("add"):
        weight = fold(case.weight, merged.delta, case.weight.dtype).weight
    assert isinstance(merged.delta, LowRank)
    return Outcome(merged.delta, weight, [merged.truncations[t].rank for t in deltas])


def densified(case: Case, parts: Parts) -> Outcome:
    """Merge one matrix the way of the paper's script."""
    mean, ranks = torch.zeros(case.weight.shape), []
    for delta in case.deltas:
        with parts.part("densify"):
            dense = (delta.B.float() @ delta.A.float()) * delta.scale
        with parts.part("SVDs"):
            U, S, V = randomised(dense)
        cumulative = S.cumsum(0)
        r = int(torch.searchsorted(cumulative, cumulative[-1] * STAR.eta / 100)) + 1
        values = S[:r] * (cumulative[-1] / cumulative[r - 1])
        with parts.part("multiply out, average"):
            mean += (U[:, :r] @ torch.diag(values) @ V[:, :r].T) * (1 / len(case.deltas))
        ranks.append(r)
    with parts.part("add"):
        weight = (case.weight + mean).to(case.weight.dtype)
    return Outcome(mean, weight, ranks)


def randomised(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of a matrix of a known rank, with as much oversampling as the script has."""
    U, S, V = torch.svd_lowrank(dense, q=RANK + 5)
    return U[:, :RANK], S[:RANK], V[:, :RANK]


# ---------------------------------------------------------------------------------------- Inputs


def make_layer(model: Llama, decay: float) -> list[Case]:
    """Return the matrices of one layer, with the deltas of all adapters."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for name, (m, n) in model.linear.items():
        weight = (WEIGHT * torch.randn(m, n, generator=generator)).bfloat16()
        cases.append(Case(name, weight, [adapter(m, n, decay, generator) for _ in range(ADAPTERS)]))
    return cases


def adapter(m: int, n: int, decay: float, generator: torch.Generator) -> LowRank:
    """Return the delta of one adapter, alpha/r = 2: A as PEFT initialises it, B small."""
    A = (2 * torch.rand(RANK, n, generator=generator) - 1) / n**0.5
    B = FACTOR * torch.randn(m, RANK, generator=generator) * decay ** torch.arange(RANK)
    return LowRank(B.bfloat16(), A.bfloat16(), scale=2.0)


# ----------------------------------------------------------------------------- Measuring, comparing


def bench(cases: Sequence[Case], options: argparse.Namespace) -> dict[str, list[Outcome]]:
    """Let both merge the layer in turns, print what it cost; return what they made."""
    contestants: dict[str, Contestant] = {OURS: in_factor_space, PAPER: densified}
    parts: dict[str, Parts] = defaultdict(Parts)
    outcomes: dict[str, list[Outcome]] = {}

    def merge_all(label: str, chosen: Sequence[Case]) -> None:
        parts[label].merges.append(Counter())
        outcomes[label] = [contestants[label](case, parts[label]) for case in chosen]

    def take_turn(label: str) -> Cost:
        merges = [timed(partial(merge_all, label, cases))[1] for _ in range(REPEATS[label])]
        return Cost(median(cost.wall for cost in merges), median(cost.cpu for cost in merges))

    for label in contestants:
        merge_all(label, [smallest(cases)])  # loads libraries
        parts[label].merges.clear()
    costs: dict[str, list[Cost]] = {label: [] for label in contestants}
    for _ in range(options.turns):
        for label, mine in costs.items():
            mine.append(take_turn(label))
    print(table(costs, reference=OURS))
    print("\n| CPU, s | |\n|---|---:|")
    for label in contestants:
        counted = parts[label].merges
        for part in counted[0]:
            print(f"| {label}: {part} | {median(merge[part] for merge in counted):.3f} |")
    reached = median(ratios(costs[PAPER], costs[OURS], "cpu"))
    print_targets(
        [f"Target: {PAPER} ≥ {TARGET} × the CPU time of {OURS}; here {reached:.0f}"],
        full=options.full,
    )
    return outcomes


def smallest(cases: Sequence[Case]) -> Case:
    """Return the case with the least entries."""
    return min(cases, key=lambda case: case.weight.numel())


def compare(outcomes: dict[str, list[Outcome]]) -> bool:
    """Print how far the results lie apart; tell whether that is rounding."""
    differences, other_ranks, entries, changed = [], 0, 0, 0
    for mine, other in zip(outcomes[OURS], outcomes[PAPER], strict=True):
        other_ranks += sum(a != b for a, b in zip(mine.ranks, other.ranks, strict=True))
        differences.append(distance(mine.delta, other.delta))
        entries += mine.weight.numel()
        changed += int((mine.weight != other.weight).sum())
    kept = [rank for outcome in outcomes[OURS] for rank in outcome.ranks]
    print(
        f"\nKept of {RANK}: {min(kept)} to {max(kept)}, mean {sum(kept) / len(kept):.2f}; ", end=""
    )
    print(f"differing between the two: {other_ranks} of {len(kept)}")
    print(f"Merged deltas: differ by at most {max(differences):.1e} of their norm")
    print(f"Merged weights: {changed / entries:.4%} of {entries} entries rounded differently")
    return max(differences) < TOLERANCE


def compare_with_truth(case: Case, mine: Outcome, other: Outcome) -> None:
    """Print how far both are from the SVDs that LAPACK makes of the matrices in float64."""
    truth = torch.zeros(case.weight.shape, dtype=torch.float64)
    wrong, worst = Counter[str](), Counter[str]()
    for t, delta in enumerate(case.deltas):
        dense = delta.B.double() @ delta.A.double() * delta.scale
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        r = kept_rank(S, STAR.eta)
        truth += (U[:, :r] * (S[:r] * S.sum() / S[:r].sum())) @ Vh[:r] / len(case.deltas)
        found = {OURS: svd(delta).S, PAPER: randomised(dense.float())[1].double()}
        for label, outcome in ((OURS, mine), (PAPER, other)):
            wrong[label] += outcome.ranks[t] != r
            error = float((found[label] - S[:RANK]).abs().max() / S[0])
            worst[label] = max(worst[label], error)
    print(f"\nAgainst float64 SVDs of the matrices of {case.name}:")
    print("\n| | ranks that differ | worst error of a σ, of σ_1 | error of the merged delta |")
    print("|---|---:|---:|---:|")
    for label, outcome in ((OURS, mine), (PAPER, other)):
        error = f"{worst[label]:.1e} | {distance(outcome.delta, truth):.1e}"
        print(f"| {label} | {wrong[label]} of {len(case.deltas)} | {error} |")


def distance(found: Tensor | LowRank, reference: Tensor | LowRank) -> float:
    """Return how far a merged delta is from another, relative to the other's norm."""
    matrix, other = (
        delta.to_dense() if isinstance(delta, LowRank) else delta for delta in (found, reference)
    )
    return float(torch.linalg.vector_norm(matrix - other) / torch.linalg.vector_norm(other))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--decay",
        type=float,
        default=DECAY,
        metavar="D",
        help=f"ratio of neighbouring singular values of an adapter (default: {DECAY})",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    options = parse_run(parser, small=3, full=2, writes=False)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if not 0 < options.decay <= 1:
        parser.error("--decay must be above 0 and at most 1")
    return options


def main() -> int:
    """Run the benchmark; return 1 if the results differ by more than rounding."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    print_machine()
    cases = make_layer(LAYER if options.full else QUARTER, options.decay)
    shapes = ", ".join(
        f"{case.name} {case.weight.shape[0]}×{case.weight.shape[1]}" for case in cases
    )
    print(f"Threads: {options.threads}; turns: {options.turns}, of which medians; bfloat16")
    print(
        f"{ADAPTERS} adapters of rank {RANK}, decay {options.decay}, η = {STAR.eta} %; {shapes}\n"
    )
    outcomes = bench(cases, options)
    agree = compare(outcomes)
    chosen = smallest(cases)
    number = cases.index(chosen)
    compare_with_truth(chosen, outcomes[OURS][number], outcomes[PAPER][number])
    if not agree:
        print("\nFAILED: the results differ by more than rounding.", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
