"""A model on paper of merges that do not fit here: bytes, operations, and time at given rates.

Counted are a base with T adapters of rank r on all linear modules, and a base with F full
fine-tunes, both merged by STAR; and the full fine-tunes by ``task_arithmetic``. For a matrix m × n
(s the smaller side, l the larger), k triplets kept of a delta:

- read: the base and all models; written: a model. Two bytes an entry.
- adapters, decomposing, in float64, each: the factors' Grams 2r²(m + n), three small decompositions
  40r³, the kept vectors 2rk(m + n).
- adapters, adding, in float32: 2mn·Tk, one product for all.
- full fine-tunes, decomposing, in float64, each: the Gram s²l, its tridiagonal form 4/3·s³, which
  moves as many bytes as it has operations, and the kept vectors 2s²k. In float32: the two products
  4skl, where k is a share of s.
- entry by entry: an addition or conversion of each entry of each full fine-tune and of the result.

Each node has a disk of its own and its share of the tensors. Computing overlaps with reading and
writing, which share the disk, so the longer of the two counts. Whole tensors are given to cores and
to nodes, so no merge is shorter than its longest tensor on one core: "at least".

All rates are options; the defaults are those of a node of 32 cores with a fast disk, and no
measurement. Memory that is shared by the cores bounds the tridiagonal form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common import parser_of
from synthetic import Llama

MODELS = {
    "7B": Llama(4096, 14336, 32, 32000, 1024),
    "70B": Llama(8192, 28672, 80, 128256, 1024),
    "405B": Llama(16384, 53248, 126, 128256, 1024),
}
"""Mistral 7B, Llama 3 70B, Llama 3.1 405B."""

ENTRY = 2
"""Bytes of an entry in bfloat16."""


@dataclass(frozen=True)
class Work:
    """What is to be done to a tensor or a model."""

    read: float = 0
    """Bytes."""
    written: float = 0
    """Bytes."""
    float64: float = 0
    """Operations of matrix products and the like in float64."""
    float32: float = 0
    """The same in float32."""
    tridiagonal: float = 0
    """Operations, and bytes moved, of reducing to tridiagonal form in float64."""
    entries: float = 0
    """Entries that are converted, added or rounded."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * number for number in self.numbers))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All counts."""
        return (
            self.read,
            self.written,
            self.float64,
            self.float32,
            self.tridiagonal,
            self.entries,
        )


@dataclass(frozen=True)
class Rates:
    """What a node does in a second; see the options."""

    disk_read: float
    disk_write: float
    cores: int
    float64: float
    float32: float
    memory: float
    entries: float
    hashing: float

    def core_seconds(self, work: Work) -> float:
        """Return the seconds that one core computes."""
        return (
            work.float64 / self.float64
            + work.float32 / self.float32
            + work.tridiagonal / min(self.float64, self.memory / self.cores)
            + work.entries / self.entries
            + work.read / self.hashing
        )

    def disk_seconds(self, work: Work) -> float:
        """Return the seconds that one disk reads and writes."""
        return work.read / self.disk_read + work.written / self.disk_write


def adapters(m: int, n: int, count: int, rank: int, kept: float) -> Work:
    """Return the work that adapters of a matrix m × n are, beside the matrix itself."""
    each = 2 * rank**2 * (m + n) + 40 * rank**3 + 2 * rank * kept * (m + n)
    return Work(
        read=count * ENTRY * rank * (m + n),
        float64=count * each,
        float32=2 * m * n * count * kept,
        entries=m * n,
    )


def finetunes(m: int, n: int, count: int, share: float | None) -> Work:
    """Return the work that full fine-tunes of a matrix m × n are, beside the base's.

    Args:
        m: Rows.
        n: Columns.
        count: Number of fine-tunes.
        share: Triplets kept, of min(m, n); None if the deltas are added without decomposing them.
    """
    plain = Work(read=count * ENTRY * m * n, entries=(count + 1) * m * n)
    if share is None or min(m, n) == 1:
        return plain
    short, long = min(m, n), max(m, n)
    k = share * short
    each = Work(
        float64=short**2 * long + 2 * short**2 * k,
        float32=4 * short * k * long,
        tridiagonal=4 / 3 * short**3,
    )
    return plain + each * count


def matrices(model: Llama) -> list[tuple[int, int, bool]]:
    """Return rows and columns of all tensors, and whether they are linear modules."""
    found = []
    for name, shape in model.tensors.items():
        rows, columns = shape if len(shape) == 2 else (shape[0], 1)
        found.append((rows, columns, name.startswith("model.layers.") and len(shape) == 2))
    return found


