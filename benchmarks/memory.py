"""Whether the memory that methods say they need is an upper bound, and how far from what they take.

Every method merges one tensor: of adapters (rank 16, bfloat16), of full fine-tunes (stored in
bfloat16, as is the base), of both, and, where it uses a metric, in whitened inputs. A transform is
followed by ``average``, a post-step follows it. "Measured" is the peak of the process during the
merge, survey included, minus what it had with the inputs loaded. "Estimate" is what the chain tells
before anything is read (``Pipeline.memory``), by which a merge of files decides how many tensors
are merged at once. A merge that took more is made a second time, and the one that took less counts:
pages that the system holds back only add. Each kind of inputs and shape has a process of its own.

The claim: the estimate is at least the measured peak, and at most three times as much. What a
process takes besides (heap that is not given back, buffers of libraries) is a few MB, so ratios
are of both numbers with ``--slack`` MB more.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

# Must stand before torch is loaded; see methods.py.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

import torch
from common import parser_of, print_machine
from methods import in_own_process, memory, reset_peak_memory

from starmerge_models.deltas import Delta, LowRank, Stored
from starmerge_models.methods import METHODS, Deltas, Pipeline, TensorContext, make_pipeline
from starmerge_models.methods.memory import DeltaShape, InputsShape, TensorShape
from starmerge_models.spectral.metric import Inputs
from starmerge_models.spectral.moment import Moment

KINDS = ("low-rank", "dense", "mixed", "low-rank, whitened", "dense, whitened")
SHAPES = ((1024, 1024), (2048, 512), (512, 2048), (16384, 256))
TASKS = 4
RANK = 16
ROWS = 128
"""Rows of a moment's root: tokens of a short calibration."""
EXTRA = ("star+ties", "denoise+tsv_m", "star+shares", "tsv_m+own_response")
SETTINGS: dict[str, dict[str, Any]] = {
    "wudi": {"steps": 2},  # of which each takes the same memory
    "subspace_boosting": {"beta": 0.5},
    "sce": {"select_topk": 0.5},
    "mergekit": {
        "merge_method": "della",
        "settings": [
            {"parameter": parameter, "value": value}
            for parameter, value in (("weight", 1.0), ("density", 0.5), ("epsilon", 0.1))
        ],
    },
}
"""Parameters other than the default, where that takes less memory, or more time for the same."""
COUNTS = {"slerp": 1, "nuslerp": 2}
WARM = (144, 130)
"""Shape of what is merged first, so that libraries are loaded; large enough for all kernels."""
_MMAP_THRESHOLD = -3
"""The number of glibc's parameter ``M_MMAP_THRESHOLD``."""


@dataclass(frozen=True)
class Found:
    """What one merge took."""

    chain: str
    kind: str
    shape: tuple[int, int]
    estimate: int
    """Bytes."""
    measured: int
    """Bytes."""

    def ratio(self, slack: int) -> float:
        """Return estimate over measured, both with some bytes more."""
        return (self.estimate + slack) / (self.measured + slack)


# --------------------------------------------------------------------------------------- The merges


def task_vectors(
    kind: str, shape: tuple[int, int], count: int
) -> tuple[list[Delta], torch.Tensor, TensorShape]:
    """Return some task vectors of a tensor, its base, and what is known of it before."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(m, n, generator=generator) / n**0.5).bfloat16()
    deltas: list[Delta] = []
    for number in range(count):
        B = 1e-2 * torch.randn(m, RANK, generator=generator)
        A = torch.randn(RANK, n, generator=generator) / n**0.5
        if kind.startswith("low-rank") or (kind == "mixed" and number % 2):
            deltas.append(LowRank(B.bfloat16(), A.bfloat16(), 2.0))
        else:
            deltas.append(Stored([(1.0, (base + 2 * B @ A).bfloat16())], base))
    shapes = tuple(DeltaShape(d.rank if isinstance(d, LowRank) else None) for d in deltas)
    return deltas, base, TensorShape(shape, is_embedding=False, deltas=shapes, tasks=count)


def moments(n: int) -> Inputs:
    """Return moments of a tensor's inputs, the same for all tasks."""
    root = torch.randn(min(ROWS, n), n, generator=torch.Generator().manual_seed(1))
    return Inputs("columns", lambda task: Moment(root, ROWS))


