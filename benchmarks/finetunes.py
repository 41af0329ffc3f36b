"""What merging full fine-tunes costs beside the floor: reading all files, writing one.

A synthetic bfloat16 base and four full fine-tunes of it (an update of rank 16, and noise) are
merged with ``average``, ``task_arithmetic`` and ``ties``. The floor reads the five checkpoints into
a buffer that is used again, writes a file of the base's size and has it on the disk. The methods
are called in this process, whose libraries are loaded; then as ``python -m starmerge_models
merge``, which is what to compare with another tool's process. The files are in the page cache for
all.

With ``--mergekit``, mergekit merges the same models: linear, task_arithmetic and ties, with
densities and weights as ours. Its threshold of ties is that of each tensor, ours that of the whole
model. Install it into an environment of its own:

    python3.11 -m venv mergekit && mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/finetunes.py --mergekit mergekit/bin/mergekit-yaml

What favours whom: mergekit does not wait for the disk (no fsync) and does not hash what it reads,
both of which starmerge does; each computes in a dtype of its own choice. ``--threads N`` limits
starmerge only. All processes have OMP_WAIT_POLICY=PASSIVE. What ``mergekit-yaml --help`` and
``import torch`` take is shown beside: a large part of a short process.

Calls have a turn beforehand that does not count, processes none; mergekit's have at most two turns,
its ties one. The memory of the processes is looked at every 3 ms while their time is taken.
``--full`` takes some ten minutes and 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import yaml
from common import (
    Memory,
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
)
from synthetic import llama_of, make_base, make_finetunes

import starmerge_models
from starmerge_models.methods import make_pipeline

FINETUNES = 4
FLOOR = "read five, write one, fsync"
CHUNK = 16 * 2**20
"""Bytes that the floor moves at once."""

PARAMETERS: dict[str, dict[str, float]] = {
    "average": {},
    "task_arithmetic": {"alpha": 0.4},
    "ties": {"k": 20, "lambda": 1},
}
TARGETS = {"average": 2, "task_arithmetic": 2, "ties": 10}
"""Greatest wall time over that of the floor."""

MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"normalize": True}},
    "task_arithmetic": {"parameters": {"normalize": False, "lambda": 0.4}},
    "ties": {"parameters": {"normalize": True, "lambda": 1.0, "density": 0.2}},
}
"""The same methods for mergekit; every model has the weight 1."""
MERGEKIT_TURNS = {"linear": 2, "task_arithmetic": 2, "ties": 1}
"""At most so many turns: they take minutes."""


def move_bytes(inputs: Sequence[Path], output: Path, size: int) -> None:
    """Read files, write one of ``size`` bytes, and have it on the disk."""
    buffer = bytearray(CHUNK)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    output.mkdir()
    with (output / "model.safetensors").open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(memoryview(buffer)[:left])
        os.fsync(file.fileno())


def merge(
    base: Path, models: dict[str, Path], method: str, output: Path, options: argparse.Namespace
) -> None:
    """Merge in this process."""
    starmerge_models.merge(
        base,
        models,
        make_pipeline(method, PARAMETERS[method]),
        output=output,
        threads=options.threads,
        memory=options.memory,
    )


def merge_command(
    base: Path, models: dict[str, Path], method: str, output: Path, options: argparse.Namespace
) -> list[str]:
    """Return the command of the same merge."""
    command = [
        sys.executable,
        "-m",
        "starmerge_models",
        "merge",
        str(base),
        *map(str, models.values()),
    ]
    command += ["-o", str(output), "-m", method]
    for key, value in PARAMETERS[method].items():
        command += ["-p", f"{key}={json.dumps(value)}"]
    command += ["--threads", str(options.threads)] if options.threads else []
    return command + (["--memory", options.memory] if options.memory else [])


def mergekit_command(
    executable: Path, base: Path, models: dict[str, Path], method: str, output: Path
) -> list[str]:
    """Write mergekit's recipe beside the output, and return its command."""
    recipe = output.with_name(f"{method}.yaml")
    content = {
        "merge_method": method,
        "models": [{"model": str(p), "parameters": {"weight": 1.0}} for p in models.values()],
        "dtype": "bfloat16",
        **MERGEKIT[method],
    }
    if method != "linear":
        content["base_model"] = str(base)
    recipe.write_text(yaml.safe_dump(content))
    return [str(executable), str(recipe), str(output), "--quiet"]