def merges(model: Llama, options: argparse.Namespace) -> dict[str, list[Work]]:
    """Return the work of each merge, tensor by tensor."""
    found: dict[str, list[Work]] = {}
    title = f"{options.adapters} adapters, STAR"
    chosen = options.finetunes
    for m, n, is_linear in matrices(model):
        base = Work(read=ENTRY * m * n, written=ENTRY * m * n)
        low = adapters(m, n, options.adapters, options.rank, options.kept) if is_linear else Work()
        found.setdefault(title, []).append(base + low)
        for method, share in (("task_arithmetic", None), ("STAR", options.share)):
            work = base + finetunes(m, n, chosen, share if is_linear else None)
            found.setdefault(f"{chosen} full fine-tunes, {method}", []).append(work)
    return found


def table(names: Sequence[str], rates: Rates, options: argparse.Namespace) -> str:
    """Return the Markdown table."""
    times = "".join(f" {count} node{'s' * (count > 1)} |" for count in options.nodes)
    lines = [
        "| model | merge | read, GB | written, GB | TFLOP float64 | TFLOP float32 | core-hours "
        f"| disk-hours |{times} at least |",
        "|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * (len(options.nodes) + 1),
    ]
    for name in names:
        for title, tensors in merges(MODELS[name], options).items():
            whole = sum(tensors, Work())
            longest = max(map(rates.core_seconds, tensors))
            disk, cores = rates.disk_seconds(whole), rates.core_seconds(whole)
            cells = [
                name,
                title,
                f"{whole.read / 1e9:.0f}",
                f"{whole.written / 1e9:.0f}",
                f"{(whole.float64 + whole.tridiagonal) / 1e12:,.1f}",
                f"{whole.float32 / 1e12:,.1f}",
                f"{cores / 3600:.2f}",
                f"{disk / 3600:.2f}",
            ]
            for count in options.nodes:
                cells.append(duration(max(max(disk, cores / rates.cores) / count, longest)))
            cells.append(duration(longest))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add("--adapters", type=int, default=20, metavar="T", help="default: 20")
    add("--rank", type=int, default=16, metavar="r", help="of the adapters (default: 16)")
    add("--kept", type=float, default=3, metavar="k", help="of the rank (default: 3)")
    add("--finetunes", type=int, default=4, metavar="F", help="default: 4")
    add("--share", type=float, default=0.17, help="of the triplets kept (default: 0.17)")
    add("--nodes", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    add("--disk-read", type=float, default=2, metavar="GB/s", help="of a node (default: 2)")
    add("--disk-write", type=float, default=1, metavar="GB/s", help="of a node (default: 1)")
    add("--cores", type=int, default=32, help="of a node (default: 32)")
    add("--float64", type=float, default=30, metavar="GFLOP/s", help="of a core (default: 30)")
    add("--float32", type=float, default=60, metavar="GFLOP/s", help="of a core (default: 60)")
    add(
        "--bandwidth",
        type=float,
        default=200,
        metavar="GB/s",
        help="of a node's memory (default: 200)",
    )
    add("--entry", type=float, default=1, metavar="ns", help="for an entry, a core (default: 1)")
    add("--hashing", type=float, default=2.5, metavar="GB/s", help="of a core (default: 2.5)")
    return parser.parse_args()


def main() -> int:
    """Print the table."""
    options = parse_options()
    rates = Rates(
        disk_read=1e9 * options.disk_read,
        disk_write=1e9 * options.disk_write,
        cores=options.cores,
        float64=1e9 * options.float64,
        float32=1e9 * options.float32,
        memory=1e9 * options.bandwidth,
        entries=1e9 / options.entry,
        hashing=1e9 * options.hashing,
    )
    print(
        f"{options.cores} cores of {options.float64:g} GFLOP/s in float64 and {options.float32:g} "
        f"in float32, memory {options.bandwidth:g} GB/s, disk {options.disk_read:g} GB/s read and "
        f"{options.disk_write:g} GB/s written,\n{options.entry:g} ns an entry and "
        f"{options.hashing:g} GB/s hashed by a core; adapters of rank {options.rank}, "
        f"{options.kept:g} kept of each; of full fine-tunes {options.share:.0%} kept\n"
    )
    print(table(options.models, rates, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
