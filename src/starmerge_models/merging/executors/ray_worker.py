"""The worker process of a Ray cluster: an actor that opens a job and processes its items."""

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
"""Packages that compute; all machines must have the same versions."""


@dataclass(frozen=True)
class Machine:
    """The machine of a worker."""

    node: str
    """Ray's id of the node."""
    host: str
    memory: int
    """Usable memory in bytes."""
    versions: dict[str, str]
    """Versions of the packages that compute."""
    kind: str
    """Processor and GPU model, which determine the rounding of arithmetic."""


@dataclass(frozen=True)
class Reply:
    """A worker's reply: results or an error, and log messages."""

    results: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    trace: str = ""
    messages: list[tuple[str, int, str]] = field(default_factory=list)
    """Logger, level and text of each message."""


class WorkerActor:
    """The actor in a worker's process.

    Args:
        has_gpu: Whether the worker computes on a GPU; otherwise GPUs are hidden.
    """

    def __init__(self, has_gpu: bool) -> None:
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._has_gpu = has_gpu
        self._lock = Lock()
        self._opened = ExitStack()
        self._work: Callable[[int], Any] | None = None
        self._serial = 0
        self._heard = _WarningCollector()
        logging.getLogger().addHandler(self._heard)
        logging.captureWarnings(True)

    def open(self, serial: int, packed: bytes, files: Sequence[Path], is_elsewhere: bool) -> Reply:
        """Open a job in place of an earlier one, and return the machine.

        Args:
            serial: Number of the job; the driver may finish a job before this worker opens it.
            packed: The pickled job.
            files: Files of plug-ins whose classes the job contains.
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

    def work(self, numbers: Sequence[int]) -> Reply:
        """Process the items of some numbers."""

        def do() -> list[Any]:
            assert self._work is not None, "the driver opens a job first"
            for number in numbers:
                self._job.announce(number)
            return [self._work(number) for number in numbers]

        return self._answer(do)

    def close(self, flush: bool) -> Reply:
        """Close the job; without ``flush`` as after a failure."""

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
            error = _AbandonedError()
            with contextlib.suppress(_AbandonedError):
                opened.__exit__(type(error), error, None)

    def _answer(self, work: Callable[[], list[Any]]) -> Reply:
        prepare_thread()
        try:
            return Reply(work(), messages=self._heard.take())
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            return Reply(error=_picklable(error), trace=text, messages=self._heard.take())


class _AbandonedError(Exception):
    """Raised inside a job to close it when its merge is aborted."""


class _WarningCollector(logging.Handler):
    """Collects warnings, which the driver logs in its own process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a message."""
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        """Return the messages since the last call."""
        kept, self._kept = self._kept, []
        return kept


def _picklable(error: Exception) -> Exception:
    """Return the error if it can be pickled, otherwise a picklable error with the same message."""
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
