"""Events of a run: records of the logger "starmerge_models" with typed fields.

Events use Python's logging, so a program that uses the library routes them like its other logs. The
library adds no handler; without a handler an event costs one comparison. The message of a log
record is the event object: ``str(record.msg)`` is its text, and ``record.msg.fields()`` returns its
fields. The command line writes events as lines of text or of JSON.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

LOG = logging.getLogger("starmerge_models")
LOG.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Event:
    """Base class of events; the name and the fields of each subclass are public."""

    name: ClassVar[str]
    level: ClassVar[int] = logging.INFO

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Start(Event):
    """A command begins."""

    name = "start"
    version: str
    """Version of starmerge."""
    pid: int
    """Process id."""
    processors: float
    """Processors that the process may use, see
    :func:`starmerge_models.machine.usable_processors`."""
    memory: int
    """Bytes of memory that the process may use."""

    def __str__(self) -> str:
        return (
            f"starmerge {self.version}, process {self.pid}: {self.processors:g} processors, "
            f"{bytes_in_words(self.memory)} of memory"
        )


@dataclass(frozen=True)
class Plan(Event):
    """A merge has been planned and begins."""

    name = "plan"
    base: str | None
    """The base as given by the user; null where adapters are merged without a base."""
    models: list[str]
    """Names of the merged models."""
    method: str
    """The chain of methods."""
    tensors: int
    """Tensors of the output."""
    merged: int
    """Number of tensors that some model changes; the others are copied."""
    bytes_to_read: int
    bytes_to_write: int
    threads: int | None
    """Number of tensors merged at the same time; null on a cluster, which uses all processors."""
    memory: int | None
    """Limit in bytes for all tensors in work on a machine; null for a quarter of its memory."""
    output: str
    """Place of the output."""
    fingerprint: str
    """Hash of inputs, recipe and output: a killed merge is resumed if its fingerprint is equal."""

    def __str__(self) -> str:
        return (
            f"plan: {self.method} of {', '.join(self.models)} into {self.output}: {self.merged} of "
            f"{self.tensors} tensors merged, {bytes_in_words(self.bytes_to_read)} to read, "
            f"{bytes_in_words(self.bytes_to_write)} to write"
            f"{'' if self.threads is None else f', {self.threads} threads'}"
        )


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase of a run begins: "surveying", "merging", "hashing inputs", "evaluating"."""

    name = "phase_started"
    phase: str
    total: int | None
    """Number of units to do; null if not known yet."""
    unit: str
    """Unit of ``total`` and ``done``: "bytes" or "items" (rows, steps, tensors)."""

    def __str__(self) -> str:
        amount = "" if self.total is None else f", {_amount(self.total, self.unit)}"
        return f"{self.phase}: begins{amount}"


@dataclass(frozen=True)
class PhaseFinished(Event):
    """A phase has ended without an error."""

    name = "phase_finished"
    phase: str
    done: int
    unit: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.phase}: done, {_amount(self.done, self.unit)} in {self.seconds:.1f} s"


@dataclass(frozen=True)
class Step(Event):
    """A phase begins a new step: "loading base", "asking merged: past"."""

    name = "step"
    level = logging.DEBUG
    phase: str
    step: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.step}"


@dataclass(frozen=True)
class TensorDone(Event):
    """A tensor is done in a phase."""

    name = "tensor_done"
    level = logging.DEBUG
    phase: str
    tensor: str
    """Name of the tensor."""
    nbytes: int
    """Bytes of the tensor: bytes written when merging, otherwise bytes read."""
    seconds: float | None
    """Seconds of work in its thread or process; null if not measured."""
    count: int
    """Number of tensors done in the phase, including this tensor."""
    total: int
    """Number of tensors of the phase."""

    def __str__(self) -> str:
        return f"{self.phase}: {self.tensor} is done ({self.count} of {self.total})"


