"""Executor on a Ray cluster: worker processes on one or many machines that only share files.

The driver, which is the process that runs the merge, puts a job into Ray's object store once. Each
worker is an actor that opens the job and processes one group of items at a time, as assigned by the
driver. The worker reads its inputs and writes its part of the output itself, and sends back only
the results. Another worker repeats the groups of a lost worker.

**Reproducible bytes.** A worker computes like a thread of
:class:`~starmerge_models.merging.executors.threads.Threads`: with one BLAS thread, and on a GPU if
the driver would use one. The driver's machine decides: if it has a GPU, only machines with GPUs are
used, with one worker per GPU; if it has none, workers hide their GPUs. Machines with other versions
of the packages are refused, and machines of different kinds, whose libraries may round differently,
cause a warning.
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
from starmerge_models.merging.executors.ray_worker import PACKAGES, Machine, WorkerActor
from starmerge_models.merging.executors.schedule import Group, Schedule
from starmerge_models.merging.executors.threads import (
    bytes_of,
    default_threads,
)
from starmerge_models.versions import installed_versions

LOG = logging.getLogger("starmerge_models.ray")

OBJECT_STORE = 128 * 2**20
"""Bytes of the object store of a local cluster, which holds jobs but no tensors."""

PATIENCE = 60.0
"""Seconds after which a group that takes much longer than others is started a second time."""

WAIT = 600.0
"""Seconds to wait for a first worker, which an autoscaler may have to start a machine for."""

_TICK = 2.0
"""Seconds between the driver's checks for hanging workers."""

_END = 60.0
"""Seconds that workers get to finish their groups when a merge is aborted."""

_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[\w.:%]+\]):(\d{1,5})", re.ASCII)
"""Addresses of clusters."""

_REACHED = 20.0
"""Timeout in seconds for a connection to the head of a cluster."""

_FAILED_STARTS = 3
"""Number of consecutive failed starts of workers after which the merge is aborted."""


class RayExecutor:
    """An executor with workers on a Ray cluster, used as a context manager.

    Args:
        address: The cluster: "auto" for the cluster of this machine, or HOST:PORT; None starts a
            local cluster, and stops it afterwards. If the program has called ``ray.init`` itself,
            its connection is used and kept.
        threads: Number of items processed at the same time in the whole cluster; None for the
            number of its processors, or with GPUs a share of their machines' processors for each.
        memory: Limit in bytes for concurrent items on one machine, or a text such as "4GB"; None
            for a quarter of the machine's memory. An item that needs more is processed alone.
        places: Number of items that a worker processes at the same time, in threads; None for 1,
            and with a GPU the number of processors for it.

    Raises:
        UsageError: Ray is not installed, or an argument is wrong.
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
            raise UsageError(
                "Ray is not installed. Install it: pip install 'starmerge-models[ray]'."
            )
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
        """Whether several machines may write to the output."""
        return not self._is_ours

    def __enter__(self) -> RayExecutor:
        self._connect()
        try:
            self._start_workers()
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
        """Yield the results of items, in the order of the numbers.

        Args:
            job: The work.
            numbers: Numbers of the items.

        Raises:
            StarmergeError: A worker cannot reach the files, or has other versions of packages.
            WorkersLostError: Several workers were lost at the same item, or no worker started.
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
                # The error was raised by a signal handler while Ray's code was waiting.
                raise error.__cause__ from None
            raise
        run.end(flush=True)

    # ------------------------------------------------------------------------------- The workers

    def _connect(self) -> None:
        """Join the cluster, or start a local one."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Opt in to Ray's future handling of CUDA_VISIBLE_DEVICES, to avoid a warning.
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
                # Otherwise Ray would join a cluster that an environment variable names.
                "address": "local",
            }
            # By default Ray lowers the priority of workers, which merges by threads do not.
            os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray replaces the handler of SIGTERM, and would end the driver without cleaning up.
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
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, handler)

    def _start_workers(self) -> None:
        """Start the workers asynchronously."""
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
        self._actor = ray.remote(WorkerActor).options(
            num_cpus=processors,
            num_gpus=int(self._has_gpu),
            max_restarts=0,
            max_concurrency=self._places,
            # Spread the workers over all machines.
            scheduling_strategy="SPREAD",
        )
        for _ in range(count):
            self.start_worker()

    def start_worker(self) -> _Worker:
        """Start one more worker asynchronously."""
        worker = _Worker(self._actor.remote(self._has_gpu))
        self._workers.append(worker)
        return worker

    def stop_worker(self, worker: _Worker) -> None:
        """Stop a worker, which may be lost already."""
        self._end(worker)
        self._workers.remove(worker)

    def _end(self, worker: _Worker) -> None:
        import ray  # noqa: PLC0415  (an extra)

        with contextlib.suppress(Exception):  # the worker or the cluster is lost already
            ray.kill(worker.actor)

    @property
    def workers(self) -> Sequence[_Worker]:
        """The running and the starting workers."""
        return self._workers

    @property
    def places(self) -> int:
        """Number of groups that a worker processes at the same time."""
        return self._places


def _check_answers(address: str | None) -> None:
    """Check that HOST:PORT accepts connections; Ray itself would retry for over ten minutes.

    Raises:
        OSError: The connection is refused, or the host does not exist.
    """
    found = _HOST_AND_PORT.fullmatch(address or "auto")
    if found is not None:
        socket.create_connection((found[1].strip("[]"), int(found[2])), _REACHED).close()


@dataclass(eq=False)
class _Worker:
    """The driver's handle of a worker."""

    actor: Any
    machine: Machine | None = None
    """The worker's machine; None until the worker has opened a job."""


