"""An update in factors of some rank: what rounding them costs, and the memory that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from starmerge_models.deltas import LowRank
from starmerge_models.merging.outputs.approximation import Approximation, distance


def _made(m: int, n: int, r: int) -> Approximation:
    generator = torch.Generator().manual_seed(m + n + r)
    left, right = (torch.randn(*size, generator=generator) for size in ((m, r), (r, n)))
    return Approximation(left, right, norm=1.0, error=0.0)


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 4), (30, 40, 15), (30, 40, 16), (20, 9, 9)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7])
def test_the_distance_of_factors_is_right_however_small(
    m: int, n: int, r: int, size: float
) -> None:
    """Also where it is far below 1e-8 of the product, which is lost in a difference of squares."""
    made = _made(m, n, r)
    generator = torch.Generator().manual_seed(0)
    left = made.left * (1 + size * torch.rand(m, r, generator=generator))
    right = made.right * (1 + size * torch.rand(r, n, generator=generator))
    L, R, left_, right_ = (x.double().numpy() for x in (made.left, made.right, left, right))
    wanted = np.linalg.norm((L - left_) @ R + left_ @ (R - right_))
    assert distance(made, LowRank(left, right)) == pytest.approx(wanted, rel=1e-5)


def test_factors_that_rounding_leaves_alone_are_at_no_distance() -> None:
    made = _made(40, 30, 4)
    assert distance(made, LowRank(made.left, made.right)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_the_memory_that_it_takes_is_no_more_than_was_said() -> None:
    """Measured by the system, with 2 MB for what a process takes besides."""
    # Arrays are given back to the system as soon as they are free: what is measured is held.
    own = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    script = Path(__file__).with_name("peaks.py")
    root = str(Path(__file__).parents[3])
    printed = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | own,
        cwd=root,
    ).stdout
    rows = [line.rsplit(maxsplit=2) for line in printed.splitlines()]
    assert len(rows) > 12
    assert [row for row in rows if int(row[1]) > int(row[2]) + 2e6] == []
