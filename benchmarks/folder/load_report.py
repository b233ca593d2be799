"""Figures of the load test of ``cellseg-serve``, and its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, megabytes, number, percent, table

EXPECTED = ("200", "429")
"""Answers that a service under too much load may give."""


@dataclass(frozen=True)
class Phase:
    """One phase. ``clients``: of a closed loop; ``rate``: images per second of an open one. ``seconds``: from the first
    request to the last answer. ``codes``: status -> requests; ``lost``: without an answer. ``p50``, ``p99``: latency of
    answered images in s, None if there are none. ``client_cpu``, ``server_cpu``: CPU seconds. ``rss``: memory of the
    service in bytes: at the start, after each quarter, and at the end; empty if it is unknown."""

    name: str
    clients: int | None
    rate: float | None
    seconds: float
    codes: dict[str, int]
    lost: int
    p50: float | None
    p99: float | None
    client_cpu: float
    server_cpu: float | None
    rss: tuple[int, ...]

    @property
    def images(self) -> int:
        """Answered images."""
        return self.codes.get("200", 0)

    @property
    def images_per_second(self) -> float:
        """Answered images per second."""
        return self.images / self.seconds

    @property
    def unexpected(self) -> int:
        """Requests that were neither answered nor refused with 429."""
        return self.lost + sum(n for code, n in self.codes.items() if code not in EXPECTED)


@dataclass(frozen=True)
class FolderRun:
    """The folder run of the same images, beside the service. ``cpu``: CPU seconds."""

    images: int
    seconds: float
    cpu: float

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class LoadReport:
    """All phases, the closed loop first. ``image``: what was sent. ``service``: the model that answered, as
    ``/v1/models`` describes it. ``folder``: runs before and after the closed loop, none if they were not made.
    ``shared_cores``: that client and service both want, 0 if the client has cores of its own."""

    conditions: Conditions
    threads: int | None
    image: str
    service: dict[str, Any]
    phases: tuple[Phase, ...]
    folder: tuple[FolderRun, ...] = ()
    shared_cores: int = 0
    benchmark: str = "load"
    report_version: int = REPORT_VERSION

    @property
    def service_rate(self) -> float:
        """Images per second of the closed loop, had the client taken no CPU time."""
        closed = self.phases[0]
        taken = closed.client_cpu / self.shared_cores if self.shared_cores else 0.0
        return closed.images / max(closed.seconds - taken, 1e-9)

    @property
    def folder_rate(self) -> float | None:
        """Images per second of the folder runs together, None without one."""
        if not self.folder:
            return None
        return sum(run.images for run in self.folder) / sum(run.seconds for run in self.folder)

    @property
    def growth(self) -> int | None:
        """Bytes by which the service grew between the first quarter of the last phase, when the queue was full, and
        its end."""
        rss = self.phases[-1].rss
        return rss[-1] - rss[1] if len(rss) == 5 else None

    def to_markdown(self) -> str:
        """Return a table with a row per phase, and what was to be shown."""
        engine = self.service["engine"]
        lines = ["# Load of the service", "", *machine_lines(self.conditions, self.threads)]
        average = self.conditions.before.average
        if average:
            lines += [f"Load of the machine before: {number(average[0])} processes on average over a minute.", ""]
        lines += [
            f"Model {self.service['name']}, {engine['backend']} {engine['precision']} on {engine['device']}. "
            f"{self.image}. Client and service share the cores.",
            "",
        ]
        head = ("loop", "s", "images/s", "p50, s", "p99, s", "answers", "lost", "CPU s per image", "of the client")
        rows = [
            [
                phase.name,
                f"{phase.seconds:.0f}",
                number(phase.images_per_second),
                number(phase.p50),
                number(phase.p99),
                ", ".join(f"{code}: {n}" for code, n in sorted(phase.codes.items())),
                str(phase.lost),
                number(None if phase.server_cpu is None or not phase.images else phase.server_cpu / phase.images),
                number(phase.client_cpu / phase.images if phase.images else None),
                " → ".join(megabytes(value) for value in phase.rss),
            ]
            for phase in self.phases
        ]
        rows += [
            [
                "folder run",
                f"{run.seconds:.0f}",
                number(run.images_per_second),
                *("", ""),
                f"{run.images} images",
                "",
                number(run.cpu / run.images),
                *("", ""),
            ]
            for run in self.folder
        ]
        lines += [*table((*head, "memory of the service, MB"), rows), "", *self._shown()]
        return "\n".join(lines) + "\n"

    def _shown(self) -> list[str]:
        unexpected = sum(phase.unexpected for phase in self.phases)
        asked = sum(sum(phase.codes.values()) + phase.lost for phase in self.phases)
        lines = [f"- Requests neither answered nor refused with 429: {unexpected} of {asked}."]
        if self.growth is not None:
            lines.append(
                f"- Memory of the service between the first quarter of the last loop and its end: "
                f"{self.growth / 1e6:+.0f} MB."
            )
        if (rate := self.folder_rate) is not None:
            lines.append(
                f"- Service beside the folder run: {number(self.service_rate)} to {number(rate)} images/s, "
                f"{percent(self.service_rate / rate)}; the CPU time of the client is subtracted."
            )
        return lines
