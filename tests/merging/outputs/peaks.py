"""Prints the peak of memory of what outputs make of updates, and its estimate; Linux alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.merging.fold import Fold, fold_bytes
from starmerge_models.merging.outputs.approximation import (
    Approximation,
    approximate,
    approximation_bytes,
    distance,
    distance_bytes,
)

_STATUS = Path("/proc/self/status")
UPDATES = (
    (512, 512, None, 16),
    (512, 512, None, 512),
    (256, 1024, None, 256),
    (8192, 64, None, 64),
    (512, 1024, 40, 16),
    (512, 512, 800, 400),
)
SUMS = ((4096, 256, 0), (4096, 256, 512), (256, 4096, 512))
"""Rows, columns and factors of updates that are added to a weight; 0: a dense one."""
FACTORS = ((512, 512, 64), (512, 512, 256), (512, 512, 512), (256, 1024, 250), (8192, 64, 64))


def _read(key: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _peak(work: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _read("VmRSS")
    work()
    return _read("VmHWM") - before


def _factors(m: int, n: int, r: int) -> LowRank:
    return LowRank(torch.randn(r, m).T, torch.randn(r, n))


def _update(m: int, n: int, r: int | None) -> Delta:
    return Dense(torch.randn(m, n)) if r is None else _factors(m, n, r)


def _rounded(m: int, n: int, k: int) -> tuple[Approximation, LowRank]:
    exact = _factors(m, n, k)
    rounded = LowRank(exact.B.bfloat16().float(), exact.A.bfloat16().float())
    return Approximation(exact.B, exact.A, 1.0, 0.0), rounded


def _add(base: torch.Tensor, update: Delta) -> None:
    for _ in Fold(base, update, torch.bfloat16).panels():
        pass


def main() -> None:
    """Print the name, the peak and the estimate of each case."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    for r in (None, 40, 300):  # loads the libraries
        approximate(_update(200, 160, r), 20)
    for k in (20, 90):
        distance(*_rounded(200, 160, k))
    for m, n, r, k in UPDATES:
        update = _update(m, n, r)
        peak = _peak(lambda: approximate(update, k))  # noqa: B023  (called at once)
        print(f"update {m} {n} {r} {k}", peak, approximation_bytes(m, n, r, k, 4))
    _add(torch.zeros(200, 160), _update(200, 160, 20))
    for m, n, r in SUMS:
        base, update = torch.zeros(m, n).bfloat16(), _update(m, n, r or None)
        if isinstance(update, LowRank):
            update.A[0] = 0  # is left out, for which the factors are copied
        peak = _peak(lambda: _add(base, update))  # noqa: B023  (called at once)
        print(f"sum {m} {n} {r}", peak, fold_bytes(m, n, r))
    for m, n, k in FACTORS:
        given = _rounded(m, n, k)
        peak = _peak(lambda: distance(*given))  # noqa: B023  (called at once)
        print(f"factors {m} {n} {k}", peak, distance_bytes(m, n, k))


if __name__ == "__main__":
    main()
