"""Addresses of models on inference servers: ``grpc://host:port/name``. Light to import: commands ask ``is_address``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import UsageError

TOKEN_VARIABLE = "CELLSEG_TRITON_TOKEN"
_SCHEMES = ("grpc", "grpcs", "http", "https")
_URL = re.compile(rf"({'|'.join(_SCHEMES)}):/+(.*)", re.DOTALL)
_REST = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})/([A-Za-z0-9._-]+)/?")


@dataclass(frozen=True)
class Address:
    """A model on a server: ``scheme``, ``host`` and ``port``, and the model's ``name`` there."""

    scheme: str
    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/{self.name}"

    @property
    def is_grpc(self) -> bool:
        """Whether it is reached over gRPC, otherwise over HTTP."""
        return self.scheme.startswith("grpc")

    @property
    def is_encrypted(self) -> bool:
        """Whether it is reached over TLS."""
        return self.scheme.endswith("s")


def is_address(path: str | Path | None) -> bool:
    """Return whether ``path`` names a model on a server. A ``Path`` has one slash where the URL had two."""
    return path is not None and _URL.match(os.fspath(path)) is not None


def parse_address(path: str | Path) -> Address:
    """Return the address ``path``; raises ``UsageError`` for anything but ``grpc://host:port/name``."""
    found = _URL.fullmatch(os.fspath(path))
    rest = _REST.fullmatch(found[2]) if found else None
    if found is None or rest is None or not 0 < int(rest[2]) < 65536:
        shown = f"{found[1]}://{found[2].rpartition('@')[2]}" if found else os.fspath(path)  # never show a password
        raise UsageError(
            f"{shown}: not the address of a model on a server; expected SCHEME://HOST:PORT/NAME with a scheme of "
            f"{', '.join(_SCHEMES)}, such as grpc://localhost:8001/cells; a token goes into {TOKEN_VARIABLE}"
        )
    return Address(found[1], rest[1], int(rest[2]), rest[3])
