"""Reading the last word of a response, where a model thinks aloud before it answers."""

from __future__ import annotations

import re

from starmerge_models.evaluation.scoring.matching import matcher


@matcher("last_word")
def last_word(response: str, gold: str, labels: tuple[str, ...]) -> str | None:
    """Read the last word that is a label, or without labels the last word."""
    words: list[str] = re.findall(r"\w+", response)
    known = [word for word in words if not labels or word in labels]
    return known[-1] if known else None
