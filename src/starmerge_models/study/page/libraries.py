"""The JavaScript libraries that are embedded in a page, from installed Python packages.

- Vega, Vega-Lite and vega-embed, from ``vl-convert-python``: the versions that Altair targets.
- DataTables, from ``itables``, which bundles it for offline notebooks.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import altair as alt
import vl_convert

from starmerge_models.errors import StarmergeError


@cache
def vega() -> str:
    """Return a script that defines ``window.vegaEmbed``."""
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version))


@cache
def datatables() -> str:
    """Return a script that defines ``window.jQuery`` with DataTables.

    Raises:
        StarmergeError: The bundle in the installed itables has another format.
    """
    text = resources.files("itables").joinpath("html/dt_bundle.js").read_text(encoding="utf-8")
    # The bundle is an ES module that exports jQuery. Inline, it must set a global instead.
    changed, count = re.subn(
        r"\bexport\s*\{[^{}]*?([\w$]+) as jQuery\b[^{}]*\};?", r"window.jQuery=\1;", text
    )
    if count != 1:
        raise StarmergeError(
            "The installed package itables has no jQuery to export, so the report's tables cannot "
            "be made. Install itables 2.9, or make no report."
        )
    return changed
