"""Parameters of several methods at once."""

import pytest

from starmerge.cli.parameters import parameters_of
from starmerge.errors import UsageError


def test_parameters_are_those_of_their_method() -> None:
    given = {"star.eta": 30, "star+ties.star.eta": 60}
    methods = ["star", "star+ties"]
    assert parameters_of("star", given, methods) == {"eta": 30}
    assert parameters_of("star+ties", given, methods) == {"star.eta": 60}
    assert parameters_of("star", {"eta": 30}, ["star"]) == {"eta": 30}
    with pytest.raises(UsageError, match="-p eta: of which method"):
        parameters_of("star", {"eta": 30}, methods)
