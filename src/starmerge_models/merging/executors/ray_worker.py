"""What runs in the processes of a Ray cluster: an actor that opens a job and does its numbers."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from starmerge_models import plugins
from starmerge_models.device import ACCELERATOR
from starmerge_models.errors import StarmergeError
from starmerge_models.machine import usable_memory
from starmerge_models.merging.executors.executor import Job
from starmerge_models.merging.executors.threads import prepare_thread
from starmerge_models.versions import installed_versions

PACKAGES = ("torch", "numpy", "scipy")
"""What computes; their versions must be the same everywhere."""


@dataclass(frozen=True)
class Machine:
    """What a worker says of the machine that it runs on."""

    node: str
    """Ray's name of it."""
    host: str
    memory: int
    """Bytes of memory that may be used."""
    versions: dict[str, str]
    """Of what computes."""
    kind: str
    """Processor and GPU, as far as arithmetic differs between them."""


@dataclass(frozen=True)
class Said:
    """What a worker answers: results, or what was raised; and what it logged."""

    results: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    trace: str = ""
    messages: list[tuple[str, int, str]] = field(default_factory=list)
    """Logger, level and text."""


class Work:
    """What runs in a worker's process.

    Args:
        has_gpu: Whether it is to compute on a GPU; without, it sees none.
    """

    def __init__(self, has_gpu: bool) -> None:
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._has_gpu = has_gpu
        self._lock = Lock()
        self._opened = ExitStack()
        self._work: Callable[[int], Any] | None = None
        self._serial = 0
        self._heard = _Ear()
        logging.getLogger().addHandler(self._heard)
        logging.captureWarnings(True)

    def open(self, serial: int, packed: bytes, files: Sequence[Path], is_elsewhere: bool) -> Said:
        """Open a job in place of an earlier one, and tell the machine.

        Args:
            serial: Of the job: the driver may be done with one before it has been opened here.
            packed: The job, pickled.
            files: Files of plug-ins, which define what is unpickled.
            is_elsewhere: Whether this may be another machine than the driver's.
        """
        from ray import cloudpickle  # noqa: PLC0415  (an extra)

        def begin() -> list[Any]:
            if serial < self._serial:
                return [_machine()]
            self._serial = serial
            self._close(flush=False)
            for file in files:
                plugins.load_file(file)
            self._job: Job[Any] = cloudpickle.loads(packed)
            if is_elsewhere:
                try:
                    self._job.check()
                except StarmergeError as error:
                    place = socket.gethostname()
                    raise StarmergeError(f"On the machine {place}: {error}") from error
            if ACCELERATOR.exists() != self._has_gpu:
                raise StarmergeError(
                    "Torch finds no GPU here, and the driver's does. Install the same torch, with "
                    "CUDA, on all machines."
                )
            self._work = self._opened.enter_context(self._job.open())
            return [_machine()]

        with self._lock:
            return self._answer(begin)

    def work(self, numbers: Sequence[int]) -> Said:
        """Do the work for some numbers."""

        def do() -> list[Any]:
            assert self._work is not None, "the driver opens a job first"
            for number in numbers:
                self._job.announce(number)
            return [self._work(number) for number in numbers]

        return self._answer(do)

    def close(self, flush: bool) -> Said:
        """Close the job; without ``flush`` as if the work had failed."""

        def end() -> list[Any]:
            self._close(flush=flush)
            return []

        with self._lock:
            return self._answer(end)

    def _close(self, *, flush: bool) -> None:
        opened, self._opened, self._work = self._opened, ExitStack(), None
        if flush:
            opened.close()
        else:
            error = _GivenUpError()
            with contextlib.suppress(_GivenUpError):
                opened.__exit__(type(error), error, None)

    def _answer(self, work: Callable[[], list[Any]]) -> Said:
        prepare_thread()
        try:
            return Said(work(), messages=self._heard.take())
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            return Said(error=_sendable(error), trace=text, messages=self._heard.take())


class _GivenUpError(Exception):
    """Closes a job whose merge is given up."""


class _Ear(logging.Handler):
    """Keeps warnings, which the driver logs in its own process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        """Return what was kept since the last time."""
        kept, self._kept = self._kept, []
        return kept


def _sendable(error: Exception) -> Exception:
    """Return an error that arrives as itself at the driver, or says the same."""
    from ray import cloudpickle  # noqa: PLC0415  (an extra)

    try:
        if isinstance(cloudpickle.loads(cloudpickle.dumps(error)), type(error)):
            return error
    except Exception:
        pass
    if isinstance(error, StarmergeError):
        return StarmergeError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def _machine() -> Machine:
    import ray  # noqa: PLC0415  (an extra)

    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if ACCELERATOR.exists():
        kind += f", {torch.cuda.get_device_name(ACCELERATOR.device)}"
    return Machine(
        ray.get_runtime_context().get_node_id(),
        socket.gethostname(),
        usable_memory(),
        installed_versions(PACKAGES),
        kind,
    )
