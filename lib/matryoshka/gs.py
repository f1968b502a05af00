"""The client for Google Cloud Storage: requests are tried again after growing, random pauses; errors are said in sentences.

The only room that knows gcsfs and its google-auth, which load when the first ``gs://`` is used. What changes with an object's
bytes is its generation. Every request goes through ``_request`` here, not gcsfs's, which logs what a server says.
"""

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientError as ConnectionFault
from aiohttp import ClientTimeout
from fsspec.asyn import sync_wrapper
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError
from google.auth.exceptions import GoogleAuthError, TransportError

from matryoshka import stores
from matryoshka.stores import ConflictError

_ENDPOINT = "STORAGE_EMULATOR_HOST"
_ADVICE = "Run gcloud auth application-default login, set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account."
_DELETED_AT_ONCE = 32
_TIMEOUT = ClientTimeout(total=None, sock_connect=stores.CONNECT_SECONDS, sock_read=stores.READ_SECONDS)
_PASSING = {408, 429, 500, 502, 503, 504}
_CANCELLED = 499  # says that an upload was ended as asked
_BYTES = "application/octet-stream"


class _PassingError(Exception):
    """What went wrong with one attempt, and may go well with the next."""


def connect() -> "Client":
    """Returns a client with the application default credentials, or for the server that ``STORAGE_EMULATOR_HOST`` names.

    Raises:
        ValueError: There are no credentials.
    """
    token = "anon" if os.environ.get(_ENDPOINT) else "google_default"
    try:
        return Client(project="", token=token, use_listings_cache=False, skip_instance_cache=True)
    except GoogleAuthError as error:
        raise stores.no_credentials("gs://", type(error).__name__, _ADVICE) from None


def _endpoint() -> str:
    """Returns the variable that names the server, if it does: few have heard of it."""
    return _ENDPOINT if os.environ.get(_ENDPOINT) else ""


def _where(arguments: Sequence[str], parameters: Mapping[str, Any]) -> str:
    """Returns the address that a request is about."""
    key = arguments[1] if len(arguments) > 1 else parameters.get("name") or parameters.get("prefix")
    return f"gs://{'/'.join(filter(None, (*arguments[:1], key)))}"


def _multipart(boundary: str, about: Mapping[str, Any], data: bytes) -> bytes:
    """Returns what a server takes as an object and what is said of it, in one request."""
    own = boundary.encode()
    return b"".join(
        (
            b"--" + own + b"\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n" + json.dumps(about).encode(),
            b"\r\n--" + own + b"\r\nContent-Type: " + _BYTES.encode() + b"\r\n\r\n",
            data,
            b"\r\n--" + own + b"--\r\n",
        )
    )


