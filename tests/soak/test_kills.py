"""Merges that are killed at random moments, also while they go on, end with the same bytes.

KILLS=500 (``make kills``) kills that many processes; the suite kills a few.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Ended, Forks, copy, hidden, remove, tree
from tests.soak.outputs import OUTPUTS, Merge, make_merge

KILLS = int(os.environ.get("KILLS", "2"))
"""Processes that are killed in all."""
SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLED = -9


@dataclass(frozen=True)
class Workers:
    """What does the work on tensors."""

    options: tuple[str, ...]
    """Of the command line."""
    side_by_side: bool
    """Whether small tensors are worked on at the same time."""


THREADS = {
    "1 thread": Workers(("--threads", "1"), False),
    "3 threads": Workers(("--threads", "3"), True),
}
"""By a name for the report."""

RAY_FROM = 50
"""Kills from which on some are of merges by a Ray cluster, which takes seconds to begin each."""


@pytest.fixture(scope="session")
def executors() -> Iterator[dict[str, Workers]]:
    """Return all executors of the package by their names, a cluster of two nodes among them."""
    if KILLS < RAY_FROM:
        yield THREADS
        return
    from ray.cluster_utils import Cluster  # the extra: ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    options = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(**options)
    address = ("--executor", "ray", "--address", cluster.address)
    yield {**THREADS, "2 workers of Ray": Workers(address, True)}
    cluster.shutdown()


class Killing:
    """A merge that is killed again and again.

    Args:
        forks: What runs it.
        merge: The merge.
        folder: A folder of its own.
        draw: Decides when.
        executors: What does the work, by their names.
    """

    def __init__(
        self,
        forks: Forks,
        merge: Merge,
        folder: Path,
        draw: random.Random,
        executors: dict[str, Workers],
    ) -> None:
        self._forks, self._merge, self._draw = forks, merge, draw
        self._executors = executors
        self._output, self._old, reference = (
            folder / name / f"out{merge.ending}" for name in ("killed", "old", "reference")
        )
        for place in (self._output, self._old, reference):
            place.parent.mkdir(parents=True)
        self._took: dict[str, float] = {}
        """Seconds of a whole merge, by its executor."""
        for name, workers in executors.items():
            self._took[name] = self._must(self._run(merge, reference, workers)).seconds
            wanted = tree(reference)
            assert name == "1 thread" or wanted == self._wanted
            self._wanted = wanted
            remove(reference)
        self._must(self._run(merge.other(), self._old, executors["1 thread"]))
        self._most = 300
        """Operations on files that a run has, at most; found out."""
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def story(self) -> int:
        """Kill a run, perhaps some of those that go on with it, and let one end.

        Returns:
            How many were killed.
        """
        name = self._draw.choice(list(self._executors))
        before = self._start(overwrite := self._draw.random() < 0.5)
        more = ["--overwrite"] if overwrite else []
        killed, said = 0, f"{self._merge.kind}, {name}, {' '.join(more) or 'new'}"
        while True:
            moment = self._moment(name)
            ended = self._run(self._merge, self._output, self._executors[name], *more, **moment)
            if ended.code == KILLED:
                killed += 1
                said += f", {moment}"
                self.counts[name] += 1
                self.counts["by time" if "kill_after" in moment else "by operation"] += 1
            elif ended.code:
                self.wrong.append(f"{said}: {ended.code}: {ended.err}")
                return killed
            found = tree(self._output)
            if found not in (before, self._wanted):
                self.wrong.append(f"{said}: a part of an output stands under its name")
            if found == self._wanted:  # it had its name already, or was not killed
                more = ["--overwrite"]
            if ended.code == 0 or self._draw.random() < 0.6:
                break
            self.counts["killed again"] += 1
        # Whichever did the work before, any goes on with it.
        other = self._executors[self._draw.choice(list(self._executors))]
        ended = self._run(self._merge, self._output, other, *more)
        if ended.code or tree(self._output) != self._wanted:
            self.wrong.append(f"{said}: run again, it is another: {ended.code} {ended.err}")
        if resumed := re.match(r"(\d+) of \d+ tensors were there", ended.out):
            self.counts["tensors taken up"] += int(resumed[1])
        self._check_leftovers(said)
        return killed

    def _start(self, overwrite: bool) -> dict[str, bytes]:
        remove(self._output)
        if overwrite:
            copy(self._old, self._output)
        return tree(self._output)

    def _moment(self, name: str) -> dict[str, Any]:
        if self._draw.random() < 0.5:
            return {"kill_after": self._draw.uniform(0, 1.2 * self._took[name])}
        return {"kill_before": self._draw.randint(1, self._most)}

    def _run(
        self, merge: Merge, output: Path, workers: Workers, *more: str, **options: Any
    ) -> Ended:
        argv = [*merge.argv(output, *more, threads=None), *workers.options]
        settings = {"side_by_side": workers.side_by_side, **merge.settings, **options}
        ended = self._forks.run(argv, **settings)
        if "kill_before" in options and ended.code == 0:
            self._most = max(20, min(self._most, options["kill_before"]))
        return ended

    def _check_leftovers(self, said: str) -> None:
        """Only an old folder may be left, where the process died before it could delete it."""
        left = hidden(self._output)
        if any(".replaced-" not in name for name in left):
            self.wrong.append(f"{said}: left {left}")
        if left:
            self.counts["old folders left, and cleaned"] += 1
            self._must(self._forks.run(["clean", self._output.parent, "--delete", "--yes"]))
            if hidden(self._output) or tree(self._output) != self._wanted:
                self.wrong.append(f"{said}: not clean after `starmerge clean`")

    def _must(self, ended: Ended) -> Ended:
        assert ended.code == 0, ended.err
        return ended


def _share(kind: str) -> int:
    """Return how many processes are killed of those that make a kind of output."""
    return KILLS // len(OUTPUTS) + (OUTPUTS.index(kind) < KILLS % len(OUTPUTS))


@pytest.mark.parametrize("kind", [kind for kind in OUTPUTS if _share(kind)])
def test_a_merge_killed_at_random_ends_with_the_same_bytes(
    forks: Forks, executors: dict[str, Workers], kind: str, tmp_path: Path
) -> None:
    draw = random.Random(f"{kind} {SEED}")
    killing = Killing(forks, make_merge(kind, tmp_path), tmp_path / "runs", draw, executors)
    wanted = _share(kind)
    begun, killed = time.monotonic(), 0
    while killed < wanted and not killing.wrong:
        killed += killing.story()
    counts = ", ".join(f"{n} {name}" for name, n in sorted(killing.counts.items()))
    print(f"\n{kind}: {killed} killed ({counts}), {time.monotonic() - begun:.0f} s")
    assert killing.wrong == []
    assert killed >= wanted
