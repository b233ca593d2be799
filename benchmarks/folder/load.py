"""Load test of ``cellseg-serve``: requests from this process to a service in another one, on loopback.

*Closed*: so many clients, each of which sends its next image once it has its answer; gives the capacity. *Open*: images
arrive at a fixed rate, by default twice the capacity, whether or not there are answers; the service must refuse what it
cannot take (429) and stay as it is. Latency is that of answered requests, from the moment a request was due. Before and
after the closed loop the same images are counted as a folder run, to compare.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.folder.load_report import FolderRun, LoadReport, Phase
from cellseg_benchmarks.harness import images
from cellseg_benchmarks.harness.report import number
from cellseg_benchmarks.harness.worker import Worker
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, UsageError, plural
from cellseg_deploy.threads import cores

Say = Callable[[str], None]
_CPU_TICKS = 100 if not hasattr(os, "sysconf") else os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Settings:
    """``seconds``: of the open loop. ``capacity_seconds``: of the closed one, and of the folder runs together.
    ``clients``: of the closed loop. ``rate``: of the open one, None for twice what the closed one reached.
    ``megapixels``: of each image. ``address``: of a running service, None to start one; then there is no folder run."""

    model: Path | None = None
    seconds: float = 30.0
    capacity_seconds: float = 60.0
    clients: int = 8
    rate: float | None = None
    megapixels: float = 1.92
    n_images: int = 4
    address: str | None = None
    engine: shared.Engine = field(default_factory=shared.Engine)
    scale: shared.Scale = field(default_factory=shared.Scale)
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """``service``: as ``/v1/models`` describes it."""

    phases: tuple[Phase, ...]
    folder: tuple[FolderRun, ...]
    service: dict[str, Any]


def measure_load(settings: Settings, work: Path, *, say: Say) -> Measured:
    """Run both loops, and the folder runs, which write below ``work``. Raises ``BackendUnavailableError`` if the
    service does not start."""
    hw = images.size_for(settings.megapixels)
    contents = [images.encoded(image, "jpg") for image in images.smears(settings.n_images, hw)]
    with _service(settings) as (address, pid), _Folder(settings, contents, work) as folder:
        import httpx

        service = httpx.get(f"{address}/v1/models").json()["models"][0]
        for content in contents:  # the engine's first calls are slower
            httpx.post(f"{address}/v1/segment", content=content, timeout=600).raise_for_status()
        runs = folder.run(say)
        say(f"closed loop, {plural(settings.clients, 'client')}, {settings.capacity_seconds:g} s")
        closed = asyncio.run(_closed(address, contents, settings, pid))
        runs += folder.run(say)
        folder.close()
        rate = settings.rate or max(0.1, 2 * closed.images_per_second)
        say(f"open loop, {rate:.2f} images/s, {settings.seconds:g} s")
        opened = asyncio.run(_open(address, contents, rate, settings.seconds, pid))
    return Measured((closed, opened), tuple(runs), service)


class _Folder:
    """The folder run of ``contents``, open in a process of its own; none if the service was not started here."""

    def __init__(self, settings: Settings, contents: Sequence[bytes], work: Path) -> None:
        self._seconds, self._n = settings.capacity_seconds / 2, 0
        self._sources, self._work = list[Path](), work
        self._worker: Worker | None = None
        if settings.address is not None:
            return
        for number_of_image, content in enumerate(contents):
            self._sources.append(work / f"source-{number_of_image}.jpg")
            self._sources[-1].write_bytes(content)
        asked = {**settings.engine.arguments(), **_scale(settings).arguments()}
        asked["path"] = None if settings.model is None else str(settings.model)
        of_run: dict[str, Any] = {
            "settings": asked,
            "threads": settings.threads,
            "work": str(work),
            "save": [],
            "report": False,
        }
        self._worker = Worker("folder", of_run)

    def run(self, say: Say) -> list[FolderRun]:
        """Run as many images as take half of the capacity's seconds."""
        if self._worker is None:
            return []
        if not self._n:
            _ = self._ask(len(self._sources))  # the first calls are slower
            once = self._ask(len(self._sources))
            self._n = max(len(self._sources), round(self._seconds * once.images_per_second))
        say(f"folder run, {plural(self._n, 'image')}")
        return [self._ask(self._n)]

    def _ask(self, n: int) -> FolderRun:
        assert self._worker is not None
        folder = self._work / f"images-{n}"
        if not folder.exists():
            images.link_copies(self._sources, folder, n)
        answer = self._worker.ask("run", paths=[str(folder)])
        return FolderRun(answer["images"], answer["seconds"], answer["cpu_seconds"])

    def close(self) -> None:
        """End its process."""
        if self._worker is not None:
            self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _scale(settings: Settings) -> shared.Scale:
    """Return the scale that was asked for, else that of the sample smears."""
    if settings.scale == shared.Scale():
        return shared.Scale(cell_diameter=images.DIAMETER_PX)
    return settings.scale


