"""Soak test: thousands of small files through the folder run, with a very cheap stub network. Does anything grow?

A night's run has two thousand photographs, and a small leak shows only after many of them. So the run is the real one,
the files are small and some are damaged, and the network is a stub; memory, descriptors, threads and temporary files
are sampled during the run. The same criteria are applied to a stub that leaks, which must fail them.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.folder.soak_files import CELL_DIAMETER_PX, make_files
from cellseg_benchmarks.harness.figures import Lines, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.memory import give_back_free_memory, rss_bytes
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, table
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import BackendUnavailableError, ParityError, UsageError
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX, make_folder
from cellseg_deploy.images.find import find_images
from cellseg_deploy.models.spec import ModelSpec, TrainingInfo, WeightsInfo, default_operating_points
from cellseg_deploy.run.folder import ImageResult, run_folder
from cellseg_deploy.segmenter import Segmenter

Leak = Literal["memory", "descriptors", "files"]
LEAKED_BYTES = 256 * 1024
"""Bytes that the leaking stub keeps per image: a few tiles of 59 kB each."""
FILES_FOLDER, RUN_FOLDER = "files", "run"
MAX_FILES = 99_999
_MIN_FILES = 20
_SAMPLES = 200
_WARM_UP_FILES = 60


@dataclass(frozen=True)
class Settings:
    """``files``: how many to make. ``bad``: share of damaged files, chosen by ``seed``. ``leak``: what the network
    keeps of each call, to check that the criteria detect it.

    Raises ``UsageError`` for invalid numbers.
    """

    files: int = 10_000
    bad: float = 0.05
    seed: int = 0
    leak: Leak | None = None

    def __post_init__(self) -> None:
        if not (_MIN_FILES <= self.files <= MAX_FILES and 0 <= self.bad <= 1):
            raise UsageError(
                f"expected {_MIN_FILES} to {MAX_FILES} files and a share of bad ones from 0 to 1, got {self.files} and "
                f"{self.bad}"
            )


@dataclass(frozen=True)
class Limits:
    """``growth_bytes``: resident memory that a file may add, as the slope over the second half of the run: a run keeps
    the numbers of each image until its tables are written. ``overhead_ms``: median time per file outside the network.
    """

    growth_bytes: float = 4096
    overhead_ms: float = 30.0


@dataclass(frozen=True)
class Sample:
    """State of this process after ``files`` files. ``temporary_files``: this package's in the output folder, and all
    in the process's folder for temporary files."""

    files: int
    resident_bytes: int
    descriptors: int
    threads: int
    temporary_files: int


