"""The Python client, sync and async, against a service in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from conftest import THREE, DarknessBackend, draw_discs
from service_stub import HERE, access, png, service

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.serve import client as clients
from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.client import AsyncClient, Client, ServiceError
from cellseg_deploy.serve.jobs import Jobs
from cellseg_deploy.serve.limits import Limits

httpx = pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
TOKEN = "t0ken-of-the-test"


@pytest.fixture
def app(tmp_path: Path) -> Any:
    with service() as opened, Jobs.open(tmp_path / "jobs", opened.engine, Limits()) as jobs:
        yield make_app(opened, access(TOKEN), jobs)


class InProcess(httpx.BaseTransport):
    """Carries requests of the sync client to the application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def handle_request(self, request: Any) -> Any:
        content = request.read()

        async def ask() -> Any:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url=HERE) as inner:
                return await inner.request(request.method, request.url, headers=request.headers, content=content)

        answer = anyio.run(ask)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def sync_client(transport: Any, **more: Any) -> Client:
    made = Client(HERE, token=TOKEN, **more)
    made._http = httpx.Client(transport=transport, **made._rules.settings)
    return made


def async_client(transport: Any, **more: Any) -> AsyncClient:
    made = AsyncClient(HERE, token=TOKEN, **more)
    made._http = httpx.AsyncClient(transport=transport, **made._rules.settings)
    return made


def test_every_kind_of_image_is_counted(app: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    pixels = draw_discs((100, 130), THREE)
    want = Segmenter(DarknessBackend())(pixels).labels
    with sync_client(InProcess(app)) as client:
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), png(), io.BytesIO(png()), pixels):
            assert client.segment(image)["count"] == 3
        assert (client.labels(pixels) == want).all()
        assert client.segment(pixels, task="confluence", pixel_size=0.5)["task"] == "confluence"
        assert client.file(pixels, "overlay.jpg").startswith(b"\xff\xd8")
        assert [each["status"] for each in client.batch([pixels, b"x"])] == ["done", "failed"]
        assert client.models()[0]["name"] == "stub"


def test_refusals_are_the_errors_of_the_library(app: Any, tmp_path: Path) -> None:
    with sync_client(InProcess(app)) as client:
        with pytest.raises(DataError, match=r"^the PNG is cut short"):
            client.segment(png()[:-30])
        with pytest.raises(UsageError, match="task must be one of"):
            client.segment(png(), task="x")
        with pytest.raises(DataError, match="cannot be read"):
            client.segment(tmp_path / "gone.png")
        with pytest.raises(UsageError, match="uint8 RGB"):
            client.segment(np.zeros((3, 3), np.uint8))
        with pytest.raises(ServiceError, match="no such job") as refused:
            client.job("0")
        assert refused.value.status == 404
    with sync_client(InProcess(app)) as client:
        client._http.headers["Authorization"] = "Bearer wrong"
        with pytest.raises(ServiceError, match="token"):
            client.models()


def test_a_job_is_waited_for(app: Any) -> None:
    with sync_client(InProcess(app)) as client:
        number = client.submit(png(), "labels.tif")
        assert clients._labels(client.result(number, poll_seconds=0)).max() == 3
        assert client.job(number)["state"] == "done"
        client.delete(number)
        with pytest.raises(ServiceError, match="no such job"):
            client.result(number)


def test_the_async_client_does_the_same(app: Any) -> None:
    async def talk() -> None:
        async with async_client(httpx.ASGITransport(app=app)) as client:
            assert (await client.segment(png()))["count"] == 3
            assert (await client.labels(png())).max() == 3
            assert len(await client.batch([png()] * 2)) == 2
            assert (await client.models())[0]["name"] == "stub"
            number = await client.submit(png())
            assert b'"count":3' in await client.result(number, poll_seconds=0)
            await client.delete(number)
            with pytest.raises(ServiceError):
                await client.job(number)

    anyio.run(talk)


def test_both_clients_have_the_same_methods() -> None:
    sync, asynchronous = ({name for name in vars(kind) if not name.startswith("_")} for kind in (Client, AsyncClient))
    assert sync == asynchronous


@pytest.mark.parametrize(("retries", "is_answered"), [(2, True), (1, False)])
def test_a_full_queue_is_asked_again(retries: int, is_answered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    asked: list[bytes] = []

    def answer(request: Any) -> Any:
        asked.append(request.read())
        if len(asked) <= 2:
            return httpx.Response(429, headers={"Retry-After": "7"}, json={"detail": "full"})
        return httpx.Response(200, json={"count": 3})

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(clients.time, "sleep", paused.append)
    monkeypatch.setattr(clients.asyncio, "sleep", pause)
    sync = sync_client(httpx.MockTransport(answer), retries=retries)
    if is_answered:
        assert sync.segment(io.BytesIO(png()))["count"] == 3
        assert paused == [7, 7]
        assert all(png() in body for body in asked)  # an open file is read once, and sent again whole
    else:
        with pytest.raises(ServiceError) as refused:
            sync.segment(png())
        assert (refused.value.status, refused.value.retry_seconds) == (429, 7)
    asked.clear()
    paused.clear()

    async def talk() -> Any:
        async with async_client(httpx.MockTransport(answer), retries=retries) as client:
            return await client.segment(png())

    if is_answered:
        assert anyio.run(talk)["count"] == 3
    else:
        with pytest.raises(ServiceError):
            anyio.run(talk)
    sync.close()


def test_another_server_is_named() -> None:
    client = sync_client(httpx.MockTransport(lambda _: httpx.Response(502, text="<html>")))
    with client, pytest.raises(ServiceError, match=r"/v1/models: 502 Bad Gateway"):
        client.models()


@pytest.mark.parametrize("address", ["localhost:8080", "http://", "ftp://host", "http://[::1", "smears"])
def test_an_address_is_checked_when_it_is_given(address: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(UsageError, match="http://HOST:PORT"):
            kind(address)
    with pytest.raises(UsageError, match="token has characters"):
        Client(HERE, token="schlüssel")


def test_no_answer_is_an_error_of_the_service() -> None:
    def refuse(request: Any) -> Any:
        raise httpx.ConnectError("Connection refused", request=request)

    def silent(request: Any) -> Any:
        raise httpx.ReadTimeout("", request=request)

    for handler, said in ((refuse, r"no answer \(Connection refused\)"), (silent, r"no answer \(ReadTimeout\)")):
        with sync_client(httpx.MockTransport(handler)) as client, pytest.raises(ServiceError, match=said) as caught:
            client.models()
        assert caught.value.status is None

        async def ask(handler: Any = handler) -> None:
            async with async_client(httpx.MockTransport(handler)) as client:
                await client.models()

        with pytest.raises(ServiceError, match=said):
            anyio.run(ask)


def test_what_cannot_be_asked_is_not_sent() -> None:
    def never(request: Any) -> Any:
        pytest.fail("it was sent")

    with sync_client(httpx.MockTransport(never)) as client:
        with pytest.raises(UsageError, match="no image to send"):
            client.batch([])
        with pytest.raises(UsageError, match="call file"):
            client.segment(png(), output="labels.tif")
