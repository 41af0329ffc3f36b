"""What the benchmarks share: clocks, turns, tables, and the machine that the numbers depend on."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

import starmerge_models

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Seconds that something took; CPU time is that of all threads and child processes."""

    wall: float
    cpu: float


def timed(run: Callable[[], T]) -> tuple[T, Cost]:
    """Call a function; return its result and its cost."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = run()
    return result, Cost(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, user and system."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    turns: int,
    *,
    fewer: Mapping[str, int] | None = None,
    clean_up: Callable[[], object] = lambda: None,
) -> dict[str, list[Cost]]:
    """Run contestants one after the other, some times; return what each turn cost each of them.

    So a change of the machine's load meets all of them, and ratios are between neighbours in time.
    A turn before the first fills the page cache and loads libraries; it does not count.

    Args:
        contestants: What runs, by name.
        turns: How often.
        fewer: Turns of those that run less often, by name. They leave the turn before the first
            out, and after theirs the others go on without them.
        clean_up: Called after each contestant, outside of its time.
    """
    fewer = fewer or {}
    costs: dict[str, list[Cost]] = {label: [] for label in contestants}
    for turn in range(-1, turns):
        for label, run in contestants.items():
            if label in fewer and not 0 <= turn < fewer[label]:
                continue
            cost = timed(run)[1]
            clean_up()
            if turn >= 0:
                costs[label].append(cost)
    return costs


def ratios(costs: Sequence[Cost], reference: Sequence[Cost], kind: str) -> list[float]:
    """Return the ratios of the "wall" or "cpu" seconds, turn by turn as long as both have some."""
    pairs = zip(costs, reference, strict=False)
    return [getattr(cost, kind) / getattr(other, kind) for cost, other in pairs]


def span(values: Sequence[float]) -> str:
    """Return the median of some values, the least and the greatest."""
    return f"{median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def table(costs: Mapping[str, Sequence[Cost]], *, reference: str) -> str:
    """Return a Markdown table of medians, and of each contestant's ratios to the reference."""
    lines = [
        "| | turns | wall, s | CPU, s | wall, ratio (min – max) | CPU, ratio (min – max) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, mine in costs.items():
        cells = [str(len(mine))]
        cells += [f"{median(getattr(cost, kind) for cost in mine):.3f}" for kind in ("wall", "cpu")]
        for kind in ("wall", "cpu"):
            shown = span(ratios(mine, costs[reference], kind))
            cells.append("1" if label == reference else shown)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_targets(lines: Sequence[str], *, full: bool) -> None:
    """Print what is reached of the targets; of small sizes only that they are too small for it."""
    told = "\n".join(lines) if full else "Too small for the targets: fixed costs rule. See --full."
    print(f"\n{told}")


# ---------------------------------------------------------------------------------------- Processes


@dataclass(frozen=True)
class Memory:
    """The peak of a process's memory in bytes, None where the system does not tell."""

    anonymous: int | None
    """What it allocated, without pages of files; sampled, so a short peak may be higher."""
    resident: int | None
    """All its pages in memory, those of mapped files included."""


SAMPLE = 0.003
"""Seconds between two looks at a process's memory."""


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command quietly; exit with what it said if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def peak_memory(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Memory:
    """Run a command quietly and watch its memory; exit with what it said if it fails."""
    peaks: dict[str, int] = {}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        status = Path(f"/proc/{process.pid}/status")
        try:
            while process.poll() is None:
                if status.exists():
                    for line in status.read_text().splitlines():
                        key, _, value = line.partition(":")
                        if key in ("RssAnon", "VmHWM"):
                            peaks[key] = max(peaks.get(key, 0), int(value.split()[0]) * 1024)
                time.sleep(SAMPLE)
        finally:
            process.kill()  # nothing, unless the benchmark is being ended
            process.wait()
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read()}")
    return Memory(peaks.get("RssAnon"), peaks.get("VmHWM"))


def megabytes(nbytes: int | None) -> str:
    """Return a size in MB, a dash where it is not known."""
    return "–" if nbytes is None else f"{nbytes / 1e6:.0f}"


# -------------------------------------------------------------------------------------------- Disks


def copy_durably(source: Path, target: Path) -> None:
    """Copy a folder with ``cp -r`` and have every copied file, and the folder, on the disk."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in (*target.rglob("*"), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def check_space(folder: Path, wanted: float) -> None:
    """Make sure that the disk of a folder has ``wanted`` bytes free; exit if it has less."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB free, and {wanted / 1e9:.1f} GB are needed. Choose "
            "another disk with --scratch."
        )


@contextmanager
def scratch_folder(parent: Path | None, wanted: float) -> Iterator[Path]:
    """Yield a folder on a disk with ``wanted`` bytes free; delete it in the end, by SIGTERM too."""
    check_space(parent or Path(tempfile.gettempdir()), wanted)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix="starmerge-bench-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder lies on, as far as the system tells."""
    mounts = Path("/proc/self/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    kinds = {Path(line.split()[1]): line.split()[2] for line in lines}
    place = folder.resolve()
    return next((kinds[path] for path in (place, *place.parents) if path in kinds), "unknown")


# ------------------------------------------------------------------------------ Machine and options


def print_machine() -> None:
    """Print the machine, its load and the versions."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Machine: {cpu_model()}, {os.cpu_count()} cores; load before the run: {load}")
    print(
        f"Versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"starmerge {starmerge_models.__version__}; {platform.system()} {platform.release()}"
    )


def cpu_model() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the command line that shows a script's docstring as it is."""
    return argparse.ArgumentParser(
        description=(doc or "").replace("``", "`"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_run(
    parser: argparse.ArgumentParser, *, small: int = 3, full: int = 5, writes: bool = True
) -> argparse.Namespace:
    """Add options for the sizes, the turns and the place to write to; read the command line.

    Args:
        parser: What gets the options.
        small: Turns by default.
        full: Turns by default with ``--full``.
        writes: Whether the script writes files, and so has ``--scratch``.
    """
    parser.add_argument(
        "--full", action="store_true", help="the sizes of docs/performance.md (default: small)"
    )
    parser.add_argument(
        "--turns", type=int, metavar="N", help=f"default: {small}, with --full {full}"
    )
    if writes:
        parser.add_argument(
            "--scratch",
            type=Path,
            metavar="DIR",
            help="folder to write to; choose the disk (default: the system's for temporary files)",
        )
    options = parser.parse_args()
    if options.turns is None:
        options.turns = full if options.full else small
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    return options


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add options for the base and the adapters; by default the demo's."""
    parser.add_argument(
        "--base", type=Path, help="folder of the base (default: that of `starmerge demo prepare`)"
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        help="folder with a sub-folder for each adapter (default: those in the package)",
    )


def find_models(options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Return the folders of the base and of the adapters; exit if there are none."""
    if options.base is None:
        from starmerge_models.demo_names import prepared_base  # noqa: PLC0415  (needs the demo extra)

        options.base = prepared_base()
    if options.adapters is None:
        from starmerge_models_demo import ADAPTERS  # noqa: PLC0415  (needs the demo extra)

        options.adapters = ADAPTERS
    adapters = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    if not adapters:
        print(f"There are no adapters in {options.adapters}.", file=sys.stderr)
        sys.exit(2)
    return options.base, adapters
