"""Progress of long runs: events, heartbeats, and a progress bar on terminals."""

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
"""Default of the seconds between heartbeats; see :func:`set_heartbeat`."""

_REMEMBERED = 10
"""Number of heartbeats over which the rate for the remaining time is averaged."""


class Progress:
    """Progress of a phase of a run: the finished units and the current step.

    Calling it with a number of units advances it. Without a phase it reports nothing.

    Args:
        phase: Name of the phase: "merging".
        total: Total number of units; None if not known yet.
        unit: "bytes" or "items".
        tensors: Number of tensors of the phase.
        bar: A progress bar to update, and the id of its task.
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
        """Advance by some units."""
        self.done += units
        if self._bar is not None:
            bar, task = self._bar
            bar.advance(task, units)

    def tensor_done(self, name: str, nbytes: int, seconds: float | None = None) -> None:
        """Advance by the bytes of a finished tensor.

        Args:
            name: Name of the tensor.
            nbytes: Bytes of the tensor, as counted by the phase.
            seconds: Seconds of work on the tensor; None if not measured.
        """
        self(nbytes)
        self._tensors_done += 1
        if LOG.isEnabledFor(TensorDone.level):
            count = self._tensors_done
            emit(TensorDone(self.phase, name, nbytes, seconds, count, self._tensors))

    def expects(self, total: int) -> None:
        """Set the total number of units, if it was not known at the beginning."""
        self.total = total
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, total=total)

    def waits_for(self, what: str) -> None:
        """Set the current step: "loading base", "asking merged: past"."""
        self._step = what
        if self.phase:
            emit(Step(self.phase, what))
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, description=f"{self.phase}: {what}")

    def beat(self) -> None:
        """Send a heartbeat event."""
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
"""A progress that reports nothing."""


class _HeartbeatThread:
    """A thread that sends the heartbeats of the innermost phase while any phase is active.

    The interval does not restart with a phase: many short phases beat like a single long one.
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
            if now > self._next + self._interval:  # the last phase ended long ago
                self._next = now + self._interval
            if len(self._phases) == 1:
                Thread(target=self._run, args=(phase,), name="heartbeat", daemon=True).start()

    def leave(self, phase: Progress) -> None:
        with self._changed:
            self._phases.remove(phase)
            self._changed.notify_all()

    def _run(self, outermost: Progress) -> None:
        """Send heartbeats until the outermost phase ends."""
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


_PULSE = _HeartbeatThread()


def set_heartbeat(seconds: float) -> None:
    """Set the seconds between heartbeats, for runs of this process that begin later."""
    _PULSE.set_interval(seconds)


@contextmanager
def progress_bar(
    description: str, total: int | None, *, show: bool, in_bytes: bool = False, tensors: int = 0
) -> Iterator[Progress]:
    """Report the progress of a phase: yield an object that the caller advances.

    Events are sent to the logger "starmerge_models", if it is enabled. A bar is drawn on standard
    error only if it is a terminal; in a file or a pipe a bar would be an empty line.

    Args:
        description: Name of the phase.
        total: Total number of units; None if not known yet.
        show: Whether to show a bar on a terminal or in a notebook.
        in_bytes: Whether the units are bytes.
        tensors: Number of tensors of the phase, if it reports each of them.
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
    """Draw a bar, if standard error is a terminal or a notebook."""
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
    # With FORCE_COLOR, rich treats a file as a terminal.
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
