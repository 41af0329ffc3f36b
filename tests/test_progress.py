"""What a phase tells: by a bar where somebody sees it, and by events where somebody listens."""

import logging
import time
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from starmerge_models.events import Heartbeat, PhaseFinished, PhaseStarted, Step, TensorDone
from starmerge_models.progress import HEARTBEAT, Progress, progress_bar, set_heartbeat


@pytest.fixture
def quick_heart() -> Iterator[None]:
    set_heartbeat(0.1)
    yield
    set_heartbeat(HEARTBEAT)


def _events(caplog: pytest.LogCaptureFixture) -> list[object]:
    return [record.msg for record in caplog.records if record.name == "starmerge_models"]


def test_a_bar_leaves_nothing_in_a_file_or_a_pipe(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a pipe for a terminal
    with progress_bar("merging", 2, show=True) as advance:
        advance(1)
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_a_bar_says_how_far_it_is_and_what_is_waited_for() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    with Bar(console=console) as bar:
        task = bar.add_task("evaluating", total=None)
        progress = Progress("evaluating", bar=(bar, task))
        progress.expects(12)
        progress.waits_for("asking [merged]: past")
        progress(5)
        (shown,) = bar.tasks
        assert (shown.description, shown.completed, shown.total) == (
            "evaluating: asking [merged]: past",
            5,
            12,
        )


def test_a_program_that_listens_to_the_logger_hears_of_each_tensor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.DEBUG, "starmerge_models"),
        progress_bar("merging", 70, show=False, in_bytes=True, tensors=2) as phase,
    ):
        phase.tensor_done("a", 30, 0.5)
        phase.waits_for("the next one")
        phase.tensor_done("b", 40)
    *others, finished = _events(caplog)
    assert others == [
        PhaseStarted("merging", 70, "bytes"),
        TensorDone("merging", "a", 30, 0.5, 1, 2),
        Step("merging", "the next one"),
        TensorDone("merging", "b", 40, None, 2, 2),
    ]
    assert isinstance(finished, PhaseFinished)
    assert (finished.phase, finished.done) == ("merging", 70)


def test_who_listens_from_info_on_hears_of_phases_alone(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "starmerge_models"),
        progress_bar("merging", 1, show=False, tensors=1) as phase,
    ):
        phase.tensor_done("a", 1)
    assert [type(event) for event in _events(caplog)] == [PhaseStarted, PhaseFinished]


def test_a_phase_that_raises_has_not_finished(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "starmerge_models"),
        pytest.raises(ZeroDivisionError),
        progress_bar("merging", 1, show=False),
    ):
        _ = 1 / 0
    assert [type(event) for event in _events(caplog)] == [PhaseStarted]


def test_the_heart_beats_while_nothing_is_finished_and_from_phase_to_phase(
    quick_heart: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "starmerge_models"):
        with progress_bar("merging", 100, show=False, in_bytes=True) as phase:
            phase(25)
            time.sleep(0.45)
        for _ in range(8):  # each is shorter than the time between heartbeats
            with progress_bar("hashing", None, show=False):
                time.sleep(0.05)
        beats = [event for event in _events(caplog) if isinstance(event, Heartbeat)]
        time.sleep(0.3)
        assert len([event for event in _events(caplog) if isinstance(event, Heartbeat)]) == len(
            beats
        )
    first, second = (beat for beat in beats[:2])
    assert (first.phase, first.done, first.total) == ("merging", 25, 100)
    assert first.rate == pytest.approx(25 / first.elapsed)
    assert first.mean_rate == pytest.approx(25 / first.elapsed)
    assert first.seconds_left == pytest.approx(3 * first.elapsed)
    assert first.memory is not None
    assert first.memory > 2**20
    assert second.rate == 0
    assert second.mean_rate == pytest.approx(25 / second.elapsed)
    assert second.seconds_left == pytest.approx(3 * second.elapsed)
    others = [beat for beat in beats if beat.phase == "hashing"]
    assert others
    assert all(beat.seconds_left is None for beat in others)


def test_a_phase_within_another_is_the_one_that_is_told_of(
    quick_heart: None, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "starmerge_models"),
        progress_bar("outer", None, show=False),
        progress_bar("inner", None, show=False) as phase,
    ):
        phase.waits_for("a model")
        time.sleep(0.25)
    beats = [event for event in _events(caplog) if isinstance(event, Heartbeat)]
    assert {(beat.phase, beat.step) for beat in beats} == {("inner", "a model")}
