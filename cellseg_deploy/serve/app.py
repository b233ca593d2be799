"""The web application: Starlette around ``service``. The only module of the service that imports Starlette."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cellseg_deploy.serve import openapi
from cellseg_deploy.serve.engine import Answer, Task
from cellseg_deploy.serve.jobs import Jobs
from cellseg_deploy.serve.limits import megabytes
from cellseg_deploy.serve.metrics import KIND
from cellseg_deploy.serve.outputs import BY_NAME, JSON
from cellseg_deploy.serve.service import (
    RefusedError,
    Service,
    Slots,
    as_json,
    batch_reply,
    problem,
    problem_of,
    reply_of,
)
from cellseg_deploy.serve.settings import Settings
from cellseg_deploy.serve.uploads import Upload, uploads_in
from cellseg_deploy.web.access import SECURITY_HEADERS, Access
from cellseg_deploy.web.replies import Reply, body_of, most_of_body

if TYPE_CHECKING:
    from starlette.requests import Request

    Handler = Callable[[Request], Awaitable[Reply]]

_GONE = 499  # for the metrics: the client left before its answer


def make_app(service: Service, access: Access, jobs: Jobs | None = None) -> Any:
    """Return the ASGI application of ``service``; ``access``: who may call it. ``jobs``: None for none."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    calls = _Calls(service)
    of_jobs = _JobCalls(calls, jobs)
    description = openapi.describe(service, with_jobs=jobs is not None)

    def respond(reply: Reply) -> Response:
        headers = {**SECURITY_HEADERS, **reply.all_headers}
        return Response(reply.body, reply.status, headers=headers, media_type=reply.kind)

    def endpoint(path: str, handler: Handler, *, needs_token: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            status = _GONE
            try:
                refusal = access.refusal(request.headers, needs_token=needs_token)
                if refusal is not None:
                    needs_login = {"WWW-Authenticate": "Bearer"} if refusal[0] == 401 else {}
                    reply = problem(*refusal, needs_login)
                else:
                    reply = await handler(request)
                status = reply.status
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except Exception as error:
                reply = problem_of(error)
                status = reply.status
            finally:
                service.metrics.request(path, status, time.perf_counter() - start)
            return respond(reply)

        return answer

    async def not_found(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "there is no such address; /openapi.json lists all", 405: "this address has no such method"}
        return respond(problem(error.status_code, words.get(error.status_code, error.detail), error.headers))

    async def constant(reply: Callable[[], Reply]) -> Reply:
        return reply()

    routes: list[tuple[str, str, Handler, bool]] = [
        ("POST", "/v1/segment", calls.segment, True),
        ("POST", "/v1/batch", calls.batch, True),
        ("POST", "/v1/jobs", of_jobs.submit, True),
        ("GET", "/v1/jobs", of_jobs.all, True),
        ("GET", "/v1/jobs/{id}", of_jobs.one, True),
        ("GET", "/v1/jobs/{id}/result", of_jobs.result, True),
        ("DELETE", "/v1/jobs/{id}", of_jobs.delete, True),
        ("GET", "/v1/models", lambda _: constant(lambda: as_json(service.models())), True),
        ("GET", "/metrics", lambda _: constant(lambda: Reply(service.metrics.text(), KIND)), True),
        ("GET", "/openapi.json", lambda _: constant(lambda: as_json(description)), True),
        ("GET", "/healthz", lambda _: constant(service.health), False),
        ("GET", "/readyz", lambda _: constant(service.ready), False),
    ]
    return Starlette(
        routes=[
            Route(path, endpoint(path, handler, needs_token=needs_token), methods=[method])
            for method, path, handler, needs_token in routes
        ],
        exception_handlers={HTTPException: not_found},
    )


class _Calls:
    """Requests with images."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def task(self, request: Request, slots: Slots, deadline: float) -> Task:
        """Return the image that is sent, with what is asked for it. ``slots``: of the request."""
        service = self.service
        query, accept = request.query_params.multi_items(), request.headers.get("accept", "")
        service.output_of(query, accept)  # before the body: it may be long
        service.settings_of(query)
        files, fields = await self.received(request, slots, deadline)
        service.check_files(files, 1)
        given = [*query, *fields]
        return Task(files[0].name, files[0].data, service.settings_of(given), service.output_of(given, accept))

    async def segment(self, request: Request) -> Reply:
        """One image."""
        service = self.service
        deadline = self.deadline()
        with Slots(service, service.waiting) as slots:
            task = await self.task(request, slots, deadline)
            (result,) = await self._results(request, [task], [slots.submit(task)], deadline)
        return reply_of(result) if isinstance(result, Answer) else problem_of(result, task.name)

    async def batch(self, request: Request) -> Reply:
        """Several images, answered together as JSON."""
        service = self.service
        deadline = self.deadline()
        query, accept = request.query_params.multi_items(), request.headers.get("accept", "")

        def asked_in(given: list[tuple[str, str]]) -> Settings:
            if service.output_of(given, accept).kind != JSON:
                raise RefusedError(406, f"several images are answered as {JSON} only")
            return service.settings_of(given)

        asked_in(query)
        with Slots(service, service.waiting) as slots:
            files, fields = await self.received(request, slots, deadline)
            service.check_files(files, service.limits.files)
            asked = asked_in([*query, *fields])
            tasks = [Task(upload.name, upload.data, asked, BY_NAME["json"]) for upload in files]
            files.clear()
            slots.take(len(tasks) - 1)
            results = await self._results(request, tasks, [slots.submit(task) for task in tasks], deadline)
        return batch_reply([task.name for task in tasks], results)

    def deadline(self) -> float:
        """Return when a request that begins now must be answered."""
        return _now() + self.service.limits.seconds

    async def received(
        self, request: Request, slots: Slots, deadline: float
    ) -> tuple[list[Upload], list[tuple[str, str]]]:
        """Return files and fields of the body. Raises ``RefusedError`` if it is too large or too slow, and
        ``QueueFullError`` if there is no room for it; then it is not read."""
        limits = self.service.limits
        most = most_of_body(request.headers, limits.body_bytes)
        slots.hold(most or 0)
        receiving = body_of(request.headers, request.stream(), limits.body_bytes if most is None else most)
        try:
            body = await asyncio.wait_for(receiving, deadline - _now())
        except TimeoutError:
            raise RefusedError(408, f"the request did not arrive within {limits.seconds:g} s") from None
        if body is None:
            raise RefusedError(413, f"the request is larger than the limit of {megabytes(limits.body_bytes)}")
        kind, name = request.headers.get("content-type", ""), request.query_params.get("name", "")
        files, fields = uploads_in(kind, body, name)
        slots.keep(sum(len(file.data) for file in files))
        return files, fields

    async def _results(
        self, request: Request, tasks: Sequence[Task], futures: Sequence[Future[Answer]], deadline: float
    ) -> list[Answer | BaseException]:
        """Wait for all ``futures``. At the deadline, or when the client leaves, the tasks are cancelled."""
        from starlette.requests import ClientDisconnect

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answers = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        leaving = asyncio.ensure_future(left())
        try:
            waiting: set[asyncio.Future[Any]] = {answers, leaving}
            await asyncio.wait(waiting, timeout=deadline - _now(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answers.done():
                for task, future in zip(tasks, futures, strict=True):
                    task.cancel()
                    future.cancel()
        if answers.done():
            return answers.result()
        if leaving.done() and not leaving.cancelled():
            raise ClientDisconnect
        raise RefusedError(504, f"not done within {self.service.limits.seconds:g} s; send long images as jobs")


class _JobCalls:
    """Requests about jobs."""

    def __init__(self, calls: _Calls, jobs: Jobs | None) -> None:
        self._calls, self._jobs = calls, jobs

    @property
    def _opened(self) -> Jobs:
        if self._jobs is None:
            raise RefusedError(404, "this service takes no jobs; start it with `cellseg-serve --jobs DIR`")
        return self._jobs

    async def submit(self, request: Request) -> Reply:
        """Accept an image whose answer is fetched later."""
        jobs = self._opened
        await asyncio.to_thread(jobs.check_room)  # before the body; a job being written holds the lock
        with Slots(self._calls.service, jobs.waiting, timed=False) as slots:  # while the body arrives
            task = await self._calls.task(request, slots, self._calls.deadline())
            slots.hand_bytes_to(task)
            try:
                job = await asyncio.to_thread(jobs.submit, task)  # writes to the disk
            except Exception:
                task.drop()
                raise
        return as_json(job.to_json(), 202, {"Location": f"/v1/jobs/{job.id}"})

    async def all(self, _: Request) -> Reply:
        """List the jobs."""
        return as_json({"jobs": await asyncio.to_thread(self._opened.all)})

    async def one(self, request: Request) -> Reply:
        """Say how far a job is."""
        return as_json(self._opened.get(request.path_params["id"]).to_json())

    async def result(self, request: Request) -> Reply:
        """Return the answer of a finished job."""
        return reply_of(await asyncio.to_thread(self._opened.result, request.path_params["id"]))

    async def delete(self, request: Request) -> Reply:
        """Cancel a job, or forget its result."""
        await asyncio.to_thread(self._opened.delete, request.path_params["id"])
        return as_json({"status": "deleted"})


def _now() -> float:
    return asyncio.get_running_loop().time()
