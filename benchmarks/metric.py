"""What a metric costs: the demo's adapters merged in memory, without and with one.

    starmerge calibrate "$(starmerge demo prepare)" -o metric.safetensors --prompts digits …
    python benchmarks/metric.py metric.safetensors

``regmean`` takes part if the metric has prompts of the adapters' eight tasks.
The base's weights are hashed before the first turn. CPU seconds are those of all threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from common import parser_of, print_machine, table, take_turns

from starmerge_models import load_task_vectors, open_metric
from starmerge_models.demo_names import prepared_base
from starmerge_models_demo import ADAPTERS

METHODS = ("star", "tsv_m", "shares", "covariance")


def main() -> int:
    """Merge in turns, print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("metric", type=Path, help="a metric of SmolLM2-135M-Instruct")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="(default: 3)")
    options = parser.parse_args()
    print_machine()
    metric = open_metric(options.metric)
    adapters = {path.name: path for path in sorted(ADAPTERS.iterdir()) if path.is_dir()}
    vectors = load_task_vectors(prepared_base(), adapters)
    contestants: dict[str, Callable[[], object]] = {}
    for method in METHODS:
        contestants[f"`{method}`"] = partial(vectors.merge, method, threads=1)
        contestants[f"`{method}`, whitened"] = partial(
            vectors.merge, method, metric=metric, threads=1
        )
    if adapters.keys() <= set(metric.tasks):
        contestants["`regmean`"] = partial(vectors.merge, "regmean", metric=metric, threads=1)
    print(table(take_turns(contestants, options.turns), reference="`star`"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
