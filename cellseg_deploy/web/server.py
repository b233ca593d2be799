"""The socket of a server, and Uvicorn on it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from cellseg_deploy.errors import OutputError

ADDRESS = "127.0.0.1"


def listening_socket(port: int, address: str = ADDRESS) -> socket.socket:
    """Return a socket bound to ``port`` of ``address``, 0 for any free port. Raises ``OutputError`` if that fails."""
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        where = f"port {port}" if address == ADDRESS else f"port {port} of {address}"
        raise OutputError(f"{where} cannot be used ({error.strerror}); choose another one, or leave it out") from error
    return bound


def serve(app: Any, bound: socket.socket, on_start: Callable[[], None], *, grace_seconds: int | None = 3) -> None:
    """Serve ``app`` on ``bound`` until Ctrl-C or SIGTERM; ``on_start`` is called once connections are taken.

    Requests that were received are answered first, for at most ``grace_seconds``, None for as long as it takes. Raises
    what the handlers of the signals raise, afterwards.
    """
    import uvicorn

    bound.listen(1024)  # what connects from here on waits for the server
    on_start()
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=grace_seconds, server_header=False
    )
    uvicorn.Server(config).run(sockets=[bound])
