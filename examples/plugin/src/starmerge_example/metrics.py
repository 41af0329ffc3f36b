"""How alike a response and the right answer are, letter by letter."""

from __future__ import annotations

import math
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from starmerge_models.evaluation.scoring.metrics import Prediction, metric


@metric("edit_similarity")
def edit_similarity(row: Prediction) -> float:
    """What a row earns: twice the letters that match in order, over all letters of both."""
    return SequenceMatcher(None, row.response.strip(), row.gold, autojunk=False).ratio()


def _f1(sums: NDArray[np.float64]) -> float:
    """F1 of all rows together: 2 · shared / (written + right), NaN if there is no letter."""
    shared, written, right = sums
    return 2 * shared / (written + right) if written + right else math.nan


@metric("char_f1", of=_f1)
def char_f1(row: Prediction) -> tuple[int, int, int]:
    """Letters that response and right answer share, those of the response, those of the answer."""
    written, right = Counter(row.response.strip()), Counter(row.gold)
    return (written & right).total(), written.total(), right.total()
