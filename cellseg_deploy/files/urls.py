"""Objects in a bucket, ``s3://BUCKET/NAME``, read and written whole; the only module that knows the client library.

A URL travels as a ``Path``, in which its two slashes are one: ``s3:/BUCKET/NAME``. It is relative, whereas paths of
images on disk are absolute, so neither is taken for the other. Credentials and server come from the environment, as
for other S3 programs: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import datetime
import errno
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from cellseg_deploy.errors import BackendUnavailableError

SCHEME = "s3"
_BUFFER_BYTES = 64 * 1024  # holds the header of a photograph
_FIRST_PART = re.compile(r"([a-z][a-z0-9+.-]+):")
_WHY = (
    (r"Missing \w*Key|169\.254\.169\.254|latest/(api/token|meta-data)|169\.254\.170", "no credentials; set {keys}"),
    (r"NoSuchBucket", "no such bucket"),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|Unauthenticated|\b40[13]\b",
        "access denied; check {keys} and the rights on the bucket",
    ),
    (r"builder error|URL scheme is not allowed", "AWS_ENDPOINT_URL is not https://; set AWS_ALLOW_HTTP=true to use it"),
    (r"\b5\d\d (Internal|Bad|Service|Gateway|Slow)", "the server fails; try again later"),
    (r"after \d+ retries|error sending request|timed out", "the server does not answer; check AWS_ENDPOINT_URL"),
)
"""Pattern in the client's message -> what is said instead: its own takes ten lines."""
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def scheme_of(path: PurePath) -> str:
    """Return the scheme of the URL ``path``, "" if it is not a URL."""
    found = _FIRST_PART.fullmatch(path.parts[0]) if path.parts else None
    return found[1] if found else ""


def is_url(path: PurePath) -> bool:
    """Whether ``path`` is a URL of any scheme."""
    return bool(scheme_of(path))


def text_of(path: PurePath) -> str:
    """Return ``path`` as people write it: a URL with two slashes. Credentials before the bucket are left out."""
    scheme = scheme_of(path)
    if not scheme:
        return str(path)
    rest = "/".join(path.parts[1:])
    if ":" in rest.partition("/")[0] and "@" in rest:  # KEY:SECRET@BUCKET; a secret may contain /
        rest = f"...@{rest.rpartition('@')[2]}"
    return f"{scheme}://{rest}"


def check_readable(folder: Path) -> None:
    """Raise ``OSError`` if the objects in ``folder`` cannot be listed; lists a thousand at most."""
    with _as_os_error(folder):
        import obstore

        bucket, prefix = _store(folder)
        next(iter(obstore.list(bucket, prefix=prefix)), None)


def sizes(folder: Path) -> dict[str, int]:
    """Return the names of all objects in ``folder``, relative to it, and their sizes in bytes.

    Raises ``OSError``, also if an object has a name that no path can have.
    """
    return {name: int(info["size"]) for name, info in _objects(folder).items()}


def checksums(folder: Path) -> dict[str, str]:
    """Return the names of all objects in ``folder`` and their MD5, or another text if the server does not tell it.

    Raises ``OSError``.
    """
    return {name: str(info.get("e_tag") or "").strip('"') for name, info in _objects(folder).items()}


def read(path: Path, *, first: int | None = None) -> bytes:
    """Return the content of ``path``, or its ``first`` bytes. Raises ``OSError``."""
    with _as_os_error(path) as system:
        return bytes(system.cat_file(_key(path), start=None if first is None else 0, end=first))


def opened(path: Path) -> io.BufferedReader:
    """Open ``path`` for reading parts of it. Raises ``OSError``."""
    return io.BufferedReader(_Object(path, size_of(path)), _BUFFER_BYTES)


def size_of(path: Path) -> int:
    """Return the size of ``path`` in bytes. Raises ``OSError``."""
    with _as_os_error(path) as system:
        return int(system.info(_key(path))["size"])


def write(path: Path, content: bytes | Path) -> None:
    """Make ``path`` an object with ``content``, bytes or a file; it appears whole or not at all. Raises ``OSError``."""
    with _as_os_error(path) as system:
        if isinstance(content, Path):
            system.put_file(str(content), _key(path))
        else:
            system.pipe_file(_key(path), content)


def create(path: Path, content: bytes) -> None:
    """As ``write``, but raises ``FileExistsError`` if the object exists, even if another process just wrote it."""
    with _as_os_error(path):
        import obstore

        bucket, name = _store(path)
        obstore.put(bucket, name, content, mode="create", use_multipart=False)


def _store(path: Path) -> tuple[Any, str]:
    """Open the bucket of ``path`` for what the file system of ``_as_os_error`` cannot do, and return it and the name in
    it."""
    from obstore.store import from_url

    _, bucket, *names = path.parts
    return from_url(f"{SCHEME}://{bucket}", **_options()), "/".join(names)


def remove(path: Path) -> None:
    """Remove the object ``path`` if it exists. Raises ``OSError``."""
    with _as_os_error(path) as system:
        system.rm_file(_key(path))


class _Object(io.RawIOBase):
    """Reads an object by ranges."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with _as_os_error(self._path) as system:
            data = bytes(system.cat_file(_key(self._path), start=self._at, end=end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _key(path: Path) -> str:
    """Return bucket and name, which the library takes as they are: in a URL it takes # for the start of a fragment."""
    return "/".join(path.parts[1:])


def _objects(folder: Path) -> dict[str, Any]:
    with _as_os_error(folder) as system:
        found = system.find(_key(folder), detail=True)
    prefix = f"{_key(folder)}/"
    if found == {_key(folder): {}}:
        raise NotADirectoryError(errno.ENOTDIR, "an object, not a folder; pass its folder", text_of(folder))
    # A folder that was made in a browser is an object, too: it has the folder's name.
    objects = {
        name.removeprefix(prefix): info
        for name, info in found.items()
        if name.startswith(prefix) and not name.endswith("/")
    }
    for name in objects:
        place = PurePosixPath(name)
        if str(place) != name or ".." in place.parts or place.is_absolute():
            raise OSError(errno.EINVAL, f"the object {name!r} has a name that a file cannot have; rename it")
    return objects


@cache
def _system() -> Any:
    if missing := [name for name in ("fsspec", "obstore") if importlib.util.find_spec(name) is None]:
        raise BackendUnavailableError(
            f"missing packages: {', '.join(missing)}; run: pip install 'cellseg-deploy[url]' (on each machine)"
        )
    from obstore.fsspec import FsspecStore

    return FsspecStore(SCHEME, skip_instance_cache=True, **_options())


def _options() -> dict[str, Any]:
    return {"retry_config": {"max_retries": 5, "retry_timeout": datetime.timedelta(seconds=60)}}


@contextmanager
def _as_os_error(path: Path) -> Iterator[Any]:
    """Yield the file system; whatever its library raises becomes an ``OSError`` with one sentence.

    Raises ``BackendUnavailableError`` if the library is not installed.
    """
    system = _system()
    try:
        yield system
    except Exception as error:
        from obstore.exceptions import AlreadyExistsError

        if isinstance(error, AlreadyExistsError):
            raise FileExistsError(errno.EEXIST, "exists already", text_of(path)) from error
        said = str(error)
        why = next((why for pattern, why in _WHY if re.search(pattern, said)), None)
        if why is None and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", text_of(path)) from error
        why = (why or said.partition("\n")[0]).format(keys=_KEYS)
        raise OSError(errno.EIO, why, text_of(path)) from error
