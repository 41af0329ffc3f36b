"""Reading models of the Hub by range, from a small fake of its HTTP interface."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote

import pytest

import starmerge_models
from tests.conftest import MakeAdapter
from tests.storage.test_objects import assert_same, bytes_of

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_SECRETSECRETSECRET"


class FakeHub:
    """Repositories ``org/NAME`` that are folders of this machine; of each there is one commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.served: dict[str, int] = {}
        self.refuses = "refused"

    def entries(self, repo: str, path: str, *, recursive: bool) -> list[dict[str, object]] | None:
        root = self.folder / repo
        place = root / path
        if not place.is_dir():
            return None
        members = sorted(place.rglob("*") if recursive else place.iterdir())
        return [self.entry(root, member) for member in members]

    def entry(self, root: Path, member: Path) -> dict[str, object]:
        is_file = member.is_file()
        return {
            "type": "file" if is_file else "directory",
            "oid": str(member.stat().st_mtime_ns),
            "size": member.stat().st_size if is_file else 0,
            "path": member.relative_to(root).as_posix(),
        }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(tmp_path / "hub")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if fake.refuses in self.path:
                self.answer(401, b'{"error": "Invalid credentials"}')
            elif parts[:2] == ["api", "models"]:
                self.api(parts[2:], query)
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self.missing()

        do_HEAD = do_POST = do_GET  # noqa: N815

        def api(self, parts: list[str], query: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length).decode()
            repo, rest = "/".join(parts[:2]), parts[2:]
            if not (fake.folder / repo).is_dir():
                self.missing("RepoNotFound")
            elif len(rest) > 1 and rest[1] not in ("main", SHA):
                self.missing("RevisionNotFound")
            elif not rest or rest[0] == "revision":
                self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": []}).encode())
            elif rest[0] == "tree":
                recursive = parse_qs(query).get("recursive", ["false"])[0].lower() in ("true", "1")
                found = fake.entries(repo, "/".join(rest[2:]), recursive=recursive)
                if found is None:
                    self.missing("EntryNotFound")
                else:
                    self.answer(200, json.dumps(found).encode())
            else:
                is_json = body.startswith("{")
                paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
                root = fake.folder / repo
                known = [root / own for own in paths if (root / own).exists()]
                entries = [fake.entry(root, own) for own in known]
                self.answer(200, json.dumps(entries).encode())

        def file(self, repo: str, name: str) -> None:
            file = fake.folder / repo / name
            if not file.is_file():
                self.missing("EntryNotFound")
                return
            content = file.read_bytes()
            start, _, stop = self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")
            part = content[int(start) : int(stop) + 1 if stop else None]
            fake.served[f"{repo}/{name}"] = fake.served.get(f"{repo}/{name}", 0) + len(part)
            self.answer(206, part, **{"ETag": '"x"', "X-Repo-Commit": SHA})

        def missing(self, code: str = "EntryNotFound") -> None:
            self.answer(404, b"{}", **{"X-Error-Code": code})

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def test_a_merge_of_the_hub(
    hub: FakeHub,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    starmerge: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (hub.folder / "org").mkdir(parents=True)
    (hub.folder / "tests").mkdir()
    (hub.folder / "tests" / "tiny").symlink_to(tiny_base)  # as the adapter names its base
    adapter = make_adapter("a")
    (hub.folder / "org" / "adapters").mkdir()
    (hub.folder / "org" / "adapters" / "a").symlink_to(adapter)
    starmerge_models.merge(tiny_base, [adapter], output=tmp_path / "local")
    finished = starmerge(
        "merge", "hf://tests/tiny@main", "hf://org/adapters/a", "-o", tmp_path / "out"
    )
    assert finished.returncode == 0
    out = bytes_of(tmp_path / "out")
    assert_same(out, tmp_path / "local")
    inputs = json.loads(out["merge_report.json"])["inputs"]
    assert [own["hub_id"] for own in inputs] == ["tests/tiny", "org/adapters"]
    assert {own["revision"] for own in inputs} == {SHA}
    size = (tiny_base / "model.safetensors").stat().st_size
    assert hub.served["tests/tiny/model.safetensors"] <= size + 2**16
    for content in (*out.values(), finished.stdout.encode(), finished.stderr.encode()):
        assert TOKEN.encode() not in content


def test_what_the_hub_does_not_give(
    hub: FakeHub,
    tiny_base: Path,
    tmp_path: Path,
    starmerge: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (hub.folder / "org").mkdir(parents=True)
    out = tmp_path / "out"
    (hub.folder / "org" / "refused").mkdir()
    for base, output, said in (
        ("hf://org/none", out, "hf://org/none: the Hub has no such repository"),
        ("hf://org/refused", out, "hf://org/refused: the Hub refuses the token"),
        (tiny_base, "hf://org/out", "is not written to hf:// URLs"),
    ):
        finished = starmerge("merge", base, tiny_base, "-o", output)
        assert finished.returncode != 0
        assert said in finished.stderr
        assert TOKEN not in finished.stdout + finished.stderr
    assert not out.exists()
