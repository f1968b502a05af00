"""A real S3 server on loopback, behind a proxy that can be told to fail."""

import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faulty_proxy
from faulty_proxy import Proxy

_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>told to fail</Message></Error>'
_CODES = {"403": "AccessDenied", "429": "SlowDown", "500": "InternalError", "503": "SlowDown"}


def make_bucket() -> str:
    """Makes a bucket in the server that the environment names, and returns its address."""
    from matryoshka import storage

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    place: Any = storage.place(f"s3://{name}")
    place.fs.call_s3("create_bucket", Bucket=name)
    return f"s3://{name}"


@contextmanager
def serve(listening: socket.socket) -> Iterator[Proxy]:
    """Runs the server, and the proxy on a socket that is bound already, for as long as the block runs."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    errors = {status: _ERROR.format(code=code) for status, code in _CODES.items()}
    try:
        with faulty_proxy.running(Proxy("s3", moto.get_host_and_port(), "PUT", errors, make_bucket), listening) as proxy:
            yield proxy
    finally:
        moto.stop()
