"""What happens in a run, as events: records of the logger "starmerge_models" with typed fields.

Python's own logging carries them, so that a program that uses the library sends them where it sends
its other logs; the library adds no handler, and an event that nobody asked for costs a comparison.
The message of a record is the event itself: ``str(record.msg)`` says it in words, and
``record.msg.fields()`` gives its fields. The command line writes them as lines of text or of JSON.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

LOG = logging.getLogger("starmerge_models")
LOG.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; the name and the fields of each kind are public."""

    name: ClassVar[str]
    level: ClassVar[int] = logging.INFO

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return dict(vars(self))


@dataclass(frozen=True)
class Start(Event):
    """A command begins."""

    name = "start"
    version: str
    """Of starmerge."""
    pid: int
    """Number of the process."""
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
    """A merge is planned, and begins."""

    name = "plan"
    base: str | None
    """The base, as it was given; null where adapters are merged without one."""
    models: list[str]
    """Names of the merged models."""
    method: str
    """The chain of methods."""
    tensors: int
    """Tensors of the output."""
    merged: int
    """Tensors of which some model has a task vector; the others stay as they are."""
    bytes_to_read: int
    bytes_to_write: int
    threads: int | None
    """Tensors that are worked on at once; None: as many as a cluster has processors."""
    memory: int | None
    """Bytes that the tensors in work may take together on a machine; None: a quarter of its."""
    output: str
    """Where the output will stand."""
    fingerprint: str
    """Of inputs, recipe and output: a merge that was killed goes on where this is the same."""

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
    """Units that there are to do; null: not known yet."""
    unit: str
    """Of which ``total`` and ``done`` are numbers: "bytes" or "items" (rows, steps, tensors)."""

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
    """Something else is done now within a phase: "loading base", "asking merged: past"."""

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
    """Its name."""
    nbytes: int
    """Its bytes, as the phase counts them: of the output when merging, else those read."""
    seconds: float | None
    """Of work on it, in its thread or process; null where that is not measured."""
    count: int
    """Tensors done in the phase, this one among them."""
    total: int
    """Tensors of the phase."""

    def __str__(self) -> str:
        return f"{self.phase}: {self.tensor} is done ({self.count} of {self.total})"


@dataclass(frozen=True)
class Heartbeat(Event):
    """A phase goes on; said each half minute, whether something was finished or not."""

    name = "heartbeat"
    phase: str
    step: str | None
    """What is being done now; null where the phase does not say."""
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
    """At the rate of the last ten heartbeats; null where it is zero or the total is not known."""
    memory: int | None
    """Bytes of the process in memory (RSS); null where the system does not tell."""

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
    """Something failed and is tried again: a request to an object store, a tensor's work."""

    name = "retry"
    level = logging.WARNING
    what: str
    """What is tried again: "GET s3://bucket/model.safetensors", "the tensor lm_head.weight"."""
    attempt: int
    """Attempts that have failed so far."""
    wait: float
    """Seconds until the next one."""
    reason: str
    """Why the last one failed. Without tokens, signatures and passwords: the caller sees to it."""

    def __str__(self) -> str:
        return (
            f"Again in {self.wait:.1f} s, after {self.attempt} failed: {self.what}: {self.reason}"
        )


@dataclass(frozen=True)
class Note(Event):
    """Something that the user should know, and that is no fault."""

    name = "note"
    message: str

    def __str__(self) -> str:
        return f"Note: {self.message}"


@dataclass(frozen=True)
class Warned(Event):
    """Something that may be a fault: a warning of starmerge, or of a library."""

    name = "warning"
    level = logging.WARNING
    message: str
    category: str
    """Class of a Python warning ("UserWarning"), or the logger's name."""
    source: str
    """Where it comes from: file and line."""

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
    """An output is complete and stands in its place."""

    name = "published"
    path: str

    def __str__(self) -> str:
        return f"{self.path} is complete"


@dataclass(frozen=True)
class Finish(Event):
    """The command has ended by itself; the last event, unless it is an error."""

    name = "finish"
    exit_code: int
    """0; or 1 where the answer is no, as of ``starmerge verify``."""
    seconds: float
    """Since the start."""
    outputs: list[str]
    """What was published, in order; the last is the command's own output."""

    def __str__(self) -> str:
        made = f": {', '.join(self.outputs)}" if self.outputs else ""
        return f"finished with exit code {self.exit_code} after {self.seconds:.1f} s{made}"


@dataclass(frozen=True)
class Failed(Event):
    """The command has ended by an error or a signal; the last event."""

    name = "error"
    level = logging.ERROR
    message: str
    exit_code: int
    seconds: float
    """Since the start."""
    signal: str | None = None
    """The signal that interrupted it: "SIGINT", "SIGTERM"."""
    kept: list[str] | None = None
    """After a signal: partial outputs that the same command goes on with."""
    traceback: str | None = None
    """With ``--debug``."""

    def __str__(self) -> str:
        said = f"{'Error: ' if self.signal is None else ''}{self.message}"
        return said if self.traceback is None else f"{self.traceback}{said}"


def emit(event: Event) -> None:
    """Give an event to whoever listens to the logger."""
    if LOG.isEnabledFor(event.level):
        LOG.log(event.level, event, stacklevel=2)


def bytes_in_words(count: float) -> str:
    """Write a number of bytes for people: "1.25 GB", "0.3 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _amount(count: float, unit: str) -> str:
    return (
        bytes_in_words(count) if unit == "bytes" else f"{count:.4g}" if count % 1 else f"{count:g}"
    )


def _time(seconds: float) -> str:
    """Write a time for people: "45 s", "12 min", "5.0 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
