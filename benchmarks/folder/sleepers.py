"""A real Dask scheduler with many workers in this process, whose work is to sleep: what scheduler and journal can take.

The run is the real one, ``run_folder`` with a ``ClusterEngine``; only the body of a task is another. It sleeps, and
writes the files of an image that was done before, so this process has as much to rename and to record as in a real
run. Bands of one large image are done in the same way.
All workers share this interpreter, so the rate that is found is lower than a cluster's.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.errors import DataError
from cellseg_deploy.files.atomic import temporary_in
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.journal import ImageRecord, line_of_image
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.network import ProbabilityFile, bands_of
from cellseg_deploy.slides.region import ArrayReader, region_of

SAVE = ("labels", "overlays")
BAND_BYTES = 1 << 20
_ONE_INTERPRETER = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "2s"}
"""Each worker samples the stacks of all threads every 10 ms, of all workers, that is, if they share a process."""


@dataclass
class Body:
    """What every task does now. ``record``, ``files``: of the image that was done, files by place."""

    seconds: float
    record: ImageRecord
    files: dict[str, bytes]


_body: list[Body] = []


def sleep_instead(out: str, _: str, task: tuple[Any, ...]) -> dict[str, Any]:
    """Take the place of ``cluster.worker.do_image``."""
    (body,) = _body
    name, output_name = task[1], task[3]
    time.sleep(body.seconds)
    places = [format.place(output_name) for format in chosen_formats(SAVE) if format.folder]
    outputs = tuple(replace(file, path=place) for file, place in zip(body.record.outputs, places, strict=True))
    record = replace(body.record, image=name, output_name=output_name, outputs=outputs)
    written = [temporary_in(Path(out)) for _ in (record, *places)]
    for path, content in zip(written, [line_of_image(record), *body.files.values()], strict=True):
        path.write_bytes(content)
    names = [path.name for path in written]
    seconds = {"network": body.seconds, "write": 0.0}
    return {"record": names[0], "files": dict(zip(places, names[1:], strict=True)), "seconds": seconds}


@dataclass
class Messages:
    """``count``, ``nbytes``: of messages between the processes that a cluster would have."""

    count: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Slept:
    """One run. ``tasks``: images, or bands of one. ``messages``: None if they were not counted."""

    workers: int
    tasks: int
    sleep_seconds: float
    seconds: float
    messages: Messages | None = field(default=None)


def run_sleepers(
    segmenter: Segmenter, folder: Path, out: Path, body: Body, *, workers: int, count_messages: bool = False
) -> Slept:
    """Do the images in ``folder`` with ``workers`` that sleep; their scratch folders lie next to it.

    Raises ``DataError`` if an image failed.
    """
    from cellseg_deploy.cluster import engine as imported

    engine: Any = imported
    images, do_image = find_images([folder]), engine.do_image
    with _cluster(workers, folder.parent) as client:
        messages = Messages()
        _body[:] = [body]
        engine.do_image = sleep_instead
        try:
            elsewhere = engine.ClusterEngine(client, "in this process")
            options = RunOptions(save=SAVE, report=False)
            with counted(messages) if count_messages else nullcontext():
                since = stopwatch()
                summary = run_folder(segmenter, images, out, options=options, elsewhere=elsewhere)
                seconds = since()
        finally:
            engine.do_image = do_image
            _body.clear()
    if summary.failed:
        raise DataError(f"{summary.failed} of {len(images)} images failed")
    return Slept(workers, len(images), body.seconds, seconds, messages if count_messages else None)


def run_band_sleepers(segmenter: Segmenter, work: Path, seconds: float, *, workers: int, bands: int) -> Slept:
    """Do ``bands`` of one image with ``workers`` that sleep for ``seconds`` each; ``work``: an empty folder.

    A band is ``BAND_BYTES`` of probabilities, which this process appends to those of the bands above.
    """
    from cellseg_deploy.cluster import bands as imported

    module: Any = imported
    spec, do_band = segmenter.backend.spec, module.do_band
    rows = bands * (spec.tile_size - 2 * segmenter.halo)
    hw = rows, BAND_BYTES // (4 * len(spec.channels) * (rows // bands))
    region = region_of(ArrayReader(np.zeros((*hw, 3), np.uint8)))
    todo = bands_of(hw, spec.tile_size, segmenter.halo)
    with _cluster(workers, work.parent) as client:
        module.do_band = partial(_sleep_instead_of_band, seconds)
        try:
            since = stopwatch()
            elsewhere = ClusterEngine(client, "in this process").slide(work / "none.tif", ReadOptions())
            stored = ProbabilityFile(work / "probabilities.f32", len(spec.channels), hw)
            for band in elsewhere(work, segmenter, region, 0)(1.0, todo):
                stored.append(band.rows)
            taken = since()
        finally:
            module.do_band = do_band
    return Slept(workers, len(todo), seconds, taken)


def _sleep_instead_of_band(seconds: float, out: str, *_: Any) -> dict[str, Any]:
    """Take the place of ``cluster.worker.do_band``."""
    time.sleep(seconds)
    path = temporary_in(Path(out))
    path.write_bytes(bytes(BAND_BYTES))
    return {"rows": path.name, "size": BAND_BYTES, "blank": b"\0", "seconds": {"network": seconds}}


@contextmanager
def _cluster(workers: int, local_directory: Path) -> Iterator[Any]:
    """A client of a scheduler with ``workers`` in this process."""
    import dask
    from distributed import Client, LocalCluster

    with (
        _slow_disk_is_no_news(),
        dask.config.set(_ONE_INTERPRETER),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=False,
            local_directory=str(local_directory),
            memory_limit=0,  # all are this process: each would pause because of the others' memory
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def counted(messages: Messages) -> Iterator[None]:
    """Count what is sent through Dask's streams and calls, in both directions."""
    from distributed import core
    from distributed.batched import BatchedSend
    from distributed.protocol import dumps

    send, send_recv = BatchedSend.send, core.send_recv

    def add(*sent: Any) -> None:
        messages.count += len(sent)
        messages.nbytes += sum(len(frame) for message in sent for frame in dumps(message))

    def counted_send(self: Any, *sent: Any) -> None:
        add(*sent)
        send(self, *sent)

    async def counted_call(comm: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await send_recv(comm, *args, **kwargs)
        add(kwargs, answer)
        return answer

    BatchedSend.send, core.send_recv = counted_send, counted_call
    try:
        yield
    finally:
        BatchedSend.send, core.send_recv = send, send_recv


@contextmanager
def _slow_disk_is_no_news() -> Iterator[None]:
    """Hide Dask's warning that a folder took long to make."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Creating scratch directories")
        yield
