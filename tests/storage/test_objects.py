"""Merges from and to an S3-compatible server on this machine, some requests to which fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import starmerge_models
from starmerge_models.cli.clean import clean
from starmerge_models.cli.verify import verify as verify_command
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.events import Retry
from starmerge_models.hub.merged import open_merged
from starmerge_models.merging.verify import verify
from starmerge_models.storage import parts, ranges, requests
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.remote import remote_storage
from starmerge_models.storage.requests import ObjectBackend
from tests.conftest import MakeAdapter, MakeFinetune
from tests.forks import Forks
from tests.storage.object_server import Fault, Proxy, Request, object_server, proxy_before

SECRET, TOKEN = "SECRETSECRETSECRETSECRET", "TOKENTOKENTOKENTOKENTOKEN"
PARTS = 5 * 2**20
"""The smallest parts that S3 takes."""


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    with object_server() as port:
        yield port


class World:
    """A bucket, which the product reaches through a proxy."""

    def __init__(self, client: Any, bucket: str, proxy: Proxy, folder: Path) -> None:
        self.client, self.bucket, self.proxy, self.folder = client, bucket, proxy, folder

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def put(self, folder: Path, name: str | None = None) -> str:
        """Upload a folder; return its URL."""
        name = name or folder.name
        for file in folder.rglob("*"):
            if file.is_file():
                key = f"{name}/{file.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=self.bucket, Key=key, Body=file.read_bytes())
        return self.url(name)

    def files(self, name: str) -> dict[str, bytes]:
        """Return the objects below a name."""
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/")
        return {
            own["Key"][len(name) + 1 :]: self.client.get_object(Bucket=self.bucket, Key=own["Key"])[
                "Body"
            ].read()
            for own in found.get("Contents", [])
        }

    def unfinished(self) -> list[str]:
        """Return the keys of uploads that are neither completed nor taken back."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket)
        return [own["Key"] for own in found.get("Uploads", [])]

    def scratch(self) -> list[str]:
        folder = self.folder / "scratch"
        return sorted(own.name for own in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def world(
    server: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[World]:
    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    with proxy_before(server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": TOKEN,
            "AWS_REGION": "us-east-1",
            "STARMERGE_SCRATCH": str(tmp_path / "scratch"),
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server}")
        client.create_bucket(Bucket=bucket)
        # A process opens a bucket once, and this one has other endpoints in other tests.
        requests._store.cache_clear()
        remote_storage.cache_clear()
        monkeypatch.setattr(requests, "FIRST_DELAY", timedelta(milliseconds=2))
        yield World(client, bucket, proxy, tmp_path)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def assert_same(remote: dict[str, bytes], local: Path) -> None:
    """Compare an output with that of the same merge on this machine: its places differ."""
    expected = bytes_of(local)
    assert remote.keys() == expected.keys()
    apart = ("merge_report.json", "README.md")
    assert {n: c for n, c in remote.items() if n not in apart} == {
        n: c for n, c in expected.items() if n not in apart
    }
    ours, theirs = (json.loads(own["merge_report.json"]) for own in (remote, expected))
    for key in ("digests", "contents", "tensors", "files"):
        assert ours[key] == theirs[key]
    for one, other in zip(ours["inputs"], theirs["inputs"], strict=True):
        assert (one["tensors"], one["blake3"]) == (other["tensors"], other["blake3"])


def sharded(folder: Path, to: Path) -> Path:
    """Write a model's weights in two files and an index."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, to / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("case", ["adapters", "finetunes", "sharded", "as adapter"])
def test_merges_have_the_bytes_of_local_ones(
    case: str,
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    base, options = tiny_base, dict[str, Any]()
    make = make_finetune if case == "finetunes" else make_adapter
    models = [make("a", seed=1), make("b", seed=2)]
    if case == "finetunes":
        options["method"] = "ties"
    if case == "sharded":
        base = sharded(tiny_base, tmp_path / "sharded")
    if case == "as adapter":
        options["output_kind"] = "adapter"
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "None"}')
    local = starmerge_models.merge(base, models, output=tmp_path / "out", **options)
    urls = [world.put(model) for model in models]
    result = starmerge_models.merge(world.put(base), urls, output=world.url("out"), **options)
    (base / "tokenizer_config.json").unlink()
    assert str(result.path) == world.url("out")
    assert_same(world.files("out"), tmp_path / "out")
    assert local.report.tensors == result.report.tensors
    assert world.scratch() == []
    assert world.unfinished() == []


def test_only_what_is_needed_is_fetched_and_once(
    world: World, tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    base, model = tmp_path / "base", make_finetune("a")
    shutil.copytree(tiny_base, base)
    (base / "optimizer.bin").write_bytes(bytes(3_000_000))
    tensors = {"large": torch.zeros(500_000), **load_file(model / "model.safetensors")}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    starmerge_models.merge(
        world.put(base), [world.put(model)], "average", output=world.url("out"), common=True
    )
    served = world.proxy.served
    assert "base/optimizer.bin" not in served
    header = ranges._FIRST_BLOCK
    assert served["base/model.safetensors"] <= (base / "model.safetensors").stat().st_size + header
    # What only the fine-tune has is hashed, as an input, and nothing is fetched twice.
    assert served["a/model.safetensors"] <= (model / "model.safetensors").stat().st_size + header


def merged(world: World, base: Path, models: list[Path], **options: Any) -> dict[str, bytes]:
    urls = [world.put(model) for model in models]
    world.put(base, "base")
    world.proxy.seen.clear()
    starmerge_models.merge(world.url("base"), urls, output=world.url("out"), **options)
    return world.files("out")


@pytest.mark.parametrize(
    "plan",
    [
        lambda r: {1: Fault(status=500), 3: Fault(status=503)}.get(r.number % 5),
        lambda r: Fault(cut=True) if r.method == "GET" and r.number % 3 == 1 else None,
        lambda r: Fault(delay=3) if r.method == "GET" and r.number == 9 else None,
    ],
    ids=["500", "cut", "late"],
)
def test_what_fails_for_a_moment_is_asked_again(
    plan: Callable[[Request], Fault | None],
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(requests, "TIMEOUT", timedelta(seconds=1))
    models = [make_adapter("a", seed=1), make_adapter("b", seed=2)]
    starmerge_models.merge(tiny_base, models, output=tmp_path / "out")
    world.proxy.plan = plan
    assert_same(merged(world, tiny_base, models), tmp_path / "out")
    told = [record.msg for record in caplog.records if isinstance(record.msg, Retry)]
    assert bool(told) == (request.node.callspec.id == "cut")
    assert all(retry.what.startswith("s3://") for retry in told)


def test_an_input_that_is_replaced_is_named(
    world: World, tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    key = "base/model.safetensors"

    def replace(request: Request) -> None:
        if request.method == "GET" and request.key == key and replaced.count(key) == 3:
            content = world.client.get_object(Bucket=world.bucket, Key=key)["Body"].read()
            world.client.put_object(Bucket=world.bucket, Key=key, Body=content[:-1] + b"x")
        replaced.append(request.key)

    replaced: list[str] = []
    world.proxy.plan = replace
    with pytest.raises(StarmergeError, match=rf"{world.url(key)} was replaced"):
        merged(world, tiny_base, [make_adapter("a")])
    assert world.files("out") == {}
    assert world.scratch() == []


def test_a_replaced_config_is_found_at_the_end(
    world: World, tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    key = "a/adapter_config.json"
    reached: list[Request] = []

    def replace(request: Request) -> None:
        if request.method == "GET" and request.key == "base/model.safetensors":
            reached.append(request)
        if len(reached) == 3:  # the header was read before
            world.client.put_object(Bucket=world.bucket, Key=key, Body=b"{}")

    world.proxy.plan = replace
    with pytest.raises(StarmergeError, match=rf"{world.url(key)} was (changed|replaced)"):
        merged(world, tiny_base, [make_adapter("a")])
    assert world.files("out") == {}


@pytest.mark.parametrize(("status", "code"), [(403, "ExpiredToken"), (400, "ExpiredToken")])
def test_credentials_that_expire_are_said_and_never_shown(
    status: int, code: str, world: World, tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    world.proxy.plan = lambda r: Fault(status=status, code=code) if r.number > 12 else None
    with pytest.raises(StarmergeError, match=r"s3://\S+: the store refuses") as caught:
        merged(world, tiny_base, [make_adapter("a")])
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert TOKEN not in shown
    assert world.files("out") == {}


def test_no_secret_is_in_any_output(
    world: World, tiny_base: Path, make_adapter: MakeAdapter, capfd: pytest.CaptureFixture[str]
) -> None:
    files = merged(world, tiny_base, [make_adapter("a")], progress=True)
    printed = capfd.readouterr()
    for text in (*files.values(), printed.out.encode(), printed.err.encode()):
        for secret in (SECRET, TOKEN, "AKIDEXAMPLE", "X-Amz"):
            assert secret.encode() not in text


def test_what_keeps_failing_is_given_up(
    world: World, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr(requests, "RETRIES", 1)
    url = world.put(tiny_base, "base")
    world.proxy.plan = lambda r: Fault(delay=2)
    with pytest.raises(StarmergeError, match=r"s3://\S+: the store did not answer in time"):
        starmerge_models.merge(url, [url], output=world.url("out"))
    requests._store.cache_clear()
    monkeypatch.setattr(requests, "TIMEOUT", timedelta(seconds=30))
    world.proxy.plan = lambda r: Fault(status=500)
    with pytest.raises(StarmergeError, match=r"s3://\S+: the store answers 500"):
        starmerge_models.merge(url, [url], output=world.url("out"))


def test_what_is_not_there_is_said(world: World, tiny_base: Path) -> None:
    out = world.url("out")
    with pytest.raises(UsageError, match="nothing lies there"):
        starmerge_models.merge(world.url("none"), [str(tiny_base)], output=out)
    with pytest.raises(StarmergeError, match="there is no bucket nowhere-at-all"):
        starmerge_models.merge("s3://nowhere-at-all/base", [str(tiny_base)], output=out)
    with pytest.raises(UsageError, match="whole bucket"):
        starmerge_models.merge(tiny_base, [tiny_base], output=f"s3://{world.bucket}")
    with pytest.raises(UsageError, match="is a URL") as caught:
        starmerge_models.merge("https://h/m?X-Amz-Signature=abc", [str(tiny_base)], output=out)
    assert "abc" not in str(caught.value)


def test_overwriting(
    world: World, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    first, second = make_adapter("a", seed=1), make_adapter("b", seed=2)
    (tiny_base / "extra.json").write_text("{}")
    merged(world, tiny_base, [first])
    (tiny_base / "extra.json").unlink()
    with pytest.raises(UsageError, match="exists and is not empty"):
        starmerge_models.merge(tiny_base, [second], output=world.url("out"))
    seen: list[set[str]] = []

    def look(request: Request) -> None:
        if request.method == "PUT" and request.key.startswith("out/"):
            seen.append({*world.files("out")} if "merge_report" not in request.key else set())

    world.proxy.plan = look
    starmerge_models.merge(tiny_base, [second], output=world.url("out"), overwrite=True)
    world.proxy.plan = lambda request: None
    assert len(seen) > 3
    # While files of both merges lie there, nothing says that they are a whole one.
    assert not any("merge_report.json" in names for names in seen)
    starmerge_models.merge(tiny_base, [second], output=tmp_path / "out")
    files = world.files("out")
    assert "extra.json" not in files
    assert_same(files, tmp_path / "out")
    world.client.put_object(Bucket=world.bucket, Key="out/notes.txt", Body=b"mine")
    with pytest.raises(UsageError, match=r"notes\.txt, which is no part"):
        starmerge_models.merge(tiny_base, [first], output=world.url("out"), overwrite=True)
    world.client.put_object(Bucket=world.bucket, Key="other/notes.txt", Body=b"mine")
    with pytest.raises(UsageError, match=r"holds no merge_report\.json"):
        starmerge_models.merge(tiny_base, [first], output=world.url("other"), overwrite=True)


def test_a_failed_upload_leaves_nothing_and_is_repeated_alone(
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = large(tiny_base, tmp_path / "base")
    monkeypatch.setattr(parts, "PART", PARTS)
    monkeypatch.setattr(requests, "RETRIES", 0)
    model = make_adapter("a")

    def fail(request: Request) -> Fault | None:
        is_second = "partNumber=2" in request.path
        return Fault(status=500) if request.method == "PUT" and is_second else None

    world.proxy.plan = fail
    with pytest.raises(StarmergeError, match="The merge itself is whole, in"):
        merged(world, base, [model])
    assert world.files("out") == {}
    assert world.unfinished() == []
    world.proxy.plan = lambda request: None
    world.proxy.served.clear()
    result = starmerge_models.merge(world.url("base"), [world.url("a")], output=world.url("out"))
    assert result.resumed > 0
    assert world.proxy.served.get("base/model.safetensors", 0) <= ranges._FIRST_BLOCK
    starmerge_models.merge(base, [model], output=tmp_path / "out")
    assert_same(world.files("out"), tmp_path / "out")
    assert world.scratch() == []


def test_what_a_killed_upload_has_left_is_for_the_same_merge_alone(
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, output = make_adapter("a"), world.url("out")
    world.proxy.plan = lambda request: (
        Fault(status=403, code="AccessDenied")
        if request.method == "PUT" and request.key == "out/model.safetensors"
        else None
    )
    with pytest.raises(StarmergeError, match="The merge itself is whole"):
        starmerge_models.merge(tiny_base, [model], output=output)
    world.proxy.plan = lambda request: None
    assert "config.json" in world.files("out")
    # Another merge does not take it for its own,
    with pytest.raises(UsageError, match="exists and is not empty"):
        starmerge_models.merge(tiny_base, [model], "average", output=output)
    # nor does the same take anything else for it,
    config = world.files("out")["config.json"]
    world.client.put_object(Bucket=world.bucket, Key="out/config.json", Body=config + b" ")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty|holds no merge_report|is no part of"):
            starmerge_models.merge(tiny_base, [model], output=output, overwrite=overwrite)
    # nor a whole merge that somebody else has made there meanwhile.
    world.client.put_object(Bucket=world.bucket, Key="out/config.json", Body=config)
    world.client.put_object(Bucket=world.bucket, Key="out/merge_report.json", Body=b"{}")
    with pytest.raises(UsageError, match="exists and is not empty"):
        starmerge_models.merge(tiny_base, [model], output=output)
    world.client.delete_object(Bucket=world.bucket, Key="out/merge_report.json")
    # It goes on elsewhere, too, where nothing is in the scratch folder.
    monkeypatch.setenv("STARMERGE_SCRATCH", str(tmp_path / "elsewhere"))
    starmerge_models.merge(tiny_base, [model], output=output)
    starmerge_models.merge(tiny_base, [model], output=tmp_path / "out")
    assert_same(world.files("out"), tmp_path / "out")
    listed = world.client.list_objects_v2(Bucket=world.bucket)["Contents"]
    assert not [own["Key"] for own in listed if own["Key"].startswith(".out")]


def large(base: Path, to: Path) -> Path:
    """Write a base that is sent in several parts: one tensor has 12 MB that no adapter changes."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    tensors["large"] = torch.arange(3_000_000, dtype=torch.float32)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("moment", ["merging", "parts", "commits"])
def test_killed_and_taken_up(
    moment: str,
    loaded: Forks,
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, model = large(tiny_base, tmp_path / "base"), make_adapter("a")
    starmerge_models.merge(base, [model], output=tmp_path / "out")
    arguments = [world.put(base), world.put(model), world.url("out")]

    def wait(request: Request) -> Fault | None:
        is_it = {
            "merging": request.method == "GET" and request.key == "base/model.safetensors",
            "parts": request.method == "PUT" and "partNumber=2" in request.path,
            "commits": request.method == "PUT" and request.key == "out/generation_config.json",
        }[moment]
        if is_it:
            reached.append(request)
        return Fault(delay=600) if is_it and len(reached) >= wanted else None

    reached: list[Request] = []
    wanted = 6 if moment == "merging" else 1  # so that the large tensor is there
    world.proxy.plan = wait
    command = ["merge", *arguments[:-1], "-o", arguments[-1], "--threads", "1"]
    size = None if moment == "commits" else PARTS
    with loaded.running(command, env=dict(os.environ), part_bytes=size) as (process, ending):
        while len(reached) < wanted:
            assert not ending.done(), ending.result()
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
    assert ending.result().code == -signal.SIGKILL
    assert "merge_report.json" not in world.files("out")
    if moment != "commits":
        assert world.files("out") == {}
    world.proxy.plan = lambda request: None
    clean(Path(arguments[-1]))
    assert "(left over)" in capsys.readouterr().out
    result = starmerge_models.merge(arguments[0], arguments[1:-1], output=arguments[-1], threads=1)
    assert result.resumed > 0
    assert_same(world.files("out"), tmp_path / "out")
    assert world.scratch() == []


def test_two_merges_into_one_output(
    world: World, tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    base, model, output = tiny_base, make_adapter("a"), world.url("out")
    refused: list[str] = []

    def begin_another(request: Request) -> None:
        if request.method == "PUT" and not refused:
            refused.append("")
            with pytest.raises(UsageError, match="is being made by another process") as caught:
                starmerge_models.merge(base, model, "average", output=output)
            refused[0] = str(caught.value)

    world.proxy.plan = begin_another
    starmerge_models.merge(base, model, output=output)
    assert "out~" in refused[0]


def test_verifying_and_inspecting(
    world: World,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [make_adapter("a", seed=1), make_adapter("b", seed=2)]
    merged(world, tiny_base, models)
    verdict = verify(world.url("out"), repeat="all")
    assert verdict.is_right
    assert verdict.unlisted == []
    assert set(verdict.inputs.values()) == {"same"}
    with pytest.raises(typer.Exit) as ended:
        verify_command(Path(world.url("out")))
    assert ended.value.exit_code == 0
    # A path has one slash where a URL has two.
    assert capsys.readouterr().out.startswith(f"{world.url('out')} is as its report says")
    with pytest.raises(UsageError, match=f"{world.url('out')} is a URL"):
        open_merged(Path(world.url("out")))
    inspection = starmerge_models.inspect(world.url("base"), [world.url("a"), world.url("b")])
    local = starmerge_models.inspect(tiny_base, models)
    assert [own["rank"] for own in inspection.models] == [own["rank"] for own in local.models]
    content = bytearray(world.files("out")["model.safetensors"])
    content[-1] ^= 1
    world.client.put_object(Bucket=world.bucket, Key="out/model.safetensors", Body=bytes(content))
    assert not verify(world.url("out")).is_right


def test_what_runs_a_model_says_that_it_wants_a_folder(world: World, tiny_base: Path) -> None:
    from starmerge_models.checkpoints.source import resolve_local

    with pytest.raises(UsageError, match="copy it into one"):
        resolve_local(world.put(tiny_base, "base"))


def test_the_library_is_named_where_it_is_missing(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from starmerge_models.storage import exists, place_of\n"
        "exists(place_of('s3://bucket/base'))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'starmerge-models[remote]'" in finished.stderr


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("gs", {"GOOGLE_SKIP_SIGNATURE": "true"}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_SKIP_SIGNATURE": "true"}),
    ],
)
def test_other_stores_are_opened(
    scheme: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    store = ObjectBackend().store(RemotePlace(scheme, "bucket", "model"))
    assert type(store).__name__ == {"gs": "GCSStore", "az": "AzureStore"}[scheme]


def test_what_is_announced_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    content = os.urandom(100_000)
    (folder / "file").write_bytes(content)
    world.put(folder)
    storage = remote_storage("s3")
    assert isinstance(storage, ranges.Ranges)
    file = RemotePlace("s3", world.bucket, "data/file")
    monkeypatch.setattr(ranges, "AHEAD", 50_000)
    monkeypatch.setattr(ranges, "RANGE", 7_000)
    for start in range(0, 100_000, 20_000):
        storage.prefetch(file, start, 20_000)
    assert sum(own.nbytes for own in storage._announced.values()) == 40_000
    for start in range(0, 100_000, 20_000):
        assert storage.read(file, start, 20_000) == content[start : start + 20_000]
    assert not storage._announced
    assert world.proxy.served["data/file"] == 100_000
    with storage.stream(file) as stream:
        assert stream.seek(-10, os.SEEK_END) == 99_990
        assert stream.read(20) == content[-10:]
        assert stream.seek(0) == 0
        assert stream.readall() == content


def test_folders_that_a_console_has_made_are_folders(
    world: World, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("a", seed=1), make_adapter("b", seed=2)]
    urls = [world.put(folder) for folder in (tiny_base, *models)]
    # Consoles make an empty object whose key ends with a slash.
    for name in (tiny_base.name, "a", "b", "out"):
        world.client.put_object(Bucket=world.bucket, Key=f"{name}/", Body=b"")
    starmerge_models.merge(tiny_base, models, output=tmp_path / "out")
    for overwrite in (False, True):
        starmerge_models.merge(urls[0], urls[1:], output=world.url("out"), overwrite=overwrite)
        files = world.files("out")
        assert files.pop("") == b""
        assert_same(files, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        starmerge_models.merge(urls[0], urls[1:], output=world.url("out"))
    verdict = verify(world.url("out"))
    assert verdict.is_right
    assert not verdict.unlisted
