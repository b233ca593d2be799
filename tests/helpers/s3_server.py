"""A real S3 server on loopback (moto's), with a bucket."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "smears"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class S3Server:
    """``address``: of the server. ``bucket``: its content through another client than ours, boto3."""

    def __init__(self, address: str, bucket: Any) -> None:
        self.address, self.bucket = address, bucket

    def put(self, folder: Path, prefix: str) -> None:
        """Upload the files in ``folder``."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.bucket.put_object(Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=path.read_bytes())

    def content(self, prefix: str) -> dict[str, bytes]:
        """Content of all objects in the folder ``prefix``, by relative name."""
        found = self.bucket.objects.filter(Prefix=f"{prefix}/")
        return {item.key.removeprefix(f"{prefix}/"): item.get()["Body"].read() for item in found}

    def check_rights(self) -> None:
        """From now on only users that the server knows may do anything: nobody, as there are none."""
        self._post("reset-auth", b"0")

    def forget(self) -> None:
        """Forget buckets and rights, which the server keeps as long as this process lives."""
        self._post("reset-auth", b"1000000")
        self._post("reset", b"")

    def _post(self, what: str, data: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.address}/moto-api/{what}", data, headers, method="POST")
        urllib.request.urlopen(request).close()


@contextmanager
def started() -> Iterator[S3Server]:
    """Start a server, and set the environment for it; skips without moto or the client."""
    server_of = pytest.importorskip("moto.server", reason="needs moto[server], an S3 server")
    pytest.importorskip("obstore", reason="needs the extra url")
    boto3 = pytest.importorskip("boto3")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        made = S3Server(address, boto3.resource("s3").create_bucket(Bucket=BUCKET))
        try:
            yield made
        finally:
            made.forget()
            server.stop()
