"""Time per batch of tiles, form by form, next to PyTorch and next to the limits of the machine.

For each network and batch size every form is opened in its own worker and timed in the same rounds as the matrix
products that give the machine's peak. If memory cannot hold all forms, they are timed in several
*sittings*; PyTorch in fp32 and the fastest other form of PyTorch take part in each, so that every ratio is of paired
rounds. Before timing, every form processes the same tiles, and its output is compared with PyTorch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.engine.limits import Limits, limit_workers, size_option
from cellseg_benchmarks.harness import memory
from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png
from cellseg_benchmarks.harness.form_files import Network, make_forms, network_of
from cellseg_benchmarks.harness.forms import REFERENCE, Form, forms_for
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import (
    NOT_RUN,
    REPORT_VERSION,
    machine_lines,
    megabytes,
    number,
    percent,
    table,
    times,
)
from cellseg_benchmarks.harness.timer import Plan, Ratio, Times, Turn, interleave, ratio, times_faster
from cellseg_benchmarks.harness.worker import Peak, Worker, WorkerError
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, ModelError
from cellseg_deploy.models import default_weights_path

Say = Callable[[str], None]
StartWorker = Callable[[Network, Form, int, int | None], Worker]

_BYTES_PER_WEIGHT_BYTE = 3.0
"""Memory of a form per byte of fp32 weights: the file, the parsed graph, the engine's own copy."""
_BYTES_A_PROCESS = 600e6
_BYTES_OF_LIMITS = 2e9
"""Memory of the workers that multiply matrices, in bytes."""


@dataclass(frozen=True)
class Row:
    """Result for one form of one network at one batch size.

    ``parity``: verdict of the gate. ``times``: per call. ``reference`` and ``best``: how many times as fast as
    PyTorch in fp32, and as the fastest other form of PyTorch (``best_pytorch``), on the same kind of device.
    ``tflops``: of the network's own arithmetic. ``share_of_peak``: of the fastest matrix product in the same
    precision on that device. ``flipped``: share of pixels whose foreground is on the other side of 0.5 than PyTorch's
    (fp32). ``peak``: memory of its process. ``sitting``: rounds it took part in; ``again``: only for comparison.
    """

    network: str
    batch: int
    form: str
    engine: str
    device: str
    arithmetic: str
    parity: str
    status: Literal["measured", "not run"]
    reason: str = ""
    sitting: int = 0
    again: bool = False
    times: Times | None = None
    ms_per_tile: float | None = None
    iqr_ms_per_tile: float | None = None
    tiles_per_second: float | None = None
    first_call_ms: float | None = None
    tflops: float | None = None
    peak_tflops: float | None = None
    share_of_peak: Ratio | None = None
    reference: Ratio | None = None
    best: Ratio | None = None
    best_pytorch: str = ""
    flipped: float | None = None
    largest_difference: float | None = None
    peak: Peak | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyReport:
    """All rows with the limits of each sitting."""

    conditions: Conditions
    threads: int | None
    plan: Plan
    gflop_per_tile: dict[str, float | None]
    rows: tuple[Row, ...]
    limits: tuple[Limits, ...]
    benchmark: str = "latency"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        return _markdown(self)