class Client(GCSFileSystem):  # type: ignore[misc]
    """fsspec's file system for Google Cloud Storage, whose every request passes through ``_request``."""

    async def _request(
        self, method: str, path: str, *arguments: str, where: str = "", **parameters: Any
    ) -> tuple[int, Mapping[str, str], None, bytes]:
        where = where or _where(arguments, parameters)
        reason = ""
        for attempt in range(stores.REQUEST_ATTEMPTS):
            try:
                with _outcomes(where):
                    status, headers, body = await self._ask(method, path, *arguments, **parameters)
                if status < 400 or status == _CANCELLED:
                    return status, headers, None, body
                raise self._explain(status, where, len(arguments), body)
            except _PassingError as error:
                reason = str(error)
                await stores.pause(attempt)
        raise stores.unanswered(where, reason, _endpoint())

    async def _ask(
        self,
        method: str,
        path: str,
        *arguments: str,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        data: bytes | None = None,
        **parameters: Any,
    ) -> tuple[int, Mapping[str, str], bytes]:
        await self._set_session()
        own = {"params": self._get_params(parameters), "headers": self._get_headers(headers), "json": json, "data": data}
        url = self._format_path(path, arguments)
        async with self.session.request(method, url, timeout=_TIMEOUT, allow_redirects=False, **own) as answer:
            return answer.status, answer.headers, await answer.read()

    def _explain(self, status: int, where: str, depth: int, body: bytes) -> Exception:
        """Returns an error that says what is wrong with a place; ``depth``: 1 where a bucket was asked for, else more."""
        code = f"HTTP {status}"
        if status in _PASSING:
            return _PassingError(code)
        if status == 412:
            return ConflictError(where)
        if status == 404 and (depth == 1 or b"bucket does not exist" in body):
            return stores.no_bucket(where, _endpoint())
        if status == 404 and depth > 1:
            return stores.not_found(where)
        if status == 401:
            is_nobody = self.credentials.credentials is None
            return stores.no_credentials(where, code, _ADVICE) if is_nobody else stores.expired(where, code)
        return stores.denied(where, code) if status == 403 else stores.unanswered(where, code, _endpoint())

    async def _info(self, path: str, **_options: Any) -> Mapping[str, Any]:
        bucket, key, _ = self.split_path(path)
        with contextlib.suppress(FileNotFoundError):
            if key:
                found = await self._call("GET", "b/{}/o/{}", bucket, key, json_out=True)
                own: Mapping[str, Any] = self._process_object(bucket, found)
                return own
        if not await self._has_below(path):
            raise stores.not_found(f"gs://{path}")
        return {"name": path, "size": 0, "type": "directory"}

    async def _find(self, path: str, **_options: Any) -> Mapping[str, Mapping[str, Any]]:
        objects, _ = await self._do_list_objects(path, delimiter="")
        return {own["name"]: own for own in objects}

    async def _has_below(self, path: str) -> bool:
        objects, _ = await self._do_list_objects(path, max_results=1, delimiter="")
        return bool(objects) or not self.split_path(path)[1]

    async def _read_range(self, path: str, start: int, stop: int, tag: str | None = None) -> bytes:
        bucket, key, _ = self.split_path(path)
        span = {"Range": f"bytes={start}-{stop - 1}"}
        _, data = await self._call("GET", "b/{}/o/{}", bucket, key, alt="media", headers=span, ifGenerationMatch=tag or None)
        if len(data) != stop - start:
            raise ValueError(
                f"gs://{path}: comes as other bytes than it has ({len(data)} for {stop - start}). Upload it without a"
                " Content-Encoding: the store decompresses what has one."
            )
        own: bytes = data
        return own

    async def _read_whole(self, path: str) -> tuple[bytes, str]:
        bucket, key, _ = self.split_path(path)
        headers, data = await self._call("GET", "b/{}/o/{}", bucket, key, alt="media")
        return data, headers["X-Goog-Generation"]

    async def _put(self, path: str, data: bytes, tag: str | None = None, writer: str = "") -> None:
        bucket, key, _ = self.split_path(path)
        boundary = uuid.uuid4().hex
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        body = _multipart(boundary, {"name": key, "metadata": {"writer": writer} if writer else {}}, data)
        options = {"uploadType": "multipart", "name": key, "ifGenerationMatch": tag}
        await self._call("POST", self._uploads, bucket, headers=headers, data=body, **options)

    async def _pipe_file(self, path: str, data: bytes, **_options: Any) -> None:
        await self._put(path, data)

    async def _put_if(self, path: str, data: bytes, tag: str | None) -> bool:
        return await stores.put_once(lambda writer: self._put(path, data, tag or "0", writer), lambda: self._writer_of(path))

    async def _writer_of(self, path: str) -> str | None:
        try:
            return str((await self._info(path)).get("metadata", {}).get("writer", ""))
        except FileNotFoundError:
            return None

    @property
    def _uploads(self) -> str:
        return f"{self._location}/upload/storage/v1/b/{{}}/o"

    async def _upload(self, source: str, path: str) -> None:
        size = os.path.getsize(source)  # noqa: PTH202
        if size <= stores.PART_BYTES:
            await self._put(path, Path(source).read_bytes())
            return
        bucket, key, _ = self.split_path(path)
        headers = {"X-Upload-Content-Type": _BYTES, "X-Upload-Content-Length": str(size)}
        begun, _ = await self._call("POST", self._uploads, bucket, uploadType="resumable", name=key, headers=headers, json={})
        session = {"path": begun["Location"], "where": f"gs://{path}"}
        try:
            start = num_stalls = 0
            while start < size:
                sent = await self._send_part(session, source, start, size)
                num_stalls = 0 if sent > start else num_stalls + 1
                if num_stalls == stores.REQUEST_ATTEMPTS:
                    raise stores.unanswered(session["where"], "keeps nothing of an upload", _endpoint())
                start = sent
        except BaseException:
            with contextlib.suppress(Exception):  # a session that is not ended is forgotten by itself
                await self._request("DELETE", **session)
            raise

    async def _send_part(self, session: Mapping[str, str], source: str, start: int, size: int) -> int:
        """Sends what comes next of a file, and returns how much of it the server has now: it may keep less than it was sent."""
        with Path(source).open("rb") as file:
            file.seek(start)
            part = file.read(min(stores.PART_BYTES, size - start))
        headers = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}
        status, found, _, _ = await self._request("PUT", **session, headers=headers, data=part)
        if status != 308:
            return size
        return int(found["Range"].rpartition("-")[2]) + 1 if "Range" in found else 0

    async def _delete(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _DELETED_AT_ONCE):
            await asyncio.gather(*(self._delete_one(path) for path in paths[start : start + _DELETED_AT_ONCE]))

    async def _delete_one(self, path: str) -> None:
        bucket, key, _ = self.split_path(path)
        with contextlib.suppress(FileNotFoundError):
            await self._call("DELETE", "b/{}/o/{}", bucket, key)

    def abort_uploads(self, _path: str) -> int:
        """Returns 0: what nobody finished is not listed, and is forgotten after a week."""
        return 0

    read_range = sync_wrapper(_read_range)
    """Returns bytes ``start`` to ``stop`` of an object; with a tag, only if it still has it."""
    read_whole = sync_wrapper(_read_whole)
    """Returns an object's bytes and its tag, the generation."""
    put_if = sync_wrapper(_put_if)
    """Writes an object if the one there has a tag, or with None if there is none, and returns whether it did."""
    delete = sync_wrapper(_delete)
    """Deletes objects; one that is not there is no error."""
    has_below = sync_wrapper(_has_below)
    """Returns whether there is any object below a path."""
    upload = sync_wrapper(_upload)
    """Writes a local file as an object, which is there at once and whole; a large one goes up in parts."""


@contextlib.contextmanager
def _outcomes(where: str) -> Iterator[None]:
    """Says of what goes wrong with a connection, or with credentials, whether another attempt may help."""
    try:
        yield
    except (HttpError, NonRetryableError, GoogleAuthError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, TransportError) or getattr(cause, "retryable", False):
            raise _PassingError(type(cause).__name__) from None
        raise stores.expired(where, type(cause).__name__) from None
    except (ConnectionFault, OSError) as error:
        raise _PassingError(type(error).__name__) from None
