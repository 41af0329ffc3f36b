"""Calls of transformers in a separate process, with limits of time and memory.

A config can make transformers loop forever, exhaust the memory, or crash the process. So a module
that calls transformers is run as a program: it reads its arguments from standard input and writes
the result to standard output, both as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PATIENCE = 120.0
"""Timeout in seconds for importing transformers and creating a model without weights."""

_MEMORY = 32 * 2**30
"""Limit of the address space in bytes; libraries reserve more than they use."""


def call_isolated(program: ModuleType, question: list[Any]) -> Any:
    """Run a module as a program, and return its result.

    Args:
        program: The module, which calls :func:`serve` when it is run.
        question: The arguments of the served function.

    Returns:
        The result; None if transformers is not installed, or fails.
    """
    if find_spec("transformers") is None:
        return None
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        finished = subprocess.run(
            [sys.executable, "-m", program.__name__],
            input=json.dumps(question),
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=_PATIENCE,
            check=True,
        )
        return json.loads(finished.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def serve(function: Callable[..., Any]) -> None:
    """Call a function with the arguments on standard input, and write its result.

    Args:
        function: A function with a JSON-serialisable result.
    """
    # Redirect the output that libraries print, so that it does not mix with the result.
    answers = os.dup(1)
    os.dup2(2, 1)
    _limit_memory()
    answer = function(*json.load(sys.stdin))
    with os.fdopen(answers, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


def _limit_memory() -> None:
    try:
        import resource  # noqa: PLC0415  (not on all systems)

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, OSError, ValueError):
        pass
