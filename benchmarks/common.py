"""What the benchmarks share: clocks, and the machine that the numbers depend on."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import starmerge

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


def print_machine() -> None:
    """Print the machine, its load and the versions."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Machine: {cpu_model()}, {os.cpu_count()} cores; load before the run: {load}")
    print(
        f"Versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"starmerge {starmerge.__version__}; {platform.system()} {platform.release()}"
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
        from starmerge.demo.base_model import prepared_base  # noqa: PLC0415  (needs the demo extra)

        options.base = prepared_base()
    if options.adapters is None:
        from starmerge.demo.run import ADAPTERS  # noqa: PLC0415  (needs the demo extra)

        options.adapters = ADAPTERS
    adapters = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    if not adapters:
        print(f"There are no adapters in {options.adapters}.", file=sys.stderr)
        sys.exit(2)
    return options.base, adapters
