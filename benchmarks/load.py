"""Large merges: thousands of adapters on a small base, and a large base within little memory.

    python benchmarks/load.py            # 100 adapters; a base of 0.5 GB
    python benchmarks/load.py --full     # 2,000 adapters; a base of 16 GB, 20 GB of disk

Each merge is a process of its own, `starmerge merge`, whose memory is sampled. "Anonymous" is what
it allocated, which is what the system cannot take back; "resident" includes the pages of mapped
files, which it can. The large base is a sparse file of zeros, which reads like any other; what is
written is as large as with other weights. No process may open more than 256 files, a quarter of
what systems usually allow. (Models of 10,000 tensors: many_tensors.py.)
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import torch
from common import (
    file_system,
    megabytes,
    parse_run,
    parser_of,
    peak_memory,
    print_machine,
    scratch_folder,
)
from synthetic import ALL_LINEAR, Llama, llama_of, make_adapters, make_base, make_sparse_base

FILES = 256
"""Files that a process may have open."""
SMALL = Llama(hidden=512, intermediate=1408, layers=4, vocabulary=8192, key_value=128, head=64)
MEMORY = "1GB"
"""For tensors, of the merge into the large base."""


def measure(label: str, arguments: Sequence[str], output: Path) -> None:
    """Merge, and print a row of the table."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "starmerge_models", "merge", *arguments, "-o", str(output)]
    memory = peak_memory(command)
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in output.rglob("*"))
    kept = ""
    report = json.loads((output / "merge_report.json").read_text())
    if (error := report["output"].get("error")) is not None:
        kept = f", error {error:.2f}"
    peaks = f"{megabytes(memory.anonymous)} | {megabytes(memory.resident)}"
    print(f"| {label}{kept} | {seconds:.1f} | {peaks} | {size / 1e6:.0f} |", flush=True)
    rmtree(output)


def many_adapters(count: int, options: argparse.Namespace) -> None:
    """Merge many adapters of a small base, as a model and as an adapter."""
    size = SMALL.adapter_bytes(ALL_LINEAR)
    with scratch_folder(options.scratch, count * size + 4 * SMALL.nbytes) as scratch:
        base = make_base(scratch / "base", SMALL)
        models = list(map(str, make_adapters(scratch / "adapters", SMALL, count).values()))
        print(
            f"\n{count} adapters of rank 16, {count * size / 1e6:.0f} MB, on a base of "
            f"{SMALL.nbytes / 1e6:.0f} MB; {file_system(scratch)}\n"
        )
        print_head()
        for method in ("average", "star", "auto", "ties"):
            measure(f"`{method}`, model", [str(base), *models, "-m", method], scratch / "out")
        for method in ("average", "star"):
            wanted = ["--as", "adapter", "--rank", "64", *models, "-m", method]
            measure(f"`{method}`, adapter of rank 64", wanted, scratch / "out")


def large_base(nbytes: float, options: argparse.Namespace) -> None:
    """Merge adapters into a base that is larger than the memory it may take."""
    model = replace(llama_of(nbytes), vocabulary=128256) if nbytes > 8e9 else llama_of(nbytes)
    with scratch_folder(options.scratch, 1.25 * model.nbytes) as scratch:
        base = make_sparse_base(scratch / "base", model)
        models = list(map(str, make_adapters(scratch / "adapters", model, 8).values()))
        print(
            f"\n8 adapters of rank 16 on all linear modules, a base of {model.nbytes / 1e9:.1f} "
            f"GB, --memory {MEMORY}; largest tensor {model.largest / 1e6:.0f} MB; "
            f"{file_system(scratch)}\n"
        )
        print_head()
        for method in ("average", "star", "auto"):
            wanted = [str(base), *models, "-m", method, "--memory", MEMORY]
            measure(f"`{method}`, model", wanted, scratch / "out")


def print_head() -> None:
    """Print the head of a table."""
    print("| | wall, s | anonymous, MB | resident, MB | written, MB |\n|---|---:|---:|---:|---:|")


def main() -> int:
    """Run the benchmark."""
    options = parse_run(parser_of(__doc__))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    torch.set_num_threads(1)
    print_machine()
    many_adapters(2000 if options.full else 100, options)
    large_base(16e9 if options.full else 5e8, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
