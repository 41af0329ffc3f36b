"""A Ray cluster of this machine and a store that its workers reach, and merges for both.

The workers' requests to the store go through one proxy, those of the process that runs a merge
through another. So it shows which of them has sent what.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest

from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.storage import Place, place_of
from tests.forks import tree
from tests.storage.object_server import Proxy, object_server, proxy_before

SECONDS = 60.0
"""How long anything may take."""

BUCKET = "shared"
URL = f"s3://{BUCKET}/out"
OUTPUT = place_of(URL)

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "SECRETSECRETSECRETSECRET",
    "AWS_REGION": "us-east-1",
}

PLUGIN = '''
import os, signal, time
from pathlib import Path
from starmerge_models.deltas import total
from starmerge_models.methods.memory import total_bytes, total_shape
from starmerge_models.methods.method import Merge, method

HERE = Path(__file__).parent

def recorded():
    """Tell whether a journal beside this file has a tensor."""
    return any(b'"tensor"' in file.read_bytes() for file in HERE.rglob("journal.jsonl"))

@method("unlucky")
class Unlucky(Merge):
    """Add task vectors; on the way, do to its own process what a file beside it says."""
    def merge(self, deltas, tensor, survey):
        (HERE / f"pid-{os.getpid()}").touch()
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            file = HERE / name
            if file.exists() and file.read_text() in tensor.name:
                while (HERE / "patient").exists() and not recorded():
                    time.sleep(0.02)
                if name == "stop" or not (HERE / "always").exists():
                    file.rename(HERE / f"{name}-done")
                (HERE / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), number)
        if (HERE / "slow").exists():
            time.sleep(1.5)
        while (HERE / "block").exists() and "layers.1.self_attn.v_proj" in tensor.name:
            time.sleep(0.05)
        return total(deltas)
    def memory(self, tensor): return total_bytes(tensor)
    def result(self, tensor): return total_shape(tensor)
'''

TENSOR = "layers.1.self_attn.q_proj"
"""At which something happens."""


class Cluster:
    """A bucket, the workers' proxy and the driver's, and the workers."""

    def __init__(self, client: Any, theirs: Proxy, ours: Proxy, workers: RayExecutor) -> None:
        self.client, self.theirs, self.ours, self.workers = client, theirs, ours, workers

    def files(self, name: str) -> dict[str, bytes]:
        """Return the objects below a name, of this name and of hidden ones beside it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=name)
        keys = [own["Key"] for page in pages for own in page.get("Contents", [])]
        return {
            key[len(name) :].lstrip("/"): self.client.get_object(Bucket=BUCKET, Key=key)[
                "Body"
            ].read()
            for key in keys
        }


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster of two nodes, with one processor and with two, and its three workers."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    with object_server() as port, proxy_before(port) as theirs, proxy_before(port) as ours:
        with pytest.MonkeyPatch.context() as patch:  # what the nodes' processes inherit
            for name, value in KEYS.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL", theirs.endpoint)
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_worker_niceness", "0")  # other processes would come first
            # A worker that is stopped does not end when asked, and is killed only then.
            patch.setenv("RAY_kill_worker_timeout_milliseconds", "100")
            options = {
                "object_store_memory": 80 * 2**20,
                "include_dashboard": False,
                "include_log_monitor": False,
            }
            nodes = Nodes(
                initialize_head=True,
                head_node_args={"num_cpus": 1, "no_monitor": True, **options},
            )
            nodes.add_node(num_cpus=2, **options)
            client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
            client.create_bucket(Bucket=BUCKET)
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            with RayExecutor(nodes.address) as workers:
                yield Cluster(client, theirs, ours, workers)
        finally:
            ray.shutdown()
            nodes.shutdown()


@contextmanager
def kept(executor: RayExecutor) -> Iterator[RayExecutor]:
    """Lend an executor to a merge, which would end it."""
    yield executor


def plan_of(
    base: Path,
    models: list[Path],
    output: Place,
    method: str = "star",
    parameters: Any = None,
    kind: str = "model",
) -> Plan:
    recipe = make_recipe(
        {
            "base": str(base),
            "models": [{"path": str(path), "name": path.name} for path in models],
            "method": method,
            "parameters": parameters or {},
            "output": {"kind": kind},
        }
    )
    return make_plan(recipe, output)


def merged_twice(
    executor: RayExecutor, tmp_path: Path, plan: Callable[[Path], Plan]
) -> list[dict[str, bytes]]:
    """Merge by threads and by workers into folders of one name, which the card has."""
    local = run(plan(tmp_path / "local" / "out"), Threads(1))
    result = run(plan(tmp_path / "ray" / "out"), kept(executor))
    assert not result.resumed
    return [tree(local.path), tree(result.path)]


def alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
