"""What the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks

_LOADED = (
    *("transformers", "peft", "pandas"),
    *("starmerge_models.evaluation.runner", "starmerge_models.study.choose"),
)


@pytest.fixture(scope="session")
def loaded() -> Iterator[Forks]:
    """Return a process that runs commands in forks of itself, without importing anything again."""
    with Forks(*_LOADED) as served:
        yield served


@pytest.fixture
def starmerge(loaded: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command line: in a fork, or with ``env`` in a new process."""

    def run(
        *arguments: object, cwd: Path | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "starmerge_models", *map(str, arguments)]
        if options:
            return subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=cwd, **options
            )
        ended = loaded.run(arguments, env=dict(os.environ), cwd=str(cwd or Path.cwd()))
        return subprocess.CompletedProcess(command, ended.code, ended.out, ended.err)

    return run