def merge_once(chain: Pipeline, kind: str, shape: tuple[int, int], tasks: int) -> tuple[int, int]:
    """Merge one tensor; return the estimate and the measured peak, bytes."""
    count = COUNTS.get(chain.name, tasks)
    deltas, base, known = task_vectors(kind, shape, count)
    inputs = None
    if kind.endswith("whitened") or chain.needs_moments:
        inputs, rows = moments(shape[1]), min(ROWS, shape[1])
        text = rows if chain.uses_metric else None
        own = (rows,) * count if chain.needs_moments else ()
        known = TensorShape(
            known.shape, known.is_embedding, known.deltas, count,
            inputs=InputsShape(shape[1], text, own),
        )  # fmt: skip
    tensor = TensorContext(
        "layers.1.weight", shape, False, tuple(map(str, range(count))), (1.0,) * count,
        base=base, layer=(1, 4), inputs=inputs,
    )  # fmt: skip
    given = Deltas.of(dict(enumerate(deltas)))
    before = reset_peak_memory()
    if before is None:
        sys.exit("The peak of a process's memory is only known on Linux.")
    prepared = chain.prepare(lambda look: iter([look(given, tensor)]))
    merged = prepared.merge(given, tensor)
    measured = memory("VmHWM") - before
    del merged
    return chain.memory(known), measured


def measure(kind: str, shape: tuple[int, int], names: Sequence[str], tasks: int) -> list[Found]:
    """Merge one tensor with some methods, one after the other, in this process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # Small arrays, too, are given back to the system as soon as they are free: what is measured is
    # what is held.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    found = []
    for name in names:
        chain = make_pipeline(name, SETTINGS.get(name))
        if kind.endswith("whitened") and not chain.uses_metric:
            continue
        merge_once(chain, kind, WARM, tasks)
        gc.freeze()  # what libraries have made is not searched again before each merge
        estimate, measured = merge_once(chain, kind, shape, tasks)
        if measured > estimate:
            measured = min(measured, merge_once(chain, kind, shape, tasks)[1])
        found.append(Found(name, kind, shape, estimate, measured))
    return found


# ---------------------------------------------------------------------------------------- Printing


def bench(options: argparse.Namespace) -> Iterator[Found]:
    """Measure all kinds and shapes; print the table as it grows."""
    print("\n| method | task vectors | shape | estimate, MB | measured, MB | ratio |")
    print("|---|---|---|---:|---:|---:|", flush=True)
    for shape in options.shapes:
        for kind in options.kinds:
            for found in in_own_process(
                partial(measure, kind, shape, options.methods, options.tasks), start="fork"
            ):
                size = f"{shape[0]} × {shape[1]}"
                numbers = f"{found.estimate / 1e6:.1f} | {found.measured / 1e6:.1f}"
                ratio = found.ratio(options.slack)
                mark = "" if 0.9 <= ratio <= 3 else " ✗"
                print(f"| {found.chain} | {kind} | {size} | {numbers} | {ratio:.2f}{mark} |")
                sys.stdout.flush()
                yield found


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods or chains")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES,
        metavar="M,N",
        type=lambda text: tuple(map(int, text.split(","))),
        help="rows and columns (default: 1024,1024 2048,512 512,2048 16384,256)",
    )
    parser.add_argument(
        "--tasks", type=int, default=TASKS, metavar="N", help=f"models (default: {TASKS})"
    )
    parser.add_argument(
        "--slack", type=float, default=4, metavar="MB", help="what both have more (default: 4)"
    )
    options = parser.parse_args()
    options.slack = int(options.slack * 1e6)
    known = [name for name in METHODS if name != "auto"]
    options.methods = options.only or [*sorted(known), *EXTRA]
    return options


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    print_machine()
    ratios = sorted(found.ratio(options.slack) for found in bench(options))
    low, high = sum(ratio < 0.9 for ratio in ratios), sum(ratio > 3 for ratio in ratios)
    print(
        f"\nEstimate over measured: median {median(ratios):.2f}, {ratios[0]:.2f} – {ratios[-1]:.2f}"
        f"; of {len(ratios)} merges {low} below 0.9, {high} above 3."
    )
    return int(low > 0)


if __name__ == "__main__":
    sys.exit(main())
