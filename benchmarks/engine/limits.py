"""Limits of this machine: matrix products, memory, reading and writing images.

Every figure of a benchmark is a share of one of these, measured in the same rounds. The peak of a precision is that of
the fastest library here, for square matrices that fill the caches; data sheets are not used. ``limit_subjects``, which
runs in workers, describes how each limit is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines
from cellseg_benchmarks.harness.timer import Measured, Plan, Times, Turn, interleave
from cellseg_benchmarks.harness.worker import Worker, WorkerError

LIBRARIES = {"cpu": ("numpy", "torch", "openvino"), "cuda": ("torch",)}
"""Libraries that multiply matrices on each kind of device."""
SIZES = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices."""
UNITS = {"gemm": ("TFLOP/s", 1e12), "triad": ("GB/s", 1e9), "read": ("MP/s", 1e6), "write": ("MP/s", 1e6)}
_SEPARATOR = ": "


@dataclass(frozen=True)
class Limit:
    """One rate of the machine. ``kind``: of ``UNITS``, which gives its unit. ``what``: precision of a product, format
    of an image. ``work``: operations, bytes or pixels per call. ``kernel``: the library's name for it, if reported."""

    kind: str
    what: str
    made_by: str
    device: str
    work: float
    times: Times
    kernel: str = ""

    @property
    def rate(self) -> float:
        """Work per second in the unit of ``kind``, at the median time."""
        return self.work / self.times.median / UNITS[self.kind][1]

    @property
    def best(self) -> float:
        """Same as ``rate`` at the shortest time."""
        return self.work / min(self.times.seconds) / UNITS[self.kind][1]


@dataclass
class Limits:
    """All rates, and what could not be measured, with the reason."""

    rates: list[Limit] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def peak(self, precision: str, device: str = "cpu") -> Limit | None:
        """The fastest library for products in ``precision``; None if no library here supports it."""
        found = [x for x in self.rates if (x.kind, x.what, x.device) == ("gemm", precision, device)]
        return max(found, key=lambda limit: limit.rate, default=None)

    def to_markdown(self) -> str:
        """A table."""
        lines = ["| limit | of | by | rate | best | kernel |", "|---|---|---|--:|--:|---|"]
        for x in sorted(self.rates, key=lambda x: (x.device, x.kind, x.what, -x.rate)):
            unit = UNITS[x.kind][0].replace("FLOP", "OP" if x.what == "int8" else "FLOP")
            lines.append(
                f"| {x.kind} | {x.what} | {x.made_by}, {x.device} | {x.rate:.3g} {unit} | {x.best:.3g} | {x.kernel} |"
            )
        lines += [f"| {name} | | | not yet run | | {reason} |" for name, reason in self.missing.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class LimitsReport:
    """Report of the limits alone."""

    conditions: Conditions
    threads: int | None
    plan: Plan
    limits: Limits
    benchmark: str = "limits"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Machine and table."""
        head = ["# What the machine can do", "", *machine_lines(self.conditions, self.threads)]
        head += ["fp32 products are computed without TF32 on a GPU.", ""]
        return "\n".join([*head, self.limits.to_markdown()])


def png(report: LimitsReport) -> bytes:
    """A panel of bars for each kind of limit."""
    rates = sorted(report.limits.rates, key=lambda x: (x.what, -x.rate))
    panels = [
        Bars(
            kind,
            unit,
            tuple(
                Bar(f"{x.what} {x.made_by.partition(' ')[0]} {x.device}", x.rate, note=f"{x.rate:.3g}", group=x.made_by)
                for x in rates
                if x.kind == kind
            ),
        )
        for kind, (unit, _) in UNITS.items()
        if any(x.kind == kind for x in rates)
    ]
    return panels_png(panels, title=f"What the machine can do: {report.conditions.machine.processor}")


@dataclass
class LimitWorkers:
    """Workers that measure limits, and the facts they reported."""

    workers: dict[str, Worker] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def entries(self) -> dict[str, Turn]:
        """Entries for the timer."""
        return {
            f"{part}{_SEPARATOR}{name}": worker.turn(name)
            for part, worker in self.workers.items()
            for name in worker.names
        }

    def limits(self, measured: Measured) -> Limits:
        """Rates from the times of ``entries``."""
        found = Limits(missing=dict(self.missing))
        for part, worker in self.workers.items():
            found.missing |= worker.facts["missing"]
            for name in worker.names:
                entry = f"{part}{_SEPARATOR}{name}"
                if entry not in measured.times:
                    found.missing[entry] = measured.failed.get(entry, "not measured")
                    continue
                kind, _, what = name.partition(" ")
                facts = worker.facts
                found.rates.append(
                    Limit(
                        kind,
                        what,
                        facts["library"],
                        facts["device"],
                        facts["work"][name],
                        measured.times[entry],
                        facts["kernels"].get(name, ""),
                    )
                )
        return found


@contextmanager
def limit_workers(
    devices: Sequence[str], *, threads: int | None = None, products_only: bool = False, size: int | None = None
) -> Iterator[LimitWorkers]:
    """Start a worker for each library on each of ``devices``; one that is not installed is listed in ``missing``.

    ``products_only``: matrix products only, without memory and files: next to large networks there is no room for
    the arrays of the triad. ``size``: side of the matrices, None for the device's default.
    """
    wanted: list[tuple[str, dict[str, Any]]] = []
    for device in devices:
        kind = device.partition(":")[0]
        side = size or SIZES[kind]
        wanted += [
            (
                f"{name} on {kind}",
                {"part": name, "device": device, "size": side, "threads": threads, "triad": not products_only},
            )
            for name in LIBRARIES[kind]
        ]
    if not products_only:
        wanted.append(("files", {"part": "files", "device": "cpu", "size": 0, "threads": threads}))
    with ExitStack() as stack:
        found = LimitWorkers()
        for name, arguments in wanted:
            try:
                found.workers[name] = stack.enter_context(Worker("limits", arguments, threads=threads))
            except WorkerError as error:
                found.missing[name] = str(error)
        yield found


size_option = click.option(
    "--matrix-size",
    type=click.IntRange(16),
    metavar="N",
    help="Side of the matrices for the peak.  [default: 2048, on a GPU 8192]",
)


@click.command("limits", context_settings=shared.SETTINGS)
@shared.device_option
@shared.rounds_options(7)
@size_option
@shared.measuring_options
def limits_command(device: str, matrix_size: int | None, **given: Any) -> None:
    """What this machine can do: products of matrices in each precision, memory, reading and writing images.

    Writes limits.json, limits.md and limits.png to DIR.
    """
    plan = shared.settings_of(Plan, given)
    bench = shared.Bench("limits", given)
    devices, absent = bench.devices(device)
    progress = bench.begin()
    here = [name for name in devices if name not in absent]
    with limit_workers(here, threads=bench.threads, size=matrix_size) as workers:
        workers.missing |= absent
        measured = interleave(workers.entries(), plan, say=bench.say, progress=progress)
        limits = workers.limits(measured)
    report = LimitsReport(bench.conditions(), bench.threads, plan, limits)
    bench.publish(report, png(report))
