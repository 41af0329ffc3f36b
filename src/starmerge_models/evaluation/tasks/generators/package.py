"""Imports the packages that rows are generated from."""

from __future__ import annotations

import importlib
from types import ModuleType

from starmerge_models.errors import UsageError


def package(name: str) -> ModuleType:
    """Import the package that a task's rows are generated from.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"This task needs the package {name.partition('.')[0]!r}, which is not installed. "
            "Install the extra 'demo': pip install 'starmerge-models[demo]'."
        ) from error
