"""Adapters merged into one adapter: seconds, and the peak of memory.

Adapters of rank 16 on q_proj and v_proj of a Llama of 7 billion parameters, in bfloat16, merged by
``python -m starmerge_models merge --as adapter`` into one: as it is (20 adapters: rank 320, exact),
and at rank 64. The base does not take part. The peak is that of the process's anonymous memory,
looked at every 3 ms; beside it that of a process which only loads Python, torch and starmerge. The
files are in the page cache. ``--full`` needs 12 GB of disk; without it, the model has a width of
512.
"""

from __future__ import annotations

import os
import sys
from shutil import rmtree

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from common import (
    megabytes,
    parse_run,
    parser_of,
    peak_memory,
    print_machine,
    scratch_folder,
    timed,
)
from synthetic import QUERY_VALUE, RANK, Llama, make_adapters

SMALL = Llama(hidden=512, intermediate=1024, layers=2, vocabulary=1024, key_value=512, head=64)
FULL = Llama(hidden=4096, intermediate=11008, layers=32, vocabulary=32000, key_value=4096, head=128)
COUNTS = {False: (20, 100), True: (20, 500)}
CASES = (("average", None), ("average", 64), ("star", 64))
EXACT = 20
"""Up to so many adapters are also merged without a rank."""


def main() -> int:
    """Merge, print a table."""
    options = parse_run(parser_of(__doc__), small=1, full=1)
    model, counts = FULL if options.full else SMALL, COUNTS[options.full]
    print_machine()
    nbytes = 2 * model.layers * 2 * 2 * RANK * model.hidden
    print(f"\n{model.layers} layers of width {model.hidden}; {nbytes / 1e6:.1f} MB an adapter\n")
    print("| adapters | method | rank | seconds | CPU, s | peak, MB | Python and torch, MB |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    with scratch_folder(options.scratch, 1.4 * max(counts) * nbytes) as folder:
        models = list(
            make_adapters(folder / "adapters", model, max(counts), targets=QUERY_VALUE).values()
        )
        command = [sys.executable, "-m", "starmerge_models", "merge", "--as", "adapter"]
        idle = peak_memory([sys.executable, "-c", "import starmerge_models.merging.engine"])
        for count in counts:
            for method, rank in CASES:
                if rank is None and count > EXACT:
                    continue
                output = folder / "out"
                run = [*command, *map(str, models[:count]), "-m", method, "-o", str(output)]
                run += [] if rank is None else ["--rank", str(rank)]
                peak, cost = timed(lambda run=run: peak_memory(run))
                cells = [count, method, rank or "exact", f"{cost.wall:.1f}", f"{cost.cpu:.1f}"]
                cells += [megabytes(peak.anonymous), megabytes(idle.anonymous)]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                rmtree(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
