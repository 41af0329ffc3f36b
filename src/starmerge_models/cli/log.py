"""Standard error of a command: bars and notes, lines with times, or events in JSON.

Python's logging carries the events of :mod:`starmerge_models.events`; the handler here is added to
their logger when starmerge runs as a command, and only then.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
import warnings
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TextIO

from starmerge_models import __version__, machine
from starmerge_models.events import (
    LOG,
    Event,
    Failed,
    Finish,
    Heartbeat,
    Log,
    Note,
    PhaseStarted,
    Published,
    Start,
    Warned,
)
from starmerge_models.progress import set_heartbeat

Mode = Literal["auto", "text", "json"]

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # Python 3.10 does not take the type of the stream.
    _StreamHandler = logging.StreamHandler


class Reporter(_StreamHandler):
    """Writes the events of this process's command to standard error."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.mode: Mode = "auto"
        self.quiet = self.debug = False
        self._command: str | None = None
        self._run, self._began = os.urandom(6).hex(), time.monotonic()
        self._outputs: list[str] = []
        self._has_ended = False
        self.has_worked = False
        """Whether the command has begun a phase, and not only printed what it knows."""
        LOG.addHandler(self)
        LOG.propagate = False
        LOG.setLevel(logging.INFO)
        warnings.showwarning = _show_warning

    def configure(self, mode: Mode, *, quiet: bool, heartbeat: float, debug: bool) -> None:
        """Choose which events are written, and in which form.

        Args:
            mode: "auto": bars, or heartbeats where no terminal is; notes, warnings, errors. "text":
                events as lines with times. "json": all events, those of each tensor among them.
            quiet: Write only errors.
            heartbeat: Seconds between heartbeats.
            debug: Write debug messages and tracebacks, too.
        """
        self.mode, self.quiet, self.debug = mode, quiet, debug
        set_heartbeat(heartbeat)
        LOG.setLevel(logging.DEBUG if mode == "json" or debug else logging.INFO)
        if not self.is_for_people:
            # A stream that is no terminal gets no bar; lines of other libraries become events.
            sys.stderr = _Lines(self.stream)
        if not self.is_for_people or not self.stream.isatty():
            for library in ("HF_HUB", "HF_DATASETS"):
                os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")

    @property
    def is_for_people(self) -> bool:
        """Whether standard error is free text for people."""
        return self.mode == "auto" and not self.quiet

    def start(self, command: str | None) -> None:
        """Log that a command begins."""
        self._command = command
        processors, memory = machine.usable_processors(), machine.usable_memory()
        LOG.info(Start(__version__, os.getpid(), processors, memory))

    def finish(self, exit_code: int) -> None:
        """Log that the command has ended by itself."""
        LOG.info(Finish(exit_code, self._seconds(), self._outputs))

    def fail(self, message: str, exit_code: int, **details: Any) -> None:
        """Log that an error or a signal has ended the command; see :class:`Failed`."""
        LOG.error(Failed(message, exit_code, self._seconds(), **details))

    def close(self) -> None:
        """Give standard error back to the main thread: the interpreter may still write to it.

        Other threads may still run, and their lines would stand among those of the log.
        """
        if isinstance(sys.stderr, _Lines):
            sys.stderr.end()
        LOG.removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if its level and kind are to be written."""
        if self._has_ended:  # threads that are still running must not add events
            return
        self._has_ended = isinstance(record.msg, Finish | Failed)
        self.has_worked |= isinstance(record.msg, PhaseStarted)
        if isinstance(record.msg, Published):
            self._outputs.append(record.msg.path)
        if self._is_written(record):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line of text or of JSON."""
        event = _event_of(record)
        if self.mode != "json":
            is_timed = self.mode == "text" or isinstance(event, Heartbeat)
            return f"{_time(record, 'seconds')} {event}" if is_timed else str(event)
        common = {
            "time": _time(record, "milliseconds"),
            "level": record.levelname.lower(),
            "event": event.name,
            "command": self._command,
            "run": self._run,
        }
        return json.dumps(common | event.fields())

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore a failed write: the run goes on, even if the reader of its log has ended."""

    def _is_written(self, record: logging.LogRecord) -> bool:
        event, level = record.msg, record.levelno
        if self.quiet:
            return level >= logging.ERROR
        if not isinstance(event, Event):
            return self.debug or level >= logging.WARNING
        if self.mode == "json":
            return True
        if self.mode == "text":
            return self.debug or level >= logging.INFO
        if isinstance(event, Heartbeat):
            return not self.stream.isatty()
        return level >= logging.WARNING or isinstance(event, Note)

    def _seconds(self) -> float:
        return time.monotonic() - self._began


class _Lines(io.TextIOBase):
    """A replacement of standard error that makes an event of each line of other libraries.

    Args:
        stream: Standard error itself.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rest, self._has_ended = stream, "", False

    def write(self, text: str) -> int:
        """Buffer text; emit an event for each finished line."""
        if self._has_ended:
            if threading.current_thread() is threading.main_thread():
                self._stream.write(text)
            return len(text)
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                LOG.info(Log(line, "stderr"))
        return len(text)

    def flush(self) -> None:
        """Flush standard error itself."""
        self._stream.flush()

    def end(self) -> None:
        """Emit the last, unfinished line; from now on pass through what the main thread writes."""
        if not self._has_ended:
            self.write("\n")
            self._has_ended = True


def _event_of(record: logging.LogRecord) -> Event:
    """Return the event of a record; a plain message becomes a warning or a line of a log."""
    if isinstance(record.msg, Event):
        return record.msg
    if record.levelno >= logging.WARNING:
        source = f"{record.pathname}:{record.lineno}"
        return Warned(record.getMessage(), record.name, source)
    return Log(record.getMessage(), record.name)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Make an event of a Python warning; see :func:`warnings.showwarning`."""
    LOG.warning(Warned(str(message), category.__name__, f"{filename}:{lineno}"))


def _time(record: logging.LogRecord, precision: str) -> str:
    """Return when a record was made, as RFC 3339 in UTC: "2026-01-31T23:59:59Z"."""
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")
