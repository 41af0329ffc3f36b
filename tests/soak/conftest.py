"""What the soak's tests share: the process that runs commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Return a process that runs commands in forks of itself."""
    with Forks() as served:
        yield served
