"""What a merge costs beside a copy: adapters merged into a synthetic base, files to files.

Part A, time. 20 adapters of rank 16 on q_proj and v_proj are merged into a bfloat16 base, called in
this process and run as ``python -m starmerge_models merge``, in turns with ``cp -r`` of the base
and an fsync of every file copied, since a merge also ends with its files on the disk. The files are
in the page cache for all.

Part B, memory. The peak of the anonymous memory of ``python -m starmerge_models merge``, looked at
every 3 ms, for bases and numbers of adapters that grow; beside it that of the same command with
--dry-run, which reads headers but no tensor: what Python and the libraries take. The bound is
500 MB and three times the largest tensor. ``--full`` needs 34 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from statistics import median

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from common import (
    copy_durably,
    file_system,
    megabytes,
    parse_run,
    parser_of,
    peak_memory,
    print_machine,
    print_targets,
    ratios,
    run_process,
    scratch_folder,
    table,
    take_turns,
    timed,
)
from synthetic import QUERY_VALUE, RANK, Llama, llama_of, make_adapters, make_base

import starmerge_models

ADAPTERS = 20
TARGET = 1.3
"""Of Part A: wall time, over that of the copy."""
BOUND = 500e6
"""Of Part B: bytes beside three times the largest tensor."""
SMALL = {0.1e9: (2,), 0.3e9: (20,)}
FULL = {1e9: (2, 20, 200), 4e9: (20, 200), 16e9: (20, 200)}
"""Of Part B: bytes of the bases, and the numbers of adapters merged into each."""

COPY = "`cp -r` of the base + fsync"
IN_PROCESS = "`starmerge_models.merge(...)`"


def bench_time(size: float, options: argparse.Namespace) -> None:
    """Time merge and copy, print the table."""
    model = llama_of(size)
    wanted = 2.2 * model.nbytes + ADAPTERS * model.adapter_bytes(QUERY_VALUE)
    with scratch_folder(options.scratch, wanted) as scratch:
        base = make_base(scratch / "base", model)
        adapters = make_adapters(scratch / "adapters", model, ADAPTERS, targets=QUERY_VALUE)
        output = scratch / "output"
        command = merge_command(base, list(adapters.values()), output, options)
        print(f"\nPart A: {ADAPTERS} adapters of rank {RANK} on q_proj and v_proj into a base of")
        print(f"{described(model)}; {file_system(scratch)}; {options.turns} turns\n")
        contestants = {
            COPY: lambda: copy_durably(base, output),
            IN_PROCESS: lambda: merge(base, adapters, output, options),
            "`python -m starmerge_models merge`": lambda: run_process(command),
            "`python -c 'import torch'`": lambda: run_process(
                [sys.executable, "-c", "import torch"]
            ),
        }
        costs = take_turns(
            contestants, options.turns, clean_up=lambda: rmtree(output, ignore_errors=True)
        )
    print(table(costs, reference=COPY))
    reached = median(ratios(costs[IN_PROCESS], costs[COPY], "wall"))
    print_targets(
        [f"Target: {IN_PROCESS} ≤ {TARGET} × the wall time of the copy; here {reached:.2f}"],
        full=options.full,
    )


def bench_memory(cases: Mapping[float, Sequence[int]], options: argparse.Namespace) -> None:
    """Measure the peak memory of merges, print the table as it grows."""
    print("\nPart B: peak memory of `python -m starmerge_models merge`, MB\n")
    print("| base | largest tensor | adapters | anonymous | bound | --dry-run | resident | s |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for size, counts in cases.items():
        model = llama_of(size)
        wanted = 2.1 * model.nbytes + max(counts) * model.adapter_bytes(QUERY_VALUE)
        with scratch_folder(options.scratch, wanted) as scratch:
            base = make_base(scratch / "base", model)
            made = make_adapters(scratch / "adapters", model, max(counts), targets=QUERY_VALUE)
            adapters = list(made.values())
            output = scratch / "output"
            for count in counts:
                command = merge_command(base, adapters[:count], output, options)
                idle = peak_memory([*command, "--dry-run"])
                peak, cost = timed(lambda command=command: peak_memory(command))
                rmtree(output)
                cells = (
                    megabytes(model.nbytes),
                    megabytes(model.largest),
                    str(count),
                    megabytes(peak.anonymous),
                    megabytes(int(BOUND) + 3 * model.largest),
                    megabytes(idle.anonymous),
                    megabytes(peak.resident),
                    f"{cost.wall:.1f}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)


def merge(base: Path, adapters: dict[str, Path], output: Path, options: argparse.Namespace) -> None:
    """Merge with STAR, in this process."""
    starmerge_models.merge(
        base, adapters, "star", output=output, threads=options.threads, memory=options.memory
    )


def merge_command(
    base: Path, adapters: Sequence[Path], output: Path, options: argparse.Namespace
) -> list[str]:
    """Return the command of the same merge."""
    command = [sys.executable, "-m", "starmerge_models", "merge", str(base), *map(str, adapters)]
    command += ["-o", str(output)]
    command += ["--threads", str(options.threads)] if options.threads else []
    return command + (["--memory", options.memory] if options.memory else [])


def described(model: Llama) -> str:
    """Return a model's sizes in words."""
    return (
        f"{model.nbytes / 1e9:.2f} GB ({model.layers} layers of {model.hidden}, "
        f"{len(model.tensors)} tensors)"
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=("A", "B"), help="only this part (default: both)")
    parser.add_argument("--threads", type=int, metavar="N", help="as of `starmerge merge`")
    parser.add_argument("--memory", metavar="SIZE", help="as of `starmerge merge`, such as 4GB")
    return parse_run(parser, small=2)


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    print_machine()
    if options.part != "B":
        bench_time(1.5e9 if options.full else 0.3e9, options)
    if options.part != "A":
        bench_memory(FULL if options.full else SMALL, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
