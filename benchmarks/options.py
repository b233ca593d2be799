"""Options and habits that the commands which measure have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_benchmarks.harness.machine import Conditions, Load, Machine
    from cellseg_benchmarks.harness.partial import Progress
    from cellseg_benchmarks.harness.report import Report
    from cellseg_benchmarks.harness.timer import Plan

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def measuring_options(function: F) -> F:
    """``-o``, ``--threads``, ``--quiet``: of every command."""
    options = [
        click.option("-o", "--output", required=True, metavar="DIR", type=PATH, help="New folder for the report."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: as each library chooses]"),
        click.option("--quiet", "-q", is_flag=True, help="No lines of progress."),
    ]
    return console.with_options(function, options)


def engine_options(function: F) -> F:
    """How to open a model and run it over folders; see ``engine_settings``."""
    options = [
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt"]),
            default="auto",
            show_default=True,
            help="As for cellseg-infer.",
        ),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda for tensorrt, else cpu]"),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of OpenVINO."),
        click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Tiles a call."),
        click.option("--streams", type=click.IntRange(1), help="Batches that OpenVINO computes at a time."),
    ]
    return console.with_options(function, options)


def engine_settings(
    backend: str, device: str | None, precision: str | None, batch_size: int, streams: int | None
) -> dict[str, Any]:
    """What ``engine_options`` say, as settings of a folder run; see ``folder.subject``."""
    return {
        "backend": backend,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "streams": streams,
    }


def scale_settings(scale: float | None, cell_diameter: float | None) -> dict[str, Any]:
    """The same for ``--scale`` and ``--cell-diameter``."""
    return {"scale": scale, "cell_diameter_px": cell_diameter}


def scale_options(function: F) -> F:
    """``--scale`` and ``--cell-diameter``."""
    options = [
        click.option("--scale", type=float, help="Model px per image px.  [default: the training images' scale]"),
        click.option("--cell-diameter", type=float, metavar="PX", help="Or: diameter of cells in the images."),
    ]
    return console.with_options(function, options)


def without_gpu(machine: Machine, device: str | None) -> dict[str, str]:
    """What a report says of the GPU if none is here and none was asked for."""
    return {} if machine.gpu or (device or "cpu") != "cpu" else {"cuda": f"not yet run: {machine.no_gpu}"}


def rounds_options(rounds: int, min_seconds: float = 0.2) -> Callable[[F], F]:
    """``--rounds``, ``--min-seconds``, ``--settle`` and ``--budget``, for the commands that interleave."""
    options = [
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True, help="Turns of each."),
        click.option(
            "--min-seconds",
            type=click.FloatRange(0),
            default=min_seconds,
            show_default=True,
            help="Least length of a turn; what is shorter is repeated.",
        ),
        click.option(
            "--settle",
            type=click.FloatRange(0),
            default=0.25,
            show_default=True,
            help="Seconds of rest before a turn, so that threads of the one before stop waiting for work.",
        ),
        click.option(
            "--budget", type=click.FloatRange(0), metavar="SECONDS", help="End the rounds (3 at least) after so long."
        ),
    ]

    def decorate(function: F) -> F:
        return console.with_options(function, options)

    return decorate


def plan_of(rounds: int, min_seconds: float, settle: float, budget: float | None) -> Plan:
    """What the options of ``rounds_options`` say."""
    from cellseg_benchmarks.harness.timer import Plan

    return Plan(
        rounds=rounds,
        min_seconds=min_seconds,
        settle_seconds=settle,
        budget_seconds=budget,
    )


def numbers(text: str, name: str, kind: type[float] = int) -> list[Any]:
    """``1,8`` as positive numbers without doubles, in order; click's usage error names the option ``name``."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise click.UsageError(f"{name} must be positive numbers with commas between them, got {text!r}")
    return sorted(set(found))


def words(text: str | None) -> list[str] | None:
    """``a,b`` as a list; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def teller(quiet: bool) -> Callable[[str], None]:
    """Where lines of progress go."""
    return lambda line: None if quiet else console.say(console.printable(line))


def progress(output: Path, benchmark: str) -> Progress:
    """Keeps the figures of ``benchmark`` in ``output`` while they are made; says so if they are all that is left."""
    from cellseg_benchmarks.harness.partial import Progress

    made = Progress(output, benchmark)

    def tell() -> None:
        if made.path is not None and made.path.is_file():
            console.say(f"what was measured until then is in {console.printable(made.path)}")

    click.get_current_context().call_on_close(tell)
    return made


def publish(output: Path, report: Report, png: bytes, progress: Progress) -> None:
    """Write and show ``report``; one that was stopped then ends as the signal has it."""
    from cellseg_benchmarks.harness.report import write_report

    click.echo(write_report(output, report, png, progress))
    progress.finish()


def start() -> tuple[Machine, Load]:
    """The machine, and how busy it is before anything is measured; ends with an error without matplotlib."""
    console.require_packages("plots", "matplotlib")
    from cellseg_benchmarks.harness import machine

    return machine.look(), machine.load()


def conditions(machine: Machine, before: Load) -> Conditions:
    """Machine and load, looked at again now that all is measured."""
    from cellseg_benchmarks.harness.machine import Conditions, load

    return Conditions(machine, before, load())


def devices_for(device: str, machine: Machine) -> tuple[list[str], dict[str, str]]:
    """Devices to measure on for ``--device`` (``auto``, ``cpu``, ``cuda``), and which are not here, with the reason.

    ``auto``: the CPU, and the GPU as far as there is one. Raises ``BackendUnavailableError`` if the GPU was asked for.
    """
    from cellseg_deploy.errors import BackendUnavailableError

    if device == "cuda" and machine.gpu is None:
        raise BackendUnavailableError(f"--device cuda was asked for, but {machine.no_gpu}")
    if device in ("cpu", "cuda"):
        return [device], {}
    return ["cpu", "cuda"], {} if machine.gpu else {"cuda": f"not yet run: {machine.no_gpu}"}


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: the CPU, and the GPU where there is one.",
)
