"""Many requests at a time: shared batches, limits, failures that stay with their image, who may ask."""

from __future__ import annotations

import io
import re
from typing import Any

import anyio
import numpy as np
import pytest
from PIL import Image
from service_stub import PORT, GatedBackend, access, ask, png, service, talk, until

from cellseg_deploy.errors import BackendUnavailableError, DataError, UsageError
from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.engine import Task
from cellseg_deploy.serve.limits import Accepted, Limits, QueueFullError
from cellseg_deploy.serve.outputs import BY_NAME
from cellseg_deploy.serve.service import Service

pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytestmark = pytest.mark.reliability

ONE_TILE = (30, 40)


def figure(opened: Service, name: str, **labels: str) -> float:
    """A figure of /metrics."""
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    text = ask(opened, "GET", "/metrics").text
    found = re.search(rf"^{name}{re.escape('{' + inner + '}') if inner else ''} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in:\n{text}"
    return float(found[1])


def small(value: int) -> bytes:
    """A one-tile image of one colour, on which the stub finds one cell if it is dark."""
    pixels = np.full((*ONE_TILE, 3), 230, np.uint8)
    pixels[8:24, 10:30] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


async def post_all(client: Any, contents: list[bytes], before_answers: Any) -> list[Any]:
    """Send all at once; ``before_answers`` runs while they wait."""
    answers: list[Any] = [None] * len(contents)

    async def send(index: int) -> None:
        answers[index] = await client.post("/v1/segment", content=contents[index])

    async with anyio.create_task_group() as group:
        for index in range(len(contents)):
            group.start_soon(send, index)
        await before_answers()
    return answers


def test_32_small_images_share_batches() -> None:
    backend = GatedBackend()
    with service(backend) as opened:
        contents = [small(40) if index % 2 else small(230) for index in range(32)]

        async def gate() -> None:
            # 2 helpers and 16 that wait for the network: all are there before the first batch, of at most 8, is run
            await until(lambda: opened.engine._network._n_waiting + backend.taken >= 18)
            backend.gate.set()

        answers = talk(opened, lambda client: post_all(client, contents, gate))
        assert [answer.json()["count"] for answer in answers] == [index % 2 for index in range(32)]
        assert figure(opened, "cellseg_batch_tiles_sum") == 32
        # The first batch, a full one, and in the worst case one for each of the others.
        assert figure(opened, "cellseg_batch_tiles_count") <= 1 + 1 + (32 - 1 - 8)
        assert figure(opened, "cellseg_requests_total", path="/v1/segment", status="200") == 32
        assert figure(opened, "cellseg_stage_seconds_count", stage="network") == 32
        assert figure(opened, "cellseg_queue_images") == 0
        assert figure(opened, "cellseg_engine_busy_seconds_total") > 0
        assert figure(opened, "cellseg_batch_limit_tiles") == 8


@pytest.mark.parametrize(("error", "status"), [(DataError("not finite"), 422), (ValueError("odd"), 500)])
def test_a_failing_image_does_not_harm_those_in_its_batch(error: Exception, status: int, caplog: Any) -> None:
    backend = GatedBackend(error)
    contents = [small(40), small(GatedBackend.poison), small(40), small(40)]
    with service(backend) as opened:

        async def gate() -> None:
            await until(lambda: opened.engine._network._n_waiting + backend.taken >= 4)
            backend.gate.set()

        answers = talk(opened, lambda client: post_all(client, contents, gate))
        assert [answer.status_code for answer in answers] == [200, status, 200, 200]
        assert str(error) in answers[1].json()["detail"]
        assert ask(opened, "GET", "/healthz").status_code == 200
        assert len(opened.accepted) == 0


def test_a_network_that_failed_is_told_until_the_restart() -> None:
    backend = GatedBackend(BackendUnavailableError("the device is gone"))
    backend.gate.set()
    with service(backend) as opened:
        assert ask(opened, "POST", "/v1/segment", content=small(GatedBackend.poison)).status_code == 503
        opened.engine._thread.join()
        for path in ("/healthz", "/readyz"):
            answer = ask(opened, "GET", path)
            assert answer.status_code == 503
            assert "the device is gone" in answer.json()["detail"]
        later = ask(opened, "POST", "/v1/segment", content=small(40))
        assert later.status_code == 503
        assert "restart the service" in later.json()["detail"]


def test_the_server_of_a_remote_engine_may_come_back() -> None:
    backend = GatedBackend(BackendUnavailableError("no answer from grpc://here/cells"))
    backend.is_remote = True
    backend.gate.set()
    with service(backend) as opened:
        failed = ask(opened, "POST", "/v1/segment", content=small(GatedBackend.poison))
        assert failed.status_code == 503
        assert "no answer from grpc://here/cells" in failed.json()["detail"]
        assert ask(opened, "GET", "/healthz").status_code == 200
        assert ask(opened, "POST", "/v1/segment", content=small(40)).status_code == 200


def test_a_full_queue_is_told_before_the_body_is_read() -> None:
    backend = GatedBackend()
    with service(backend, limits=Limits(queue=2)) as opened:

        async def third(client: Any) -> Any:
            async def never() -> Any:
                pytest.fail("the body was read")
                yield b""

            async def meanwhile() -> None:
                await until(lambda: len(opened.accepted) == 2)
                refused = await client.post("/v1/segment", content=never())
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["detail"].startswith("the queue of 2 images is full")
                assert (await client.get("/readyz")).status_code == 503
                assert (await client.get("/healthz")).status_code == 200
                backend.gate.set()

            return await post_all(client, [small(40)] * 2, meanwhile)

        assert [answer.status_code for answer in talk(opened, third)] == [200, 200]
        assert ask(opened, "POST", "/v1/segment", content=small(40)).status_code == 200


def test_a_batch_takes_as_many_places_as_it_has_files() -> None:
    with service(limits=Limits(queue=2)) as opened:
        files = [("image", (f"{index}.png", small(40))) for index in range(3)]
        assert ask(opened, "POST", "/v1/batch", files=files).status_code == 429
        assert len(opened.accepted) == 0
        assert ask(opened, "POST", "/v1/batch", files=files[:2]).json()["done"] == 2


def test_an_image_that_takes_too_long_is_given_up_and_frees_its_place() -> None:
    backend = GatedBackend()
    with service(backend, limits=Limits(seconds=0.05)) as opened:
        answer = ask(opened, "POST", "/v1/segment", content=small(40))
        assert answer.status_code == 504
        assert "not done within 0.05 s" in answer.json()["detail"]
        backend.gate.set()
        anyio.run(until, lambda: len(opened.accepted) == 0)
        task = Task("a.png", small(40), opened.defaults, BY_NAME["json"])
        assert opened.engine.submit(task).result().found == 1


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def slow() -> Any:
        yield b"\x89PNG"
        await anyio.sleep_forever()

    with service(limits=Limits(seconds=0.05)) as opened:
        answer = ask(opened, "POST", "/v1/segment", content=slow())
        assert answer.status_code == 408
        assert len(opened.accepted) == 0


def test_a_client_that_leaves_frees_its_place() -> None:
    backend = GatedBackend()
    with service(backend) as opened:
        app = make_app(opened, access())
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/segment",
            "raw_path": b"/v1/segment",
            "query_string": b"",
            "headers": [(b"host", f"127.0.0.1:{PORT}".encode())],
            "http_version": "1.1",
            "scheme": "http",
        }
        large = png([], (600, 600))  # 225 tiles
        messages = iter([{"type": "http.request", "body": large}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(_: Any) -> None:
            pass

        async def leave() -> None:
            await app(scope, receive, send)

        anyio.run(leave)
        backend.gate.set()
        anyio.run(until, lambda: len(opened.accepted) == 0)
        assert sum(backend.batches) < 100  # the rest of the image is not run
        assert figure(opened, "cellseg_requests_total", path="/v1/segment", status="499") == 1


@pytest.mark.parametrize("way", ["length", "chunks"])
def test_a_body_over_the_limit_is_refused_before_it_is_in_memory(way: str) -> None:
    async def parts() -> Any:
        for index in range(100):
            assert index < 3, "read on after the limit"
            yield bytes(100_000)

    async def unread() -> Any:
        pytest.fail("the body was read")
        yield b""

    content, headers = (unread(), {"Content-Length": "200001"}) if way == "length" else (parts(), {})
    with service(limits=Limits(body_bytes=200_000)) as opened:
        answer = ask(opened, "POST", "/v1/segment", content=content, headers=headers)
        assert answer.status_code == 413
        assert "larger than the limit of" in answer.json()["detail"]
        assert len(opened.accepted) == 0


def test_images_in_flight_are_limited_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of which only one fits run one after the other."""
    with service(GatedBackend()) as opened:
        engine = opened.engine
        engine._memory._most = 1
        tasks = [Task(f"{index}.png", png(), opened.defaults, BY_NAME["json"]) for index in range(3)]
        futures = [engine.submit(task) for task in tasks]
        anyio.run(until, lambda: engine._network._n_waiting > 0 or any(task.is_running for task in tasks))
        assert sum(task.is_running for task in tasks) == 1
        engine.backend.gate.set()  # type: ignore[attr-defined]
        assert [future.result().found for future in futures] == [3, 3, 3]
        assert engine._memory._used == 0


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/metrics", "/openapi.json"])
def test_foreign_hosts_and_origins_are_refused(headers: dict[str, str], path: str) -> None:
    with service() as opened:
        assert ask(opened, "GET", path, headers=headers).status_code == 403
        assert ask(opened, "GET", path, headers={"Origin": f"http://127.0.0.1:{PORT}"}).status_code == 200


def test_with_a_token_only_the_state_is_told_without_it() -> None:
    token = "t0ken-of-the-test"
    with service() as opened:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                answer = ask(opened, "GET", path, headers=headers, token=token)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert ask(opened, "GET", path, headers={"Authorization": f"Bearer {token}"}, token=token).is_success
        assert ask(opened, "POST", "/v1/segment", content=png(), token=token).status_code == 401
        for path in ("/healthz", "/readyz"):
            assert ask(opened, "GET", path, token=token).is_success


def test_limits_are_numbers_above_zero() -> None:
    with pytest.raises(UsageError, match="queue must be above 0, got 0"):
        Limits(queue=0)


def test_when_to_come_again_follows_how_long_images_take() -> None:
    accepted = Accepted(4)
    accepted.take(4)
    with pytest.raises(QueueFullError) as full:
        accepted.take()
    assert full.value.retry_seconds == 1
    accepted.give_back(seconds=5.0)
    accepted.take()
    with pytest.raises(QueueFullError, match="in 10 seconds"):
        accepted.take()


def test_no_more_is_taken_than_is_answered_in_half_of_the_time() -> None:
    now = 0.0
    accepted = Accepted(100, seconds=60, clock=lambda: now)
    for end in (4.0, 4.0, 8.0, 8.0):  # two at a time, 4 s each: one every 2 s; the first began when nothing was known
        accepted.admit()
        now = end
        accepted.give_back(seconds=4.0)
    for _ in range(16):
        accepted.admit()  # up to 15 wait before it: 30 s
    words = "the queue of 16 images takes about 32 s, more than half of the 60 s"
    with pytest.raises(QueueFullError, match=words) as full:
        accepted.admit()
    assert full.value.retry_seconds == 16
    accepted.take(40)  # files of a request that was admitted
    accepted.admit(timed=False)  # a job has no time limit
    for _ in range(57):
        accepted.give_back()
    now = 1e6  # idle time counts for nothing
    accepted.admit()
    accepted.give_back(seconds=2.0)
    for _ in range(16):
        accepted.admit()


def test_a_queue_too_long_in_time_is_told_like_a_full_one() -> None:
    backend = GatedBackend()
    with service(backend, limits=Limits(seconds=60)) as opened:
        opened.accepted.admit()
        opened.accepted.give_back(seconds=40.0)

        async def second(client: Any) -> Any:
            async def meanwhile() -> None:
                await until(lambda: len(opened.accepted) == 1)
                refused = await client.post("/v1/segment", content=small(40))
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
                assert (await client.get("/readyz")).status_code == 503
                backend.gate.set()

            return await post_all(client, [small(40)], meanwhile)

        assert [answer.status_code for answer in talk(opened, second)] == [200]
