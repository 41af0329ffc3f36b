"""What a long run tells of itself: events, heartbeats, and a bar where a person looks on."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import TYPE_CHECKING

from starmerge_models.events import (
    LOG,
    Heartbeat,
    PhaseFinished,
    PhaseStarted,
    Step,
    TensorDone,
    emit,
)
from starmerge_models.machine import resident_memory

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

HEARTBEAT = 30.0
"""Seconds between heartbeats, unless :func:`set_heartbeat` has said otherwise."""

_REMEMBERED = 10
"""Heartbeats whose rate tells the time that is left."""


class Progress:
    """What a phase of a run tells of itself: how much is done, and what is being waited for.

    Called with a number of units, it moves on. One that belongs to no phase tells nothing.

    Args:
        phase: What the run does: "merging".
        total: Units in all; None: not known yet.
        unit: "bytes" or "items".
        tensors: How many tensors the phase is about.
        bar: A bar that moves along, and its id there.
    """

    def __init__(
        self,
        phase: str = "",
        total: int | None = None,
        unit: str = "items",
        tensors: int = 0,
        bar: tuple[Bar, TaskID] | None = None,
    ) -> None:
        self.phase, self.total, self.unit = phase, total, unit
        self.done = 0
        self._tensors, self._tensors_done, self._bar = tensors, 0, bar
        self._step: str | None = None
        self.began = time.monotonic()
        self._beats = deque([(self.began, 0)], maxlen=_REMEMBERED)

    def __call__(self, units: int) -> None:
        """Move on by some units."""
        self.done += units
        if self._bar is not None:
            bar, task = self._bar
            bar.advance(task, units)

    def tensor_done(self, name: str, nbytes: int, seconds: float | None = None) -> None:
        """Move on by the bytes of a tensor.

        Args:
            name: The tensor's.
            nbytes: Its bytes, as the phase counts them.
            seconds: How long it was worked on; None: that was not measured.
        """
        self(nbytes)
        self._tensors_done += 1
        if LOG.isEnabledFor(TensorDone.level):
            count = self._tensors_done
            emit(TensorDone(self.phase, name, nbytes, seconds, count, self._tensors))

    def expects(self, total: int) -> None:
        """Say how many units there are in all, where that was not known at the beginning."""
        self.total = total
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, total=total)

    def waits_for(self, what: str) -> None:
        """Say what is being done now: "loading base", "asking merged: past"."""
        self._step = what
        if self.phase:
            emit(Step(self.phase, what))
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, description=f"{self.phase}: {what}")

    def beat(self) -> None:
        """Say how far it is."""
        now, done = time.monotonic(), self.done
        (last, before), (first, long_before) = self._beats[-1], self._beats[0]
        self._beats.append((now, done))
        rate = _rate(done - long_before, now - first)
        left = None if self.total is None or not rate else max(0, self.total - done) / rate
        emit(
            Heartbeat(
                phase=self.phase,
                step=self._step,
                done=done,
                total=self.total,
                unit=self.unit,
                rate=_rate(done - before, now - last),
                mean_rate=_rate(done, now - self.began),
                elapsed=now - self.began,
                seconds_left=left,
                memory=resident_memory(),
            )
        )


def _rate(units: int, seconds: float) -> float:
    return units / seconds if seconds > 0 else 0.0


SILENT = Progress()
"""Tells nothing."""


class _Pulse:
    """A thread that lets the innermost phase say how far it is, as long as there is a phase.

    The time between heartbeats goes on from phase to phase: many short phases beat like a long one.
    """

    def __init__(self) -> None:
        self._interval = HEARTBEAT
        self._changed = Condition()
        self._phases: list[Progress] = []
        self._next = -math.inf

    def set_interval(self, seconds: float) -> None:
        with self._changed:
            self._interval = seconds
            if not self._phases:
                self._next = -math.inf

    def enter(self, phase: Progress) -> None:
        with self._changed:
            self._phases.append(phase)
            now = time.monotonic()
            if now > self._next + self._interval:  # long after the last phase
                self._next = now + self._interval
            if len(self._phases) == 1:
                Thread(target=self._run, args=(phase,), name="heartbeat", daemon=True).start()

    def leave(self, phase: Progress) -> None:
        with self._changed:
            self._phases.remove(phase)
            self._changed.notify_all()

    def _run(self, outermost: Progress) -> None:
        """Beat until the phase ends with which the thread began."""
        while True:
            with self._changed:
                if self._phases[:1] != [outermost]:
                    return
                left = self._next - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                phase = self._phases[-1]
                self._next = time.monotonic() + self._interval
            phase.beat()


_PULSE = _Pulse()


def set_heartbeat(seconds: float) -> None:
    """Set the seconds between the heartbeats of this process's runs that begin from now on."""
    _PULSE.set_interval(seconds)


@contextmanager
def progress_bar(
    description: str, total: int | None, *, show: bool, in_bytes: bool = False, tensors: int = 0
) -> Iterator[Progress]:
    """Tell how far a phase of a run is: yield what moves it on.

    Events go to the logger "starmerge_models", if it listens. A person sees a bar on standard
    error; in a file or a pipe, all that there is of a bar would be an empty line.

    Args:
        description: What is being done.
        total: Units in all; None: not known yet.
        show: Whether to show a bar on a terminal or in a notebook.
        in_bytes: Whether the units are bytes.
        tensors: How many tensors the phase is about, if it tells of each.
    """
    is_heard = LOG.isEnabledFor(logging.INFO)
    if not show and not is_heard:
        yield SILENT
        return
    unit = "bytes" if in_bytes else "items"
    with _drawn(description, total, in_bytes=in_bytes, show=show) as bar:
        phase = Progress(description, total, unit, tensors, bar)
        if not is_heard:
            yield phase
            return
        emit(PhaseStarted(description, total, unit))
        _PULSE.enter(phase)
        try:
            yield phase
        finally:
            _PULSE.leave(phase)
        emit(PhaseFinished(description, phase.done, unit, time.monotonic() - phase.began))


@contextmanager
def _drawn(
    description: str, total: int | None, *, in_bytes: bool, show: bool
) -> Iterator[tuple[Bar, TaskID] | None]:
    """Draw a bar, where a person sees it."""
    if not show:
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  (only where a bar is drawn)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar  # noqa: PLC0415

    console = Console(stderr=True)
    # With FORCE_COLOR, rich takes a file for a terminal.
    is_seen = console.is_terminal and sys.stderr.isatty()
    if not is_seen and not console.is_jupyter:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=total)
