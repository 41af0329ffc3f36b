"""What the benchmarks share: clocks, and the machine that the numbers depend on."""

from __future__ import annotations

import os
import platform
import resource
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
