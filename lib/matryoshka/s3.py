"""The client for S3: requests are tried again after growing, random pauses, and what fails in the end is said in a sentence.

The only room that knows s3fs and its botocore, which load when the first ``s3://`` is used.
"""

import os
from collections.abc import Sequence
from typing import Any

from aiohttp import ClientError as ConnectionFault
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from matryoshka import stores
from matryoshka.stores import ConflictError

_MOST_PARTS, _PARTS_AT_ONCE = 10_000, 4
_DELETED_AT_ONCE = 1_000

_BROKEN = (HTTPClientError, ConnectionFault, TimeoutError)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound, CredentialRetrievalError)
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_EXPIRED = ("ExpiredToken", "RequestTimeTooSkewed", "TokenRefreshRequired")
_ENDPOINT = "AWS_ENDPOINT_URL"
_ADVICE = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role."


def connect() -> "Client":
    """Returns a client for the endpoint, region and credentials that the environment names (``AWS_ENDPOINT_URL`` and so on)."""
    retries = {"mode": "standard", "total_max_attempts": stores.REQUEST_ATTEMPTS}
    config = {"retries": retries, "connect_timeout": stores.CONNECT_SECONDS, "read_timeout": stores.READ_SECONDS}
    return Client(config_kwargs=config, use_listings_cache=False, max_concurrency=1, skip_instance_cache=True)


def _explain(error: Exception, where: str) -> Exception:
    """Returns an error that says what is wrong with a place: ``ValueError`` where a person must change something."""
    code = _code_of(error)
    if code in _CONFLICTS:
        return ConflictError(where)
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return stores.not_found(where)
    if isinstance(error, _NO_CREDENTIALS):
        return stores.no_credentials(where, type(error).__name__, _ADVICE)
    if code == "NoSuchBucket":
        return stores.no_bucket(where, _ENDPOINT)
    if code in _EXPIRED:
        return stores.expired(where, code)
    reason = code or type(error.__cause__ or error).__name__
    return stores.denied(where, code) if isinstance(error, PermissionError) else stores.unanswered(where, reason, _ENDPOINT)


def _code_of(error: BaseException) -> str:
    """Returns the code that the server gave, or nothing where there was no answer."""
    for own in (error, error.__cause__):
        if isinstance(own, ClientError):
            return str(own.response.get("Error", {}).get("Code", ""))
    return ""


class Client(S3FileSystem):  # type: ignore[misc]
    """fsspec's file system for S3, whose every request passes through ``_call_s3``: botocore tries it again where it may."""

    retries = 1  # by s3fs itself, without jitter, and times botocore's

    async def _call_s3(self, method: str, *parameters: Any, **arguments: Any) -> Any:
        try:
            return await super()._call_s3(method, *parameters, **arguments)
        except (OSError, BotoCoreError, ClientError, ConnectionFault) as error:
            where = f"s3://{'/'.join(filter(None, (arguments.get('Bucket'), arguments.get('Key', arguments.get('Prefix')))))}"
            raise _explain(error, where) from None

    async def _read_range(self, path: str, start: int, stop: int, tag: str | None = None) -> bytes:
        bucket, key, _ = self.split_path(path)
        condition = {"IfMatch": tag} if tag else {}
        for attempt in range(stores.BODY_ATTEMPTS):
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **condition)
            try:
                async with answer["Body"] as body:
                    data: bytes = await body.read()
                if len(data) == stop - start:
                    return data
            except _BROKEN:  # in the middle of the body: nobody else tries again
                pass
            await stores.pause(attempt)
        raise stores.broken(f"s3://{path}")

    async def _read_whole(self, path: str) -> tuple[bytes, str]:
        bucket, key, _ = self.split_path(path)
        for attempt in range(stores.BODY_ATTEMPTS):
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key)
            try:
                async with answer["Body"] as body:
                    return await body.read(), answer["ETag"]
            except _BROKEN:
                await stores.pause(attempt)
        raise stores.broken(f"s3://{path}")

    async def _put_if(self, path: str, data: bytes, tag: str | None) -> bool:
        bucket, key, _ = self.split_path(path)
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}

        async def put(writer: str) -> None:
            await self._call_s3("put_object", Bucket=bucket, Key=key, Body=data, Metadata={"writer": writer}, **condition)

        return await stores.put_once(put, lambda: self._writer_of(bucket, key))

    async def _writer_of(self, bucket: str, key: str) -> str | None:
        try:
            return str((await self._call_s3("head_object", Bucket=bucket, Key=key)).get("Metadata", {}).get("writer", ""))
        except FileNotFoundError:
            return None

    async def _delete(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _DELETED_AT_ONCE):
            parts = [self.split_path(path)[:2] for path in paths[start : start + _DELETED_AT_ONCE]]
            objects = {"Objects": [{"Key": key} for _, key in parts], "Quiet": True}
            answer = await self._call_s3("delete_objects", Bucket=parts[0][0], Delete=objects)
            for fault in answer.get("Errors", ()):
                raise RuntimeError(
                    f"s3://{parts[0][0]}/{fault['Key']}: cannot be deleted ({fault['Code']}). Check the right to delete objects."
                )

    async def _abort_uploads(self, path: str) -> int:
        bucket, prefix, _ = self.split_path(path)
        marker: dict[str, str] = {}
        num_aborted = 0
        while True:
            page = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            for upload in page.get("Uploads", ()):
                await self._call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                num_aborted += 1
            if not page.get("IsTruncated"):
                return num_aborted
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def _has_below(self, path: str) -> bool:
        bucket, key, _ = self.split_path(path)
        prefix = f"{key.rstrip('/')}/" if key else ""
        answer = await self._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return bool(answer.get("Contents")) or not key

    async def _upload(self, source: str, path: str) -> None:
        size = os.path.getsize(source)  # noqa: PTH202
        part_bytes = max(stores.PART_BYTES, -(-size // _MOST_PARTS))
        await self._put_file(source, path, chunksize=part_bytes, max_concurrency=_PARTS_AT_ONCE)

    call_s3 = sync_wrapper(_call_s3)
    read_range = sync_wrapper(_read_range)
    """Returns bytes ``start`` to ``stop`` of an object; with a tag, only if it still has it."""
    read_whole = sync_wrapper(_read_whole)
    """Returns an object's bytes and its tag, the ETag."""
    put_if = sync_wrapper(_put_if)
    """Writes an object if the one there has a tag, or with None if there is none, and returns whether it did."""
    delete = sync_wrapper(_delete)
    """Deletes objects of one bucket; one that is not there is no error."""
    abort_uploads = sync_wrapper(_abort_uploads)
    """Ends uploads below a path that nobody finished, and returns how many there were."""
    has_below = sync_wrapper(_has_below)
    """Returns whether there is any object below a path."""
    upload = sync_wrapper(_upload)
    """Writes a local file as an object, which is there at once and whole; a large one goes up in parts."""