@contextmanager
def _service(settings: Settings) -> Iterator[tuple[str, int | None]]:
    """Address and process number of the service, the latter None if it was running already."""
    if settings.address is not None:
        yield settings.address.rstrip("/"), None
        return
    engine, scale = settings.engine, _scale(settings)
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
        self._server_cpu, self._rss = _cpu_of(pid), list[int]()
        self.look()

    def look(self) -> None:
        """Remember the memory of the service."""
        if (rss := _rss_of(self._pid)) is not None:
            self._rss.append(rss)

    async def send(self, due: float) -> float:
        """Send the next image, which was due at ``due``; returns the seconds to wait before another one, 0 unless it
        was refused."""
        import httpx

        try:
            answer = await self._client.post(self._place, content=next(self._contents))
        except httpx.HTTPError:
            self.lost += 1
            return 0.0
        self.codes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            self.latencies.append(time.perf_counter() - due)
        return float(answer.headers.get("retry-after", 0))

    def phase(self, name: str, *, clients: int | None = None, rate: float | None = None) -> Phase:
        """Sum up."""
        p50, p99 = np.percentile(self.latencies, [50, 99]).tolist() if self.latencies else (None, None)
        server_cpu = _cpu_of(self._pid)
        self.look()
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
            rss=tuple(self._rss),
        )


async def _closed(address: str, contents: Sequence[bytes], settings: Settings, pid: int | None) -> Phase:
    async with _client() as client:
        tally = _Tally(client, address, contents, pid)
        end = time.perf_counter() + settings.capacity_seconds

        async def ask() -> None:
            while (now := time.perf_counter()) < end:
                wait = await tally.send(now)
                await asyncio.sleep(max(0.0, min(wait, end - time.perf_counter())))

        await asyncio.gather(*(ask() for _ in range(settings.clients)))
        return tally.phase(f"closed, {plural(settings.clients, 'client')}", clients=settings.clients)


async def _open(address: str, contents: Sequence[bytes], rate: float, seconds: float, pid: int | None) -> Phase:
    async with _client() as client:
        tally = _Tally(client, address, contents, pid)
        start = time.perf_counter()
        asking = []
        n = max(1, int(seconds * rate))
        quarters = {n * k // 4 for k in (1, 2, 3)} - {0}
        for index in range(n):
            due = start + index / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if index in quarters:
                tally.look()
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
@click.option("--seconds", type=float, default=Settings.seconds, show_default=True, help="Length of the open loop.")
@click.option(
    "--capacity-seconds",
    type=float,
    default=Settings.capacity_seconds,
    show_default=True,
    help="Length of the closed loop, and of the folder runs together.",
)
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
    """What cellseg-serve answers under load: throughput, latency, codes, memory; closed loop, then open loop at twice
    its rate. Beside it the folder run of the same images.

    Without --scale or --cell-diameter, the cell diameter of the sample smears is set. Writes load.json and load.md to
    DIR.
    """
    console.require_packages("serve", "httpx", "starlette", "uvicorn", "prometheus_client")
    settings = shared.settings_of(Settings, given)
    for name in ("seconds", "capacity_seconds", "rate", "megapixels"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UsageError(f"{name} must be above 0, got {value:g}")
    images.check_size(settings.megapixels)
    bench = shared.Bench("load", given)
    bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        found = measure_load(settings, Path(place), say=bench.say)
    usable = cores()
    report = LoadReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        image=f"Synthetic smears of {settings.megapixels:g} megapixels as JPEG, answered as JSON",
        **vars(found),
        shared_cores=usable if settings.address is None and (settings.threads or usable) >= usable else 0,
    )
    bench.publish(report, None)
