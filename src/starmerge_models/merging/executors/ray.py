"""Workers on a Ray cluster: processes of one machine or of many, which share nothing but files.

The process that runs the merge, the driver, puts a job into Ray's object store once. Each worker is
an actor that opens the job and does the groups of numbers that the driver hands it, one at a time;
it reads its inputs and writes its part of the output itself, and only what a number's result says
goes back. What a lost worker had in hand, another does again.

**Bytes.** A worker computes as a thread of
:class:`~starmerge_models.merging.executors.threads.Threads` does: with one thread of BLAS, and on a
GPU where the driver would. So whether there is a GPU in it is decided by the driver's machine: if
it has one, only machines with GPUs work, a worker for each GPU; if it has none, workers do not see
theirs. Packages of other versions are refused, and machines of several kinds, whose libraries may
round differently, get a warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from starmerge_models import plugins
from starmerge_models.device import ACCELERATOR
from starmerge_models.errors import StarmergeError, UsageError, WorkersLostError
from starmerge_models.events import Retry, emit
from starmerge_models.merging.executors.executor import Job, Result
from starmerge_models.merging.executors.ray_worker import PACKAGES, Machine, Work
from starmerge_models.merging.executors.schedule import Group, Schedule
from starmerge_models.merging.executors.threads import (
    bytes_of,
    default_threads,
)
from starmerge_models.versions import installed_versions

LOG = logging.getLogger("starmerge_models.ray")

OBJECT_STORE = 128 * 2**20
"""Bytes of the object store of a cluster of this machine: it holds jobs, and no tensors."""

PATIENCE = 60.0
"""Seconds after which a group that takes much longer than others is begun a second time."""

WAIT = 600.0
"""Seconds to wait for a first worker, which an autoscaler may have to start a machine for."""

_TICK = 2.0
"""Seconds after which the driver looks for workers that hang."""

_END = 60.0
"""Seconds that workers get to finish what they have begun when a merge is given up."""

_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[\w.:%]+\]):(\d{1,5})", re.ASCII)
"""Addresses of clusters."""

_REACHED = 20.0
"""Seconds in which the head of a cluster accepts a connection."""

_FAILED_STARTS = 3
"""Workers in a row that did not start, after which none is tried any more."""


class RayExecutor:
    """An executor: workers on a Ray cluster. To be used as a context manager.

    Args:
        address: The cluster: "auto" for the one that this machine belongs to, or HOST:PORT; None
            starts one of this machine alone, and ends it afterwards. A program that has called
            ``ray.init`` itself is left connected as it is.
        threads: How many numbers are worked on at once in the whole cluster; None: as many as it
            has processors, or with GPUs a share of their machines' processors for each.
        memory: Bytes that the work on one machine may take together, or a text such as "4GB"; None
            for a quarter of the machine's. What needs more is done alone there.
        places: How many numbers a worker does at once, in threads; None: 1, and with a GPU as many
            as there are processors for it.

    Raises:
        UsageError: Ray is not installed, or one of them is wrong.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        threads: int | None = None,
        memory: int | str | None = None,
        places: int | None = None,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError("Ray is not installed. Install starmerge with the extra: ray.")
        if address is not None and "://" in address:
            raise UsageError(
                f"{address!r} is an address of Ray Client, which cannot be used. Run the command "
                "on a machine of the cluster, with auto or HOST:PORT."
            )
        if address is not None and address != "auto" and not _HOST_AND_PORT.fullmatch(address):
            raise UsageError(
                f"{address!r} is no address of a Ray cluster. Give auto or HOST:PORT, such as "
                "10.0.0.1:6379."
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads!r}. Give a whole number, 1 or more.")
        self.address, self.threads = address, threads
        self.memory = None if memory is None else bytes_of(memory)
        self._wanted_places = places
        self._workers: list[_Worker] = []
        self._is_ours = False
        self._jobs = 0

    @property
    def spans_machines(self) -> bool:
        """Whether several machines may fill one output; False: this one alone."""
        return not self._is_ours

    def __enter__(self) -> RayExecutor:
        self._connect()
        try:
            self._hire()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray  # noqa: PLC0415  (an extra)

        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        if self._is_connected_here:
            ray.shutdown()

    def run(self, job: Job[Result], numbers: Iterable[int]) -> Generator[Result]:
        """Yield the results of some numbers, in the order of the numbers.

        Args:
            job: The work.
            numbers: What it is done for.

        Raises:
            StarmergeError: A worker does not reach the files, or has other packages.
            WorkersLostError: The same work cost several workers, or no worker could be had.
        """
        import ray  # noqa: PLC0415  (an extra)
        from ray import cloudpickle  # noqa: PLC0415  (an extra)

        wanted = list(numbers)
        if not wanted:
            return
        self._jobs += 1
        run = _Run(
            self,
            Schedule(job, wanted, max(1, len(self._workers) * self._places)),
            ray.put(cloudpickle.dumps(job)),
            self._jobs,
        )
        try:
            yield from run.results()
        except BaseException as error:
            run.end(flush=False)
            if isinstance(error, SystemError) and error.__cause__ is not None:
                # What a signal's handler has raised while Ray's own code was waiting.
                raise error.__cause__ from None
            raise
        run.end(flush=True)

    # ------------------------------------------------------------------------------- The workers

    def _connect(self) -> None:
        """Join the cluster, or start one of this machine."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would otherwise warn of what it will do in future: leave CUDA_VISIBLE_DEVICES alone.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray  # noqa: PLC0415  (an extra)

        self._is_connected_here = not ray.is_initialized()
        self._is_ours = self._is_connected_here and self.address is None
        if not self._is_connected_here:
            return
        options: dict[str, Any] = {"address": self.address}
        if self._is_ours:
            options = {
                "num_cpus": self.threads or default_threads(),
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
                # Without it, Ray would join a cluster that the environment names.
                "address": "local",
            }
            # Ray would give way to all other processes, and a merge by threads does not.
            os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray takes the signal for itself, and would end the driver without its clearing up.
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _check_answers(self.address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (RuntimeError, ValueError, OverflowError, OSError) as error:
            if self._is_ours:
                raise StarmergeError(f"Ray does not start here: {error}") from error
            raise UsageError(
                f"There is no Ray cluster at {self.address!r}: {' '.join(str(error).split())}. "
                "Start one with `ray start --head`, or leave --address out."
            ) from error
        finally:
            with contextlib.suppress(ValueError):  # of a thread that is not the main one
                signal.signal(signal.SIGTERM, handler)

    def _hire(self) -> None:
        """Ask for the workers; they start while the driver goes on."""
        import ray  # noqa: PLC0415  (an extra)

        self._has_gpu = ACCELERATOR.exists()
        self._places, processors = 1, 1
        count = self.threads or max(1, int(ray.cluster_resources().get("CPU", 1)))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if self._has_gpu:
            owners = [node["Resources"] for node in ray.nodes() if node["Resources"].get("GPU")]
            if not gpus:
                raise UsageError(
                    "This machine has a GPU, and the cluster none, so the same merge would have "
                    "other bytes there. Hide the GPU (CUDA_VISIBLE_DEVICES=), or start Ray where "
                    "there are GPUs."
                )
            processors = max(1, int(min(node.get("CPU", 1) / node["GPU"] for node in owners)))
            self._places, count = processors, min(count, gpus)
        elif gpus:
            LOG.warning(
                "The %d GPUs of the cluster are not used, as this machine has none and the bytes "
                "are to be those that it would write. To use them, start the command where there "
                "is a GPU, such as with ray job submit --entrypoint-num-gpus 1.",
                gpus,
            )
        self._places = self._wanted_places or self._places
        self._actor = ray.remote(Work).options(
            num_cpus=processors,
            num_gpus=int(self._has_gpu),
            max_restarts=0,
            max_concurrency=self._places,
            # On as many machines as there are.
            scheduling_strategy="SPREAD",
        )
        for _ in range(count):
            self.hire()

    def hire(self) -> _Worker:
        """Ask for one more worker."""
        worker = _Worker(self._actor.remote(self._has_gpu))
        self._workers.append(worker)
        return worker

    def dismiss(self, worker: _Worker) -> None:
        """End a worker, which may be lost already."""
        self._end(worker)
        self._workers.remove(worker)

    def _end(self, worker: _Worker) -> None:
        import ray  # noqa: PLC0415  (an extra)

        with contextlib.suppress(Exception):  # it is gone, or the cluster is
            ray.kill(worker.actor)

    @property
    def workers(self) -> Sequence[_Worker]:
        """The workers that are there, or will be."""
        return self._workers

    @property
    def places(self) -> int:
        """How many groups a worker has at once."""
        return self._places


def _check_answers(address: str | None) -> None:
    """Make sure that something listens at HOST:PORT: Ray would try for longer than ten minutes.

    Raises:
        OSError: Nothing does, or there is no such host.
    """
    found = _HOST_AND_PORT.fullmatch(address or "auto")
    if found is not None:
        socket.create_connection((found[1].strip("[]"), int(found[2])), _REACHED).close()


@dataclass(eq=False)
class _Worker:
    """A worker, as the driver knows it."""

    actor: Any
    machine: Machine | None = None
    """None until it has opened a job."""


class _RemoteError(Exception):
    """The traceback of a worker, as the cause of the error that it raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Run:
    """One job being done.

    Args:
        executor: Whose workers do it.
        schedule: What is begun next.
        packed: The job in Ray's object store.
        serial: Number of the job, higher than those of earlier ones.
    """

    def __init__(
        self, executor: RayExecutor, schedule: Schedule[Any], packed: Any, serial: int
    ) -> None:
        self._executor, self._schedule = executor, schedule
        self._packed, self._serial = packed, serial
        self._files = plugins.loaded_files()
        self._opening: dict[Any, _Worker] = {}
        self._working: dict[Any, tuple[_Worker, Group]] = {}
        self._open: list[_Worker] = []
        """Workers that have opened the job."""
        self._failed = 0
        """Workers in a row that were lost before they had opened it."""
        self._kinds: set[str] = set()
        self._alone_since = time.monotonic()
        for worker in executor.workers:
            self._ask_to_open(worker)

    def results(self) -> Generator[Any]:
        """Yield the results in their order."""
        import ray  # noqa: PLC0415  (an extra)

        while not self._schedule.is_done:
            self._hand_out()
            pending = [*self._opening, *self._working]
            ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
            if ready:  # and all others that are
                ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            for reference in ready:
                self._take(reference)
            self._check_alone()
            yield from self._schedule.results()

    def end(self, *, flush: bool) -> None:
        """Have every worker that has opened the job close it; those that hang are ended.

        A worker that is still starting closes it when it is to open the next.

        Args:
            flush: Whether all went well.
        """
        import ray  # noqa: PLC0415  (an extra)

        working = list(self._working)
        if not flush and working:  # what has begun is waited for
            ray.wait(working, num_returns=len(working), timeout=_END)
        for reference, (worker, _) in self._working.items():
            ready, _ = ray.wait([reference], timeout=0)
            if not ready and worker in self._executor.workers:
                self._replace(worker)
        closing = {
            worker.actor.close.remote(flush): worker
            for worker in self._open
            if worker in self._executor.workers
        }
        for reference, worker in closing.items():
            try:
                said = ray.get(reference, timeout=_END)
            except ray.exceptions.RayError:
                self._replace(worker)
                continue
            if said.error is not None and flush:
                raise said.error from _RemoteError(said.trace)

    def _hand_out(self) -> None:
        """Give work to the workers that have a place free."""
        now = time.monotonic()
        busy: dict[_Worker, int] = {}
        memory: dict[str, int] = {}
        for worker, held in self._working.values():
            assert worker.machine is not None
            busy[worker] = busy.get(worker, 0) + 1
            # A worker that hangs must not keep the others of its machine waiting for its memory.
            if not self._schedule.is_late(held, now, PATIENCE):
                memory[worker.machine.node] = memory.get(worker.machine.node, 0) + held.memory
        for worker in self._open:
            machine = worker.machine
            assert machine is not None
            limit = self._executor.memory or machine.memory // 4

            def fits(need: int, node: str = machine.node, limit: int = limit) -> bool:
                return node not in memory or memory[node] + need <= limit

            while busy.get(worker, 0) < self._executor.places:
                own = [held for holder, held in self._working.values() if holder is worker]
                group = self._schedule.begin(now, fits) or self._schedule.again(
                    now, PATIENCE, fits, own
                )
                if group is None:
                    break
                self._working[worker.actor.work.remote(group.numbers)] = worker, group
                busy[worker] = busy.get(worker, 0) + 1
                memory[machine.node] = memory.get(machine.node, 0) + group.memory

    def _take(self, reference: Any) -> None:
        """Take what a worker answers."""
        import ray  # noqa: PLC0415  (an extra)

        group: Group | None = None
        if reference in self._opening:
            worker = self._opening.pop(reference)
        else:
            worker, group = self._working.pop(reference)
        try:
            said = ray.get(reference)
        except ray.exceptions.RayTaskError:  # raised by Ray in the worker, not by the work
            raise
        except ray.exceptions.RayError as error:
            self._lose(worker, group, error)
            return
        for name, level, text in said.messages:
            host = worker.machine.host if worker.machine else "a worker"
            logging.getLogger(name).log(level, "%s: %s", host, text)
        if said.error is not None:
            raise said.error from _RemoteError(said.trace)
        if group is None:
            self._welcome(worker, said.results[0])
        else:
            self._schedule.done(group, said.results, time.monotonic())

    def _welcome(self, worker: _Worker, machine: Machine) -> None:
        """Let a worker take part that has opened the job."""
        ours = installed_versions(PACKAGES)
        others = [
            f"{name} {version} there and {ours[name]} here"
            for name, version in machine.versions.items()
            if version != ours[name]
        ]
        if others:
            raise StarmergeError(
                f"{machine.host} has other packages than this machine: {', '.join(others)}. The "
                "bytes of the merge would depend on who does what: install the same everywhere."
            )
        is_other = bool(self._kinds) and machine.kind not in self._kinds
        self._kinds.add(machine.kind)
        if is_other and len(self._kinds) == 2:
            LOG.warning(
                "The machines of the cluster are of several kinds (%s), whose libraries may round "
                "differently: another run may give other last bits.",
                "; ".join(sorted(self._kinds)),
            )
        worker.machine = machine
        self._failed = 0
        self._open.append(worker)

    def _lose(self, worker: _Worker, group: Group | None, error: Exception) -> None:
        """Do again elsewhere what a lost worker had in hand, and ask for another one."""
        reason = " ".join(str(error).split())
        if group is None:
            self._failed += 1
            if self._failed >= _FAILED_STARTS:
                raise WorkersLostError(f"{self._failed} workers in a row did not start: {reason}")
        if worker in self._executor.workers:
            self._replace(worker)
        if group is not None and (losses := self._schedule.lost(group, reason)):
            assert worker.machine is not None  # it had work
            named = ", ".join(map(self._schedule.job.label, group.numbers[:3]))
            what = f"{named} …" if len(group.numbers) > 3 else named
            emit(Retry(what, losses, 0.0, f"a worker on {worker.machine.host} was lost"))

    def _replace(self, worker: _Worker) -> None:
        """End a worker and ask for another one."""
        if worker in self._open:
            self._open.remove(worker)
        self._executor.dismiss(worker)
        fresh = self._executor.hire()
        if not self._schedule.is_done:
            self._ask_to_open(fresh)

    def _ask_to_open(self, worker: _Worker) -> None:
        elsewhere = self._executor.spans_machines
        reference = worker.actor.open.remote(self._serial, self._packed, self._files, elsewhere)
        self._opening[reference] = worker

    def _check_alone(self) -> None:
        """Give up if there has been no worker for long."""
        now = time.monotonic()
        if self._open:
            self._alone_since = now
        elif now - self._alone_since > WAIT:
            raise WorkersLostError(
                f"The cluster has given no worker in {WAIT / 60:.0f} minutes: its processors are "
                "taken by others, or its machines are gone (see `ray status`)."
            )
