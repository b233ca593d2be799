"""What all commands share: errors and signals to exit codes, logging, shared options.

Light to import: a command's ``--help`` must not load numpy or an engine.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from cellseg_deploy.errors import CellsegError

F = TypeVar("F", bound=Callable[..., Any])

EXIT_OK, EXIT_INTERNAL, EXIT_SOME_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 3, 130, 143

_log = logging.getLogger("cellseg_deploy")


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is done is kept, as after Ctrl-C, but the exit code is 143."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run ``command`` and give its exit code; prints errors to stderr. A command returns its code, or None for 0."""
    previous = _on_sigterm(_raise_terminated)
    try:
        code = command.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)
        print_error("terminated" if terminated else "interrupted")
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except CellsegError as error:
        print_error(str(error))
        _log.debug("raised here:", exc_info=error)
        return error.exit_code
    except Exception as error:
        _log.critical("internal error, please report it", exc_info=error)
        return EXIT_INTERNAL
    finally:
        _on_sigterm(previous)
    return code if isinstance(code, int) else EXIT_OK


def print_error(message: str) -> None:
    """One error on stderr, in red where that is a terminal."""
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)


def set_up_logging(verbosity: int) -> None:
    """Log to stderr: warnings, with ``-v`` progress of single steps, with ``-vv`` everything of this package."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    _log.handlers[:] = [handler]
    _log.setLevel(level)
    _log.propagate = False


def printable(text: str | Path) -> str:
    """``text`` as one line that any terminal and encoding can show: no control characters, no broken Unicode."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in escaped)


def model_options(function: F) -> F:
    """Options of every command that runs a model: which one, on what, with which settings."""
    options = [
        click.option(
            "--model",
            type=click.Path(path_type=Path),
            help="Model file written by cellseg-export: .onnx, .xml or .engine.  [default: the model that ships with the package]",
        ),
        click.option(
            "--task",
            type=click.Choice(["counting", "confluence"]),
            default="counting",
            show_default=True,
            help="What the results are for: numbers of cells, or the covered area. Chooses the operating point.",
        ),
        click.option(
            "--scale",
            type=float,
            help="Model px per image px, for images at another magnification.  [default: the training images' scale]",
        ),
        click.option(
            "--cell-diameter",
            type=float,
            metavar="PX",
            help="Typical cell diameter in the images in px; the scale follows from it. Not with --scale.",
        ),
        click.option("--batch-size", type=int, default=8, show_default=True, help="Tiles a call of the network."),
        click.option(
            "--device",
            help="cpu, cuda or cuda:N. Never another one instead.  [default: cuda for tensorrt, else cpu]",
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt"]),
            default="auto",
            show_default=True,
            help="Inference engine; auto takes the fastest form that passed the parity gate for this model here.",
        ),
        click.option(
            "--ort-provider",
            type=click.Choice(["cuda", "tensorrt"]),
            help="What ONNX Runtime runs a GPU with; tensorrt builds its engine at each start.  [default: cuda]",
        ),
        click.option("--rebuild", is_flag=True, help="Build the TensorRT engine of the model anew."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            help="Arithmetic of OpenVINO; bf16 needs a CPU that has it.  [default: fp32, or what auto chose]",
        ),
        click.option("--threads", type=int, help="CPU threads of the engine.  [default: one a core]"),
        click.option("--streams", type=int, help="Batches that OpenVINO computes at a time.  [default: 1]"),
        click.option(
            "--halo", type=int, metavar="PX", help="Context around a tile in model px.  [default: the model's own]"
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def reading_options(function: F) -> F:
    """Options of every command that reads images."""
    options = [
        click.option("--max-pixels", type=int, metavar="N", help="Refuse larger images.  [default: 200 million]"),
        click.option(
            "--bit-depth",
            type=int,
            metavar="BITS",
            help="Bits (9 to 16) the camera really used in 16-bit files.  [default: the file's full range]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def log_options(function: F) -> F:
    """``--quiet``, ``-v`` and ``--version``."""
    options = [
        click.option("-q", "--quiet", is_flag=True, help="No progress and no table; errors and warnings only."),
        click.option("-v", "--verbose", count=True, help="Say more; -vv for everything."),
        click.version_option(package_name="cellseg-deploy"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _on_sigterm(handler: Any) -> Any:
    """Set the handler of SIGTERM and give the former one; nothing in a thread, where Python allows no handlers."""
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return signal.SIG_DFL
