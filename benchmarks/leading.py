"""What the leading directions of a merged adapter cost: seconds, peak of memory, and accuracy.

One tensor's average of adapters of rank 16, A as PEFT initialises it and B with a decaying
spectrum, as :func:`starmerge_models.spectral.leading.leading` cuts it to rank 64; one thread. The
shapes are q and v of a 7B model: 500 adapters (8000 factors), 100 and 20. "Peak" is the most that
the call takes beside the factors, "estimate" is what a merge reckons with before it starts.
"Excess" is by how much the squared error is above the smallest possible one, from the eigenvalues
of the product's Gram matrix in float64; it takes longest of all, so ``--exact`` asks for it.
Without ``--full`` the shapes have a quarter of each side.
"""

from __future__ import annotations

import os
import sys
from functools import partial

# Must stand before torch is loaded; see methods.py.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import megabytes, parser_of, print_machine, timed
from methods import in_own_process, memory, reset_peak_memory
from synthetic import DECAY, RANK

from starmerge_models.deltas import LowRank
from starmerge_models.spectral.leading import leading, leading_bytes

SHAPES = ((4096, 4096), (1024, 4096))
ADAPTERS = (500, 100, 20)
KEPT = 64


def main() -> int:
    """Decompose, print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--full", action="store_true", help="shapes of 7B")
    parser.add_argument("--exact", action="store_true", help="compare with the best approximation")
    options = parser.parse_args()
    print_machine()
    shrink = 1 if options.full else 4
    print("\n| matrix | factors | CPU, s | peak, MB | estimate, MB | error | excess |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for m, n in SHAPES:
        for adapters in ADAPTERS:
            sizes = (m // shrink, n // shrink, RANK * adapters // shrink, KEPT // shrink)
            print(in_own_process(partial(row, *sizes, exact=options.exact)), flush=True)
    return 0


def row(m: int, n: int, r: int, k: int, *, exact: bool) -> str:
    """Return the row of a delta of r factors that is cut to rank k."""
    torch.set_num_threads(1)
    delta = make(m, n, r)
    leading(make(m // 8, n // 8, r // 8), k // 8)  # loads the libraries
    before = reset_peak_memory()
    (found, lost), cost = timed(lambda: leading(delta, k))
    peak = None if before is None else memory("VmHWM") - before
    kept = float(found.S.square().sum())
    cells = [f"{m} × {n}", str(r), f"{cost.cpu:.2f}", megabytes(peak)]
    cells += [megabytes(leading_bytes(m, n, r, k)), f"{(lost / (kept + lost)) ** 0.5:.6f}"]
    cells += [f"{excess(delta, k, lost):.1e}" if exact else ""]
    return f"| {' | '.join(cells)} |"


def make(m: int, n: int, r: int) -> LowRank:
    """Return factors as the sum of adapters has them."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(r, size, generator=generator) for size in (m, n))
    B *= DECAY ** (torch.arange(r) % RANK)[:, None]
    return LowRank(B.T, A, 1 / (r * (3 * n) ** 0.5))


def excess(delta: LowRank, k: int, lost: float) -> float:
    """Return the squared error beyond the smallest possible one, relative to it."""
    wide = delta if delta.shape[0] <= delta.shape[1] else LowRank(delta.A.T, delta.B.T, delta.scale)
    product = wide.entries().double()
    energies = torch.linalg.eigvalsh(product @ product.T)
    best = float(energies[:-k].sum())
    return lost / best - 1


if __name__ == "__main__":
    sys.exit(main())
