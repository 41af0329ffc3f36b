"""An imitation of the Hub's HTTP interface, as a server on this machine.

It answers what the Hub's client asks when it looks for repositories, uploads, commits and
downloads: ``/api/whoami-v2``, ``/api/repos/create``, ``/api/models/…`` (info, tree, preupload,
branch, commit), ``/api/validate-yaml``, the LFS batch interface with uploads whole and in parts,
and ``/ORG/NAME/resolve/…``. Repositories are kept in memory, with their history.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "b5c1e0signature"
"""Stands in the query of every address that is given out for an upload."""


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, str]
    """The SHA-256 of each file, by its name."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commits(self, revision: str) -> list[Commit] | None:
        """Return the history up to a branch or a commit."""
        for commits in self.branches.values():
            for n, commit in enumerate(commits, 1):
                if commit.oid == revision:
                    return commits[:n]
        return self.branches.get(revision)


@dataclass
class Fault:
    """Of the next requests that fit, so many fail."""

    method: str
    path: str
    """A regular expression, to be found in the path."""
    what: int | str
    """A status; "drop": the connection, amid the body; "lost": the answer, after the
    request was carried out; "stall": for ever, amid the body."""
    times: int = 10**6


class FakeHub:
    """The state of the imitation."""

    def __init__(self, token: str, *, part_bytes: int | None = None) -> None:
        self.token, self.part_bytes = token, part_bytes
        self.role, self.user, self.orgs = "write", "alice", {"acme": "admin", "look": "read"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        """All content that was sent, by its SHA-256."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.uploads: list[str] = []
        """SHA-256 of every large file whose upload was complete."""
        self.faults: list[Fault] = []
        self.meanwhile: Callable[[], object] | None = None
        """What somebody else does before a commit that was asked for; once."""
        self.stalled = threading.Event()
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.Lock()
        self.url = ""

    def put(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """Make a repository with files."""
        repo = self.repos[repo_id] = Repo(private)
        self.commit(repo, "main", "initial commit", self.stored({".gitattributes": b"*.bin lfs\n"}))
        if files:
            self.commit(repo, "main", "first", {**self.head(repo_id).files, **self.stored(files)})
        return repo

    def stored(self, files: dict[str, bytes]) -> dict[str, str]:
        named = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.blobs.update((named[name], content) for name, content in files.items())
        return named

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repos[repo_id].branches[branch][-1]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Return what a branch shows, but the file that every repository is made with."""
        shown = self.head(repo_id, branch).files
        return {name: self.blobs[sha] for name, sha in shown.items() if name != ".gitattributes"}

    def messages(self, repo_id: str, branch: str = "main") -> list[str]:
        return [commit.message for commit in self.repos[repo_id].branches[branch]]

    def commit(self, repo: Repo, branch: str, message: str, files: dict[str, str]) -> Commit:
        history = repo.branches.setdefault(branch, [])
        parent = history[-1].oid if history else ""
        text = json.dumps([parent, message, sorted(files.items()), branch])
        history.append(Commit(hashlib.sha1(text.encode()).hexdigest(), message, files))
        return history[-1]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve an imitation on a free port."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _FailedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = {
    ("GET", r"/api/whoami-v2"): "whoami",
    ("POST", r"/api/validate-yaml"): "validate",
    ("POST", r"/api/repos/create"): "create",
    ("GET", rf"/api/models/{_ID}(/revision/(?P<revision>[^/]+))?"): "info",
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/.*)?"): "tree",
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)"): "preupload",
    ("POST", rf"/api/models/{_ID}/branch/(?P<revision>[^/]+)"): "branch",
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)"): "commit",
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch"): "batch",
    ("PUT", r"/upload/(?P<sha>\w{64})(/(?P<part>\d+))?"): "upload",
    ("POST", r"/complete/(?P<sha>\w{64})"): "complete",
    ("POST", r"/verify"): "verify",
    ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)"): "resolve",
    ("HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)"): "resolve",
}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for the client to have its head

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault(self.command, path)
        try:
            if fault is not None and fault.what in ("drop", "stall"):
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                if fault.what == "stall":
                    self.hub.stalled.set()
                    threading.Event().wait(120)
                self._hang_up()
                return
            body = self._body()
            if fault is not None and isinstance(fault.what, int):
                raise _FailedError(fault.what, self._indiscreet())
            status, headers, content = self._carry_out(split.path, body)
            if fault is not None:
                self._hang_up()
                return
        except _FailedError as failure:
            status, content = failure.status, json.dumps({"error": str(failure)}).encode()
            headers = {"X-Error-Message": str(failure), "X-Error-Code": failure.code}
        except (ConnectionError, OSError):
            return
        self._send(status, headers, content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _indiscreet(self) -> str:
        """Return an error's text that quotes secrets, as no server should."""
        signed = f"{self.hub.url}/upload/x?X-Amz-Signature={SIGNATURE}"
        return f"Refused: Bearer {self.hub.token} at {signed}"

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"X-Request-Id": "1", **headers}.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError
        return body

    def _carry_out(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for (method, pattern), name in _ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found is None or method != self.command:
                continue
            parts = {key: unquote(v) for key, v in found.groupdict().items() if v is not None}
            if name not in ("upload", "complete", "resolve", "info", "tree"):
                self._check_token()
            if name == "upload" and SIGNATURE not in self.query.get("X-Amz-Signature", []):
                raise _FailedError(403, "The address is not signed.")
            with self.hub.lock:
                answer = getattr(self, f"_{name}")(body, **parts)
            if isinstance(answer, tuple):
                return answer
            kind = {"Content-Type": "application/json"}
            return 200, kind, json.dumps(answer).encode()
        raise _FailedError(404, f"No such address: {self.command} {path}")

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _FailedError(
                401, f"Invalid username or password: {self.headers['Authorization']}"
            )

    def _check_writer(self, repo: str) -> None:
        org = repo.partition("/")[0]
        if (
            self.hub.role == "read"
            or self.hub.orgs.get(org) == "read"
            or (org != self.hub.user and org not in self.hub.orgs)
        ):
            raise _FailedError(403, "Forbidden: pass `create_pr=1` to make a pull request")

    def _repo(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (
            found.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            raise _FailedError(404, "Repository not found", "RepoNotFound")
        return found

    def _history(self, repo: str, revision: str) -> list[Commit]:
        commits = self._repo(repo).commits(revision)
        if not commits:
            raise _FailedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits

    def _whoami(self, _: bytes) -> Any:
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.hub.orgs.items()]
        access = {"displayName": "test", "role": self.hub.role}
        auth = {"type": "access_token", "accessToken": access}
        return {"type": "user", "name": self.hub.user, "orgs": orgs, "auth": auth}

    def _validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            raise _FailedError(400, "No metadata.")
        return {"errors": [], "warnings": []}

    def _create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        self._check_writer(repo)
        if repo in self.hub.repos:
            raise _FailedError(409, "You already created this model repo")
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.put(repo, {}, private=private)
        return {"url": f"{self.hub.url}/{repo}", "name": repo}

    def _info(self, _: bytes, repo: str, revision: str = "main") -> Any:
        commit = self._history(repo, revision)[-1]
        return {
            "id": repo,
            "sha": commit.oid,
            "private": self._repo(repo).private,
            "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            "tags": [],
            "downloads": 0,
        }

    def _tree(self, _: bytes, repo: str, revision: str) -> Any:
        return [
            self._entry(name, sha)
            for name, sha in sorted(self._history(repo, revision)[-1].files.items())
        ]

    def _entry(self, name: str, sha: str) -> dict[str, Any]:
        size = len(self.hub.blobs[sha])
        entry = {"type": "file", "path": name, "size": size, "oid": self._oid(sha)}
        if _is_large(name):
            entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
        return entry

    def _oid(self, sha: str) -> str:
        content = self.hub.blobs[sha]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self._check_writer(repo)
        files = self._history(repo, revision)[-1].files
        ignored = self.hub.blobs.get(files.get(".gitignore", ""), b"").decode().split()
        answers = []
        for wanted in json.loads(body)["files"]:
            name = wanted["path"]
            sha, large = files.get(name), _is_large(name)
            oid = None if sha is None else sha if large else self._oid(sha)
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": name, "uploadMode": mode, "shouldIgnore": name in ignored, "oid": oid}
            )
        return {"files": answers}

    def _branch(self, body: bytes, repo: str, revision: str) -> Any:
        self._check_writer(repo)
        start = json.loads(body or b"{}").get("startingPoint", "main")
        self._repo(repo).branches[revision] = list(self._history(repo, start))
        return {}

    def _batch(self, body: bytes, repo: str) -> Any:
        self._check_writer(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            sha, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": sha, "size": size}
            if sha not in self.hub.blobs:
                verify = {"href": f"{self.hub.url}/verify"}
                entry["actions"] = {"upload": self._upload_action(sha, size), "verify": verify}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _upload_action(self, sha: str, size: int) -> dict[str, Any]:
        signed = f"X-Amz-Signature={SIGNATURE}"
        bound = self.hub.part_bytes
        if bound is None or size <= bound:
            return {"href": f"{self.hub.url}/upload/{sha}?{signed}"}
        parts = range(1, -(-size // bound) + 1)
        header = {str(n): f"{self.hub.url}/upload/{sha}/{n}?{signed}" for n in parts}
        header["chunk_size"] = str(bound)
        return {"href": f"{self.hub.url}/complete/{sha}?{signed}", "header": header}

    def _upload(self, body: bytes, sha: str, part: str = "") -> Any:
        if part:
            self.hub.parts[sha, int(part)] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        self._keep(sha, body)
        return 200, {}, b""

    def _complete(self, body: bytes, sha: str) -> Any:
        parts = [self.hub.parts.pop((sha, n["partNumber"])) for n in json.loads(body)["parts"]]
        self._keep(sha, b"".join(parts))
        return {}

    def _keep(self, sha: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha:
            raise _FailedError(400, "The bytes do not have the announced hash.")
        self.hub.blobs[sha] = content
        self.hub.uploads.append(sha)

    def _verify(self, body: bytes) -> Any:
        wanted = json.loads(body)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _FailedError(400, "Not uploaded.")
        return {}

    def _commit(self, body: bytes, repo: str, revision: str) -> Any:
        self._check_writer(repo)
        if self.hub.meanwhile is not None:
            meanwhile, self.hub.meanwhile = self.hub.meanwhile, None
            meanwhile()
        lines = [json.loads(line) for line in body.splitlines()]
        head = self._history(repo, revision)[-1]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise _FailedError(412, "A commit has happened since.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            name = value["path"]
            if line["key"] == "deletedFile":
                if files.pop(name, None) is None:
                    raise _FailedError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _FailedError(400, "The file was not uploaded.")
                files[name] = value["oid"]
            else:
                files |= self.hub.stored({name: base64.b64decode(value["content"])})
        made = self.hub.commit(self._repo(repo), revision, header["summary"], files)
        url = f"{self.hub.url}/{repo}/commit/{made.oid}"
        return {"commitUrl": url, "commitOid": made.oid, "success": True}

    def _resolve(self, _: bytes, repo: str, revision: str, name: str) -> Any:
        commit = self._history(repo, revision)[-1]
        if name not in commit.files:
            raise _FailedError(404, "Entry not found", "EntryNotFound")
        sha = commit.files[name]
        content = self.hub.blobs[sha]
        headers = {
            "ETag": f'"{sha if _is_large(name) else self._oid(sha)}"',
            "X-Repo-Commit": commit.oid,
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(content))
        return 200, headers, content


def _is_large(name: str) -> bool:
    """Tell whether the Hub keeps a file of this name as LFS."""
    return name.endswith((".safetensors", ".bin", ".gguf"))
