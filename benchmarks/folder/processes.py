"""Several processes for decoding and labelling, feeding one engine, against the threads of one process.

The engine is a stub that takes a set time per tile and almost no CPU, as a GPU does, so that decoding and labelling
bound the run. Each process runs its share of the folder as ``cellseg-infer`` does; its tiles go to the engine's process
through shared memory. Label images must have the same bytes in every form. Tables are written per share and not merged:
that is left out of the processes' time, in their favour.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, table
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import CellsegError, DataError, plural
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.segmenter import BATCH_SIZE, Segmenter
from cellseg_deploy.threads import ThreadPlan, cores

Tiles = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
_GREY_OF_CELLS = 200


class StubEngine(Backend):
    """Darkness as foreground, ``seconds`` per tile in all, of which most is waiting."""

    name, device, precision = "stub", "cuda", "fp32"

    def __init__(self, spec: ModelSpec, seconds: float) -> None:
        self.spec, self._seconds = spec, seconds
        grey = np.arange(256, dtype=np.float32)
        self._foreground = 1 / (1 + np.exp((grey - _GREY_OF_CELLS) / 4))
        self._others = np.zeros((len(spec.channels), 1, 1), np.float32)
        if spec.classes:
            self._others[-len(spec.classes)] = 1

    def _predict(self, tiles_nhwc: Tiles) -> Probabilities:
        import cv2

        since = stopwatch()
        n, size = len(tiles_nhwc), self.spec.tile_size
        out = np.empty((n, len(self.spec.channels), size, size), np.float32)
        out[:] = self._others
        for tile_hwc, maps_khw in zip(tiles_nhwc, out, strict=True):
            np.take(self._foreground, cv2.cvtColor(tile_hwc, cv2.COLOR_RGB2GRAY), out=maps_khw[0], mode="clip")
        time.sleep(max(0.0, n * self._seconds - since()))
        return out


@dataclass(frozen=True)
class Place:
    """Shared memory of one process: ``batch`` tiles in, their probabilities out."""

    name: str
    batch: int
    spec: ModelSpec

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        size = self.spec.tile_size
        return (self.batch, size, size, 3), (self.batch, len(self.spec.channels), size, size)

    @property
    def nbytes(self) -> int:
        tiles, probabilities = self.shapes
        return int(np.prod(tiles)) + 4 * int(np.prod(probabilities))

    def views(self, memory: SharedMemory) -> tuple[Tiles, Probabilities]:
        tiles, probabilities = self.shapes
        first: Tiles = np.ndarray(tiles, np.uint8, memory.buf)
        return first, np.ndarray(probabilities, np.float32, memory.buf, first.nbytes)


class EngineElsewhere(Backend):
    """The engine of another process, through shared memory."""

    name, device, precision = "stub", "cuda", "fp32"

    def __init__(self, place: Place, memory: SharedMemory, connection: Connection) -> None:
        self.spec, self._connection = place.spec, connection
        self._tiles, self._probabilities = place.views(memory)

    def _predict(self, tiles_nhwc: Tiles) -> Probabilities:
        n = len(tiles_nhwc)
        self._tiles[:n] = tiles_nhwc
        self._connection.send(n)
        self._connection.recv()
        return self._probabilities[:n].copy()


@dataclass(frozen=True)
class Form:
    """``processes`` that read and label, each with ``helpers`` threads; ``apart``: the engine is in another process."""

    processes: int
    helpers: int
    apart: bool

    def __str__(self) -> str:
        where = "engine in its own process" if self.apart else "engine in the same process"
        return f"{plural(self.processes, 'process', 'processes')} of {plural(self.helpers, 'thread')}, {where}"


@dataclass(frozen=True)
class Share:
    """What one process works on: ``images`` into the folder ``out``. ``place``: None for an engine of its own."""

    images: tuple[str, ...]
    out: str
    helpers: int
    spec: ModelSpec
    seconds_per_tile: float
    place: Place | None


def work(share: Share, engine: Connection, control: Connection) -> None:
    """Body of a process: run one image, say that it is ready, wait for the start, run, and send the CPU seconds."""
    with ExitStack() as stack:
        backend: Backend
        if share.place is None:
            backend = StubEngine(share.spec, share.seconds_per_tile)
        else:
            memory = SharedMemory(share.place.name)
            stack.callback(memory.close)
            backend = EngineElsewhere(share.place, memory, engine)
        segmenter = Segmenter(backend, cell_diameter_px=image_set.DIAMETER_PX)
        images = find_images([Path(path) for path in share.images], follow_links=True)
        count(segmenter, images[:1], Path(f"{share.out}-warm"), share.helpers)  # libraries load on first use
        control.send("ready")
        control.recv()
        before = cpu_seconds()
        summary = count(segmenter, images, Path(share.out), share.helpers)
        if summary.failed:
            raise DataError(f"{summary.failed} of {summary.found} images failed")
        control.send(cpu_seconds() - before)
        del backend, segmenter  # they hold views of the shared memory


def count(segmenter: Segmenter, images: list[FoundImage], out: Path, helpers: int) -> RunSummary:
    """The folder run as shipped, without the report."""
    return run_folder(segmenter, images, out, options=RunOptions(report=False), threads=ThreadPlan(1, helpers))


def cpu_seconds() -> float:
    """CPU time of this process, all threads, user and system."""
    taken = os.times()
    return taken.user + taken.system


@dataclass(frozen=True)
class Run:
    """One run of all images. ``cpu_seconds``: of all processes together. ``labels``: SHA-256 over all label images."""

    form: Form
    round: int
    seconds: float
    cpu_seconds: float
    labels: str


def run(form: Form, images: Sequence[Path], folder: Path, spec: ModelSpec, seconds_per_tile: float, round_: int) -> Run:
    """Run ``images`` in ``form``, into new folders below ``folder``. Processes are started before the clock is."""
    context = multiprocessing.get_context("spawn")
    one_at_a_time = threading.Lock()
    with ExitStack() as stack:
        children, controls, servers = [], [], []
        outs = [folder / f"out-{k}" for k in range(form.processes)]
        engine = stack.enter_context(StubEngine(spec, seconds_per_tile))
        for k, out in enumerate(outs):
            ours, theirs = context.Pipe()
            control, their_control = context.Pipe()
            place = None
            if form.apart:
                size = Place("", BATCH_SIZE, spec).nbytes
                memory = SharedMemory(create=True, size=size)
                stack.callback(memory.unlink)
                stack.callback(memory.close)
                place = Place(memory.name, BATCH_SIZE, spec)
                servers.append(threading.Thread(target=serve, args=(engine, one_at_a_time, ours, place, memory)))
            mine = tuple(map(str, images[k :: form.processes]))
            share = Share(mine, str(out), form.helpers, spec, seconds_per_tile, place)
            child = context.Process(target=work, args=(share, theirs, their_control))
            child.start()
            theirs.close()
            their_control.close()
            children.append(child)
            controls.append(control)
            if not form.apart:
                ours.close()
        for server in servers:
            server.start()
        for control in controls:
            answered(control)
        since, before = stopwatch(), cpu_seconds()
        for control in controls:
            control.send("go")
        taken = [float(answered(control)) for control in controls]
        seconds = since()
        cpu = sum(taken) + cpu_seconds() - before
        for child in children:
            child.join()
        for server in servers:
            server.join()
    return Run(form, round_, seconds, cpu, digest(outs))


def serve(engine: Backend, one_at_a_time: threading.Lock, pipe: Connection, place: Place, memory: SharedMemory) -> None:
    """Answer the tiles of one process until it ends."""
    tiles, probabilities = place.views(memory)
    while True:
        try:
            n = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        with one_at_a_time:
            probabilities[:n] = engine.predict(tiles[:n])
        pipe.send(n)


def answered(control: Connection) -> Any:
    """Receive from a process; raises ``CellsegError`` if it ended instead."""
    try:
        return control.recv()
    except EOFError:
        raise CellsegError("a process of the benchmark ended early; its own message is above") from None


def digest(outs: Sequence[Path]) -> str:
    """SHA-256 over names and bytes of all label images of the folders ``outs``."""
    found = {path.name: path.read_bytes() for out in outs for path in (out / "labels").iterdir()}
    whole = hashlib.sha256()
    for name, data in sorted(found.items()):
        whole.update(f"{name} {len(data)} ".encode() + data)
    return whole.hexdigest()


@dataclass(frozen=True)
class ProcessesReport:
    """``cores``: that this process may use. ``ms_per_tile``: of the stub engine."""

    conditions: Conditions
    images: int
    megapixels: float
    ms_per_tile: float
    cores: int
    runs: tuple[Run, ...]
    report_version: int = REPORT_VERSION

    @property
    def benchmark(self) -> str:
        return "processes"

    def rows(self) -> list[list[str]]:
        """Cells of the table: medians over rounds; ratios to the first form, within a round."""
        forms = list(dict.fromkeys(item.form for item in self.runs))
        first = {item.round: item for item in self.runs if item.form == forms[0]}
        rows = []
        for form in forms:
            of_form = [item for item in self.runs if item.form == form]
            ratios = [first[item.round].seconds / item.seconds for item in of_form]
            rows.append(
                [
                    str(form),
                    number(statistics.median(self.images / item.seconds for item in of_form)),
                    number(statistics.median(ratios)),
                    number(statistics.median(item.cpu_seconds / self.images for item in of_form)),
                    number(statistics.median(item.cpu_seconds / item.seconds for item in of_form)),
                ]
            )
        return rows

    def to_markdown(self) -> str:
        """The table, and on what it was measured."""
        head = ["form", "images/s", "x the first", "CPU s per image", "cores busy"]
        lines = [
            "# Processes for decoding and labelling",
            "",
            *machine_lines(self.conditions, None),
            f"{self.images} PNG files of {self.megapixels:.2g} megapixels; stub engine of {self.ms_per_tile:g} ms per "
            f"tile; {self.cores} cores; label images of all {len(self.runs)} runs have the same bytes.",
            "",
            *table(head, self.rows()),
        ]
        return "\n".join(lines) + "\n"


def measure(
    images: Sequence[Path],
    forms: Sequence[Form],
    rounds: int,
    ms_per_tile: float,
    work_in: Path,
    say: Callable[[str], None],
) -> list[Run]:
    """Run each of ``forms`` once per round, in alternating order. Raises ``DataError`` if label images differ."""
    spec = read_model_file(default_model_path()).spec
    runs: list[Run] = []
    for round_ in range(rounds):
        for form in forms if round_ % 2 == 0 else forms[::-1]:
            with tempfile.TemporaryDirectory(dir=work_in) as folder:
                found = run(form, images, Path(folder), spec, ms_per_tile / 1000, round_)
            say(f"round {round_ + 1} of {rounds}: {form}: {len(images) / found.seconds:.2f} images/s")
            if runs and found.labels != runs[0].labels:
                raise DataError(f"label images of {form} are not those of {runs[0].form}")
            runs.append(found)
    return runs


@click.command("processes", context_settings=shared.SETTINGS)
@click.option("--images", type=click.IntRange(1), default=16, show_default=True, help="Images in a folder.")
@click.option("--megapixels", type=float, default=1.92, show_default=True, help="Size of a sample smear.")
@click.option("--processes", default="1,2", show_default=True, metavar="N,...", help="Processes that feed the engine.")
@click.option(
    "--ms-per-tile", type=click.FloatRange(0), default=1.0, show_default=True, help="Time of the stub engine."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each form.")
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="New folder for the report.")
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def processes_command(
    images: int, megapixels: float, processes: str, ms_per_tile: float, rounds: int, **given: Any
) -> None:
    """Several processes for decoding and labelling against the threads of one, with a stub engine as fast as a GPU.

    Writes processes.json and processes.md to DIR.
    """
    image_set.check_size(megapixels)
    usable = cores()
    forms = [Form(1, usable, apart=False)]
    forms += [Form(n, max(1, usable // n), apart=True) for n in shared.numbers(processes, "--processes")]
    bench = shared.Bench("processes", given)
    bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        hw = image_set.size_for(megapixels)
        made = image_set.smears(min(images, image_set.DIFFERENT), hw)
        folders, _ = image_set.write_set(Path(place), made, ["png"], images)
        files = sorted(folders["png"].iterdir())
        runs = measure(files, forms, rounds, ms_per_tile, Path(place), bench.say)
    report = ProcessesReport(bench.conditions(), images, megapixels, ms_per_tile, usable, tuple(runs))
    bench.publish(report, b"")
