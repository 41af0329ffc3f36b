"""Steps of a recipe file: the check whether a step's output is up to date."""

from __future__ import annotations

from starmerge_models.errors import StarmergeError
from starmerge_models.merging.plan import Plan
from starmerge_models.merging.report import versions
from starmerge_models.merging.verify import verify
from starmerge_models.reading import read_json
from starmerge_models.storage import exists
from starmerge_models.storage.publishing import REPORT


def is_up_to_date(plan: Plan, *, progress: bool = False) -> bool:
    """Return whether the output of a plan exists and a new merge would give the same bytes.

    The report must have the same recipe and versions, and the files of the output and of the inputs
    must have the hashes in the report.

    Args:
        plan: The plan, which may allow overwriting.
        progress: Show a progress bar on standard error.
    """
    if not exists(plan.path / REPORT):
        return False
    try:
        report = read_json(plan.path / REPORT)
        wanted = plan.recipe.model_dump(), versions(plan.recipe)
        if (report.get("recipe"), report.get("versions")) != wanted:
            return False
        verdict = verify(plan.path, progress=progress)
    except StarmergeError:
        return False
    return verdict.is_right and set(verdict.inputs.values()) == {"same"}
