"""The side of a worker process: one model, opened once; one image per task, from a path to files next to the results.

Files get temporary names in the output folder. The process that started the run gives them their names once it
records the image, so a task that is run twice, or whose worker is killed, changes no result.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cellseg_deploy.batching import BatchedNetwork, Network, alone, core_given_up
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock
from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cluster.allocator import keep_freed_memory
from cellseg_deploy.cluster.work_order import WorkOrder, of_results, read_order
from cellseg_deploy.errors import BackendUnavailableError, CellsegError, DataError, UsageError, concerns_one_image
from cellseg_deploy.files import urls
from cellseg_deploy.files.atomic import temporary_in, write_bytes
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.image_work import ImageWork
from cellseg_deploy.run.journal import line_of_image
from cellseg_deploy.run.record import Inputs, identity_of
from cellseg_deploy.slides.network import BandNetwork, bands_of
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.slides.sparse_region import sparse_region
from cellseg_deploy.threads import single_threaded_libraries

ERROR = "error"
"""In the answer to a task that failed: the exception."""

_engines: dict[str, _Engine] = {}
_opening = threading.Lock()


class _Engine:
    """The model of one run in this process; ``users``: tasks that run with it."""

    def __init__(self, order: WorkOrder, *, n_threads: int, number: int | None) -> None:
        self.users = 0
        keep_freed_memory()
        for root in order.roots:
            _check_root(Path(root))
        self._segmenter = order.open(threads=n_threads, number=number)
        try:
            expected = RunIdentity.from_json(order.identity)
            own = identity_of(self._segmenter, order.options, Inputs((), ()))
            if unlike := differences(of_results(expected), of_results(own)):
                raise BackendUnavailableError(
                    f"would not give the results of the machine that starts the run: {'; '.join(unlike)}; install the "
                    "same versions and use the same model on both"
                )
        except BaseException:
            self._segmenter.close()
            raise
        self._libraries = single_threaded_libraries()
        self._libraries.__enter__()
        self._reading = order.options.reading
        self._work = ImageWork(self._segmenter, order.options, chosen_formats(order.save))
        self._cores = threading.Semaphore(n_threads)
        self._thread: threading.Thread | None = None
        backend, batch = self._segmenter.backend, self._segmenter.batch_size
        self._batched = BatchedNetwork(backend.predict, batch=batch, step=backend.batch_step)
        if n_threads > 1:
            self._thread = threading.Thread(target=self._batched.serve, name="cellseg-engine", daemon=True)
            self._thread.start()
        self._network: Network = self._shared if n_threads > 1 else alone(backend.predict, batch)

    def __call__(self, out: Path, task: Any) -> dict[str, Any]:
        path, name, problem, output_name, scale, with_thresholds = task
        image = FoundImage(Path(path), name, problem)
        with self._cores:
            finished = self._work(image, output_name, scale, self._network, with_thresholds=with_thresholds)
        clock = StageClock()
        written = dict[str, str]()
        try:
            with clock("write"):
                for place, content in finished.files.items():
                    assert isinstance(content, bytes)  # a path only once a worker has written it
                    written[place] = self._write(out, content)
                record_file = self._write(out, line_of_image(finished.record))
        except BaseException:
            for each in written.values():
                with suppress(OSError):
                    (out / each).unlink(missing_ok=True)
            raise
        seconds = dict(finished.seconds)
        seconds["write"] = seconds.get("write", 0.0) + clock.seconds["write"]
        return {"record": record_file, "files": written, "seconds": seconds}

    def band(self, out: Path, task: Any) -> dict[str, Any]:
        """See ``do_band``."""
        path, level, xywh, stamp, scale, contrast, first_row = task
        clock = StageClock()
        reader = open_image(Path(path), self._reading)
        try:
            if tuple(reader.stamp) != tuple(stamp):
                raise DataError(
                    f"{path}: another file than on the machine that starts the run (size or time differs); expected "
                    "the same file under this path on all machines"
                )
            region, segmenter = region_of(reader, level, tuple(xywh)), self._segmenter
            bands = bands_of(scaled_size(region.hw, scale), segmenter.backend.spec.tile_size, segmenter.halo)
            (band,) = (each for each in bands if each.write[0].start == first_row)
            sparse = sparse_region(segmenter, region, scale, contrast)
            compute = BandNetwork(
                *(segmenter, region.hw, region.rows if sparse is None else sparse.rows, scale, self._network),
                contrast=contrast,
                judge=None if sparse is None else sparse.colours,
                clock=clock,
            )
            with self._cores:
                found = compute(band)
        finally:
            reader.close()
        assert not isinstance(found.rows, Path)
        name = self._write(out, found.rows.data)
        return {"rows": name, "size": found.rows.nbytes, "blank": found.blank, "seconds": dict(clock.seconds)}

    def close(self) -> None:
        """End the thread of the network, and close the model."""
        self._batched.end(RuntimeError("the model was closed"))
        if self._thread is not None:
            self._thread.join()
        self._segmenter.close()
        self._libraries.__exit__(None, None, None)

    @staticmethod
    def _write(out: Path, content: bytes | memoryview) -> str:
        path = temporary_in(out)
        write_bytes(path, content)
        return path.name

    def _shared(self, tiles: ImageTiles) -> None:
        self._batched(tiles, partial(core_given_up, self._cores))


def do_image(out: str, order_file: str, task: tuple[Any, ...]) -> dict[str, Any]:
    """Do one image; body of a Dask task. ``task``: path, name and problem of the image, name of its files, its scale,
    and whether its thresholds are wanted.

    Returns the names of files in ``out``: ``record`` with the image's line, ``files`` by place; or ``ERROR``. Only
    names and seconds travel to the scheduler.
    """
    return _do(out, order_file, lambda engine: engine(Path(out), task))


def do_band(out: str, order_file: str, task: tuple[Any, ...]) -> dict[str, Any]:
    """Compute one band of a large image; body of a Dask task. ``task``: path, level, region and stamp of the image, its
    scale, the contrast of blank tiles, and the first row that the band owns.

    Returns ``rows``, the name of a file in ``out`` with the probabilities (rows, K, w), its ``size`` in bytes, the
    flags ``blank`` and ``seconds``; or ``ERROR``.
    """
    return _do(out, order_file, lambda engine: engine.band(Path(out), task))


def _do(out: str, order_file: str, work: Callable[[_Engine], dict[str, Any]]) -> dict[str, Any]:
    from distributed import get_worker

    worker = get_worker()
    try:
        engine = _hold(Path(out), order_file, worker)
        try:
            return work(engine)
        finally:
            with _opening:
                engine.users -= 1
    except CellsegError as error:
        said = str(error) if concerns_one_image(error) else f"worker {worker.address}: {error}"
        return {ERROR: type(error)(said)}
    except Exception as error:
        return {ERROR: _portable(error)}


def _hold(out: Path, order_file: str, worker: Any) -> _Engine:
    """Return the model of this run, opened by the first task; models of earlier runs are closed."""
    with _opening:
        if (engine := _engines.get(order_file)) is None:
            for name in [name for name, other in _engines.items() if not other.users]:
                _engines.pop(name).close()
            order = read_order(out, order_file)
            number = worker.name if isinstance(worker.name, int) else None
            _engines[order_file] = engine = _Engine(
                order, n_threads=order.threads or worker.state.nthreads, number=number
            )
        engine.users += 1
        return engine


def _check_root(root: Path) -> None:
    """Raise ``UsageError`` if this machine does not see ``root``, a folder of images."""
    if not urls.is_url(root):
        if not root.is_dir():
            raise UsageError(f"{root}: no such folder of images on this machine; make it available at this path")
        return
    try:
        urls.check_readable(root)
    except OSError as error:
        raise UsageError(
            f"{urls.text_of(root)}: cannot be listed from this machine ({error.strerror}); workers take credentials "
            "from their own environment"
        ) from error


def _portable(error: Exception) -> Exception:
    """Return ``error`` if it survives the way to another process, otherwise an error that tells of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