@dataclass(frozen=True)
class Heartbeat(Event):
    """Progress of a running phase, sent each half minute, even without progress."""

    name = "heartbeat"
    phase: str
    step: str | None
    """The current step; null if the phase has no steps."""
    done: int
    total: int | None
    unit: str
    rate: float
    """Units a second since the last heartbeat."""
    mean_rate: float
    """Units a second since the phase began."""
    elapsed: float
    """Seconds since the phase began."""
    seconds_left: float | None
    """Estimate from the rate of the last ten heartbeats; null if the rate is zero or the total is
    not known."""
    memory: int | None
    """Resident memory of the process (RSS) in bytes; null if the system does not report it."""

    def __str__(self) -> str:
        parts = [_amount(self.done, self.unit)]
        if self.total is not None:
            parts[0] += f" of {_amount(self.total, self.unit)}"
        parts.append(f"{_amount(self.rate, self.unit)}/s")
        if self.seconds_left is not None:
            parts.append(f"{_time(self.seconds_left)} left")
        if self.memory is not None:
            parts.append(f"{bytes_in_words(self.memory)} of memory")
        doing = self.phase if self.step is None else f"{self.phase}: {self.step}"
        return f"{doing}: {', '.join(parts)}"


@dataclass(frozen=True)
class Retry(Event):
    """An operation failed and will be retried: a request to an object store, work on a tensor."""

    name = "retry"
    level = logging.WARNING
    what: str
    """The operation: "GET s3://bucket/model.safetensors", "the tensor lm_head.weight"."""
    attempt: int
    """Number of failed attempts so far."""
    wait: float
    """Seconds until the next attempt."""
    reason: str
    """Reason of the last failure. The caller must remove tokens, signatures and passwords."""

    def __str__(self) -> str:
        return (
            f"Again in {self.wait:.1f} s, after {self.attempt} failed: {self.what}: {self.reason}"
        )


@dataclass(frozen=True)
class Note(Event):
    """Information for the user that is not a warning."""

    name = "note"
    message: str

    def __str__(self) -> str:
        return f"Note: {self.message}"


@dataclass(frozen=True)
class Warned(Event):
    """A warning of starmerge or of another library."""

    name = "warning"
    level = logging.WARNING
    message: str
    category: str
    """Class of a Python warning ("UserWarning"), or the logger's name."""
    source: str
    """Origin of the warning: file and line."""

    def __str__(self) -> str:
        return f"Warning: {self.message}"


@dataclass(frozen=True)
class Log(Event):
    """A message for developers, or a line that another library wrote to standard error."""

    name = "log"
    message: str
    logger: str
    """The logger's name, or "stderr"."""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Published(Event):
    """An output is complete and has been moved to its final place."""

    name = "published"
    path: str

    def __str__(self) -> str:
        return f"{self.path} is complete"


@dataclass(frozen=True)
class Finish(Event):
    """The command has ended normally; the last event, unless there is an error."""

    name = "finish"
    exit_code: int
    """0; or 1 for a negative result, such as that of ``starmerge verify``."""
    seconds: float
    """Since the start."""
    outputs: list[str]
    """Published outputs in order; the last is the output of the command itself."""

    def __str__(self) -> str:
        made = f": {', '.join(self.outputs)}" if self.outputs else ""
        return f"finished with exit code {self.exit_code} after {self.seconds:.1f} s{made}"


@dataclass(frozen=True)
class Failed(Event):
    """The command was ended by an error or a signal; the last event."""

    name = "error"
    level = logging.ERROR
    message: str
    exit_code: int
    seconds: float
    """Since the start."""
    signal: str | None = None
    """The signal that ended it, "SIGINT" or "SIGTERM"."""
    kept: list[str] | None = None
    """After a signal: partial outputs that the same command resumes."""
    traceback: str | None = None
    """Traceback; set only with ``--debug``."""

    def __str__(self) -> str:
        said = f"{'Error: ' if self.signal is None else ''}{self.message}"
        return said if self.traceback is None else f"{self.traceback}{said}"


def emit(event: Event) -> None:
    """Send an event to the handlers of the logger."""
    if LOG.isEnabledFor(event.level):
        LOG.log(event.level, event, stacklevel=2)


def bytes_in_words(count: float) -> str:
    """Return a number of bytes as readable text: "1.25 GB", "0.3 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _amount(count: float, unit: str) -> str:
    return (
        bytes_in_words(count) if unit == "bytes" else f"{count:.4g}" if count % 1 else f"{count:g}"
    )


def _time(seconds: float) -> str:
    """Return a duration as readable text: "45 s", "12 min", "5.0 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
