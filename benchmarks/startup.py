"""What starting takes: the interpreter, torch, starmerge, the commands' help, a command with torch.

Each is a Python process of its own, in turns. Two differences are claimed: ``import
starmerge_models`` takes less than 0.3 s beyond ``import torch``, and ``python -m starmerge_models
--help`` less than 0.5 s in all.
``starmerge_models.merge`` is looked up to have everything imported that a merge needs. The command
``methods`` imports the same and prints a list: how commands that compute start and end.
"""

from __future__ import annotations

import sys
from functools import partial
from statistics import median

from common import Cost, parse_run, parser_of, print_machine, run_process, table, take_turns

PYTHON = "`python -c pass`"
TORCH = "`import torch`"
STARMERGE = "`import torch, starmerge_models`"
MERGE = "`import torch, starmerge_models; starmerge_models.merge`"
HELP = "`python -m starmerge_models --help`"

COMMANDS = {
    PYTHON: ["-c", "pass"],
    "`import starmerge_models`": ["-c", "import starmerge_models"],
    HELP: ["-m", "starmerge_models", "--help"],
    "`python -m starmerge_models merge --help`": ["-m", "starmerge_models", "merge", "--help"],
    TORCH: ["-c", "import torch"],
    STARMERGE: ["-c", "import torch, starmerge_models"],
    MERGE: ["-c", "import torch, starmerge_models; starmerge_models.merge"],
    "`python -m starmerge_models methods`": ["-m", "starmerge_models", "methods"],
}


def beyond(costs: dict[str, list[Cost]], label: str) -> float:
    """Return the median of the seconds that something took more than ``import torch``."""
    pairs = zip(costs[label], costs[TORCH], strict=True)
    return median(mine.wall - torch.wall for mine, torch in pairs)


def main() -> int:
    """Run the benchmark."""
    options = parse_run(parser_of(__doc__), small=2, full=9, writes=False)
    print_machine()
    print(f"{options.turns} turns\n")
    costs = take_turns(
        {
            label: partial(run_process, [sys.executable, *arguments])
            for label, arguments in COMMANDS.items()
        },
        options.turns,
    )
    print(table(costs, reference=PYTHON))
    print(f"\nBeyond {TORCH}: {STARMERGE} {beyond(costs, STARMERGE):.3f} s (target: < 0.3),")
    print(f"{MERGE} {beyond(costs, MERGE):.3f} s")
    print(f"{HELP}: {median(cost.wall for cost in costs[HELP]):.3f} s (target: < 0.5)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
