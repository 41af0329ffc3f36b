"""Figures of these tests, which are many, are drawn in little time."""

import pytest

from starmerge_models.study.figures import style

DPI = style._SETTINGS["savefig.dpi"]
"""The resolution of figures as users get them."""


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels; commands in processes of their own, and test_scores.py, draw them all."""
    monkeypatch.setitem(style._SETTINGS, "savefig.dpi", 72)


@pytest.fixture
def small_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write PDFs with fonts of another kind: to cut TrueType takes most of the time of one.

    These fonts lack what is outside Latin-1, such as the dots of a name that is cut.
    """
    monkeypatch.setitem(style._SETTINGS, "pdf.fonttype", 3)