class _RemoteError(Exception):
    """The traceback in a worker, attached as the cause of the worker's error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Run:
    """A running job.

    Args:
        executor: The executor with the workers.
        schedule: The schedule of the job's groups.
        packed: The job in Ray's object store.
        serial: Number of the job, which increases from job to job.
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
        """Number of consecutive workers that were lost before they opened the job."""
        self._kinds: set[str] = set()
        self._alone_since = time.monotonic()
        for worker in executor.workers:
            self._open_job(worker)

    def results(self) -> Generator[Any]:
        """Yield the results in order."""
        import ray  # noqa: PLC0415  (an extra)

        while not self._schedule.is_done:
            self._hand_out()
            pending = [*self._opening, *self._working]
            ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
            if ready:  # and all others that are
                ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            for reference in ready:
                self._receive(reference)
            self._check_has_workers()
            yield from self._schedule.results()

    def end(self, *, flush: bool) -> None:
        """Make every worker that has opened the job close it, and stop hanging workers.

        A worker that is still starting closes the job when it opens the next one.

        Args:
            flush: Whether the job succeeded.
        """
        import ray  # noqa: PLC0415  (an extra)

        working = list(self._working)
        if not flush and working:  # wait for running groups
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
        """Assign groups to the workers with free capacity."""
        now = time.monotonic()
        busy: dict[_Worker, int] = {}
        memory: dict[str, int] = {}
        for worker, held in self._working.values():
            assert worker.machine is not None
            busy[worker] = busy.get(worker, 0) + 1
            # Do not count the memory of hanging workers, for which others would wait.
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
                group = self._schedule.begin(now, fits) or self._schedule.begin_copy(
                    now, PATIENCE, fits, own
                )
                if group is None:
                    break
                self._working[worker.actor.work.remote(group.numbers)] = worker, group
                busy[worker] = busy.get(worker, 0) + 1
                memory[machine.node] = memory.get(machine.node, 0) + group.memory

    def _receive(self, reference: Any) -> None:
        """Process the reply of a worker."""
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
            self._handle_lost_worker(worker, group, error)
            return
        for name, level, text in said.messages:
            host = worker.machine.host if worker.machine else "a worker"
            logging.getLogger(name).log(level, "%s: %s", host, text)
        if said.error is not None:
            raise said.error from _RemoteError(said.trace)
        if group is None:
            self._add_worker(worker, said.results[0])
        else:
            self._schedule.done(group, said.results, time.monotonic())

    def _add_worker(self, worker: _Worker, machine: Machine) -> None:
        """Add a worker that has opened the job, after checking its machine."""
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

    def _handle_lost_worker(self, worker: _Worker, group: Group | None, error: Exception) -> None:
        """Reschedule the group of a lost worker, and start a replacement."""
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
        """Stop a worker and start another one."""
        if worker in self._open:
            self._open.remove(worker)
        self._executor.stop_worker(worker)
        fresh = self._executor.start_worker()
        if not self._schedule.is_done:
            self._open_job(fresh)

    def _open_job(self, worker: _Worker) -> None:
        elsewhere = self._executor.spans_machines
        reference = worker.actor.open.remote(self._serial, self._packed, self._files, elsewhere)
        self._opening[reference] = worker

    def _check_has_workers(self) -> None:
        """Abort if there has been no worker for :data:`WAIT` seconds."""
        now = time.monotonic()
        if self._open:
            self._alone_since = now
        elif now - self._alone_since > WAIT:
            raise WorkersLostError(
                f"The cluster has given no worker in {WAIT / 60:.0f} minutes: its processors are "
                "taken by others, or its machines are gone (see `ray status`)."
            )
