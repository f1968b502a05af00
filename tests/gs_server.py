"""A server on loopback that speaks as much of Google Cloud Storage's JSON API as clients need, behind a proxy that can fail.

Generations and the conditions on them, ranges, pages of listings, uploads in one request and in parts are as Google documents
them. No server that could be installed for tests has all of these: they keep no conditions on what is read, or none at all.
"""

import email.parser
import email.policy
import itertools
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import faulty_proxy
from faulty_proxy import Proxy

_KEPT_BYTES = 256 << 10  # of an upload that is not whole, a multiple of so many is kept
_BUCKET = "(?P<bucket>[^/]+)"
_SPAN = re.compile(r"bytes (?P<start>\d+)-\d+/(?P<size>\d+)")


class Failure(Exception):  # noqa: N818 - an answer
    """An answer that says what is wrong."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        error = {"domain": "global", "reason": reason, "message": message}
        self.status, self.value = status, {"error": {"code": status, "message": message, "errors": [error]}}


@dataclass
class Answer:
    """What a request is answered with."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> "Answer":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass
class Call:
    """A request."""

    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Object:
    """An object as it is kept."""

    bucket: str
    name: str
    data: bytes
    generation: int
    metadata: Mapping[str, str]

    def resource(self) -> dict[str, Any]:
        """Returns what the API says of it."""
        own = {"kind": "storage#object", "bucket": self.bucket, "name": self.name, "size": str(len(self.data))}
        when = "2026-01-01T00:00:00.000Z"
        return own | {"generation": str(self.generation), "metadata": self.metadata, "updated": when, "timeCreated": when}


@dataclass
class Session:
    """An upload in parts."""

    name: str
    condition: Mapping[str, str]
    data: bytearray = field(default_factory=bytearray)
    object: Object | None = None