def measure_latency(
    networks: Sequence[Network],
    forms: Sequence[Form],
    batches: Sequence[int],
    plan: Plan,
    *,
    threads: int | None = None,
    absent: Mapping[str, str] | None = None,
    limit_size: int | None = None,
    start: StartWorker | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> tuple[list[Row], list[Limits]]:
    """Rows of every form of every network at every batch size, in order, and the limits of each sitting.

    ``absent``: unavailable devices (``cuda``) with the reason; forms on them become rows with that reason.
    ``limit_size``: side of the matrices for the peak, None for the default.
    """
    start, progress = start or start_form, progress or Progress()
    rows: list[Row] = []
    limits: list[Limits] = []
    for network in networks:
        for batch in batches:
            if progress.skips(f"{network.name}, batches of {batch}"):
                continue
            say(f"{network.name}, batches of {batch}")
            made = _Group(network, batch, plan, threads, limit_size, start, say, progress, first_sitting=len(limits))
            made.measure(forms, absent or {})
            rows += made.rows
            limits += made.limits
    return rows, limits


def start_form(network: Network, form: Form, batch: int, threads: int | None) -> Worker:
    """Start a worker with ``form`` opened for ``batch`` tiles per call."""
    arguments = {
        "engine": form.engine,
        "network": str(network.weights),
        "file": str(network.file(form)),
        "device": form.device,
        "batch": batch,
        "threads": threads,
        "settings": form.settings,
    }
    return Worker("form", arguments, threads=threads)


def forms_at_once(weights_bytes: int, available: int | None) -> int:
    """How many forms of a network fit into ``available`` bytes of memory at a time; at least two."""
    if available is None:
        return 1000
    return max(
        2, int((0.8 * available - _BYTES_OF_LIMITS) / (_BYTES_PER_WEIGHT_BYTE * weights_bytes + _BYTES_A_PROCESS))
    )


@dataclass
class _Group:
    """One network at one batch size."""

    network: Network
    batch: int
    plan: Plan
    threads: int | None
    limit_size: int | None
    start: StartWorker
    say: Say
    progress: Progress
    first_sitting: int
    rows: list[Row] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    _answers: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def measure(self, forms: Sequence[Form], absent: Mapping[str, str]) -> None:
        found: dict[str, Row] = {}
        pending: list[Form] = []
        for form in forms:
            reason = absent.get(form.device, "") or self.network.missing(form)
            if reason:
                found[form.key] = self._row(form, "not run", reason=reason)
            else:
                pending.append(form)
        room = forms_at_once(_weights_bytes(self.network.weights), memory.available_bytes())
        # PyTorch first: the others are compared with its fastest form.
        pending.sort(key=lambda form: (form.device, form.engine != "pytorch"))
        with self.progress.stoppable(lambda: ""):
            while pending and self.progress.stopped is None:
                anchors = self._anchors(found, pending[0].device, forms)
                n_new = max(1, room - len(anchors))
                new = [form for form in pending if form.device == pending[0].device][:n_new]
                for row in self._sitting([*anchors, *new], again=frozenset(form.key for form in anchors)):
                    if row.again:
                        self.rows.append(row)
                    else:
                        found[_key(row)] = row
                pending = [form for form in pending if form not in new]
        for form in pending:  # stopped by a signal
            found.setdefault(form.key, self._row(form, "not run", reason="stopped before it was measured"))
            self.progress.skips(f"{form.key} of {self.network.name}, batches of {self.batch}")
        self.rows = [found[form.key] for form in forms if form.key in found] + self.rows

    def _anchors(self, found: Mapping[str, Row], device: str, forms: Sequence[Form]) -> list[Form]:
        """PyTorch's fp32 and its fastest form, if they were timed in an earlier sitting on ``device``."""
        timed = [row for row in found.values() if row.device == device and row.times and row.engine == "pytorch"]
        keys = {_key(row) for row in timed if row.form == REFERENCE}
        # Sittings differ, so forms of PyTorch are ranked relative to the reference of their own sitting.
        keys |= {_key(max(timed, key=lambda row: row.reference.median if row.reference else 0))} if timed else set()
        return [form for form in forms if form.key in keys]

    def _sitting(self, forms: Sequence[Form], again: frozenset[str]) -> list[Row]:
        number = self.first_sitting + len(self.limits)
        rows: dict[str, Row] = {}
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for form in forms:
                self.say(f"  opening {form.key} ...")
                try:
                    workers[form.key] = stack.enter_context(self.start(self.network, form, self.batch, self.threads))
                    self._answers[form.key] = _answer(workers[form.key])
                except WorkerError as error:
                    rows[form.key] = self._row(form, "not run", reason=str(error))
                    self.say(f"  {form.key}: not run: {error}")
            devices = sorted({form.device for form in forms if form.key in workers})
            limiters = stack.enter_context(
                limit_workers(devices, threads=self.threads, products_only=True, size=self.limit_size)
            )
            entries: dict[str, Turn] = {key: worker.turn("predict") for key, worker in workers.items()}
            measured = interleave(
                entries | limiters.entries(),
                self.plan,
                say=lambda line: self.say(f"  {line}"),
                progress=self.progress,
                name=f"{self.network.name}, batches of {self.batch}, sitting {number}, rounds",
            )
            limits = limiters.limits(measured)
            self.limits.append(limits)
            for form in forms:
                if form.key not in workers:
                    continue
                if form.key not in measured.times:
                    rows[form.key] = self._row(form, "not run", reason=measured.failed[form.key])
                    continue
                worker = workers[form.key]
                row = self._timed(form, measured.times, limits)
                rows[form.key] = replace(row, peak=_peak(worker), details=worker.facts, sitting=number)
        ordered = [replace(rows[form.key], again=form.key in again, sitting=number) for form in forms]
        return [self._with_best(row, ordered) for row in ordered]

    def _row(self, form: Form, status: Literal["measured", "not run"], *, reason: str = "") -> Row:
        return Row(
            self.network.name,
            self.batch,
            form.name,
            form.engine,
            form.device,
            form.arithmetic,
            self.network.verdict(form),
            status,
            reason,
        )

    def _timed(self, form: Form, times: Mapping[str, Times], limits: Limits) -> Row:
        mine = times[form.key]
        row = self._row(form, "measured")
        reference_key = form.key.replace(form.name, REFERENCE)
        reference, answer = self._answers.get(reference_key), self._answers[form.key]
        row = replace(
            row,
            times=mine,
            ms_per_tile=1e3 * mine.median / self.batch,
            iqr_ms_per_tile=1e3 * mine.iqr / self.batch,
            tiles_per_second=self.batch / mine.median,
            first_call_ms=1e3 * mine.first_seconds,
            reference=times_faster(times[reference_key], mine) if reference_key in times else None,
            flipped=None if reference is None else flipped_share(reference, answer),
            largest_difference=None if reference is None else float(np.abs(reference - answer).max()),
        )
        if self.network.flops is None:
            return row
        work = self.network.flops.total * self.batch
        row = replace(row, tflops=work / mine.median / 1e12)
        peak = limits.peak(form.arithmetic, form.device)
        if peak is None:
            return row
        share = ratio(peak.times.seconds, mine.seconds).scaled(work / peak.work)
        return replace(row, peak_tflops=peak.rate, share_of_peak=share)

    def _with_best(self, row: Row, sitting: Sequence[Row]) -> Row:
        """``row`` compared with the fastest form of PyTorch of its sitting on its device."""
        rivals = [other for other in sitting if other.times and (other.engine, other.device) == ("pytorch", row.device)]
        if not rivals or row.times is None:
            return row
        best = min(rivals, key=lambda other: other.times.median if other.times else 0)
        assert best.times is not None
        return replace(row, best=times_faster(best.times, row.times), best_pytorch=best.form)


def flipped_share(reference: np.ndarray[Any, Any], answer: np.ndarray[Any, Any]) -> float:
    """Share of pixels of the first channel (foreground) of (N, K, H, W) that are on different sides of 0.5."""
    return float(np.mean((reference[:, 0] >= 0.5) != (answer[:, 0] >= 0.5)))


def _answer(worker: Worker) -> np.ndarray[Any, Any]:
    with tempfile.TemporaryDirectory(prefix="cellseg-latency-") as folder:
        path = Path(folder) / "answer.npy"
        worker.ask("save", path=str(path))
        answer: np.ndarray[Any, Any] = np.load(path)
        return answer


def _peak(worker: Worker) -> Peak | None:
    """Peak memory of ``worker``; None if it was ended, as happens to the one interrupted by a signal."""
    try:
        return worker.peak()
    except WorkerError:
        return None


def _key(row: Row) -> str:
    return row.form if row.device == "cpu" else f"{row.form} on {row.device}"


def _weights_bytes(weights: Path) -> int:
    file = weights if weights.is_file() else weights / "model.safetensors"
    return file.stat().st_size if file.is_file() else 0


_HEAD = (
    *("form", "device", "parity", "ms per tile", "IQR", "tiles/s", "TFLOP/s", "of peak", "x eager fp32"),
    *("x PyTorch's best", "flipped px", "memory, MB", "GPU memory, MB"),
)


def _markdown(report: LatencyReport) -> str:
    """A table for each network and batch size, then the limits."""
    plan = report.plan
    lines = ["# Latency of the network", "", *machine_lines(report.conditions, report.threads)]
    lines += [
        f"Up to {plan.rounds} interleaved rounds, turns of at least {plan.min_seconds:g} s; medians, and ratios of "
        "paired rounds with their 95 % bootstrap interval. Times are host to host: uint8 tiles in, float32 "
        "probabilities out. *of peak*: of the fastest product of matrices in that precision, in the same rounds. "
        "*flipped px*: pixels whose foreground is on the other side of 0.5 than PyTorch's in fp32. *memory*: peak of "
        "the form's process, libraries included; *GPU memory*: taken by opening it and the first call. fp32 is "
        "computed without TF32 on a GPU.",
        "",
    ]
    for network, batch in groups(report.rows):
        rows = [row for row in report.rows if (row.network, row.batch) == (network, batch) and not row.again]
        work = report.gflop_per_tile.get(network)
        told = "" if work is None else f", {number(work)} GFLOP per tile"
        best = next((row.best_pytorch for row in rows if row.best_pytorch), "")
        lines += [f"## {network}, batches of {batch}{told}", ""]
        lines += [f"PyTorch's best: {best}.", ""] if best else []
        lines += [*table(_HEAD, [_cells(row) for row in rows], words=3), ""]
        lines += [f"- {row.form} on {row.device}: {row.reason}" for row in rows if row.reason]
        lines += [""]
    lines += ["## Limits of the machine", ""]
    for place, limits in enumerate(report.limits):
        lines += [f"Sitting {place + 1}:", "", limits.to_markdown()]
    return "\n".join(lines)


def png(report: LatencyReport) -> bytes:
    """Bar chart: ms per tile of each form, with its interquartile range."""
    panels = []
    for network, batch in groups(report.rows):
        bars = [
            Bar(
                row.form if row.device == "cpu" else f"{row.form}, {row.device}",
                row.ms_per_tile,
                (row.iqr_ms_per_tile or 0) / 2,
                _note(row),
                row.engine,
            )
            for row in report.rows
            if (row.network, row.batch) == (network, batch) and not row.again
        ]
        panels.append(Bars(f"{network}, batches of {batch}", "ms per tile, median and IQR", tuple(bars)))
    return panels_png(panels, title=f"Latency of the network: {report.conditions.machine.processor}")


def groups(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Networks and batch sizes in order."""
    return list(dict.fromkeys((row.network, row.batch) for row in rows))


def _note(row: Row) -> str:
    if row.ms_per_tile is None:
        return NOT_RUN
    faster = "" if row.reference is None else f", {row.reference.median:.1f}x"
    return f"{number(row.ms_per_tile)} ms{faster}"


def _cells(row: Row) -> list[str]:
    if row.ms_per_tile is None:
        return [row.form, row.device, row.parity, NOT_RUN, *[""] * (len(_HEAD) - 4)]
    share = "" if row.share_of_peak is None else percent(row.share_of_peak.median)
    return [
        row.form,
        row.device,
        row.parity,
        number(row.ms_per_tile),
        number(row.iqr_ms_per_tile),
        number(row.tiles_per_second),
        number(row.tflops),
        share,
        times(row.reference),
        times(row.best),
        "" if row.flipped is None else f"{row.flipped:.3%}",
        "" if row.peak is None else megabytes(row.peak.rss_bytes),
        "" if row.peak is None else megabytes(row.peak.gpu_bytes),
    ]


@click.command("latency", context_settings=shared.SETTINGS)
@click.argument("networks", metavar="[NETWORK]...", nargs=-1, type=shared.PATH)
@click.option(
    "--made",
    multiple=True,
    metavar="DIR",
    type=shared.FOLDER,
    help="Folder that `parity` made of the NETWORK in the same place.  [default: made in -o, which takes long]",
)
@click.option("--forms", metavar="NAME,...", help="Forms to time, as pytorch-fp32,openvino-bf16.  [default: all]")
@click.option("--batch-sizes", metavar="N,...", default="1,8", show_default=True, help="Tiles per call.")
@shared.device_option
@shared.rounds_options(10)
@size_option
@shared.measuring_options
def latency_command(networks: tuple[Path, ...], made: tuple[Path, ...], matrix_size: int | None, **given: Any) -> None:
    """Time every form of networks beside PyTorch, tile by tile, as a share of what the machine can do.

    NETWORK is a run folder of cellseg-train or its model.safetensors, by default the model that ships. Its forms come
    from --made; without it they are made first, through the parity gate, and stay in DIR/forms. Writes latency.json,
    latency.md and latency.png to DIR. Exit code 8 if nothing could be timed.
    """
    console.require_packages("export", "torch", "timm", "safetensors")
    weights = list(networks) or [default_weights_path()]
    for path in weights:
        if not path.exists():
            raise ModelError(f"{path}: no such file or folder; give a run folder or its model.safetensors")
    if made and len(made) != len(weights):
        raise click.UsageError(
            f"--made must be given once for each NETWORK or not at all: {len(made)} and {len(weights)}"
        )
    batches = shared.numbers(given["batch_sizes"], "--batch-sizes")
    plan = shared.settings_of(Plan, given)
    bench = shared.Bench("latency", given)
    devices, absent = bench.devices(given["device"])
    chosen = forms_for(devices, shared.words(given["forms"]))
    if not chosen:
        raise click.UsageError(f"none of the forms {given['forms']} runs on {', '.join(devices)}")
    progress = bench.begin()
    folders = list(made)
    if not made:
        for place, path in enumerate(weights):
            folders.append(bench.output / "forms" / f"{place + 1}-{path.stem}")
            make_forms(path, folders[-1], [form for form in chosen if form.device not in absent], say=bench.say)
    found = [network_of(path, folder) for path, folder in zip(weights, folders, strict=True)]
    rows, limits = measure_latency(
        found,
        chosen,
        batches,
        plan,
        threads=bench.threads,
        absent=absent,
        limit_size=matrix_size,
        say=bench.say,
        progress=progress,
    )
    report = LatencyReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        plan=plan,
        gflop_per_tile={n.name: None if n.flops is None else n.flops.total / 1e9 for n in found},
        rows=tuple(rows),
        limits=tuple(limits),
    )
    bench.publish(report, png(report))
    if not any(row.status == "measured" for row in rows):
        raise BackendUnavailableError("no form could be timed; the report says why")
