"""The web application: Starlette around ``routes``, and who may call it.

It listens on 127.0.0.1 only. A request needs the token that the command prints, as a cookie that the first page sets or
in the header ``Authorization: Bearer``; the Host header must name this machine, so that no foreign name can be pointed
here (DNS rebinding); and an Origin header must be this server's own. A body is counted while it arrives.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from cellseg_deploy.errors import CellsegError, OutputError
from cellseg_deploy.view import routes
from cellseg_deploy.view.routes import Call, Handler, Reply
from cellseg_deploy.view.workspace import Workspace

ADDRESS = "127.0.0.1"
MAX_UPLOAD_BYTES = 500 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(workspace: Workspace, *, token: str, port: int, max_upload: int = MAX_UPLOAD_BYTES) -> Any:
    """Return the ASGI application for ``workspace``. ``port``: the one it is reached at. ``max_upload``: in bytes."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
    origins = {f"http://{host}" for host in hosts}
    cookie = f"cellseg-view-{port}"  # a browser sends the cookies of all ports

    def respond(reply: Reply) -> Response:
        kept = f"private, max-age={reply.seconds}" if reply.seconds else "no-store"
        headers = {**_HEADERS, "Cache-Control": kept}
        return Response(reply.body, reply.status, headers=headers, media_type=reply.kind)

    def refused(status: int, reason: str) -> Response:
        return respond(Reply(f"{reason}\n".encode(), "text/plain; charset=utf-8", status))

    def why_refused(request: Request) -> Response | None:
        if request.headers.get("host", "") not in hosts:
            return refused(403, "This is not the address that cellseg-view printed.")
        if request.headers.get("origin", next(iter(origins))) not in origins:
            return refused(403, "Other pages may not use cellseg-view.")
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(cookie, "")
        if not hmac.compare_digest(given.encode(), token.encode()):
            return refused(403, "The token is missing or old: open the address that cellseg-view printed.")
        return None

    async def body_of(request: Request, most: int) -> bytes | None:
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said) > most:
            return None
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                return None
            parts.append(part)
        return b"".join(parts)

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        most = max_upload if handler is routes.upload else routes.MAX_JSON_BYTES

        async def answer(request: Request) -> Response:
            with_token = request.query_params.get("token", "") if handler is routes.page else ""
            if with_token and hmac.compare_digest(with_token.encode(), token.encode()):
                response = Response(status_code=303, headers={"Location": "/", **_HEADERS})
                response.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
                return response if request.headers.get("host", "") in hosts else refused(403, "Not this address.")
            if (refusal := why_refused(request)) is not None:
                return refusal
            body = await body_of(request, most)
            if body is None:
                words = f"the file is larger than the limit of {max_upload >> 20} MB (`max_upload`)"
                return respond(routes.failed_with(413, words))
            call = Call(request.path_params, dict(request.query_params), body)
            try:
                return respond(await run_in_threadpool(handler, workspace, call))
            except CellsegError as error:
                return respond(routes.failed(error))

        return answer

    return Starlette(
        routes=[Route(path, endpoint(handler), methods=[method]) for method, path, handler in routes.ROUTES]
    )


def listening_socket(port: int) -> socket.socket:
    """Return a socket bound to ``port`` of 127.0.0.1, 0 for any free one. Raises ``OutputError`` if it is taken."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((ADDRESS, port))
    except OSError as error:
        bound.close()
        raise OutputError(
            f"port {port} cannot be used ({error.strerror}); choose another one, or leave it out"
        ) from error
    return bound


def serve(app: Any, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve ``app`` on ``bound`` until Ctrl-C or SIGTERM; ``on_start`` is called once connections are taken."""
    import uvicorn

    bound.listen()  # what connects from here on waits for the server
    on_start()
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3, server_header=False)
    uvicorn.Server(config).run(sockets=[bound])
