"""Questions to transformers, answered in a process of their own.

A config can make transformers loop for ever, take all memory, or end the process. So a module that
asks transformers runs as a program: it reads a question from standard input and writes the answer
to standard output, both as JSON.
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
"""Seconds that transformers gets to be imported and to lay out a model without weights."""

_MEMORY = 32 * 2**30
"""Bytes of address space; libraries take some before they need them."""


def ask(program: ModuleType, question: list[Any]) -> Any:
    """Run a module as a program, and return its answer.

    Args:
        program: The module, which calls :func:`answer_with` when it is run.
        question: The arguments of the function that it answers with.

    Returns:
        The answer; None where transformers is absent, or fails.
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


def answer_with(function: Callable[..., Any]) -> None:
    """Answer the question on standard input with a function of it.

    Args:
        function: It takes the question's entries as its arguments, and returns what JSON can hold.
    """
    # What libraries print is not the answer.
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
