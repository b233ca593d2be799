"""Shared options and steps of the measuring commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_benchmarks.harness.machine import Conditions, Machine
    from cellseg_benchmarks.harness.partial import Progress
    from cellseg_benchmarks.harness.report import Report

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class Engine:
    """Values of ``engine_options``: how to open a model."""

    backend: str = "auto"
    device: str | None = None
    precision: str | None = None
    batch_size: int = 8
    streams: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return these as settings of a folder run; see ``folder.subject``."""
        return asdict(self)

    def not_run(self, machine: Machine) -> dict[str, str]:
        """Note on the GPU for the report, if none is available and none was requested."""
        return {} if machine.gpu or (self.device or "cpu") != "cpu" else {"cuda": f"not yet run: {machine.no_gpu}"}


@dataclass(frozen=True)
class Scale:
    """Values of ``scale_options``."""

    scale: float | None = None
    cell_diameter: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Return these as arguments of ``Segmenter.load``."""
        return {"scale": self.scale, "cell_diameter_px": self.cell_diameter}


def settings_of(kind: type[S], given: Mapping[str, Any]) -> S:
    """Make the dataclass ``kind`` from the options ``given`` by click, by the names of its fields.

    A field that is itself a dataclass, such as ``Engine``, takes its own options.
    """
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        factory: Any = field.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            values[field.name] = settings_of(factory, given)
        elif field.name in given:
            values[field.name] = given[field.name]
    return kind(**values)


def measuring_options(function: F) -> F:
    """Add ``-o``, ``--threads``, ``--quiet``, which every command has."""
    options = [
        click.option("-o", "--output", required=True, metavar="DIR", type=PATH, help="New folder for the report."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: as each library chooses]"),
        click.option("--quiet", "-q", is_flag=True, help="Hide progress."),
    ]
    return console.with_options(function, options)


def engine_options(function: F) -> F:
    """Add the options for opening a model and running it over folders: ``Engine``."""
    options = [
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt"]),
            default=Engine.backend,
            show_default=True,
            help="See cellseg-infer --help.",
        ),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda for tensorrt, else cpu]"),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of OpenVINO."),
        click.option(
            "--batch-size", type=click.IntRange(1), default=Engine.batch_size, show_default=True, help="Tiles per call."
        ),
        click.option("--streams", type=click.IntRange(1), help="Batches that OpenVINO computes at a time."),
    ]
    return console.with_options(function, options)


def scale_options(function: F) -> F:
    """Add ``--scale`` and ``--cell-diameter``: ``Scale``."""
    options = [
        click.option("--scale", type=float, help="Model px per image px.  [default: the training images' scale]"),
        click.option(
            "--cell-diameter", type=float, metavar="PX", help="Diameter of cells in the images, instead of --scale."
        ),
    ]
    return console.with_options(function, options)


def model_option(function: F) -> F:
    """Add ``--model``, for commands that measure a single model."""
    return click.option("--model", type=PATH, help="Model file.  [default: the one that ships]")(function)


def rounds_options(rounds: int, min_seconds: float = 0.2) -> Callable[[F], F]:
    """``--rounds``, ``--min-seconds``, ``--settle`` and ``--budget``, for the commands that interleave: ``timer.Plan``.

    The last two are named after the fields of ``Plan``.
    """
    options = [
        click.option(
            "--rounds", type=click.IntRange(1), default=rounds, show_default=True, help="Turns per measured item."
        ),
        click.option(
            "--min-seconds",
            type=click.FloatRange(0),
            default=min_seconds,
            show_default=True,
            help="Shortest length of a turn; shorter work is repeated.",
        ),
        click.option(
            "--settle",
            "settle_seconds",
            type=click.FloatRange(0),
            default=0.25,
            show_default=True,
            help="Seconds of rest before a turn, so that threads of the previous turn stop waiting for work.",
        ),
        click.option(
            "--budget",
            "budget_seconds",
            type=click.FloatRange(0),
            metavar="SECONDS",
            help="End the rounds (3 at least) after this long.",
        ),
    ]

    def decorate(function: F) -> F:
        return console.with_options(function, options)

    return decorate


def numbers(text: str, name: str, kind: type[float] = int) -> list[Any]:
    """``1,8`` as positive numbers without duplicates, in order; click's usage error names the option ``name``."""
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


def check_pair(images: Path | None, masks: Path | None) -> None:
    """Raise click's usage error if only one of the two folders is passed."""
    if (images is None) != (masks is None):
        raise click.UsageError("--images and --masks belong together: the images are judged by true cells")


def teller(quiet: bool) -> Callable[[str], None]:
    """Return the function that receives lines of progress."""
    return lambda line: None if quiet else console.say(console.printable(console.in_options(line)))


def progress(output: Path, benchmark: str) -> Progress:
    """Keep the figures of ``benchmark`` in ``output`` during the run; report it if they are all that is left."""
    from cellseg_benchmarks.harness.partial import Progress

    made = Progress(output, benchmark)

    def tell() -> None:
        if made.path is not None and made.path.is_file():
            console.say(f"what was measured until then is in {console.printable(made.path)}")

    click.get_current_context().call_on_close(tell)
    return made


class Bench:
    """One run of a command: the machine, the output folder, the receiver of messages.

    The machine is described before anything is measured. Without matplotlib there is no figure.
    """

    def __init__(self, benchmark: str, given: Mapping[str, Any]) -> None:
        from cellseg_benchmarks.harness import machine

        self.machine, self._before = machine.look(), machine.load()
        self.benchmark = benchmark
        self.output: Path = given["output"]
        self.threads: int | None = given.get("threads")
        self.say = teller(given["quiet"])

    def begin(self) -> Progress:
        """Make the folder, which must be new; figures are kept there during the run."""
        from cellseg_benchmarks.harness.report import new_folder

        new_folder(self.output)
        self.progress = progress(self.output, self.benchmark)
        return self.progress

    def conditions(self) -> Conditions:
        """Machine and load, read again after all measurements."""
        from cellseg_benchmarks.harness.machine import Conditions, load

        return Conditions(self.machine, self._before, load())

    def publish(self, report: Report, png: bytes | None) -> None:
        """Write and show ``report``; if it was stopped, end as the signal requires."""
        from cellseg_benchmarks.harness.report import write_report

        click.echo(write_report(self.output, report, png, self.progress))
        self.progress.finish()

    def devices(self, device: str) -> tuple[list[str], dict[str, str]]:
        """Devices to measure on for ``device_option``, and unavailable devices, with the reason.

        ``auto``: the CPU, and the GPU if there is one. Raises ``BackendUnavailableError`` if the GPU was requested
        explicitly.
        """
        from cellseg_deploy.errors import BackendUnavailableError

        missing = {"cuda": f"not yet run: {self.machine.no_gpu}"} if self.machine.gpu is None else {}
        if device == "cuda" and missing:
            raise BackendUnavailableError(f"--device cuda was requested, but {self.machine.no_gpu}")
        return (["cpu", "cuda"], missing) if device == "auto" else ([device], {})


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: the CPU, and the GPU where there is one.",
)
