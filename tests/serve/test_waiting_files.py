"""Memory of the files that wait: bounded as a whole, told before a body is read, and given back at every end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from service_stub import HERE, GatedBackend, access, ask, png, service, talk, until

from cellseg_deploy.errors import UsageError
from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.jobs import Jobs
from cellseg_deploy.serve.limits import Limits, Waiting
from cellseg_deploy.serve.service import Service

httpx = pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytestmark = pytest.mark.reliability

IMAGE = png(hw=(30, 40), centres=[(20, 15)])
PADDED = IMAGE + bytes(4000 - len(IMAGE))  # what follows a PNG is ignored, with a warning
TWO_FIT = Limits(body_bytes=4096, held_bytes=9000)


async def unread() -> AsyncIterator[bytes]:
    """A body that nobody may read."""
    pytest.fail("the body was read")
    yield b""


class Held:
    """A body in chunks, whose second one comes only when ``gate`` is set."""

    def __init__(self) -> None:
        self.gate, self.is_read = anyio.Event(), False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.is_read = True
        yield IMAGE[:10]
        await self.gate.wait()
        yield IMAGE[10:]


def test_a_body_that_does_not_fit_is_told_to_come_later_before_it_is_read() -> None:
    backend = GatedBackend()
    with service(backend, limits=TWO_FIT) as opened:
        # The workers hold decoded images only: keep the files in the queue before them.
        opened.engine._memory._most = 1

        async def conversation(client: Any) -> None:
            answers: list[Any] = []

            async def send(content: bytes = PADDED) -> None:
                answers.append(await client.post("/v1/segment", content=content))

            async with anyio.create_task_group() as group:
                for _ in range(3):  # the first is decoded, and frees its bytes
                    group.start_soon(send)
                    await until(lambda: backend.taken > 0)
                await until(lambda: opened.waiting.used == 2 * len(PADDED))
                full = await client.post("/v1/segment", content=unread(), headers={"Content-Length": "2000"})
                assert full.status_code == 429
                assert int(full.headers["retry-after"]) >= 1
                assert "the files that wait fill the" in full.json()["detail"]
                assert "cellseg_waiting_bytes 8000.0" in (await client.get("/metrics")).text
                group.start_soon(send, IMAGE)  # fits
                await until(lambda: opened.waiting.used == 2 * len(PADDED) + len(IMAGE))
                backend.gate.set()
            assert [answer.status_code for answer in answers] == [200] * 4

        talk(opened, conversation)
        assert opened.waiting.used == 0
        assert ask(opened, "POST", "/v1/segment", content=PADDED).status_code == 200


def test_a_body_without_a_length_counts_as_the_largest_until_it_has_arrived() -> None:
    backend = GatedBackend()
    backend.gate.set()
    with service(backend, limits=Limits(body_bytes=4096, held_bytes=5000)) as opened:

        async def conversation(client: Any) -> None:
            slow = Held()
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: client.post("/v1/segment", content=slow))
                await until(lambda: slow.is_read)
                assert opened.waiting.used == 4096
                assert (await client.post("/v1/segment", content=unread())).status_code == 429
                assert (await client.post("/v1/segment", content=IMAGE)).status_code == 200
                backend.gate.clear()
                slow.gate.set()
                await until(lambda: backend.taken == 2)
                assert opened.waiting.used == 0  # it has arrived, and is decoded; its answer is still awaited
                backend.gate.set()

        talk(opened, conversation)


FILES = [("image", ("a.png", IMAGE)), ("image", ("b.png", b"not an image"))]


@pytest.mark.parametrize(
    ("status", "path", "more"),
    [
        (200, "segment", {"content": IMAGE}),
        (422, "segment", {"content": b"not an image"}),
        (413, "segment", {"content": bytes(5000)}),
        (413, "segment", {"files": FILES}),
        (415, "segment", {"content": b"{}", "headers": {"Content-Type": "application/json"}}),
        (400, "segment", {"files": FILES[:1], "data": {"task": "x"}}),
        (400, "segment", {"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        (200, "batch", {"files": FILES}),
        (429, "batch", {"files": FILES * 2}),
        (202, "jobs", {"content": IMAGE}),
        (202, "jobs", {"content": b"not an image"}),
        (400, "jobs", {"files": FILES[:1], "data": {"task": "x"}}),
    ],
)
def test_the_bytes_are_given_back_at_every_end(status: int, path: str, more: dict[str, Any], tmp_path: Path) -> None:
    limits = Limits(body_bytes=4096, held_bytes=9000, queue=3)
    with service(limits=limits) as opened, Jobs.open(tmp_path, opened.engine, limits) as jobs:
        answer = call(opened, jobs, "POST", f"/v1/{path}", **more)
        assert answer.status_code == status
        anyio.run(until, lambda: not any(job.task for job in jobs._jobs.values()))
        assert (opened.waiting.used, jobs.waiting.used, len(opened.accepted)) == (0, 0, 0)


def test_an_image_given_up_in_the_queue_lets_go_of_its_file() -> None:
    backend = GatedBackend()
    with service(backend, limits=Limits(seconds=0.05)) as opened:
        opened.engine._memory._most = 1

        async def conversation(client: Any) -> list[int]:
            statuses: list[int] = []

            async def send() -> None:
                statuses.append((await client.post("/v1/segment", content=PADDED)).status_code)

            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(send)
            return statuses

        assert talk(opened, conversation) == [504] * 3
        assert opened.waiting.used == 0  # the network is still at the first


def call(opened: Service, jobs: Jobs, method: str, path: str, **more: Any) -> Any:
    """One request to a service with jobs."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app=make_app(opened, access(), jobs))
        async with httpx.AsyncClient(transport=transport, base_url=HERE, timeout=60) as client:
            return await client.request(method, path, **more)

    return anyio.run(run)


