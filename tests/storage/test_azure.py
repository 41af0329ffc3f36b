"""Merges from and to Azurite, Microsoft's imitation of Azure Blob Storage (``make azure``)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import obstore
import pytest

import starmerge_models
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.verify import verify
from starmerge_models.storage import parts, pieces, requests
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.remote import remote_storage
from tests.conftest import MakeAdapter
from tests.storage.test_objects import PARTS, assert_same, large

AZURITE = shutil.which("azurite-blob")
pytestmark = pytest.mark.skipif(
    AZURITE is None, reason="needs Azurite on the PATH, a program of Node.js: make azure"
)

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite, as Microsoft has published them."""


def make_container(port: int, name: str) -> None:
    """Make a container; the request is signed as "Authorize with Shared Key" describes."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    signed = (
        "PUT" + 12 * "\n" + f"x-ms-date:{date}\nx-ms-version:{version}\n"
        f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    )
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "PUT",
        f"/{ACCOUNT}/{name}?restype=container",
        headers={
            "x-ms-date": date,
            "x-ms-version": version,
            "Content-Length": "0",
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        },
    )
    assert connection.getresponse().status == 201


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run Azurite in memory."""
    assert AZURITE is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    options = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with subprocess.Popen(
        [AZURITE, *options, "--blobPort", str(port)],
        cwd=tmp_path_factory.mktemp("azurite"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        make_container(port, "models")
        yield port
        process.kill()


@pytest.fixture
def store(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[obstore.store.ObjectStore]:
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
        "STARMERGE_SCRATCH": str(tmp_path / "scratch"),
    }.items():
        monkeypatch.setenv(name, value)
    requests._store.cache_clear()
    remote_storage.cache_clear()
    yield requests._store("az", "models")
    requests._store.cache_clear()


def put(store: obstore.store.ObjectStore, folder: Path, name: str) -> str:
    for file in folder.iterdir():
        obstore.put(store, f"{name}/{file.name}", file.read_bytes())
    return f"az://models/{name}"


def files(store: obstore.store.ObjectStore, name: str) -> dict[str, bytes]:
    found = [own["path"] for page in obstore.list(store, name) for own in page]
    return {path[len(name) + 1 :]: bytes(obstore.get(store, path).bytes()) for path in found}


def test_merges_have_the_bytes_of_local_ones(
    store: obstore.store.ObjectStore,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "PART", PARTS)
    base = large(tiny_base, tmp_path / "base")
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    urls = [put(store, model, model.name) for model in models]
    output = "az://models/out"
    starmerge_models.merge(put(store, base, "base"), urls, output=output)
    starmerge_models.merge(base, models, output=tmp_path / "out")
    assert_same(files(store, "out"), tmp_path / "out")
    assert verify(output).wrong == []
    with pytest.raises(UsageError, match="exists and is not empty"):
        starmerge_models.merge(base, models, output=output)
    starmerge_models.merge(base, models, "average", output=output, overwrite=True)
    starmerge_models.merge(base, models, "average", output=tmp_path / "out", overwrite=True)
    assert_same(files(store, "out"), tmp_path / "out")


def test_files_are_put_together_of_pieces(store: obstore.store.ObjectStore) -> None:
    output = RemotePlace("az", "models", "pieces/out")
    shared = pieces.PieceFolder(pieces.pieces_of(output, "abc"))
    content = random.Random(0).randbytes(40 * 2**20 + 11)
    file, step = shared.open("w", len(content)), 3 * 2**20 + 1
    for start in range(0, len(content), step):
        more = start + step < len(content)
        file.write(memoryview(content)[start : start + step], start, more=more)
    (found,) = pieces.files_in(shared.pieces).values()
    found.send(output / "w")
    assert files(store, "pieces/out") == {"w": content}
    (left,) = pieces.pieces_left(output)
    left.delete()
    assert pieces.pieces_left(output) == []


def test_refusals_are_told_apart(
    store: obstore.store.ObjectStore,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_adapter("a")
    with pytest.raises(StarmergeError, match="there is no bucket nothere"):
        starmerge_models.merge("az://nothere/base", [model], output=tmp_path / "out")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(os.urandom(64)).decode())
    requests._store.cache_clear()
    with pytest.raises(StarmergeError, match="refuses the credentials.*403"):
        starmerge_models.merge("az://models/base", [model], output=tmp_path / "out")
