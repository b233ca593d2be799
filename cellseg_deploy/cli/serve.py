"""``cellseg-serve``: count cells over HTTP."""

from __future__ import annotations

import ipaddress
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.web.access import Access

TOKEN_VARIABLE = "CELLSEG_SERVE_TOKEN"
_SHORTEST_TOKEN = 16

_EPILOG = """\b
cellseg-serve                                            the model that ships, on http://127.0.0.1:8080
curl -F image=@smear.png http://127.0.0.1:8080/v1/segment
cellseg-serve --model my.onnx --host 0.0.0.0 --token-file token.txt

\b
Exit codes: 0 stopped (Ctrl-C, SIGTERM; what was accepted is answered first), 2 usage, 5 model refused, 6 port or jobs
folder not usable, 7 jobs folder in use, 8 engine, device or packages not available.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="IP address to listen on; 0.0.0.0 for all. Anything but this machine's own 127.0.0.1 needs a token.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for any free port.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"File with the token that requests must send (Authorization: Bearer TOKEN).  [default: the variable "
    f"{TOKEN_VARIABLE}]",
)
@console.model_options
@console.reading_options
@console.count_options
@click.option("--classes", metavar="A,B", help="Classes of the model that count as cells.  [default: all but platelet]")
@click.option("--pixel-size", type=float, metavar="UM", help="Pixel size in micrometres.  [default: as in the TIFF]")
@click.option("--max-body", type=click.IntRange(1), default=200, show_default=True, metavar="MB", help="Per request.")
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    metavar="MB",
    help="Files received and not yet decoded; more are answered 429. Jobs have as much of their own.  "
    "[default: 1024, or --max-body if that is more]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Images accepted and not yet answered; more are answered 429.",
)
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="Per request; then 504."
)
@click.option("--max-files", type=click.IntRange(1), default=32, show_default=True, help="Images in one request.")
@click.option(
    "--jobs",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take long images as jobs, and keep their results in DIR.  [default: no jobs]",
)
@click.option("--max-jobs", type=click.IntRange(1), default=16, show_default=True, help="Jobs waiting or running.")
@click.option("--keep-jobs", type=click.IntRange(1), default=1000, show_default=True, help="Finished jobs kept in DIR.")
@click.option(
    "--grace",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="When stopped, finish accepted jobs for so long; the others are reported as lost.",
)
@console.log_options
def command(
    host: str, port: int, token_file: Path | None, max_body: int, max_queue: int, timeout: float, **asked: Any
) -> None:
    """Count and outline the cells of images sent over HTTP.

    The options for model, scale and counting are the defaults of requests, which may set their own. The service is
    described at /openapi.json.
    """
    console.set_up_logging(asked["verbose"])
    console.require_packages("serve", "starlette", "uvicorn", "prometheus_client")

    from cellseg_deploy.backends import open_backend
    from cellseg_deploy.models import default_model_path
    from cellseg_deploy.serve.app import make_app
    from cellseg_deploy.serve.engine import Engine
    from cellseg_deploy.serve.jobs import Jobs
    from cellseg_deploy.serve.limits import Limits
    from cellseg_deploy.serve.metrics import Metrics
    from cellseg_deploy.serve.service import Service
    from cellseg_deploy.serve.settings import Settings
    from cellseg_deploy.web.server import listening_socket, serve

    is_loopback = _is_loopback(host)
    token = _token(token_file, is_needed=not is_loopback)
    limits = Limits(
        body_bytes=max_body << 20,
        held_bytes=(asked["max_waiting"] or max(1024, max_body)) << 20,
        queue=max_queue,
        seconds=timeout,
        files=asked["max_files"],
        jobs=asked["max_jobs"],
        kept_jobs=asked["keep_jobs"],
        grace_seconds=asked["grace"],
    )
    defaults = Settings(
        cell_diameter=console.cell_diameter_or_auto(asked["scale"], asked["cell_diameter"]),
        classes=console.names_in(asked["classes"]),
        **{name: asked[name] for name in ("task", "scale", "count_rule", "border_cells", "field", "pixel_size")},
        **{name: asked[name] for name in ("bit_depth", "halo", "batch_size", "max_pixels")},
    )
    model = asked["model"] or default_model_path()
    threads = console.plan_threads(asked["threads"], device=asked["device"], model=model, backend=asked["backend"])
    with (
        listening_socket(port, host) as bound,
        open_backend(model, console.engine_options(asked, threads), given=asked["model"]) as backend,
        Engine(
            backend,
            batch=asked["batch_size"],
            plan=threads,
            metrics=Metrics(),
            in_flight_bytes=limits.in_flight_bytes,
        ) as engine,
        nullcontext() if asked["jobs"] is None else Jobs.open(asked["jobs"], engine, limits) as jobs,
    ):
        service = Service(engine, defaults, limits)
        port = bound.getsockname()[1]

        def started() -> None:
            click.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            sys.stdout.flush()
            if not asked["quiet"]:
                console.say(
                    f"{backend.spec.name}: {backend.name} {backend.precision} on {backend.device}; Ctrl-C ends it"
                )

        try:
            app = make_app(service, _access(host, port, token, is_loopback=is_loopback), jobs)
            serve(app, bound, started, grace_seconds=math.ceil(timeout) + 1)
        except KeyboardInterrupt:  # the usual end; Uvicorn has answered what it took
            return


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise click.BadParameter(f"{host!r} is not an IP address", param_hint="--host") from None


def _token(file: Path | None, *, is_needed: bool) -> str:
    """Return the token, empty for none. An argument would be seen by every user of the machine."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if file is not None:
        try:
            token = file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"{file}: cannot be read ({error})", param_hint="--token-file") from None
    token = token.strip()
    if not token and (is_needed or file is not None):
        raise click.UsageError(
            f"a service that other machines can reach needs a token: set {TOKEN_VARIABLE}, or give --token-file FILE"
        )
    if token and (len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token):
        raise click.UsageError(
            f"the token must have at least {_SHORTEST_TOKEN} characters, without spaces; for one: openssl rand -hex 32"
        )
    return token


def _access(host: str, port: int, token: str, *, is_loopback: bool) -> Access:
    from cellseg_deploy.web.access import Access, hosts_of

    without = (401, "The token is missing or wrong: send the header Authorization: Bearer TOKEN.")
    own = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Access("cellseg-serve", hosts_of(port) | {own} if is_loopback else None, token, without_token=without)
