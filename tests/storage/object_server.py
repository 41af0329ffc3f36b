"""An S3-compatible server on this machine, and a proxy before it that can make requests fail."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

SERVER = """
import logging
from threading import Thread
from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
# The application of S3 alone: the one of all services looks for theirs at each request.
server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True)
Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
input()
"""


@contextmanager
def object_server() -> Iterator[int]:
    """Run moto's server in a process of its own; yield its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Request:
    """A request that has reached the proxy."""

    method: str
    path: str
    """Bucket, key and query."""
    number: int
    """How many of the method came before."""

    @property
    def key(self) -> str:
        """The object within its bucket."""
        return self.path.partition("?")[0].lstrip("/").partition("/")[2]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request."""

    status: int | None = None
    """Answer this, without asking the server."""
    code: str = "InternalError"
    """The code in the answer's body."""
    delay: float = 0.0
    """Seconds to wait before anything is done."""
    cut: bool = False
    """Close the connection in the midst of the body."""


Plan = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """Passes requests on to a server, and makes some of them fail."""

    upstream: int
    plan: Plan = lambda request: None
    served: dict[str, int] = field(default_factory=dict)
    """Bytes of bodies that were answered to GET, by key."""
    taken: dict[str, int] = field(default_factory=dict)
    """Bytes of bodies that came with PUT, by key."""
    seen: list[Request] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._counts: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def note(self, method: str, path: str) -> Request:
        with self._lock:
            number = self._counts.get(method, 0)
            self._counts[method] = number + 1
            request = Request(method, path, number)
            self.seen.append(request)
        return request

    def add(self, sums: dict[str, int], key: str, count: int) -> None:
        with self._lock:
            sums[key] = sums.get(key, 0) + count

    def count(self, method: str, pattern: str = "") -> int:
        """Tell how many requests of a method have come whose path matches."""
        return sum(own.method == method and bool(re.search(pattern, own.path)) for own in self.seen)


@contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    """Run a proxy before a server of this machine."""
    proxy = Proxy(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each body waits 40 ms for the client to have its head

        def _pass(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            request = proxy.note(self.command, self.path)
            fault = proxy.plan(request) or Fault()
            time.sleep(fault.delay)
            if fault.status is not None:
                said = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
                self._answer(fault.status, {}, said.encode(), cut=False)
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if self.command == "GET" and answer.status < 300:
                proxy.add(proxy.served, request.key, len(content))
            if self.command == "PUT":
                proxy.add(proxy.taken, request.key, length)
            self._answer(answer.status, dict(answer.getheaders()), content, cut=fault.cut)

        def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool) -> None:
            own = ("connection", "content-length", "transfer-encoding", "date", "server")
            try:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in own:
                        self.send_header(name, value)
                lengths = {k.lower(): v for k, v in headers.items()}
                is_head = self.command == "HEAD"
                length = lengths.get("content-length", "0") if is_head else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if not is_head:
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._pass)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
