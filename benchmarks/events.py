"""What events cost: the command that merges thousands of tiny tensors, with and without --log json.

Four full fine-tunes of a Llama-shaped base of width 64 are averaged, which is as little work for a
tensor as there is, so an event for each weighs most. Processes take turns: one tells nothing, one
writes lines of text, one an event for every tensor. Each turn's ratios are to the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import rmtree

from common import (
    file_system,
    parse_run,
    parser_of,
    print_machine,
    scratch_folder,
    table,
    take_turns,
)
from many_tensors import MODELS, tiny_model
from synthetic import make_base, make_finetunes


def bench(count: int, options: argparse.Namespace) -> None:
    """Time the command, print the table."""
    model = tiny_model(count)
    with scratch_folder(options.scratch, model.nbytes * (2 + MODELS)) as scratch:
        base = make_base(scratch / "base", model)
        finetunes = make_finetunes(scratch / "models", model, MODELS)
        output, log = scratch / "output", scratch / "log"
        command = [sys.executable, "-m", "starmerge_models", "merge", str(base)]
        command += [*map(str, finetunes.values()), "-m", "average", "-o", str(output)]

        def run(*told: str) -> None:
            with log.open("w") as stderr:
                subprocess.run(
                    [*command, *told], stderr=stderr, stdout=subprocess.DEVNULL, check=True
                )

        contestants: dict[str, Callable[[], object]] = {
            "`--quiet`": partial(run, "--quiet"),
            "`--log text`": partial(run, "--log", "text"),
            "`--log json`": partial(run, "--log", "json"),
        }
        print(f"{len(model.tensors)} tensors, {file_system(scratch)}; {options.turns} turns\n")
        costs = take_turns(contestants, options.turns, clean_up=partial(rmtree, output))
        print(table(costs, reference="`--quiet`"))
        lines = Path(log).read_text().count("\n")
        print(f"\n{lines} events, {log.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    """Run the benchmark."""
    options = parse_run(parser_of(__doc__), small=3, full=5)
    print_machine()
    bench(10000 if options.full else 2000, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