class Store:
    """All buckets, and the answers to requests about them: one at a time."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {}
        self.sessions: dict[str, Session] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._lock = threading.Lock()
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            (method, re.compile(path.replace("BUCKET", _BUCKET)), answer)
            for method, path, answer in (
                ("POST", "/storage/v1/b", self.make_bucket),
                ("GET", "/storage/v1/b/BUCKET/o", self.find),
                ("GET", "/storage/v1/b/BUCKET/o/(?P<name>[^/]+)", self.get),
                ("DELETE", "/storage/v1/b/BUCKET/o/(?P<name>[^/]+)", self.delete),
                ("POST", "/storage/v1/b/BUCKET/o/(?P<name>[^/]+)/rewriteTo/b/(?P<target>[^/]+)/o/(?P<new>[^/]+)", self.copy),
                ("POST", "/upload/storage/v1/b/BUCKET/o", self.upload),
                ("PUT", "/upload/storage/v1/b/BUCKET/o", self.add_part),
                ("DELETE", "/upload/storage/v1/b/BUCKET/o", self.cancel),
            )
        ]

    def answer(self, path: str, call: Call) -> Answer:
        """Returns the answer to a request."""
        for method, pattern, answer in self._routes:
            if method == call.method and (found := pattern.fullmatch(path)):
                try:
                    with self._lock:
                        return answer(call, **{key: unquote(value) for key, value in found.groupdict().items()})
                except Failure as failure:
                    return Answer.of(failure.value, failure.status)
        return Answer.of({}, 501)

    def make_bucket(self, call: Call) -> Answer:
        self.buckets[json.loads(call.body)["name"]] = {}
        return Answer.of({})

    def _objects(self, bucket: str) -> dict[str, Object]:
        if bucket not in self.buckets:
            raise Failure(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[bucket]

    def _object(self, bucket: str, name: str) -> Object:
        objects = self._objects(bucket)
        if name not in objects:
            raise Failure(404, "notFound", f"No such object: {bucket}/{name}")
        return objects[name]

    def _check(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        there = self._objects(bucket).get(name)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != (there.generation if there else 0):
            raise Failure(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")

    def _keep(self, bucket: str, name: str, data: bytes, metadata: Mapping[str, str]) -> Object:
        own = self._objects(bucket)[name] = Object(bucket, name, data, next(self._generations), metadata)
        return own

    def find(self, call: Call, bucket: str) -> Answer:
        query = call.query
        prefix, delimiter, most = query.get("prefix", ""), query.get("delimiter", ""), int(query.get("maxResults", 1_000))
        found: dict[str, Object | None] = {}  # by name, or beginning of names
        for name, own in sorted(self._objects(bucket).items()):
            if name.startswith(prefix):
                folder, is_below, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ("", "", "")
                found[f"{prefix}{folder}{delimiter}" if is_below else name] = None if is_below else own
        names = [name for name in sorted(found) if name > query.get("pageToken", "")]
        page = {name: found[name] for name in names[:most]}
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer |= {"items": items} if (items := [own.resource() for own in page.values() if own]) else {}
        answer |= {"prefixes": folders} if (folders := [name for name, own in page.items() if not own]) else {}
        return Answer.of(answer | ({"nextPageToken": [*page][-1]} if len(names) > most else {}))

    def get(self, call: Call, bucket: str, name: str) -> Answer:
        own = self._object(bucket, name)
        self._check(bucket, name, call.query)
        if call.query.get("alt") != "media":
            return Answer.of(own.resource())
        headers = {"X-Goog-Generation": str(own.generation), "Content-Type": "application/octet-stream"}
        if "Range" not in call.headers:
            return Answer(own.data, 200, headers)
        first, last = (int(bound) for bound in call.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(own.data):
            raise Failure(416, "requestedRangeNotSatisfiable", "The requested range cannot be satisfied.")
        part = own.data[first : last + 1]
        return Answer(part, 206, headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(own.data)}"})

    def delete(self, call: Call, bucket: str, name: str) -> Answer:
        self._object(bucket, name)
        self._check(bucket, name, call.query)
        del self.buckets[bucket][name]
        return Answer(status=204)

    def copy(self, call: Call, bucket: str, name: str, target: str, new: str) -> Answer:
        own = self._object(bucket, name)
        if "rewriteToken" not in call.query:  # a large object is not copied by one request
            return Answer.of({"kind": "storage#rewriteResponse", "done": False, "rewriteToken": "go on"})
        made = self._keep(target, new, own.data, own.metadata)
        return Answer.of({"kind": "storage#rewriteResponse", "done": True, "resource": made.resource()})

    def upload(self, call: Call, bucket: str) -> Answer:
        if call.query["uploadType"] == "resumable":
            return self._begin(call, bucket)
        head = f"Content-Type: {call.headers['Content-Type']}\r\n\r\n".encode()
        about, data = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + call.body).iter_parts()
        name = call.query["name"]
        self._check(bucket, name, call.query)
        metadata = json.loads(about.get_payload(decode=True))["metadata"]
        return Answer.of(self._keep(bucket, name, data.get_payload(decode=True), metadata).resource())

    def _begin(self, call: Call, bucket: str) -> Answer:
        self._check(bucket, call.query["name"], call.query)
        key = uuid.uuid4().hex
        self.sessions[key] = Session(call.query["name"], call.query)
        address = f"http://{call.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
        return Answer.of({}, Location=address)

    def _session(self, call: Call) -> Session:
        if call.query["upload_id"] not in self.sessions:
            raise Failure(404, "notFound", "No such upload.")
        return self.sessions[call.query["upload_id"]]

    def add_part(self, call: Call, bucket: str) -> Answer:
        own = self._session(call)
        if own.object:  # it was whole before: whoever sends the end again learns so
            return Answer.of(own.object.resource())
        span = _SPAN.fullmatch(call.headers["Content-Range"])
        if not span or int(span["start"]) > len(own.data):
            raise Failure(400, "invalid", "Invalid request.")
        own.data += call.body[len(own.data) - int(span["start"]) :]
        if len(own.data) < int(span["size"]):
            del own.data[len(own.data) - len(own.data) % _KEPT_BYTES :]
            return Answer(status=308, headers={"Range": f"bytes=0-{len(own.data) - 1}"} if own.data else {})
        self._check(bucket, own.name, own.condition)
        own.object = self._keep(bucket, own.name, bytes(own.data), {})
        return Answer.of(own.object.resource())

    def cancel(self, call: Call, bucket: str) -> Answer:
        self._objects(bucket)
        self._session(call)
        del self.sessions[call.query["upload_id"]]
        return Answer(status=499)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        call = Call(self.command, dict(parse_qsl(address.query, keep_blank_values=True)), dict(self.headers), body)
        answer = self.store.answer(address.path, call)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - as http.server calls them


def make_bucket() -> str:
    """Makes a bucket in the server that the environment names, and returns its address."""
    from matryoshka import storage

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    place: Any = storage.place(f"gs://{name}")
    place.fs.call("POST", "b", json={"name": name})
    return f"gs://{name}"


@contextmanager
def serve(listening: socket.socket) -> Iterator[Proxy]:
    """Runs the server, and the proxy on a socket that is bound already, for as long as the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": Store()}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    error = json.dumps({"error": {"code": 0, "message": "told to fail"}})
    errors = dict.fromkeys(("401", "403", "429", "500", "503"), error)
    try:
        with faulty_proxy.running(Proxy("gs", server.server_address[:2], "POST", errors, make_bucket), listening) as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()
