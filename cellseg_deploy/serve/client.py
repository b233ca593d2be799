"""Ask ``cellseg-serve`` from Python: ``Client``, and ``AsyncClient`` with the same methods to await.

The only module that imports ``httpx``. What is sent and what is made of an answer is in ``_Rules``, once for both.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import CellsegError, DataError, UsageError
from cellseg_deploy.images import any_image
from cellseg_deploy.outputs.requirements import require_packages

Image: TypeAlias = "str | Path | bytes | BinaryIO | npt.NDArray[np.uint8]"
"""A path, the bytes of a file, an open file, or uint8 RGB (h, w, 3), which is sent as PNG."""

ENDED = ("done", "failed", "lost")


class ServiceError(CellsegError):
    """The service refused, or did not answer. ``status``: of HTTP, None without an answer. ``retry_seconds``: when to
    ask again, None if that is useless.
    """

    def __init__(self, status: int | None, words: str, retry_seconds: int | None = None) -> None:
        super().__init__(words)
        self.status, self.retry_seconds = status, retry_seconds


@dataclass(frozen=True)
class _Request:
    """``how``: arguments of ``httpx.Client.request``. ``name``: of the image."""

    method: str
    path: str
    how: dict[str, Any]


class _Rules:
    """Requests and answers, without input or output."""

    def __init__(self, address: str, token: str, retries: int, timeout: float) -> None:
        require_packages("serve", "httpx")
        if retries < 0:
            raise UsageError(f"retries must be at least 0, got {retries}")
        import httpx

        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise UsageError(f"address {address!r} is no URL ({error}); expected http://HOST:PORT") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(f"address must be http://HOST:PORT or https://HOST:PORT, got {address!r}")
        if not (token.isascii() and token.isprintable()):
            raise UsageError("token has characters that a header cannot hold; pass it as the service got it")
        self.retries, self.address = retries, address
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.settings: dict[str, Any] = {"base_url": address, "headers": headers, "timeout": timeout}

    @staticmethod
    def post(path: str, images: Sequence[Image], output: str | None, parameters: dict[str, Any]) -> _Request:
        if "output" in parameters:
            raise UsageError("output does not apply to an answer as JSON; for another one call file(image, output)")
        if not images:
            raise UsageError("no image to send; pass at least one")
        query = {name: _text(value) for name, value in parameters.items() if value is not None}
        if output is not None:
            query["output"] = output
        files = [("image", _file(image)) for image in images]
        return _Request("POST", path, {"params": query, "files": files})

    @staticmethod
    def check(response: Any) -> Any:
        """Return ``response``. Raises ``DataError`` if the image cannot be used, ``UsageError`` for a wrong parameter,
        ``ServiceError`` for everything else."""
        if response.is_success:
            return response
        try:
            words = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):  # not from cellseg-serve: a proxy, or another server
            words = f"{response.url}: {response.status_code} {response.reason_phrase}"
        if response.status_code == 422:
            raise DataError(words)
        if response.status_code == 400:
            raise UsageError(words)
        later = response.headers.get("retry-after", "")
        raise ServiceError(response.status_code, words, int(later) if later.isdecimal() else None)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Raise ``ServiceError`` if the service does not answer."""
        import httpx

        try:
            yield
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise ServiceError(None, f"{self.address}: no answer ({why}); check address and service") from error

    def pauses(self) -> Iterator[bool]:
        """Yield for each attempt whether another one may follow."""
        for attempt in range(self.retries + 1):
            yield attempt < self.retries


class Client:
    """``address``: of the service. ``token``: if it needs one. ``retries``: how often to repeat a request that
    met a full queue, after the time that the service says. ``timeout``: seconds without an answer.

    >>> with Client("http://127.0.0.1:8080") as client:  # doctest: +SKIP
    ...     client.segment("smear.png", task="counting")["counted"]
    """

    def __init__(
        self, address: str = "http://127.0.0.1:8080", *, token: str = "", retries: int = 5, timeout: float = 90
    ) -> None:
        self._rules = _Rules(address, token, retries, timeout)
        import httpx

        self._http = httpx.Client(**self._rules.settings)

    def segment(self, image: Image, **parameters: Any) -> dict[str, Any]:
        """Return counts, figures, warnings and cells of ``image``. ``parameters``: as in ``/openapi.json``.

        Raises ``DataError`` if the image cannot be used, ``UsageError``, ``ServiceError``.
        """
        found: dict[str, Any] = self._ask(_Rules.post("/v1/segment", [image], "json", parameters)).json()
        return found

    def labels(self, image: Image, **parameters: Any) -> npt.NDArray[np.int32]:
        """Return the label image (h, w): 0 background, 1..n the cells. Raises as ``segment``."""
        return _labels(self.file(image, "labels.tif", **parameters))

    def file(self, image: Image, output: str, **parameters: Any) -> bytes:
        """Return ``output``: geojson, labels.tif, labels.png, overlay.png or overlay.jpg. Raises as ``segment``."""
        return bytes(self._ask(_Rules.post("/v1/segment", [image], output, parameters)).content)

    def batch(self, images: Sequence[Image], **parameters: Any) -> list[dict[str, Any]]:
        """Return an entry per image, in order: ``status`` done with ``result``, or failed with ``error``."""
        found: list[dict[str, Any]] = self._ask(_Rules.post("/v1/batch", images, None, parameters)).json()["images"]
        return found

    def submit(self, image: Image, output: str = "json", **parameters: Any) -> str:
        """Send a long image as a job; return its id. Raises as ``segment``."""
        return str(self._ask(_Rules.post("/v1/jobs", [image], output, parameters)).json()["id"])

    def job(self, number: str) -> dict[str, Any]:
        """Describe the job ``number``: its ``state``, and how far it is."""
        found: dict[str, Any] = self._get(f"/v1/jobs/{number}").json()
        return found

    def result(self, number: str, *, poll_seconds: float = 1.0) -> bytes:
        """Wait for the job ``number``, and return its answer. Raises ``ServiceError`` if it failed or was lost."""
        while self.job(number)["state"] not in ENDED:
            time.sleep(poll_seconds)
        return bytes(self._get(f"/v1/jobs/{number}/result").content)

    def delete(self, number: str) -> None:
        """Cancel the job ``number``, or forget its result."""
        self._ask(_Request("DELETE", f"/v1/jobs/{number}", {}))

    def models(self) -> list[dict[str, Any]]:
        """Describe the model."""
        found: list[dict[str, Any]] = self._get("/v1/models").json()["models"]
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, path: str) -> Any:
        return self._ask(_Request("GET", path, {}))

    def _ask(self, request: _Request) -> Any:
        for may_retry in self._rules.pauses():
            try:
                with self._rules.reached():
                    response = self._http.request(request.method, request.path, **request.how)
                return _Rules.check(response)
            except ServiceError as error:
                if error.status != 429 or error.retry_seconds is None or not may_retry:
                    raise
                time.sleep(error.retry_seconds)
        raise AssertionError("the last attempt returns or raises")