@dataclass(frozen=True)
class Criterion:
    """One criterion of the run: the measured figure, the allowed figure and their unit."""

    name: str
    measured: float
    allowed: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the measured figure is within the limit; NaN never is."""
        return self.measured <= self.allowed


@dataclass(frozen=True)
class Soak:
    """Result of a run. ``before``: after a warm-up, before the run; ``after``: when the run has ended.

    ``overhead_ms``: wall time from one result to the next, without the network and without the sampling, one figure per
    file. ``wrong``: files with an unexpected result: a damaged one that did not fail, a sound one that failed
    or has another number of cells, one that was not reported.
    """

    n_files: int
    n_bad: int
    before: Sample
    after: Sample
    samples: tuple[Sample, ...]
    overhead_ms: tuple[float, ...]
    wrong: tuple[str, ...]
    wall_seconds: float

    def criteria(self, limits: Limits) -> list[Criterion]:
        """Criteria of the run, with its figures."""
        before, after = self.before, self.after
        return [
            Criterion("memory growth in the second half", self.growth_bytes, limits.growth_bytes, "bytes per file"),
            Criterion("file descriptors afterwards", after.descriptors, before.descriptors),
            Criterion("threads afterwards", after.threads, before.threads),
            Criterion("temporary files afterwards", after.temporary_files, before.temporary_files),
            Criterion("overhead outside the network, median", self.median_ms, limits.overhead_ms, "ms per file"),
            Criterion("files with a wrong result", len(self.wrong), 0),
        ]

    @property
    def growth_bytes(self) -> float:
        """Slope of the resident memory over the second half of the run, in bytes per file."""
        half = [sample for sample in self.samples if sample.files >= self.n_files / 2]
        return slope([sample.files for sample in half], [sample.resident_bytes for sample in half])

    @property
    def median_ms(self) -> float:
        """Median overhead per file."""
        return statistics.median(self.overhead_ms) if self.overhead_ms else float("nan")

    def resident_bytes_until(self, share: float) -> float:
        """Median resident memory of the last ten samples up to ``share`` of the run; NaN without samples."""
        until = [sample.resident_bytes for sample in self.samples if sample.files <= share * self.n_files]
        return statistics.median(until[-10:]) if until else float("nan")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Median slope of all pairs of points (Theil 1950, Sen 1968); NaN with fewer than two values of ``x``.

    A step, when the allocator takes or returns memory at once, does not tilt it as it would a least-squares line.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    first, second = np.triu_indices(len(xs), 1)
    apart = xs[first] != xs[second]
    if not apart.any():
        return float("nan")
    return float(np.median((ys[second] - ys[first])[apart] / (xs[second] - xs[first])[apart]))


class StubBackend(Backend):
    """A network of receptive field 1 x 1: a pixel is cell where it is darker than middle grey. Times itself.

    ``leak``: what it keeps of each call, to check that the criteria detect it.
    """

    name = "stub"
    device = "cpu"
    precision = "fp32"

    def __init__(self, leak: Leak | None = None) -> None:
        self.spec = ModelSpec(
            name="soak stub",
            variant="plain",
            channels=("foreground",),
            tile_size=140,
            halo=8,
            image_scale=1.0,
            cell_diameter_px=CELL_DIAMETER_PX,
            patch_size=14,
            encoder="none",
            weights=WeightsInfo(origin="made in place", licence="MIT"),
            training=TrainingInfo(),
            operating_points=default_operating_points("plain"),
        )
        self.leak = leak
        self.seconds = 0.0
        self._kept: list[bytes] = []
        self._descriptors: list[int] = []

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        seconds = stopwatch()
        for _ in tiles_nhwc:  # one tile per image
            self._leak()
        darkness = 1 - tiles_nhwc.mean(axis=3, dtype=np.float32) / 255
        answer = np.where(darkness > 0.5, np.float32(0.99), np.float32(0.01))[:, None]
        self.seconds += seconds()
        return answer

    def _leak(self) -> None:
        if self.leak == "memory":
            self._kept.append(os.urandom(LEAKED_BYTES))  # not zeros: zero pages take no memory until they are touched
        elif self.leak == "descriptors":
            self._descriptors.append(os.open(os.devnull, os.O_RDONLY))
        elif self.leak == "files":
            os.close(tempfile.mkstemp()[0])

    def _close(self) -> None:
        """Release the memory leaked on purpose."""
        self._kept.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())


def soak(
    folder: Path, settings: Settings, *, say: Callable[[str], None] = lambda _: None, progress: Progress | None = None
) -> Soak:
    """Make the files of ``settings`` in ``folder``/files and run to ``folder``/run.

    Raises ``BackendUnavailableError`` if the system has no /proc, and what the folder run raises.
    """
    if sys.platform != "linux":
        raise BackendUnavailableError("memory, descriptors and threads are read from /proc; use Linux")
    n_files, n_bad = settings.files, round(settings.files * settings.bad)
    say(f"making {n_files} files, {n_bad} of them damaged")
    truth = make_files(folder / FILES_FOLDER, n_files, n_bad, settings.seed)
    with _own_temporary_folder(folder / "tmp") as temporary, StubBackend(settings.leak) as backend:
        _warm_up(folder, settings.seed)
        progress = progress or Progress()
        watch = _Watch(backend, folder / RUN_FOLDER, temporary, truth, say, progress)
        before, seconds = watch.sample(), stopwatch()
        images = find_images([folder / FILES_FOLDER])
        watch.wait_for_next()
        with progress.stoppable(lambda: f"{n_files - watch.files} of {n_files} files"):
            run_folder(Segmenter(backend), images, folder / RUN_FOLDER, on_result=watch)
        wall_seconds = seconds()
        gc.collect()
        return Soak(
            n_files=watch.files if progress.stopped else n_files,
            n_bad=n_bad,
            before=before,
            after=watch.sample(everywhere=True),
            samples=tuple(watch.samples),
            overhead_ms=tuple(watch.overhead_ms),
            wrong=tuple(watch.mistaken if progress.stopped else watch.wrong()),
            wall_seconds=wall_seconds,
        )


class _Watch:
    """Called by the run for each image: times it, checks its result, and samples the process now and then."""

    def __init__(
        self,
        backend: StubBackend,
        out: Path,
        temporary: Path,
        truth: dict[str, int | None],
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.backend, self.out, self.temporary, self.say, self.progress = backend, out, temporary, say, progress
        self.n_files, self.files = len(truth), 0
        self.unreported = dict(truth)
        self.mistaken: list[str] = []
        self.samples: list[Sample] = []
        self.overhead_ms: list[float] = []
        self._every = max(1, len(truth) // _SAMPLES)

    def wait_for_next(self) -> None:
        """Start the clock of the next image."""
        self._network, self._since = self.backend.seconds, stopwatch()

    def __call__(self, result: ImageResult) -> None:
        self.overhead_ms.append(1000 * (self._since() - (self.backend.seconds - self._network)))
        self.files += 1
        expected = self.unreported.pop(result.image, -1)
        if (result.status == "done", result.cells) != (expected is not None, expected):
            self.mistaken.append(f"{result.image}: {result.status}, {result.cells} cells, made with {expected}")
        if self.files % self._every == 0 or self.files == self.n_files:
            self.samples.append(self.sample())
        if self.files % (10 * self._every) == 0:
            self.progress.keep("samples", self.samples)
            self.say(f"{self.files}/{self.n_files} files, {self.samples[-1].resident_bytes / 2**20:.0f} MiB")
        self.wait_for_next()

    def sample(self, *, everywhere: bool = False) -> Sample:
        """State of the process now; ``everywhere``: temporary files also in subfolders of the output folder."""
        ours = f"{TEMPORARY_PREFIX}*"
        found = list(self.out.rglob(ours) if everywhere else self.out.glob(ours))
        # The reserve of each thread's arena varies with other load on the machine; leaked memory is in use.
        give_back_free_memory()
        resident = rss_bytes()
        if resident is None:
            raise BackendUnavailableError("/proc/self/status does not say VmRSS, the memory that is held; use Linux")
        return Sample(
            files=self.files,
            resident_bytes=resident,
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            threads=len(list(Path("/proc/self/task").iterdir())),
            temporary_files=len(found) + len(list(self.temporary.iterdir())),
        )

    def wrong(self) -> list[str]:
        """Files with an unexpected result."""
        return [*self.mistaken, *(f"{name}: never reported" for name in self.unreported)]


def _warm_up(folder: Path, seed: int) -> None:
    """Run a few files of every kind, so that libraries have loaded what they load once."""
    with tempfile.TemporaryDirectory(dir=folder) as place, StubBackend() as backend:
        files = Path(place) / FILES_FOLDER
        make_files(files, _WARM_UP_FILES, _WARM_UP_FILES // 3, seed)
        run_folder(Segmenter(backend), find_images([files]), Path(place) / RUN_FOLDER)
    gc.collect()


@contextmanager
def _own_temporary_folder(folder: Path) -> Iterator[Path]:
    """Use ``folder`` as the process's folder for temporary files, so that those of other programs are not counted.

    It is removed afterwards if it is empty.
    """
    make_folder(folder)
    former, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = former
        if not any(folder.iterdir()):
            folder.rmdir()


_MIB = 2**20
_MOST_WRONG = 20


@dataclass(frozen=True)
class SoakReport:
    """``settings``: options of the command. ``verdict``: ``holds``, or the criteria that do not hold."""

    conditions: Conditions
    settings: Settings
    limits: Limits
    soak: Soak
    criteria: tuple[Criterion, ...]
    verdict: str
    benchmark: str = "soak"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return the criteria as a table, and further results of the run."""
        soak = self.soak
        words = " ".join(f"--{name} {value}" for name, value in asdict(self.settings).items() if value is not None)
        rows = [
            [c.name, _figure(c.measured), f"{_figure(c.allowed)} {c.unit}".strip(), "holds" if c.holds else "**fails**"]
            for c in self.criteria
        ]
        resident = [sample.resident_bytes for sample in soak.samples]
        lines = [
            "# Soak",
            "",
            *machine_lines(self.conditions, None),
            f"`python -m cellseg_benchmarks soak {words}`: {soak.n_files} files, {soak.n_bad} of them damaged, in "
            f"{soak.wall_seconds:.0f} s, {1000 * soak.wall_seconds / soak.n_files:.1f} ms per file with all that comes "
            f"before the first and after the last. **{self.verdict[0].upper()}{self.verdict[1:]}.**",
            "",
            *table(("criterion", "measured", "allowed", "verdict"), rows),
            "",
            f"Resident memory: {_figure(soak.before.resident_bytes / _MIB)} MiB before, "
            f"{_figure(soak.resident_bytes_until(0.5) / _MIB)} MiB in the middle, "
            f"{_figure(soak.resident_bytes_until(1) / _MIB)} MiB at the end, "
            f"{_figure(max(resident) / _MIB)} MiB at most.",
            "",
            f"Overhead: 95 % of files below {np.quantile(soak.overhead_ms, 0.95):.1f} ms, the slowest "
            f"{max(soak.overhead_ms):.0f} ms. Most at a time: {max(s.descriptors for s in soak.samples)} descriptors, "
            f"{max(s.threads for s in soak.samples)} threads.",
        ]
        if soak.wrong:
            lines += ["", "Wrong results:", "", *(f"- {line}" for line in soak.wrong[:_MOST_WRONG])]
        return "\n".join(lines) + "\n"


