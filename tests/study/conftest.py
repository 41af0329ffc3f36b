"""Figures of these tests, which are many, are drawn in little time."""

import pytest

from starmerge_models.study.figures import style

SHIPPED = dict(style._SETTINGS)
"""The settings of figures as users get them."""


@pytest.fixture(autouse=True)
def _quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels, and small fonts: cutting TrueType takes most of the time of a PDF.

    Commands in processes of their own, and test_scores.py, draw as users do.
    """
    monkeypatch.setitem(style._SETTINGS, "savefig.dpi", 72)
    monkeypatch.setitem(style._SETTINGS, "pdf.fonttype", 3)
