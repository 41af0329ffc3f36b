"""An executor of other processes, which shares nothing with the merge but its files."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import cloudpickle

from starmerge_models import plugins
from starmerge_models.merging.executors.executor import Job, Result


class Processes:
    """Two processes that do the work in a strange order, and some of it twice.

    A merge opens and closes an executor; these go on until they are stopped.
    """

    threads = 2
    memory = 2**30

    def __init__(self) -> None:
        # Both are forks of a new process, which loads once what they need.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["starmerge_models.merging.work"])
        self._workers = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((ours, process))

    spans_machines = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stop(self) -> None:
        """End the processes."""
        for ours, process in self._workers:
            ours.send(None)
            process.join()

    def run(self, job: Job[Result], numbers: Iterable[int]) -> Generator[Result]:
        """Yield the results of some numbers, in the order of the numbers."""
        wanted = list(numbers)
        # Classes of plug-ins are found by their modules, which another process has not loaded.
        files = [str(file) for file in plugins.loaded_files()]
        packed = cloudpickle.dumps(job)
        for first, (ours, _) in enumerate(self._workers):
            share = [*wanted[first::2], *wanted[:3]]
            ours.send((files, packed, share[::-1]))
        found: dict[int, Any] = {}
        answers = [ours.recv() for ours, _ in self._workers]
        for results, error in answers:
            if error is not None:
                raise error
            found |= pickle.loads(results)
        for number in wanted:
            yield found[number]


def _work(connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    while (task := connection.recv()) is not None:
        files, packed, numbers = task
        try:
            for file in files:
                plugins.load_file(Path(file))
            job: Job[Any] = pickle.loads(packed)
            with job.open() as work:
                results = {number: work(number) for number in numbers}
            connection.send((cloudpickle.dumps(results), None))
        except Exception as error:
            connection.send((None, error))
