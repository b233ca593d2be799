"""Shared by all commands: errors and signals to exit codes, logging, common options.

Light to import: a command's ``--help`` must not load numpy or an engine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellseg_deploy.backends import BACKENDS, PRECISIONS, EngineOptions
from cellseg_deploy.errors import CellsegError, plural
from cellseg_deploy.images.options import MAX_PIXELS
from cellseg_deploy.outputs import requirements

if TYPE_CHECKING:
    from cellseg_deploy.cells.scale import CellDiameter
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.threads import ThreadPlan

F = TypeVar("F", bound=Callable[..., Any])

EXIT_OK, EXIT_INTERNAL, EXIT_SOME_FAILED, EXIT_NO_STDOUT, EXIT_INTERRUPTED = 0, 1, 3, 6, 130

require_packages = requirements.require_packages

_OF_STDOUT = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)
_log = logging.getLogger("cellseg_deploy")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP (the terminal closed): finished work is kept, as after Ctrl-C; exit code 143 or 129."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run ``command`` and return its exit code; errors go to stderr. A command returns its code, or None for 0."""
    previous = _catch_signals()
    try:
        code = command.main(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # see say()
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        return _interrupted(error.__cause__ or error)
    except CellsegError as error:
        print_error(str(error))
        _log.debug("raised here:", exc_info=error)
        return error.exit_code
    except SystemExit:  # raised by click if a pipe was closed, and by nothing else here
        return _stdout_is_lost(errno.EPIPE)
    except Exception as error:
        if isinstance(error, OSError) and isinstance(error.__context__, KeyboardInterrupt):
            return _interrupted(error.__context__)  # click prints a line on stderr after an interrupt, which was lost
        # Errors about a file name the file, and are CellsegErrors.
        if isinstance(error, OSError) and error.filename is None and error.errno in _OF_STDOUT:
            return _stdout_is_lost(error.errno)
        _log.critical("internal error, please report it", exc_info=error)
        return EXIT_INTERNAL
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if isinstance(code, int) else EXIT_OK


def _stdout_is_lost(number: int) -> int:
    """Handle a closed pipe, or a full disk, behind stdout."""
    with contextlib.suppress(OSError, ValueError):  # or Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print_error(f"stdout cannot be written to ({os.strerror(number)}); files that were written are complete")
    return EXIT_NO_STDOUT


def print_error(message: str) -> None:
    """Print one error on stderr, in red on a terminal."""
    say(click.style("error: ", fg="red", bold=True) + in_options(message))


_ARGUMENTS = (
    *(
        "backend",
        "batch_size",
        "bit_depth",
        "border_cells",
        "boxes",
        "classes",
        "cell_diameter_px",
        "count_rule",
        "cuda_graph",
        "device",
    ),
    *(
        "field",
        "follow_links",
        "group_by",
        "halo",
        "images",
        "mask_foreground",
        "masks",
        "max_body",
        "max_pixels",
        "max_upload",
        "max_waiting",
        "model",
        "overwrite",
        "pixel_size_um",
        "precision",
        "rebuild",
        "report_thresholds",
    ),
    *("memory", "region", "save", "scale", "scheduler", "shard", "skip_blank", "streams", "task", "threads"),
    *("tls_ca_file", "tls_cert", "tls_key", "upload", "workers"),
)
# A word of its own, and after any path at the start ("DIR/NAME.png: ..."): a file name may look like a mark.
_MARKED = re.compile(rf"(?:(?<=[\s(])|^)`({'|'.join(_ARGUMENTS)})(?:=('?)([^`']+)\2)?`(?=[.,;:)]*(?:\s|$))")
_PATH_FIRST = re.compile(r"[^:]*(?:/[^:]*|\.\w+): ")


def in_options(text: str) -> str:
    """Replace arguments marked by the library (`bit_depth=12`) in ``text`` with the corresponding options."""

    def option(found: re.Match[str]) -> str:
        name, value = found[1].removesuffix("_px").removesuffix("_um"), found[3]
        return f"--{name.replace('_', '-')}" + ("" if value in (None, "True") else f" {value}")

    path = _PATH_FIRST.match(text)
    start = path.end() if path else 0
    return text[:start] + _MARKED.sub(option, text[start:])


def warning_words(kind: str, found: Mapping[str, Any]) -> str:
    """Return one line on a ``kind`` of warning; ``found``: its entry in ``cells.notes.count_warnings``."""
    images, first = found["images"], found["first"]
    return f"{kind}, {plural(images, 'image')}: {printable(first['image'])}: {printable(in_options(first['warning']))}"


def say(line: str) -> None:
    """Print one line on stderr; if stderr is closed (a pipe or terminal), work goes on without the line."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


class _InOptions(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (the name that logging calls)
        """Format the line, with options in place of marked arguments."""
        record.message = in_options(record.message)
        return super().formatMessage(record)


def set_up_logging(verbosity: int) -> None:
    """Log to stderr: warnings, with ``-v`` progress of single steps, with ``-vv`` everything of this package."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(_InOptions("%(levelname)s: %(message)s"))
    _log.handlers[:] = [handler]
    _log.setLevel(level)
    _log.propagate = False


def printable(text: str | Path) -> str:
    """Make ``text`` one line safe for any terminal and encoding: no control characters, no broken Unicode."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in escaped)


def _cell_diameter(_ctx: click.Context, _option: click.Parameter, value: str | None) -> float | str | None:
    """Parse a number of pixels, or ``auto``."""
    if value is None or value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number of pixels nor auto") from None


_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(_ctx: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Parse an amount of memory such as 4GB."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise click.BadParameter(f"{value!r} is not an amount of memory; expected a number with MB or GB, such as 4GB")
    return int(float(found[1]) * _BYTES[found[2].upper()])


def cell_diameter_or_auto(scale: float | None, cell_diameter: CellDiameter) -> CellDiameter:
    """Return ``cell_diameter`` as passed, or ``auto`` if no magnification was set."""
    return "auto" if scale is None and cell_diameter is None else cell_diameter


def names_in(text: str | None) -> tuple[str, ...] | None:
    """Return comma-separated names in ``text``, each once; None for None."""
    return None if text is None else tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def engine_options(asked: Mapping[str, Any], threads: ThreadPlan) -> EngineOptions:
    """Build the engine options from the options of ``model_options``; ``asked``: their values by name."""
    names = ("backend", "device", "precision", "streams", "cuda_graph", "rebuild")
    return EngineOptions(threads=threads.engine, **{name: asked[name] for name in names})


def segmenter_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``Segmenter.load`` that stand for magnification, tiles and operating point."""
    diameter = cell_diameter_or_auto(asked["scale"], asked["cell_diameter"])
    names = ("task", "scale", "batch_size", "halo", "border_cells")
    return {"cell_diameter_px": diameter, **{name: asked[name] for name in names}}


def read_options(asked: Mapping[str, Any]) -> ReadOptions:
    """Build the read options from ``reading_options`` and, if present, ``--pixel-size``."""
    from cellseg_deploy.images.options import ReadOptions

    return ReadOptions(asked["max_pixels"], asked["bit_depth"], asked.get("pixel_size"))


def plan_threads(total: int | None, *, device: str | None, model: Path | None, backend: str) -> ThreadPlan:
    """Plan threads from ``--threads`` and the other options of ``model_options``."""
    from cellseg_deploy import threads
    from cellseg_deploy.backends import default_device

    return threads.plan(total, device=device or default_device(model, backend))


def with_options(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """Decorate ``function`` with click's ``options``, listed in its help in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def refuse_options(context: click.Context, names: Sequence[str], because: str) -> None:
    """Raise click's usage error if one of the parameters ``names`` was passed; ``because``: the reason."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {because}")


def model_options(function: F) -> F:
    """Add the options of every command that runs a model: model, engine and settings."""
    options = [
        click.option(
            "--model",
            type=click.Path(path_type=Path),
            help="Model file written by cellseg-export: .onnx, .xml or .engine; or, on a server, grpc://HOST:PORT/NAME "
            "(grpcs, http, https).  [default: the package's own model]",
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
            help="Model px per image px, for images at another magnification.  [default: see --cell-diameter]",
        ),
        click.option(
            "--cell-diameter",
            callback=_cell_diameter,
            metavar="PX|auto",
            help="Typical cell diameter in image px, which sets the scale; auto: measured when the run starts, once "
            "per folder and image size. Not with --scale.  [default: auto]",
        ),
        click.option("--batch-size", type=int, default=8, show_default=True, help="Tiles per network call."),
        click.option(
            "--device",
            help="cpu, cuda or cuda:N. Never falls back to another device.  [default: cuda for tensorrt, else cpu]",
        ),
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            default=EngineOptions.backend,
            show_default=True,
            help="Inference engine; auto takes the fastest form that passed the parity gate for this model here.",
        ),
        click.option("--rebuild", is_flag=True, help="Rebuild the model's TensorRT engine."),
        click.option(
            "--cuda-graph",
            is_flag=True,
            help="Let TensorRT replay full batches as one CUDA graph: fewer launches, a second context in GPU memory.",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="Arithmetic. With --backend auto: only forms of the model that compute in it; with openvino: fp32 or "
            "bf16, which needs a CPU that supports it.  [default: the model's own or fp32]",
        ),
        click.option(
            "--threads",
            type=int,
            help="Total CPU threads: for the engine and, alongside it, reading, labelling and writing.  "
            "[default: one per core]",
        ),
        click.option("--streams", type=int, help="Batches that OpenVINO computes at a time.  [default: 1]"),
        click.option(
            "--halo", type=int, metavar="PX", help="Context around a tile in model px.  [default: the model's own]"
        ),
    ]
    return with_options(function, options)


def reading_options(function: F) -> F:
    """Add the options of every command that reads images."""
    options = [
        click.option(
            "--max-pixels",
            type=int,
            default=MAX_PIXELS,
            metavar="N",
            help="Refuse larger images.  [default: 200 million]",
        ),
        click.option(
            "--bit-depth",
            type=int,
            metavar="BITS",
            help="Bits (9 to 16) the camera really used in 16-bit files.  [default: as the file says, or all]",
        ),
    ]
    return with_options(function, options)


def memory_option(function: F) -> F:
    """Add ``--memory``, for every command that may read an image by region."""
    return click.option(
        "--memory",
        callback=_bytes,
        metavar="AMOUNT",
        help="Memory for blocks of an image that is read by region, such as 4GB; results do not depend on it.  "
        "[default: half of what is free]",
    )(function)


def mask_options(function: F) -> F:
    """Add the mask options of every command that reads masks."""
    from cellseg_deploy.images.mask_foreground import MASK_FOREGROUNDS

    return click.option(
        "--mask-foreground",
        type=click.Choice(MASK_FOREGROUNDS),
        default="auto",
        show_default=True,
        help="Which numbers in the masks are cells: those above 0 (light), or all but the largest (dark: the masks are "
        "negatives). auto takes those above 0 and refuses a mask that looks like a negative.",
    )(function)


def count_options(function: F) -> F:
    """Add the options for the field of view and the count rule, for every command that counts."""
    options = [
        click.option(
            "--count-rule",
            type=click.Choice(["half", "all", "exclude-border", "frame"]),
            default="half",
            show_default=True,
            help="Which cells cut by the image border count. half: those judged at least half inside; exclude-border: "
            "none; frame: those at the top and right only (unbiased counting frame).",
        ),
        click.option(
            "--border-cells",
            type=click.Choice(["visible", "model"]),
            default="visible",
            show_default=True,
            help="Which cells cut by the image border are labelled: all that are visible, or those above the "
            "model's own limit, as in earlier versions.",
        ),
        click.option(
            "--field",
            type=click.Choice(["auto", "full"]),
            default="auto",
            show_default=True,
            help="Leave out what is outside the field of view (eyepiece surround, frame, letterbox, band), or "
            "use the full picture.",
        ),
    ]
    return with_options(function, options)


def report_options(function: F) -> F:
    """Add the options for groups and report, for every command that writes tables of many images."""
    options = [
        click.option(
            "--group-by",
            default="",
            metavar="PATTERN|CSV",
            help="Groups of summary.csv and the report: a regular expression searched in the names, or a CSV with the "
            "columns image,group.  [default: folders]",
        ),
        click.option(
            "--report/--no-report", default=True, help="Write report.html and files for MultiQC.  [default: report]"
        ),
    ]
    return with_options(function, options)


def log_options(function: F) -> F:
    """Add ``--quiet``, ``-v`` and ``--version``."""
    options = [
        click.option("-q", "--quiet", is_flag=True, help="No progress and no table; errors and warnings only."),
        click.option("-v", "--verbose", count=True, help="Verbose log; -vv for debug output."),
        click.version_option(package_name="cellseg-deploy"),
    ]
    return with_options(function, options)


def _interrupted(error: BaseException) -> int:
    """Report the interrupt and return its exit code."""
    print_error("terminated" if isinstance(error, Terminated) else "interrupted")
    return error.exit_code if isinstance(error, Terminated) else EXIT_INTERRUPTED


def _raise_terminated(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def _catch_signals() -> dict[int, Any]:
    """Turn SIGTERM and SIGHUP into ``Terminated``; return the previous handlers.

    An ignored signal (``nohup``) stays ignored; does nothing outside the main thread, where Python allows no handlers.
    """
    previous: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):
                previous[number] = signal.signal(number, _raise_terminated)
    return previous
