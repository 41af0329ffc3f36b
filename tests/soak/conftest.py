"""What the soak's tests share: the process that runs commands."""

from __future__ import annotations

import pytest

from tests.forks import Forks


@pytest.fixture(scope="session")
def forks(loaded: Forks) -> Forks:
    """Return a process that runs commands in forks of itself."""
    return loaded
