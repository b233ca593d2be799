"""How long a network takes for a batch of tiles, form by form, beside PyTorch and beside what the machine can do.

For each network and batch size all forms are opened, each in a worker, and timed in the same rounds with the products
of matrices that the machine's peak is taken from. Where memory does not hold them all, they are timed in several
*sittings*; PyTorch in fp32 and the fastest other form of PyTorch take part in each, so that every ratio is of paired
rounds. Before it is timed, every form answers the same tiles, and its answer is compared with PyTorch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellseg_benchmarks.engine.limits import Limits, limit_workers
from cellseg_benchmarks.harness import memory
from cellseg_benchmarks.harness.form_files import Network
from cellseg_benchmarks.harness.forms import REFERENCE, Form
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION
from cellseg_benchmarks.harness.timer import Plan, Ratio, Times, Turn, interleave, ratio, times_faster
from cellseg_benchmarks.harness.worker import Peak, Worker, WorkerError

Say = Callable[[str], None]
StartWorker = Callable[[Network, Form, int, int | None], Worker]

_BYTES_PER_WEIGHT_BYTE = 3.0
"""Memory that a form takes for each byte of fp32 weights: the file, the parsed graph, the engine's own copy."""
_BYTES_A_PROCESS = 600e6
_BYTES_OF_LIMITS = 2e9
"""Memory of the workers that multiply matrices."""


@dataclass(frozen=True)
class Row:
    """What was found of one form of one network at one batch size.

    ``parity``: verdict of the gate. ``times``: of one call. ``reference`` and ``best``: how many times as fast as
    PyTorch in fp32, and as the fastest other form of PyTorch (``best_pytorch``), on the same kind of device.
    ``tflops``: of the network's own arithmetic. ``share_of_peak``: of the fastest product of matrices in the same
    precision on that device. ``flipped``: share of pixels whose foreground is on the other side of 0.5 than PyTorch's
    (fp32). ``peak``: memory of its process. ``sitting``: rounds it took part in; ``again``: only to be compared with.
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
        from cellseg_benchmarks.engine.latency_report import markdown

        return markdown(self)


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

    ``absent``: devices (``cuda``) that are not here, with the reason; forms on them are rows that say so.
    ``limit_size``: side of the matrices for the peak, None for the usual.
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
    """A worker with ``form`` opened for ``batch`` tiles a call."""
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
        # PyTorch first: the others are compared with the fastest of it.
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
        for form in pending:  # a signal has come
            found.setdefault(form.key, self._row(form, "not run", reason="stopped before it was measured"))
            self.progress.skips(f"{form.key} of {self.network.name}, batches of {self.batch}")
        self.rows = [found[form.key] for form in forms if form.key in found] + self.rows

    def _anchors(self, found: Mapping[str, Row], device: str, forms: Sequence[Form]) -> list[Form]:
        """PyTorch's fp32 and its fastest form, if they were timed in an earlier sitting on ``device``."""
        timed = [row for row in found.values() if row.device == device and row.times and row.engine == "pytorch"]
        keys = {_key(row) for row in timed if row.form == REFERENCE}
        # Sittings differ, so forms of PyTorch are ranked by how they compare with the reference of their own.
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
        """``row`` beside the fastest form of PyTorch of its sitting on its device."""
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
    """Most memory of ``worker``; None if it was ended, as the one that a signal interrupts is."""
    try:
        return worker.peak()
    except WorkerError:
        return None


def _key(row: Row) -> str:
    return row.form if row.device == "cpu" else f"{row.form} on {row.device}"


def _weights_bytes(weights: Path) -> int:
    file = weights if weights.is_file() else weights / "model.safetensors"
    return file.stat().st_size if file.is_file() else 0
