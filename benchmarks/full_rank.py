"""The kernel for full-rank task vectors against torch.linalg.svd.

Decompose one dense float32 delta, find the rank that keeps η = 40 % of its nuclear norm, and
multiply out what is kept: by starmerge (float64 Gram matrix, tridiagonal eigensolver, first r
vectors, two products, certificate) and by ``torch.linalg.svd(D, full_matrices=False)`` in float32
with the same rule, which is how such a truncation is usually written. They take turns, and each
gets one thread, as a tensor does in a merge: the ratio holds for that. torch.linalg.svd gains from
more threads. The ratio is its seconds over those of the kernel, so that more is better.

The truth is in float64: the SVD, and for the sizes that it takes minutes for, all eigenvectors of
the Gram matrix of the shorter side, by torch.linalg.eigh. Shown are its rank, those of the
contestants, and how far the truncated deltas lie from the one of float64 at its rank, relative to
its norm (Frobenius).

The larger a matrix, the fewer turns and spectra; --turns sets the turns of all. ``--full`` goes up
to 4096 × 14336, and takes some 8 minutes on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

# Must stand before torch and SciPy are loaded.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import scipy
import torch
from common import Cost, parser_of, print_machine, ratios, span, timed
from torch import Tensor

from starmerge_models.deltas import Dense
from starmerge_models.spectral import kept_rank, svd_dense, truncate_and_rescale

ETA = 40.0
ERROR = 1e-5
"""Largest error of a truncated delta that is allowed."""


@dataclass(frozen=True)
class Size:
    """A shape of a weight."""

    m: int
    n: int
    aim: float | None
    """The ratio that is aimed at."""
    turns: int
    """How often, unless the command line says it."""
    spectra: tuple[str, ...] = ("low rank + noise", "power law k^-½", "flat")


SMALL = (Size(1024, 1024, 2.2, 3), Size(1024, 4096, 5.0, 1, ("low rank + noise",)))
FULL = (
    Size(1024, 1024, 2.2, 5),
    Size(1024, 4096, 5.0, 5),
    Size(2048, 2048, None, 2),
    Size(4096, 4096, 2.3, 2, ("low rank + noise",)),
    Size(4096, 14336, 5.0, 1, ("low rank + noise",)),
)
LARGE = 4096
"""Shorter side from which on the truth is not the SVD, which would take minutes."""


@dataclass(frozen=True)
class Kept:
    """A truncated delta."""

    rank: int
    delta: Tensor


def kernel(D: Tensor) -> Kept:
    """Truncate by starmerge."""
    # A delta of its own for each turn: what was found for one is remembered.
    low, truncation = truncate_and_rescale(svd_dense(Dense(D)), eta=ETA)
    return Kept(truncation.rank, low.to_dense())


def plain(D: Tensor) -> Kept:
    """Truncate by torch.linalg.svd, in the width of D."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    r = kept_rank(S, ETA)
    return Kept(r, (U[:, :r] * (S[:r] * (S.sum() / S[:r].sum()))) @ Vh[:r])


def exact(D: Tensor) -> Kept:
    """Truncate in float64."""
    D = D.double()
    if min(D.shape) < LARGE:
        return plain(D)
    values, U = torch.linalg.eigh(D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D)
    S, U = values.clamp(min=0).sqrt().flip(0), U.flip(1)
    r = kept_rank(S, ETA)
    U, scale = U[:, :r], S.sum() / S[:r].sum()
    return Kept(r, scale * (U @ (U.T @ D) if D.shape[0] <= D.shape[1] else (D @ U) @ U.T))


# ------------------------------------------------------------------------------------------ Spectra


def low_rank_and_noise(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Make 32 directions above a floor of noise, as a fine-tune stored in bfloat16 has it."""
    B, A = (torch.randn(shape, generator=generator) for shape in ((m, 32), (32, n)))
    return B @ A / 32 + 0.1 * torch.randn(m, n, generator=generator)


def power_law(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Make σ_k = k^-½ in random directions."""
    p = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, p, generator=generator))[0] for side in (m, n))
    return (left * torch.arange(1, p + 1).rsqrt()) @ right.T


def flat(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Make independent normal entries."""
    return torch.randn(m, n, generator=generator)


SPECTRA: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "low rank + noise": low_rank_and_noise,
    "power law k^-½": power_law,
    "flat": flat,
}


# -------------------------------------------------------------------------------------- The contest


def bench(size: Size, spectrum: str, turns: int) -> bool:
    """Time both on one matrix, print a line of the table; tell whether the kernel is right."""
    D = SPECTRA[spectrum](size.m, size.n, torch.Generator().manual_seed(0))
    contestants = {"kernel": partial(kernel, D), "svd": partial(plain, D)}
    costs: dict[str, list[Cost]] = {label: [] for label in contestants}
    kept: dict[str, Kept] = {}
    for _ in range(turns):
        for label, run in contestants.items():
            kept[label], cost = timed(run)
            costs[label].append(cost)
    truth, cost = timed(partial(exact, D))
    errors = {
        label: float(torch.linalg.vector_norm(mine.delta.double() - truth.delta))
        / float(torch.linalg.vector_norm(truth.delta))
        for label, mine in kept.items()
    }
    cells = [
        f"{size.m} × {size.n}",
        spectrum,
        str(turns),
        *(f"{median(cost.wall for cost in costs[label]):.3f}" for label in contestants),
        f"{cost.wall:.3f}",
        span(ratios(costs["svd"], costs["kernel"], "wall")),
        f"≥ {size.aim}" if size.aim else "",
        f"{truth.rank} ({truth.rank / min(size.m, size.n):.2f})",
        *(str(kept[label].rank) for label in contestants),
        *(f"{errors[label]:.0e}" for label in contestants),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return kept["kernel"].rank == truth.rank and errors["kernel"] <= ERROR


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--full", action="store_true", help="the sizes of docs/performance.md (default: small)"
    )
    parser.add_argument(
        "--turns", type=int, metavar="N", help="turns of every row (default: 5 to 1, by its size)"
    )
    options = parser.parse_args()
    if options.turns is not None and options.turns < 1:
        parser.error("--turns must be at least 1")
    return options


def main() -> int:
    """Run the benchmark; return 1 if the kernel's rank or result is wrong."""
    options = parse_options()
    torch.set_num_threads(1)
    print_machine()
    print(f"SciPy {scipy.__version__}; one thread each; η = {ETA:g} %; seconds of wall time\n")
    for warm_up in (kernel, plain):
        warm_up(torch.randn(256, 256))
    heads = ["size", "spectrum", "turns", "kernel, s", "svd, s", "float64, s"]
    heads += ["svd / kernel (min – max)", "aim", "rank (share)", "kernel's", "svd's"]
    heads += ["kernel's error", "svd's"]
    print(f"| {' | '.join(heads)} |\n|---|---|" + "---:|" * (len(heads) - 2))
    right = [
        bench(size, spectrum, options.turns or size.turns)
        for size in (FULL if options.full else SMALL)
        for spectrum in size.spectra
    ]
    if not all(right):
        print("\nFAILED: the kernel's rank or result is not that of float64.", file=sys.stderr)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
