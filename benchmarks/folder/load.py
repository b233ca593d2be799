"""Load test of ``cellseg-serve``: requests from this process to a service in another one, on loopback.

*Closed*: so many clients, each of which sends its next image once it has its answer; gives the capacity. *Open*: images
arrive at a fixed rate, by default twice the capacity, whether or not there are answers; the service must refuse what it
cannot take (429) and stay as it is. Latency is that of answered requests, from the moment a request was due.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness import images
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, megabytes, number, table
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, UsageError, plural

Say = Callable[[str], None]
_CPU_TICKS = 100 if not hasattr(os, "sysconf") else os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Phase:
    """One phase. ``clients``: of a closed loop; ``rate``: images per second of an open one. ``seconds``: from the first
    request to the last answer. ``codes``: status -> requests; ``lost``: without an answer. ``p50``, ``p99``: latency of
    answered images in s, None if there are none. ``client_cpu``, ``server_cpu``: CPU seconds. ``rss_before``,
    ``rss_after``: memory of the service in bytes."""

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
    rss_before: int | None
    rss_after: int | None

    @property
    def images_per_second(self) -> float:
        """Answered images per second."""
        return self.codes.get("200", 0) / self.seconds


@dataclass(frozen=True)
class LoadReport:
    """All phases. ``image``: what was sent. ``service``: the model that answered, as ``/v1/models`` describes it."""

    conditions: Conditions
    threads: int | None
    image: str
    service: dict[str, Any]
    phases: tuple[Phase, ...]
    benchmark: str = "load"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return one table with a row per phase."""
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
        head = ("loop", "images/s", "p50, s", "p99, s", "answers", "lost", "CPU of client, s", "CPU of service, s")
        rows = [
            [
                phase.name,
                number(phase.images_per_second),
                number(phase.p50),
                number(phase.p99),
                ", ".join(f"{code}: {n}" for code, n in sorted(phase.codes.items())),
                str(phase.lost),
                number(phase.client_cpu),
                number(phase.server_cpu),
                f"{megabytes(phase.rss_before)} → {megabytes(phase.rss_after)}",
            ]
            for phase in self.phases
        ]
        return "\n".join([*lines, *table((*head, "memory of service, MB"), rows)]) + "\n"


@dataclass(frozen=True)
class Settings:
    """``seconds``: of each phase. ``clients``: of the closed loop. ``rate``: of the open one, None for twice what the
    closed one reached. ``megapixels``: of each image. ``address``: of a running service, None to start one."""

    model: Path | None = None
    seconds: float = 30.0
    clients: int = 8
    rate: float | None = None
    megapixels: float = 1.92
    n_images: int = 4
    address: str | None = None
    engine: shared.Engine = field(default_factory=shared.Engine)
    scale: shared.Scale = field(default_factory=shared.Scale)
    threads: int | None = None


def measure_load(settings: Settings, *, say: Say) -> tuple[tuple[Phase, ...], dict[str, Any]]:
    """Run both phases; returns them, and the description of the model. Raises ``BackendUnavailableError`` if the
    service does not start."""
    hw = images.size_for(settings.megapixels)
    contents = [images.encoded(image, "jpg") for image in images.smears(settings.n_images, hw)]
    with _service(settings) as (address, pid):
        import httpx

        service = httpx.get(f"{address}/v1/models").json()["models"][0]
        for content in contents:  # the engine's first calls are slower
            httpx.post(f"{address}/v1/segment", content=content, timeout=600).raise_for_status()
        say(f"closed loop, {plural(settings.clients, 'client')}, {settings.seconds:g} s")
        closed = asyncio.run(_closed(address, contents, settings, pid))
        rate = settings.rate or max(0.1, 2 * closed.images_per_second)
        say(f"open loop, {rate:.2f} images/s, {settings.seconds:g} s")
        opened = asyncio.run(_open(address, contents, rate, settings.seconds, pid))
    return (closed, opened), service


@contextmanager
def _service(settings: Settings) -> Iterator[tuple[str, int | None]]:
    """Address and process number of the service, the latter None if it was running already."""
    if settings.address is not None:
        yield settings.address.rstrip("/"), None
        return
    engine, scale = settings.engine, settings.scale
    asked = {
        "--model": settings.model,
        "--backend": engine.backend,
        "--device": engine.device,
        "--precision": engine.precision,
        "--batch-size": engine.batch_size,
        "--streams": engine.streams,
        "--scale": scale.scale,
        "--cell-diameter": scale.cell_diameter,
        "--threads": settings.threads,
    }
    words = [str(word) for name, value in asked.items() if value is not None for word in (name, value)]
    program = "from cellseg_deploy.cli.serve import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "--port", "0", "-q", *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise BackendUnavailableError("cellseg-serve did not start; its message is above")
            yield address, process.pid
        finally:
            process.terminate()


