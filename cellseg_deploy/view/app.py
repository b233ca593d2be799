"""The web application: Starlette around ``routes``, and who may call it.

It listens on 127.0.0.1 only. A request needs the token that the command prints, as a cookie that the first page sets or
in the header ``Authorization: Bearer``; the Host header must name this machine, so that no foreign name can be pointed
here (DNS rebinding); and an Origin header must be this server's own. A body is counted while it arrives.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from cellseg_deploy.errors import CellsegError
from cellseg_deploy.view import routes
from cellseg_deploy.view.routes import Call, Handler
from cellseg_deploy.view.workspace import Workspace
from cellseg_deploy.web.access import SECURITY_HEADERS, Access
from cellseg_deploy.web.replies import Reply, body_of
from cellseg_deploy.web.server import ADDRESS

MAX_UPLOAD_BYTES = 500 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    **SECURITY_HEADERS,
}


def make_app(workspace: Workspace, *, token: str, port: int, max_upload: int = MAX_UPLOAD_BYTES) -> Any:
    """Return the ASGI application for ``workspace``. ``port``: the one it is reached at. ``max_upload``: in bytes."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    cookie = f"cellseg-view-{port}"  # a browser sends the cookies of all ports
    access = Access(
        "cellseg-view",
        frozenset(f"{name}:{port}" for name in (ADDRESS, "localhost")),
        token,
        cookie,
        (403, "The token is missing or old: open the address that cellseg-view printed."),
    )

    def respond(reply: Reply) -> Response:
        return Response(reply.body, reply.status, headers={**_HEADERS, **reply.all_headers}, media_type=reply.kind)

    def refused(status: int, reason: str) -> Response:
        return respond(Reply(f"{reason}\n".encode(), "text/plain; charset=utf-8", status))

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        most = max_upload if handler is routes.upload else routes.MAX_JSON_BYTES

        async def answer(request: Request) -> Response:
            with_token = request.query_params.get("token", "") if handler is routes.page else ""
            if with_token and access.is_token(with_token):
                response = Response(status_code=303, headers={"Location": "/", **_HEADERS})
                response.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
                return response if access.knows(request.headers.get("host", "")) else refused(403, "Not this address.")
            if (refusal := access.refusal(request.headers, request.cookies)) is not None:
                return refused(*refusal)
            body = await body_of(request.headers, request.stream(), most)
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