class AsyncClient:
    """As ``Client``, to await.

    >>> async with AsyncClient("http://127.0.0.1:8080") as client:  # doctest: +SKIP
    ...     results = await asyncio.gather(*map(client.segment, paths))
    """

    def __init__(
        self, address: str = "http://127.0.0.1:8080", *, token: str = "", retries: int = 5, timeout: float = 90
    ) -> None:
        self._rules = _Rules(address, token, retries, timeout)
        import httpx

        self._http = httpx.AsyncClient(**self._rules.settings)

    async def segment(self, image: Image, **parameters: Any) -> dict[str, Any]:
        """See ``Client.segment``."""
        found: dict[str, Any] = (await self._ask(_Rules.post("/v1/segment", [image], "json", parameters))).json()
        return found

    async def labels(self, image: Image, **parameters: Any) -> npt.NDArray[np.int32]:
        """See ``Client.labels``."""
        return _labels(await self.file(image, "labels.tif", **parameters))

    async def file(self, image: Image, output: str, **parameters: Any) -> bytes:
        """See ``Client.file``."""
        return bytes((await self._ask(_Rules.post("/v1/segment", [image], output, parameters))).content)

    async def batch(self, images: Sequence[Image], **parameters: Any) -> list[dict[str, Any]]:
        """See ``Client.batch``."""
        answer = await self._ask(_Rules.post("/v1/batch", images, None, parameters))
        found: list[dict[str, Any]] = answer.json()["images"]
        return found

    async def submit(self, image: Image, output: str = "json", **parameters: Any) -> str:
        """See ``Client.submit``."""
        return str((await self._ask(_Rules.post("/v1/jobs", [image], output, parameters))).json()["id"])

    async def job(self, number: str) -> dict[str, Any]:
        """See ``Client.job``."""
        found: dict[str, Any] = (await self._get(f"/v1/jobs/{number}")).json()
        return found

    async def result(self, number: str, *, poll_seconds: float = 1.0) -> bytes:
        """See ``Client.result``."""
        while (await self.job(number))["state"] not in ENDED:
            await asyncio.sleep(poll_seconds)
        return bytes((await self._get(f"/v1/jobs/{number}/result")).content)

    async def delete(self, number: str) -> None:
        """See ``Client.delete``."""
        await self._ask(_Request("DELETE", f"/v1/jobs/{number}", {}))

    async def models(self) -> list[dict[str, Any]]:
        """See ``Client.models``."""
        found: list[dict[str, Any]] = (await self._get("/v1/models")).json()["models"]
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _get(self, path: str) -> Any:
        return await self._ask(_Request("GET", path, {}))

    async def _ask(self, request: _Request) -> Any:
        for may_retry in self._rules.pauses():
            try:
                with self._rules.reached():
                    response = await self._http.request(request.method, request.path, **request.how)
                return _Rules.check(response)
            except ServiceError as error:
                if error.status != 429 or error.retry_seconds is None or not may_retry:
                    raise
                await asyncio.sleep(error.retry_seconds)
        raise AssertionError("the last attempt returns or raises")


def _file(image: Image) -> tuple[str, bytes]:
    """Name and bytes of an image; read once, so that it can be sent again."""
    if isinstance(image, (str, Path)):
        try:
            return Path(image).name, Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror}") from error
    if isinstance(image, bytes):
        return any_image.UNNAMED, image
    if isinstance(image, np.ndarray):
        import imagecodecs

        any_image.check_array(image)
        return any_image.UNNAMED, bytes(imagecodecs.png_encode(image, level=1))
    data = image.read()
    if not isinstance(data, bytes):
        raise UsageError("the file must be opened in binary mode ('rb')")
    return any_image.name_of(image), data


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(value) if isinstance(value, (list, tuple)) else str(value)


def _labels(data: bytes) -> npt.NDArray[np.int32]:
    import tifffile

    return np.asarray(tifffile.imread(io.BytesIO(data)), np.int32)