class _Tally:
    """Answers of one phase."""

    def __init__(self, client: Any, address: str, contents: Sequence[bytes], pid: int | None) -> None:
        self._client, self._place, self._contents = client, f"{address}/v1/segment", cycle(contents)
        self._pid = pid
        self.codes: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.lost = 0
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._server_cpu, self._rss = _cpu_of(pid), _rss_of(pid)

    async def send(self, due: float) -> int:
        """Send the next image, which was due at ``due``; returns the status, 0 without an answer."""
        import httpx

        try:
            answer = await self._client.post(self._place, content=next(self._contents))
        except httpx.HTTPError:
            self.lost += 1
            return 0
        self.codes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            self.latencies.append(time.perf_counter() - due)
        return int(answer.status_code)

    def phase(self, name: str, *, clients: int | None = None, rate: float | None = None) -> Phase:
        """Sum up."""
        p50, p99 = np.percentile(self.latencies, [50, 99]).tolist() if self.latencies else (None, None)
        server_cpu = _cpu_of(self._pid)
        return Phase(
            name=name,
            clients=clients,
            rate=rate,
            seconds=time.perf_counter() - self._start,
            codes=dict(self.codes),
            lost=self.lost,
            p50=p50,
            p99=p99,
            client_cpu=time.process_time() - self._cpu,
            server_cpu=None if server_cpu is None or self._server_cpu is None else server_cpu - self._server_cpu,
            rss_before=self._rss,
            rss_after=_rss_of(self._pid),
        )


async def _closed(address: str, contents: Sequence[bytes], settings: Settings, pid: int | None) -> Phase:
    async with _client() as client:
        tally = _Tally(client, address, contents, pid)
        end = time.perf_counter() + settings.seconds

        async def ask() -> None:
            while (now := time.perf_counter()) < end:
                await tally.send(now)

        await asyncio.gather(*(ask() for _ in range(settings.clients)))
        return tally.phase(f"closed, {plural(settings.clients, 'client')}", clients=settings.clients)


async def _open(address: str, contents: Sequence[bytes], rate: float, seconds: float, pid: int | None) -> Phase:
    async with _client() as client:
        tally = _Tally(client, address, contents, pid)
        start = time.perf_counter()
        asking = []
        for index in range(max(1, int(seconds * rate))):
            due = start + index / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asking.append(asyncio.create_task(tally.send(due)))
        await asyncio.gather(*asking)
        return tally.phase(f"open, {number(rate)} images/s", rate=rate)


def _client() -> Any:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=120, limits=limits)


def _cpu_of(pid: int | None) -> float | None:
    """CPU seconds of the process ``pid``, None if the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(words[11]) + int(words[12])) / _CPU_TICKS


def _rss_of(pid: int | None) -> int | None:
    """Memory of the process ``pid`` in bytes, None if the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


@click.command("load", context_settings=shared.SETTINGS)
@shared.model_option
@click.option("--seconds", type=float, default=Settings.seconds, show_default=True, help="Length of each phase.")
@click.option(
    "--clients", type=click.IntRange(1), default=Settings.clients, show_default=True, help="Of the closed loop."
)
@click.option("--rate", type=float, help="Images per second of the open loop.  [default: twice the closed loop's]")
@click.option("--megapixels", type=float, default=Settings.megapixels, show_default=True, help="Of each image.")
@click.option("--address", metavar="URL", help="Running service.  [default: start one]")
@shared.scale_options
@shared.engine_options
@shared.measuring_options
def load_command(**given: Any) -> None:
    """What cellseg-serve answers under load: throughput, latency, codes, memory; closed loop, then open loop.

    Writes load.json and load.md to DIR.
    """
    console.require_packages("serve", "httpx", "starlette", "uvicorn", "prometheus_client")
    settings = shared.settings_of(Settings, given)
    for name in ("seconds", "rate", "megapixels"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UsageError(f"{name} must be above 0, got {value:g}")
    images.check_size(settings.megapixels)
    bench = shared.Bench("load", given)
    bench.begin()
    phases, service = measure_load(settings, say=bench.say)
    report = LoadReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        image=f"Synthetic smears of {settings.megapixels:g} megapixels as JPEG, answered as JSON",
        service=service,
        phases=phases,
    )
    bench.publish(report, None)
