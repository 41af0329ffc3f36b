"""How often a race of candidates errs, and what it saves: simulated, no model is asked.

A row's difficulty is normal, and so is a candidate's luck with it: a candidate answers the row if
its skill exceeds their sum. So candidates mostly fail on the same rows, as merges of one base do.
The fine-tune of each task, the ceiling, answers 90 % of its rows. For each setting:

- *best stopped*: races in which a candidate with the highest true skill was stopped for being
  clearly behind. Of equally good candidates, each counts: the share is of candidates.
- *behind later*: races whose choice a race with four times the rows puts clearly behind another
  candidate (paired, 95 %).
- *first tie*: the same, had the first given of all ties been taken.
- *regret*: the mean of the best true average less that of the choice, and its 95th percentile.
- *asked*: rows asked, as a share of asking every candidate all rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from common import parser_of, print_machine
from numpy.typing import NDArray
from scipy.stats import norm

from starmerge_models.evaluation.scoring.comparison import difference
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score
from starmerge_models.study.race import Outcome, race, round_sizes

SHARED = 0.8
"""Share of a row's difficulty that all candidates have in common."""

CEILING = 0.9

Right = NDArray[np.bool_]
"""(candidates, tasks, rows): who answers which row."""


@dataclass(frozen=True)
class Setting:
    """Candidates by their true accuracy, the same in every task."""

    name: str
    skills: Sequence[float]


SETTINGS = (
    Setting("all equal", [0.6] * 8),
    Setting("one ahead by 0.02, given last", [0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.62]),
    Setting("one ahead by 0.05, given last", [0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.65]),
    Setting("one ahead by 0.05, given first", [0.65, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]),
    Setting("a ladder of 0.02, best last", [0.46, 0.48, 0.5, 0.52, 0.54, 0.56, 0.58, 0.6]),
    Setting("half of them poor", [0.3, 0.58, 0.3, 0.6, 0.3, 0.59, 0.3, 0.6]),
)


def answers(
    skills: Sequence[float], tasks: int, rows: int, generator: np.random.Generator
) -> Right:
    """Draw who answers which row; the fine-tune comes last."""
    levels = np.array([*skills, CEILING])
    shared = generator.normal(size=(1, tasks, rows))
    own = generator.normal(size=(len(levels), tasks, rows))
    difficulty = SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own
    right: Right = difficulty < norm.ppf(levels)[:, None, None]
    return right


def scores(right: Right, candidate: int, rows: int) -> dict[str, Score]:
    """Return a candidate's scores on the first rows of each task."""
    return {
        str(task): score(
            [
                Prediction(str(row), "", str(hit), "True", float(hit))
                for row, hit in enumerate(own[:rows])
            ],
            "accuracy",
        )
        for task, own in enumerate(right[candidate])
    }


def run(right: Right, rows: int, budget: int | None = None) -> Outcome:
    """Race the candidates over the first rows."""
    tasks, ends = right.shape[1], round_sizes(rows)
    count = len(right) - 1

    def ask(names: Sequence[str], number: int) -> Mapping[str, Mapping[str, Score]]:
        return {name: scores(right, int(name), ends[number]) for name in names}

    costs = [tasks * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    ceilings = [scores(right, count, end) for end in ends]
    return race([str(number) for number in range(count)], ask, ceilings, costs, budget)


def is_clearly_behind(right: Right, chosen: int, rows: int) -> bool:
    """Tell whether some other candidate is clearly better than the chosen on the first rows."""
    ceiling, own = scores(right, len(right) - 1, rows), scores(right, chosen, rows)
    totals = right[:-1, :, :rows].sum(axis=(1, 2))
    found = difference(own, scores(right, int(totals.argmax()), rows), ceiling)
    return found is not None and found.clear and found.value < 0


def main() -> int:
    """Simulate, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--races", type=int, default=40, help="of each setting (default: 40)")
    parser.add_argument("--tasks", type=int, default=4, help="(default: 4)")
    parser.add_argument("--rows", type=int, default=64, help="of a task (default: 64)")
    options = parser.parse_args()
    print_machine()
    print(f"{options.races} races of 8 candidates, {options.tasks} tasks of {options.rows} rows\n")
    print("| setting | best stopped | behind later | first tie | regret, 95 % | asked |")
    print("|---|---:|---:|---:|---:|---:|")
    for setting in SETTINGS:
        skills = np.array(setting.skills)
        top = {str(number) for number in np.flatnonzero(skills == skills.max())}
        stopped, behind, first_behind, regrets, asked = 0, 0, 0, [], []
        for seed in range(options.races):
            generator = np.random.default_rng(seed)
            right = answers(setting.skills, options.tasks, 4 * options.rows, generator)
            outcome = run(right, options.rows)
            stopped += sum(s.name in top and s.stopped == "behind" for s in outcome.standings)
            chosen = int(outcome.chosen)
            behind += is_clearly_behind(right, chosen, 4 * options.rows)
            first_behind += is_clearly_behind(right, int(outcome.ties[0]), 4 * options.rows)
            regrets.append(float(skills.max() - skills[chosen]) / CEILING)
            whole = len(skills) * options.tasks * options.rows
            asked.append(sum(s.rows for s in outcome.standings) / whole)
        rate = stopped / (options.races * len(top))
        print(
            f"| {setting.name} | {rate:.1%} | {behind / options.races:.0%} "
            f"| {first_behind / options.races:.0%} "
            f"| {np.mean(regrets):.3f}, {np.quantile(regrets, 0.95):.3f} | {np.mean(asked):.0%} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
