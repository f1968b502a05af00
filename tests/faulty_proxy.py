"""A proxy before the server of an object store, which can be told to fail: errors, throttling, broken connections, delays."""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

Kind = Literal["401", "403", "429", "500", "503", "drop answer", "drop request", "lose answer", "delay"]

_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Fault:
    """What is to go wrong with the next so many requests of a kind.

    Attributes:
        kind: ``drop answer``: in the middle of its body; ``drop request``: in the middle of the body that comes, of which the
            server never hears; ``lose answer``: the server has done it, and nobody is told.
        method: Of the requests.
        path: Expression that the path and query of a request, without their quoting, must match somewhere.
        times: How many requests.
        delay: Seconds.
    """

    kind: Kind
    method: str = "GET"
    path: str = ""
    times: int = 1
    delay: float = 0.0


@dataclass
class Request:
    """What was asked for, and how many bytes came back."""

    method: str
    path: str
    range: str | None
    num_bytes: int = 0


@dataclass
class Proxy:
    """Hands requests on to the server, but for those that are to fail.

    Attributes:
        scheme: Of the store's addresses.
        server: Its host and port.
        write: Method of the requests that write an object.
        errors: What the store says with each status.
        make_bucket: Makes a bucket, and returns its address.
        faults: Still to come.
        requests: That were made.
    """

    scheme: str
    server: tuple[str, int]
    write: str
    errors: Mapping[str, str]
    make_bucket: Callable[[], str]
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        """Returns what is to go wrong with a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, unquote(path)):
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[list[Fault]]:
        """Makes requests fail for as long as the block runs."""
        self.faults = list(faults)
        try:
            yield self.faults
        finally:
            self.faults = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def _handle(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        request = Request(self.command, self.path, self.headers.get("Range"))
        self.proxy.requests.append(request)
        if fault and fault.kind == "delay":
            time.sleep(fault.delay)
        if fault and fault.kind == "drop request":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._hang_up()
            return
        body = self._body()
        if fault and fault.kind in self.proxy.errors:
            self._answer(int(fault.kind), {}, self.proxy.errors[fault.kind].encode())
            return
        status, headers, data = self._ask(body)
        request.num_bytes = len(data)
        if fault and fault.kind == "lose answer":
            self._hang_up()
        else:
            self._answer(status, headers, data, is_cut=fault is not None and fault.kind == "drop answer")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - as http.server calls them

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0] or b"-1", 16):
            parts.append(self._read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _read(self, num_bytes: int) -> bytes:
        """Returns part of a body; one that is cut off, as by a killed client, is one that no server would take."""
        data = self.rfile.read(num_bytes)
        if len(data) < num_bytes or num_bytes < 0:
            raise ConnectionError("the client went away")
        return data

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.server)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {*_HOP, "expect"}}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        found = dict(answer.getheaders())
        connection.close()
        return answer.status, found, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, is_cut: bool = False) -> None:
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(data)))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(proxy: Proxy, listening: socket.socket) -> Iterator[Proxy]:
    """Runs the proxy on a socket that is bound already, for as long as the block runs."""
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    front = ThreadingHTTPServer(listening.getsockname(), handler, bind_and_activate=False)
    front.socket.close()
    front.socket, front.daemon_threads = listening, True
    front.server_activate()
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        front.shutdown()
