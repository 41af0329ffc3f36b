"""Merges by a Ray cluster into an S3-compatible store, which workers and driver reach by two ways.

The workers' requests go through one proxy, those of the process that runs the merge through
another. So it shows which of them has sent what.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from starmerge_models.cli.clean import clean
from starmerge_models.errors import StarmergeError, WorkersLostError
from starmerge_models.events import PhaseFinished, Published
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors import schedule
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.storage import requests
from starmerge_models.storage.places import place_of
from starmerge_models.storage.remote import remote_storage
from tests.conftest import MakeAdapter, MakeFinetune
from tests.merging.executors.test_ray import kept
from tests.merging.executors.test_ray import plan_of as plan_to
from tests.storage.object_server import Fault, Proxy, Request, object_server, proxy_before
from tests.storage.test_objects import assert_same

ray = pytest.importorskip("ray", reason="needs the extra: ray")

BUCKET = "shared"
_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "SECRETSECRETSECRETSECRET",
    "AWS_REGION": "us-east-1",
}


class World:
    """A bucket, the workers' proxy and the driver's, and the workers."""

    def __init__(self, client: Any, theirs: Proxy, workers: RayExecutor) -> None:
        self.client, self.theirs, self.workers = client, theirs, workers
        self.ours = theirs

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[World]:
    """Start a store and a cluster of two nodes, which reaches it through a proxy."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    with object_server() as port, proxy_before(port) as theirs:
        # What the nodes' processes inherit.
        os.environ.update(_KEYS, AWS_ENDPOINT_URL=theirs.endpoint, RAY_worker_niceness="0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "num_cpus": 1}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        cluster.add_node(**options)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket=BUCKET)
        try:
            with RayExecutor(cluster.address) as workers, proxy_before(port) as ours:
                world = World(client, theirs, workers)
                world.ours = ours
                yield world
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def world(
    cluster: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_at_once: None
) -> Iterator[World]:
    monkeypatch.setattr(schedule, "LEAST", 1)  # the tiny model's tensors would be one group
    monkeypatch.setenv("AWS_ENDPOINT_URL", cluster.ours.endpoint)
    monkeypatch.setenv("STARMERGE_SCRATCH", str(tmp_path / "scratch"))
    for name, value in _KEYS.items():
        monkeypatch.setenv(name, value)
    # A process opens a bucket once, and this one has other endpoints in other tests.
    requests._store.cache_clear()
    remote_storage.cache_clear()
    for proxy in (cluster.ours, cluster.theirs):
        proxy.taken.clear()
        proxy.served.clear()
        proxy.plan = lambda request: None
    yield cluster
    for name in cluster.files(""):
        cluster.client.delete_object(Bucket=BUCKET, Key=name)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a base whose file goes in parts: one tensor has 20 MB that no model changes."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["large"] = torch.arange(5_000_000, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plan_of(base: Path, models: list[Path], output: str, kind: str, method: str = "star") -> Plan:
    return plan_to(base, models, place_of(output), method, {}, kind)


URL = f"s3://{BUCKET}/out"


@pytest.mark.parametrize("kind", ["model", "unified", "adapter", "gguf"])
def test_workers_send_what_they_write(
    kind: str,
    world: World,
    base: Path,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    is_adapter = kind in ("adapter", "gguf")
    if kind == "model":
        models = [make_adapter("a"), make_adapter("b", seed=1)]
    else:
        base = tiny_base
        other = make_adapter("b", seed=1) if is_adapter else make_finetune("b", seed=1)
        models = [make_adapter("a"), other]
    method = "emr" if kind == "unified" else "star"
    run(plan_of(base, models, str(tmp_path / "out"), kind, method), Threads(1))
    run(plan_of(base, models, URL, kind, method), kept(world.workers))
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}
    assert list((tmp_path / "scratch").iterdir()) == []
    if not is_adapter:  # an adapter's factors are cut to one rank by the driver
        weights = {"model": "model", "unified": "unified/model"}[kind] + ".safetensors"
        size = (tmp_path / "out" / weights).stat().st_size
        of_workers = sum(n for key, n in world.theirs.taken.items() if weights in key)
        of_driver = sum(n for key, n in world.ours.taken.items() if weights in key)
        assert of_driver < 8 * 1024  # its header
        assert of_workers == 2 * size - of_driver  # as pieces, and once more whole
        assert not any(weights in key for key in world.ours.served)


def test_an_adapter_as_one_file(
    world: World, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="needs the extra: gguf")
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    run(plan_of(tiny_base, models, str(tmp_path / "out.gguf"), "gguf"), Threads(1))
    run(plan_of(tiny_base, models, f"{URL}.gguf", "gguf"), kept(world.workers))
    assert world.files("out.gguf") == {"": (tmp_path / "out.gguf").read_bytes()}
    assert world.files(".out") == {}


def test_an_old_merge_of_the_same_sizes_is_replaced(
    world: World,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While files of both lie there, no report says that they are a whole merge."""
    old, new = [make_adapter("a")], [make_adapter("b", seed=1)]
    run(plan_of(base, old, URL, "model"), kept(world.workers))
    before = world.files("out/")
    reports: list[bool] = []

    def look(request: Request) -> None:
        if request.key == "out/model.safetensors":
            reports.append("merge_report.json" in world.files("out/"))

    world.theirs.plan = look
    plan = make_plan(plan_of(base, new, f"{URL}-", "model").recipe, place_of(URL), overwrite=True)
    caplog.set_level(logging.DEBUG, "starmerge_models")
    run(plan, kept(world.workers))
    after = world.files("out/")
    assert len(after["model.safetensors"]) == len(before["model.safetensors"])
    assert after["model.safetensors"] != before["model.safetensors"]
    assert reports
    assert not any(reports)
    run(plan_of(base, new, str(tmp_path / "out"), "model"), Threads(1))
    assert_same(after, tmp_path / "out")
    told = [record.msg for record in caplog.records]
    published = [event.path for event in told if isinstance(event, Published)]
    assert published[0] == URL  # and then the local one
    uploaded = [e.done for e in told if isinstance(e, PhaseFinished) and e.phase == "uploading"]
    assert uploaded == [sum(map(len, after.values()))]


def test_a_failed_upload_is_repeated_from_the_pieces(
    world: World,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [make_adapter("a")]
    run(plan_of(base, models, str(tmp_path / "out"), "model"), Threads(1))

    def refuse(request: Request) -> Fault | None:
        is_weights = request.method == "POST" and request.key == "out/model.safetensors"
        return Fault(status=403, code="AccessDenied") if is_weights else None

    world.theirs.plan = refuse
    with pytest.raises(StarmergeError, match=r"refuses the credentials.*The merge itself is whole"):
        run(plan_of(base, models, URL, "model"), kept(world.workers))
    assert world.files("out/") == {}
    clean(Path(URL))
    lines = capsys.readouterr().out.splitlines()
    assert sum("(left over)" in line for line in lines) == 2
    assert any("s3://shared/.out.partial-" in line for line in lines)
    world.theirs.plan = lambda request: None
    world.theirs.taken.clear()
    result = run(plan_of(base, models, URL, "model"), kept(world.workers))
    assert result.resumed > 0
    assert {key.partition("/")[0] for key in world.theirs.taken} == {"out"}
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}


def test_missing_pieces_are_found_before_anything_appears(
    world: World, base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("a")]
    world.theirs.plan = lambda request: (
        Fault(status=403, code="AccessDenied") if request.key == "out/model.safetensors" else None
    )
    with pytest.raises(StarmergeError, match="The merge itself is whole"):
        run(plan_of(base, models, URL, "model"), kept(world.workers))
    world.theirs.plan = lambda request: None
    pieces = sorted(key for key in world.files(".out") if "+" in key)
    world.client.delete_object(Bucket=BUCKET, Key=f".out{pieces[len(pieces) // 2]}")
    with pytest.raises(StarmergeError, match=r"lacks pieces of model\.safetensors.*--fresh"):
        run(plan_of(base, models, URL, "model"), kept(world.workers))
    assert world.files("out/") == {}
    run(plan_of(base, models, URL, "model"), kept(world.workers), fresh=True)
    run(plan_of(base, models, str(tmp_path / "out"), "model"), Threads(1))
    assert_same(world.files("out/"), tmp_path / "out")


_PLUGIN = '''
import os, signal
from pathlib import Path
from starmerge_models.deltas import total
from starmerge_models.methods.memory import total_bytes, total_shape
from starmerge_models.methods.method import Merge, method

@method("deadly")
class Deadly(Merge):
    """Add task vectors; kill its own process at one tensor while a file lies beside it."""
    def merge(self, deltas, tensor, survey):
        if (Path(__file__).parent / "deadly").exists() and "layers.1.self_attn.q" in tensor.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return total(deltas)
    def memory(self, tensor): return total_bytes(tensor)
    def result(self, tensor): return total_shape(tensor)
'''


@pytest.mark.parametrize("by", ["workers", "threads"])
def test_what_was_sent_is_taken_up(
    by: str,
    world: World,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(_PLUGIN)
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    method = "own.py:Deadly"
    (tmp_path / "deadly").touch()
    with pytest.raises(WorkersLostError, match="is kept in"):
        run(plan_of(base, models, URL, "model", method), kept(world.workers))
    assert world.files("out/") == {}
    assert world.files(".out")
    (tmp_path / "deadly").unlink()
    executor = kept(world.workers) if by == "workers" else Threads(1)
    result = run(plan_of(base, models, URL, "model", method), executor)
    # Threads of this machine write files here, where none of the pieces is.
    assert (result.resumed > 0) == (by == "workers")
    run(plan_of(base, models, str(tmp_path / "out"), "model", method), Threads(1))
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}


def test_workers_go_on_with_what_threads_have_left(
    world: World,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store has none of it, not even the zeros that a hole in a file would be read as."""
    weights = base / "model.safetensors"
    tensors = {"a.zeros": torch.zeros(1000), **load_file(weights)}
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(_PLUGIN)
    (tmp_path / "deadly").touch()
    models = [make_adapter("a")]
    text = (
        "from starmerge_models.merging.engine import run\n"
        "from starmerge_models.merging import journal\n"
        "from starmerge_models.merging.executors.threads import Threads\n"
        "from tests.merging.executors.test_ray_objects import plan_of\n"
        "from pathlib import Path\n"
        "journal._SECONDS = 0\n"
        f"plan = plan_of(Path({str(base)!r}), [Path({str(models[0])!r})], {URL!r}, 'model',"
        " 'own.py:Deadly')\n"
        "run(plan, Threads(1))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-c", text], check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "deadly").unlink()
    plan = plan_of(base, models, URL, "model", "own.py:Deadly")
    assert run(plan, kept(world.workers)).resumed == 0
    local = plan_of(base, models, str(tmp_path / "out"), "model", "own.py:Deadly")
    run(local, Threads(1))
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}


def test_a_merge_that_fails_leaves_no_pieces(
    world: World, tiny_base: Path, make_finetune: MakeFinetune
) -> None:
    models = [make_finetune("a", scale=float("nan"))]
    with pytest.raises(StarmergeError, match="has a NaN"):
        run(plan_of(tiny_base, models, URL, "model", "average"), kept(world.workers))
    assert world.files("") == {}


def test_workers_without_access_are_told_at_the_start(
    world: World, base: Path, make_adapter: MakeAdapter
) -> None:
    world.theirs.plan = lambda request: Fault(status=403, code="AccessDenied")
    with pytest.raises(StarmergeError, match="refuses the credentials"):
        run(plan_of(base, [make_adapter("a")], URL, "model"), kept(world.workers))
    assert world.files("") == {}