def test_a_job_deleted_in_the_queue_lets_go_of_its_file_and_makes_room(tmp_path: Path) -> None:
    backend = GatedBackend()
    with service(backend, limits=TWO_FIT) as opened, Jobs.open(tmp_path, opened.engine, TWO_FIT) as jobs:
        try:
            numbers = [call(opened, jobs, "POST", "/v1/jobs", content=PADDED).json()["id"]]
            anyio.run(until, lambda: backend.taken > 0)  # decoded, and frees its bytes
            numbers += [call(opened, jobs, "POST", "/v1/jobs", content=PADDED).json()["id"] for _ in range(2)]
            full = call(opened, jobs, "POST", "/v1/jobs", content=unread(), headers={"Content-Length": "4000"})
            assert (full.status_code, full.headers["retry-after"]) == (429, "10")
            assert opened.waiting.used == 0  # requests have room of their own
            task = jobs.get(numbers[2]).task
            assert task is not None
            assert call(opened, jobs, "DELETE", f"/v1/jobs/{numbers[2]}").status_code == 200
            assert (task.data, jobs.waiting.used) == (b"", len(PADDED))
            again = call(opened, jobs, "POST", "/v1/jobs", content=PADDED)
            assert again.status_code == 202
        finally:
            backend.gate.set()
        anyio.run(until, lambda: jobs.get(again.json()["id"]).has_ended)
        assert jobs.get(numbers[1]).to_json()["count"] == 1
        assert jobs.waiting.used == 0


def test_bytes_are_given_back_once() -> None:
    waiting = Waiting(100, lambda: 1)
    held = waiting.take(80)
    part = held.split(30)
    for _ in range(2):
        held.give_back()
        assert waiting.used == 30
    assert part.split(50).nbytes == 30  # no more than there are
    part.give_back()
    assert waiting.used == 30


def test_what_waits_must_have_room_for_one_request() -> None:
    with pytest.raises(UsageError, match="is 1 MB, but one request may have 2 MB; raise the first"):
        Limits(body_bytes=2 << 20, held_bytes=1 << 20)