def judged(soak: Soak, limits: Limits, conditions: Conditions, settings: Settings) -> SoakReport:
    """Return the report of ``soak`` with its verdict."""
    criteria = tuple(soak.criteria(limits))
    failed = [criterion.name for criterion in criteria if not criterion.holds]
    verdict = f"fails: {', '.join(failed)}" if failed else "holds"
    return SoakReport(conditions, settings, limits, soak, criteria, verdict)


def png(report: SoakReport) -> bytes:
    """Plot resident memory over files with the limit from the middle on, and the overhead between two samples."""
    soak, limits = report.soak, report.limits
    files = [float(sample.files) for sample in soak.samples]
    middle, start = soak.n_files / 2, soak.resident_bytes_until(0.5) / _MIB
    memory = {
        "resident": (files, [sample.resident_bytes / _MIB for sample in soak.samples]),
        f"{limits.growth_bytes:g} bytes per file, the most allowed": (
            [middle, float(soak.n_files)],
            [start, start + limits.growth_bytes * middle / _MIB],
        ),
    }
    windows = [soak.overhead_ms[int(first) : int(last)] for first, last in pairwise([0.0, *files])]
    overhead = {
        "median": (files, [float(np.median(window)) for window in windows]),
        "95 % below": (files, [float(np.quantile(window, 0.95)) for window in windows]),
        "allowed for the median": ([0.0, float(soak.n_files)], [limits.overhead_ms] * 2),
    }
    panels = (
        Lines("memory of the process", "files", "MiB", memory, logarithmic=False),
        Lines("per file outside the network", "files", "ms", overhead, logarithmic=False, logarithmic_y=True),
    )
    return panels_png(panels, title=f"{soak.n_files} files, {soak.n_bad} damaged: {report.verdict}")


