"""Importing the package that rows are made of."""

from __future__ import annotations

import importlib
from types import ModuleType

from starmerge_models.errors import UsageError


def package(name: str) -> ModuleType:
    """Import the package behind a task.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"This task is made of the package {name.partition('.')[0]!r}, which is not installed. "
            "Install the extra 'demo': pip install 'starmerge-models[demo]'."
        ) from error
