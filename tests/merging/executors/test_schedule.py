"""Which work is begun next: everything once, in order, within bounds, and again if it was lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import WorkersLostError
from starmerge_models.merging.executors import schedule as schedules
from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.schedule import MOST, WINDOW, Group, Schedule


@dataclass(frozen=True)
class Sized(FunctionJob[int]):
    """Work of a known size, in MB."""

    def nbytes(self, number: int) -> int:
        return self.cost(number)


def sized(sizes: list[int]) -> Sized:
    return Sized(lambda number: number, lambda number: sizes[number] * 10**6)


def anything(need: int) -> bool:
    return True


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=120),
    places=st.integers(1, 7),
    draw=st.data(),
)
def test_every_number_is_done_and_comes_in_order(
    sizes: list[int], places: int, draw: st.DataObject
) -> None:
    schedule: Schedule[int] = Schedule(sized(sizes), range(len(sizes)), places)
    working: list[Group] = []
    given_, now, lost = [], 0.0, 0
    while not schedule.is_done:
        now += 1
        while len(working) < places and (group := schedule.begin(now, anything)):
            assert 1 <= len(group.numbers) <= MOST
            assert group.memory == 10**6 * max(sizes[number] for number in group.numbers)
            working.append(group)
        group = working.pop(draw.draw(st.integers(0, len(working) - 1)))
        if lost < 2 and draw.draw(st.booleans()):
            lost += 1
            schedule.lost(group, "It was killed.")
        else:
            schedule.done(group, [10 * number for number in group.numbers], now)
        given_ += schedule.results()
        assert len(schedule._found) <= WINDOW * places * MOST
    assert given_ == [10 * number for number in range(len(sizes))]


def test_groups_cost_about_the_same_and_large_work_is_first() -> None:
    sizes = [100] * 40 + [3000] + [100] * 8
    schedule: Schedule[int] = Schedule(sized(sizes), range(len(sizes)), 2)
    groups = []
    while (group := schedule.begin(0.0, anything)) is not None:
        groups.append(group)
        schedule.done(group, group.numbers, 1.0)
        list(schedule.results())
    assert sorted(number for group in groups for number in group.numbers) == list(range(49))
    # 7.8 GB, read and held 15.6, in 32 groups of up to two.
    assert {len(group.numbers) for group in groups} == {1, 2}
    large = next(i for i, group in enumerate(groups) if 40 in group.numbers)
    # It is begun as soon as the window reaches it, before those that come before it.
    assert any(max(group.numbers) < 40 for group in groups[large + 1 :])


def test_small_numbers_share_a_group() -> None:
    schedule: Schedule[int] = Schedule(sized([0] * 200 + [1]), range(201), 2)
    counts = []
    while (group := schedule.begin(0.0, anything)) is not None:
        counts.append(len(group.numbers))
    assert sorted(counts) == [9, MOST, MOST, MOST]


def test_work_of_unknown_cost_is_handed_out_one_by_one() -> None:
    job = FunctionJob(lambda number: number, lambda number: 0)
    schedule: Schedule[int] = Schedule(job, range(5), 2)
    group = schedule.begin(0.0, anything)
    assert group is not None
    assert group.numbers == (0,)


def test_what_does_not_fit_waits_and_holds_up_only_the_window() -> None:
    sizes = [1000] + [100] * 100
    schedule: Schedule[int] = Schedule(sized(sizes), range(101), 1)
    begun = []
    while (group := schedule.begin(0.0, lambda need: need < 10**9)) is not None:
        begun.append(group)
        schedule.done(group, group.numbers, 1.0)
    assert len(begun) == WINDOW - 1
    assert list(schedule.results()) == []
    large = schedule.begin(0.0, anything)
    assert large is not None
    assert large.numbers == (0,)


def test_a_number_that_kills_workers_is_found_and_named() -> None:
    schedule: Schedule[int] = Schedule(sized([1] * 6), range(6), 1)
    with pytest.raises(WorkersLostError, match=r"3 workers were lost .* number 4,.*Killed\."):
        while not schedule.is_done:
            group = schedule.begin(0.0, anything)
            assert group is not None
            if 4 in group.numbers:
                schedule.lost(group, "Killed.")
            else:
                schedule.done(group, group.numbers, 0.0)
            list(schedule.results())
    assert schedule._deaths[4] == 3
    assert max(schedule._deaths[number] for number in (0, 1, 2, 3, 5)) == 1


def test_work_that_hangs_is_begun_again_and_the_first_result_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedules, "LEAST", 1)
    schedule: Schedule[str] = Schedule(sized([10] * 4), range(4), 4)
    groups = [schedule.begin(0.0, anything) for _ in range(4)]
    hangs, *others = groups
    assert hangs is not None
    for group in others:
        assert group is not None
        schedule.done(group, ["first"], 1.0)
    assert schedule.begin_copy(2.0, 0.0, anything) is None  # three times as long as others is late
    assert schedule.begin_copy(4.0, 60.0, anything) is None
    assert not schedule.is_late(hangs, 2.0, 0.0)
    assert not schedule.is_late(hangs, 4.0, 60.0)
    assert schedule.is_late(hangs, 4.0, 0.0)  # so its memory does not count any more
    assert schedule.begin_copy(4.0, 0.0, anything, [hangs]) is None
    assert schedule.begin_copy(4.0, 0.0, anything) is hangs
    assert schedule.begin_copy(5.0, 0.0, anything) is None  # two workers have it
    schedule.lost(hangs, "The first one was killed.")
    assert schedule.begin(5.0, anything) is None
    schedule.done(hangs, ["second"], 6.0)
    assert schedule.is_late(hangs, 6.0, 60.0)
    schedule.done(hangs, ["third"], 7.0)
    assert list(schedule.results()) == ["second", "first", "first", "first"]