def _figure(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.1f}"


@click.command("soak", context_settings=shared.SETTINGS)
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="New folder.")
@click.option(
    "--files", type=click.IntRange(20, MAX_FILES), default=Settings.files, show_default=True, help="Number of images."
)
@click.option(
    "--bad", type=click.FloatRange(0, 1), default=Settings.bad, show_default=True, help="Share of damaged images."
)
@click.option(
    "--seed", type=click.IntRange(0), default=Settings.seed, show_default=True, help="Chooses the damaged images."
)
@click.option(
    "--leak",
    type=click.Choice(["memory", "descriptors", "files"]),
    is_flag=False,
    flag_value="memory",
    help="Make the network leak (memory by default): the verdict must then fail.",
)
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def soak_command(**given: Any) -> None:
    """A folder run over thousands of small images with a stub network: does anything grow, and what does a file cost?

    Makes the images in DIR/files, runs to DIR/run, and writes soak.json, soak.md and soak.png to DIR. Exit code 5 if a
    criterion fails: memory flat; descriptors, threads and temporary files back to where they were; at most 30 ms per
    file outside the network; each result the right one. Linux only.
    """
    bench = shared.Bench("soak", given)
    progress = bench.begin()
    settings = shared.settings_of(Settings, given)
    found = soak(bench.output, settings, say=bench.say, progress=progress)
    report = judged(found, Limits(), bench.conditions(), settings)
    bench.publish(report, png(report))
    if report.verdict != "holds":
        raise ParityError(f"the soak {report.verdict}; see {bench.output / 'soak.md'}")
