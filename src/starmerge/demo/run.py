"""The demo itself: merge the adapters that come with the package, and ask what the merges kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from starmerge.demo.base_model import prepared_base
from starmerge.evaluation.runner import Evaluation, evaluate
from starmerge.evaluation.table import LEGEND, differences, markdown
from starmerge.evaluation.tasks import TASKS
from starmerge.merging.engine import MergeResult, merge
from starmerge.study.figures import plot_scores

ADAPTERS = Path(__file__).parent / "adapters"
"""The adapters, a folder a task, each made by ``starmerge finetune`` with a seed of its own."""

METHODS = ("average", "star")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    evaluation: Evaluation
    merges: dict[str, MergeResult]
    table: str
    """The scores in Markdown, and how the merges differ."""
    chart: Path


def run_demo(
    output: Path,
    *,
    rows: int = 100,
    scorer: str = "generate",
    overwrite: bool = False,
    progress: bool = False,
) -> DemoResult:
    """Merge the adapters with average and STAR, score everything, write table and chart.

    Args:
        output: Folder for the merged models, the chart, the table and the scores.
        rows: Held-out rows a task.
        scorer: "generate" or "rank".
        overwrite: Replace what stands at ``output``.
        progress: Whether to show progress bars.

    Raises:
        UsageError: The base has not been prepared, or ``output`` is taken.
    """
    base = prepared_base()
    adapters = {path.name: path for path in sorted(ADAPTERS.iterdir()) if path.is_dir()}
    merges = {
        method: merge(
            base, adapters, method, output=output / method, overwrite=overwrite, progress=progress
        )
        for method in METHODS
    }
    evaluation = evaluate(
        base,
        adapters | {method: merges[method].path for method in METHODS},
        [TASKS[name] for name in adapters],
        scorer=scorer,
        rows=rows,
        progress=progress,
    )
    table = "\n\n".join([markdown(evaluation), LEGEND, *differences(evaluation)])
    (output / "scores.md").write_text(table + "\n", encoding="utf-8")
    (output / "scores.json").write_text(json.dumps(evaluation.to_json(), indent=2) + "\n")
    chart = output / "scores.png"
    plot_scores(evaluation, chart, title=f"{len(adapters)} adapters of SmolLM2-135M-Instruct")
    return DemoResult(evaluation, merges, table, chart)
