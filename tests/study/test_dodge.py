"""Curves beside each other."""

import math

import pytest

from starmerge_models.study.dodge import Dodge


@pytest.mark.parametrize("curves", [1, 2, 9, 40])
def test_curves_stand_around_their_place_within_two_fifths_of_a_gap(curves: int) -> None:
    for is_log, places in ((False, [2, 4, 10]), (True, [2, 10, 50]), (False, [7])):
        dodge = Dodge(places, curves, is_log=is_log)
        for place in places:
            found = [dodge(place, curve) for curve in range(curves)]
            assert found == sorted(found)
            assert len(set(found)) == curves
            middle = math.sqrt(found[0] * found[-1]) if is_log else (found[0] + found[-1]) / 2
            assert middle == pytest.approx(place)
            spread = math.log(found[-1] / found[0]) if is_log else found[-1] - found[0]
            gap = {2: math.log(5) if is_log else 2}.get(places[0], 1)
            assert spread <= 0.4 * gap
