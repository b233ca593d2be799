"""Images of a run, done by the workers of a Dask cluster.

    this process                         scheduler                    worker processes
    plan, scale, journal  --- path --->  which worker?  --- path -->  read, network, measure, encode
    gives files their names, journal <-- names of files, seconds ---  writes files under temporary names

Images travel by path and results by file: the scheduler sees some hundred bytes per image. The workers run only the
network over an image that is read by region, band by band, and this process makes its cells and files; see ``bands``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellseg_deploy.batching import Outcome
from cellseg_deploy.cluster import bands
from cellseg_deploy.cluster.connection import LOCAL, TlsFiles, connected
from cellseg_deploy.cluster.outcomes import ClusterOutcomes, Workers, reading_of_a_worker
from cellseg_deploy.cluster.work_order import WorkOrder
from cellseg_deploy.cluster.worker import do_image
from cellseg_deploy.errors import OutputError, UsageError, check_types
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run.elsewhere import ImageTask
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import image_of_line
from cellseg_deploy.run.record import RunSetup
from cellseg_deploy.run.streamed import is_streamed
from cellseg_deploy.slides.counting import SlideElsewhere
from cellseg_deploy.threads import cores, plan

_BY_REGION = Outcome[Any](error=RuntimeError("is done by this process"))


class ClusterEngine:
    """Does the images of runs on the cluster of a Dask ``client``; see ``open_cluster``."""

    def __init__(
        self, client: Any, address: str, *, threads: int | None = None, device_per_worker: bool = False
    ) -> None:
        """``threads``, ``device_per_worker``: see ``WorkOrder``."""
        self.client, self.address = client, address
        self._threads, self._device_per_worker = threads, device_per_worker

    def order(self, setup: RunSetup) -> WorkOrder:
        """Return what the workers must know of the run ``setup``."""
        return WorkOrder.of(setup, threads=self._threads, device_per_worker=self._device_per_worker)

    def outcomes(self, setup: RunSetup, tasks: Sequence[ImageTask]) -> ImageOutcomes:
        """See ``elsewhere.Elsewhere``."""
        return ImageOutcomes(Workers(self.client, self.address), setup.out, self.order(setup), tasks)

    def slide(self, image: Path, reading: ReadOptions) -> SlideElsewhere:
        """See ``slides.api.SlideCluster``."""
        return bands.of_slide(Workers(self.client, self.address), self.order, image, reading)


@contextmanager
def open_cluster(
    address: str, *, workers: int | None = None, threads: int | None = None, tls: TlsFiles | None = None
) -> Iterator[ClusterEngine]:
    """Connect to the scheduler at ``address``, or with ``local`` start ``workers`` processes on this machine, by
    default one.

    ``threads``: CPU threads, of all local workers together, None for one per core; on another cluster of each worker,
    None for as many as Dask gives it. ``tls``: for addresses tls://, as of ``cluster.connection``; None for the files
    in Dask's configuration. Raises as ``connection.connected``, and ``UsageError`` for wrong arguments.

    >>> with cs.open_cluster("local", workers=2) as cluster:
    ...     result = model.run("photographs", out="counts", cluster=cluster)
    >>> len(result.done)
    1
    """
    check_types("a name", address=address)
    check_types("a whole number or None", workers=workers, threads=threads)
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"`{name}` must be at least 1, got {value}")
    if workers is not None and address != LOCAL:
        raise UsageError("`workers` is for the address local: other clusters have the workers they have")
    if tls is not None:
        check_types(TlsFiles, tls=tls)
        if tls != TlsFiles() and not address.startswith("tls:"):
            raise UsageError(f"files for TLS go with an address tls://HOST:PORT, got {address!r}")
    if address == LOCAL:
        per_worker = max(1, (threads or cores()) // (workers or 1))
        helpers = plan(per_worker).helpers
        # Images that wait for the network leave their thread to others.
        settings = {"workers": workers or 1, "threads_per_worker": helpers + 2 if per_worker > 1 else 1}
        threads = per_worker
    else:
        settings = {"workers": 1, "threads_per_worker": 1}
    with connected(address, tls=tls or TlsFiles(), **settings) as client:
        yield ClusterEngine(client, address, threads=threads, device_per_worker=(workers or 1) > 1)


class ImageOutcomes(ClusterOutcomes[Finished]):
    """See ``elsewhere.Outcomes``."""

    _network_seconds = 0.0

    @property
    def engine_seconds(self) -> float:
        """Mean over the workers of the time during which a network call was running."""
        return self._network_seconds / max(1, self.workers.count)

    def _work(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        task = self._tasks[index]
        image = (str(task.image.path), task.image.name, task.image.problem)
        return do_image, (*image, task.output_name, task.scale, task.with_thresholds)

    def _nbytes_of(self, index: int) -> int:
        """Of an image that is read by region 0: this process does it in its turn, so it counts as ended at once."""
        image = self._tasks[index].image
        if not image.problem and is_streamed(image.path):
            self._early[index] = _BY_REGION
            return 0
        return super()._nbytes_of(index)

    def _submit(self, index: int, attempt: str = "") -> None:
        if index not in self._early:
            super()._submit(index, attempt)

    def _take(self, index: int) -> Outcome[Finished]:
        outcome = super()._take(index)
        return self._by_region(index) if outcome is _BY_REGION else outcome

    def _by_region(self, index: int) -> Outcome[Finished]:
        """Do an image here, with its bands on the workers, next to the images that are in flight."""
        task = self._tasks[index]
        try:
            finished: Finished = task.by_region(bands.of_run(self, task.image.path))
        except Exception as error:  # as of any other image: the run decides whom it concerns
            return Outcome(error=error)
        finally:
            self.workers.wait_from_now()  # nobody looked while its labels were made
        self._network_seconds += finished.seconds.get("network", 0.0)
        return Outcome(finished)

    def _finished(self, answer: dict[str, Any]) -> Finished:
        with reading_of_a_worker():
            record = image_of_line((self.out / answer["record"]).read_bytes())
            files = {place: self.out / name for place, name in answer["files"].items()}
            sizes = {place: path.stat().st_size for place, path in files.items()}
        if record is None or sizes != {file.path: file.size for file in record.outputs}:
            raise OutputError(f"{self.out}: files of a worker are incomplete; check free space and the file system")
        self._network_seconds += answer["seconds"].get("network", 0.0)
        (self.out / answer["record"]).unlink(missing_ok=True)
        return Finished(record, {**files}, answer["seconds"])