def mergekit_version(executable: Path) -> str:
    """Return the version of mergekit in the environment of its executable."""
    code = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    python = executable.absolute().with_name("python")
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def bench(size: float, options: argparse.Namespace) -> None:
    """Time everything, print the tables."""
    model = llama_of(size)
    with scratch_folder(options.scratch, (FINETUNES + 2.1) * model.nbytes) as scratch:
        base = make_base(scratch / "base", model)
        models = make_finetunes(scratch / "models", model, FINETUNES)
        output = scratch / "output"
        inputs = [file for p in (base, *models.values()) for file in p.glob("*.safetensors")]
        print(
            f"Base + {FINETUNES} fine-tunes of {model.nbytes / 1e9:.2f} GB, "
            f"{model.parameters / 1e6:.0f} M parameters, {len(model.tensors)} tensors; "
            f"{file_system(scratch)}; {options.turns} turns"
        )
        processes = {
            f"`starmerge merge`, {method}": merge_command(base, models, method, output, options)
            for method in options.methods
        }
        fewer = dict.fromkeys(processes, options.turns)
        beside = {"`python -c 'import torch'`": [sys.executable, "-c", "import torch"]}
        if options.mergekit:
            print(f"mergekit {mergekit_version(options.mergekit).strip()}")
            for method in options.mergekit_methods:
                label = f"`mergekit-yaml`, {method}"
                processes[label] = mergekit_command(options.mergekit, base, models, method, output)
                fewer[label] = min(options.turns, MERGEKIT_TURNS[method])
            beside["`mergekit-yaml --help`"] = [str(options.mergekit), "--help"]
        else:
            print("mergekit: left out; see --mergekit")
        contestants: dict[str, Callable[[], object]] = {
            FLOOR: partial(move_bytes, inputs, output, model.nbytes)
        }
        for method in options.methods:
            contestants[in_process(method)] = partial(merge, base, models, method, output, options)
        peaks: dict[str, list[Memory]] = {label: [] for label in processes}

        def watch(label: str) -> None:
            peaks[label].append(peak_memory(processes[label]))

        for label in processes:
            contestants[label] = partial(watch, label)
        for label, command in beside.items():
            contestants[label] = partial(run_process, command)
            fewer[label] = options.turns

        def clean_up() -> None:
            rmtree(output, ignore_errors=True)

        costs = take_turns(contestants, options.turns, fewer=fewer, clean_up=clean_up)
        print(f"\n{table(costs, reference=FLOOR)}")
        reached = {
            method: median(ratios(costs[in_process(method)], costs[FLOOR], "wall"))
            for method in options.methods
        }
        targets = [
            f"Target: {method} ≤ {TARGETS[method]} × the wall time of the floor; here {ratio:.2f}"
            for method, ratio in reached.items()
        ]
        print_targets(targets, full=options.full)
        print("\n| peak memory, MB | anonymous | resident |\n|---|---:|---:|")
        for label, seen in peaks.items():
            anonymous = max((peak.anonymous for peak in seen if peak.anonymous), default=None)
            resident = max((peak.resident for peak in seen if peak.resident), default=None)
            print(f"| {label} | {megabytes(anonymous)} | {megabytes(resident)} |")


def in_process(method: str) -> str:
    """Return the name of a merge in this process."""
    return f"`starmerge_models.merge`, {method}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARAMETERS, metavar="METHOD", help="these of our methods"
    )
    parser.add_argument(
        "--mergekit", type=Path, metavar="PATH", help="mergekit-yaml of another environment"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="as of `starmerge merge`; ours only"
    )
    parser.add_argument("--memory", metavar="SIZE", help="as of `starmerge merge`, such as 4GB")
    options = parse_run(parser, small=1, full=3)
    if options.mergekit and not options.mergekit.is_file():
        parser.error(f"--mergekit {options.mergekit} is no file")
    options.methods = options.only or list(PARAMETERS)
    names = zip(PARAMETERS, MERGEKIT, strict=True)
    options.mergekit_methods = [theirs for ours, theirs in names if ours in options.methods]
    return options


def main() -> int:
    """Run the benchmark."""
    options = parse_options()
    print_machine()
    bench(0.98e9 if options.full else 0.1e9, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
