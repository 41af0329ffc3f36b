"""The demo itself: merge the adapters that come with it, and ask what the merges kept."""

from __future__ import annotations

from pathlib import Path

from starmerge_models.demo_names import prepared_base
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.suites import find_suite
from starmerge_models.study.suite import SuiteResult, run_suite


def run_demo(
    output: Path,
    settings: Settings,
    *,
    cache: ScoreCache | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> SuiteResult:
    """Run the suite "demo" on the base that was prepared for it; see :func:`run_suite`.

    Raises:
        UsageError: The base has not been prepared, or ``output`` is taken.
    """
    return run_suite(
        find_suite("demo"),
        output,
        base=prepared_base(),
        settings=settings,
        cache=cache,
        overwrite=overwrite,
        progress=progress,
    )
