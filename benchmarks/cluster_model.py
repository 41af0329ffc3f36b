"""A model of a merge on a cluster: events of workers that read, compute and write, hand in hand.

The schedule is the one that the executor uses (``starmerge_models.merging.executors.schedule``). A
worker has a core of its own. It asks the driver for a group of tensors, reads the group's bytes,
computes, writes, and asks again. The driver serves one worker after the other. Bytes flow at the
same rate to all that read at a time: each gets its share of the storage, and no more than its share
of the node's network; so do bytes that are written.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.schedule import Group, Schedule

READ, WRITE = "read", "write"
_LITTLE = 1e-3
"""Bytes that are as good as none."""


@dataclass(frozen=True)
class Tensor:
    """What one tensor takes."""

    read: float
    """Bytes."""
    seconds: float
    """Of one core."""
    written: float
    """Bytes."""
    memory: float = 0
    """Bytes that the work takes."""


@dataclass(frozen=True)
class Cluster:
    """Machines, and what they share."""

    nodes: int
    cores: int
    """Workers of a node."""
    storage_read: float = math.inf
    """Bytes a second that the storage gives to all nodes together."""
    storage_write: float = math.inf
    """Bytes a second that it takes of all nodes together."""
    network: float = math.inf
    """Bytes a second of a node, in each direction."""
    driver: float = 0.0
    """Seconds of the driver for a group: to hand it out, take its results, and note them."""
    memory: float = math.inf
    """Bytes that work on a node may take together; what needs more is done alone."""


@dataclass(frozen=True)
class Outcome:
    """How long a merge takes, and why."""

    seconds: float
    groups: int
    bounds: Mapping[str, float]
    """Seconds that each resource would take if it were the only one that is not infinite."""

    @property
    def bottleneck(self) -> str:
        """The resource that takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def used(self) -> float:
        """Share of the time that the bottleneck is busy."""
        return self.bounds[self.bottleneck] / self.seconds if self.seconds else 1.0


@dataclass(eq=False)
class _Flow:
    """Bytes on their way."""

    worker: int
    kind: str
    left: float


def simulate(tensors: Sequence[Tensor], cluster: Cluster) -> Outcome:
    """Merge tensors on a cluster in the order of the schedule.

    Args:
        tensors: What they take, in the order of the model.
        cluster: On what.
    """
    run = _Run(tensors, cluster)
    run.go()
    return Outcome(run.now, run.groups, _bounds(tensors, cluster, run.groups))


class _Run:
    """The state of the cluster at one moment."""

    def __init__(self, tensors: Sequence[Tensor], cluster: Cluster) -> None:
        self._tensors, self._cluster = tensors, cluster
        workers = cluster.nodes * cluster.cores
        self._schedule: Schedule[int] = Schedule(
            _Work(lambda number: number, lambda number: int(tensors[number].memory), tensors),
            range(len(tensors)),
            workers,
        )
        self.now, self.groups = 0.0, 0
        self._driver_free = 0.0
        self._idle = dict.fromkeys(range(workers))
        self._held: dict[int, Group] = {}
        self._memory: Counter[int] = Counter()
        self._flows: list[_Flow] = []
        self._timers: list[tuple[float, int, str]] = []
        """When the driver, or a core, is done with a worker's group, and what comes next."""

    def go(self) -> None:
        """Go from event to event until all is written."""
        self._hand_out()
        while self._timers or self._flows:
            rates = self._rates()
            arrivals = [
                self.now + flow.left / rate for flow, rate in zip(self._flows, rates, strict=True)
            ]
            until = min([*arrivals, *(timer[0] for timer in self._timers[:1])])
            for flow, rate, arrival in zip(self._flows, rates, arrivals, strict=True):
                is_there = arrival <= until
                flow.left = 0.0 if is_there else flow.left - rate * (until - self.now)
            self.now = until
            arrived = [flow for flow in self._flows if flow.left <= _LITTLE]
            self._flows = [flow for flow in self._flows if flow.left > _LITTLE]
            for flow in arrived:
                self._go_on(flow.worker, "compute" if flow.kind == READ else "end")
            while self._timers and self._timers[0][0] <= self.now:
                _, worker, step = heapq.heappop(self._timers)
                self._go_on(worker, step)
            self._hand_out()
        assert self._schedule.is_done

    def _hand_out(self) -> None:
        """Let the driver give groups to idle workers."""
        full: set[int] = set()
        """Nodes that there is nothing for now."""
        for worker in list(self._idle):
            node = worker % self._cluster.nodes
            if node in full:
                continue

            def fits(need: int, held: int = self._memory[node]) -> bool:
                return not held or held + need <= self._cluster.memory

            group = self._schedule.begin(self.now, fits)
            if group is None:
                full.add(node)
            else:
                del self._idle[worker]
                self._held[worker] = group
                self._memory[node] += group.memory
                self.groups += 1
                self._driver_free = max(self._driver_free, self.now) + self._cluster.driver
                heapq.heappush(self._timers, (self._driver_free, worker, READ))

    def _go_on(self, worker: int, step: str) -> None:
        """Begin the next step of a worker with its group."""
        group = self._held[worker]
        own = [self._tensors[number] for number in group.numbers]
        if step == READ:
            self._flows.append(_Flow(worker, READ, sum(tensor.read for tensor in own)))
        elif step == "compute":
            seconds = sum(tensor.seconds for tensor in own)
            heapq.heappush(self._timers, (self.now + seconds, worker, WRITE))
        elif step == WRITE:
            self._flows.append(_Flow(worker, WRITE, sum(tensor.written for tensor in own)))
        else:
            del self._held[worker]
            self._memory[worker % self._cluster.nodes] -= group.memory
            self._schedule.done(group, group.numbers, self.now)
            list(self._schedule.results())
            self._idle[worker] = None

    def _rates(self) -> list[float]:
        """Return the bytes a second of each flow."""
        cluster = self._cluster
        storage = {READ: cluster.storage_read, WRITE: cluster.storage_write}
        places = [(flow.kind, flow.worker % cluster.nodes) for flow in self._flows]
        of_all, of_node = Counter(kind for kind, _ in places), Counter(places)
        return [
            min(storage[kind] / of_all[kind], cluster.network / of_node[kind, node])
            for kind, node in places
        ]


def _bounds(tensors: Sequence[Tensor], cluster: Cluster, groups: int) -> dict[str, float]:
    read = math.fsum(tensor.read for tensor in tensors)
    written = math.fsum(tensor.written for tensor in tensors)
    network = cluster.nodes * cluster.network
    return {
        "processors": math.fsum(t.seconds for t in tensors) / (cluster.nodes * cluster.cores),
        "storage, read": read / cluster.storage_read,
        "storage, written": written / cluster.storage_write,
        "network of the nodes": max(read, written) / network,
        "driver": groups * cluster.driver,
        "memory": math.fsum(t.seconds * min(1.0, t.memory / cluster.memory) for t in tensors)
        / cluster.nodes,
        "longest tensor": max(
            tensor.seconds
            + tensor.read / min(cluster.network, cluster.storage_read)
            + tensor.written / min(cluster.network, cluster.storage_write)
            for tensor in tensors
        ),
    }


@dataclass(frozen=True)
class _Work(FunctionJob[int]):
    """The tensors as a job, for the schedule."""

    tensors: Sequence[Tensor] = ()

    def nbytes(self, number: int) -> int:  # type: ignore[override]
        """Return the bytes that are read."""
        return int(self.tensors[number].read)
