"""Images of a run, done by the workers of a Dask cluster.

    this process                         scheduler                    worker processes
    plan, scale, journal  --- path --->  which worker?  --- path -->  read, network, measure, encode
    gives files their names, journal <-- names of files, seconds ---  writes files under temporary names

Images travel by path and results by file: the scheduler sees some hundred bytes per image. No more images are handed
out than workers can have in progress. A result counts once, when this process records it, however often its task ran.
"""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cellseg_deploy.batching import MAX_BYTES, Outcome
from cellseg_deploy.cluster.connection import LOCAL, TlsFiles, connected
from cellseg_deploy.cluster.work_order import WorkOrder, write_order
from cellseg_deploy.cluster.worker import ERROR, do_image
from cellseg_deploy.errors import BackendUnavailableError, DataError, OutputError
from cellseg_deploy.files.atomic import remove_stale
from cellseg_deploy.run.elsewhere import ImageTask
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import image_of_line
from cellseg_deploy.run.record import RunSetup
from cellseg_deploy.threads import cores, plan

WAIT_SECONDS = 600.0
"""How long a run waits while the cluster has no worker at all."""
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
CANCELLED_TRIES = 5
"""How often an image is handed out again because its task was cancelled, or its result lost."""
_AHEAD = 2  # images handed out per thread of the workers: one in progress, one waiting at the worker
_SUSPECT = Outcome[Finished](error=RuntimeError("ended its workers"))

_log = logging.getLogger(__name__)


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

    def outcomes(self, setup: RunSetup, tasks: Sequence[ImageTask]) -> ClusterOutcomes:
        """See ``elsewhere.Elsewhere``."""
        return ClusterOutcomes(self.client, self.address, setup.out, self.order(setup), tasks)


@contextmanager
def reading_of_a_worker() -> Iterator[None]:
    """Raise ``OutputError`` if this machine does not see a file that a worker wrote."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename}: written by a worker, and cannot be read here ({error.strerror}); expected an output "
            "folder that all machines see under the same path"
        ) from error


@contextmanager
def open_cluster(
    address: str, *, workers: int = 1, threads: int | None = None, tls: TlsFiles | None = None
) -> Iterator[ClusterEngine]:
    """Connect to the scheduler at ``address``, or with ``local`` start ``workers`` processes on this machine.

    ``threads``: CPU threads, of all local workers together, None for one per core; on another cluster of each worker,
    None for as many as Dask gives it. Raises as ``connection.connected``.
    """
    if address == LOCAL:
        per_worker = max(1, (threads or cores()) // workers)
        helpers = plan(per_worker).helpers
        # Images that wait for the network leave their thread to others.
        settings = {"workers": workers, "threads_per_worker": helpers + 2 if per_worker > 1 else 1}
        threads = per_worker
    else:
        settings = {"workers": 1, "threads_per_worker": 1}
    with connected(address, tls=tls or TlsFiles(), **settings) as client:
        yield ClusterEngine(client, address, threads=threads, device_per_worker=address == LOCAL and workers > 1)


class ClusterOutcomes:
    """See ``elsewhere.Outcomes``."""

    def __init__(self, client: Any, address: str, out: Path, order: WorkOrder, tasks: Sequence[Any]) -> None:
        self._client, self._address, self._out = client, address, out
        self._order, self._tasks = order, tasks
        self._order_file = ""
        self._prefix = f"cellseg-{secrets.token_hex(6)}"
        self._futures: dict[int, Any] = {}  # in flight, by index of their task
        self._nbytes: dict[int, int] = {}  # of tasks that were handed out and are not yet yielded
        self._next_nbytes: int | None = None
        self._n_begun = 0
        self._n_cancelled = Counter[int]()  # by index of their task
        self._early: dict[int, Outcome[Finished]] = {}
        self._done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._network_seconds = 0.0
        self._n_threads = self._n_workers = 0
        self._seen_worker = self._looked = time.monotonic()

    @property
    def engine_seconds(self) -> float:
        """Mean over the workers of the time during which a network call was running."""
        return self._network_seconds / max(1, self._n_workers)

    def __enter__(self) -> Self:
        self._order_file = write_order(self._order, self._out)
        return self

    def __iter__(self) -> Iterator[Outcome[Finished]]:
        self._look()
        if not self._n_workers:
            _log.warning("%s: waiting for a worker", self._address)
        for index in range(len(self._tasks)):
            self._begin_more()
            while index not in self._early:
                self._collect()
                self._begin_more()
            outcome = self._early.pop(index)
            yield self._alone(index) if outcome is _SUSPECT else outcome
            del self._nbytes[index]

    def stop(self) -> None:
        """Begin no new tasks; does not wait for running ones."""
        futures, self._futures = self._futures, {}
        with suppress(Exception):  # the scheduler may be what failed
            self._client.cancel(list(futures.values()), force=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        with suppress(OSError):
            remove_stale(self._out)  # the order, and files of tasks that ran twice

    def _begin_more(self) -> None:
        """Hand out tasks in order as long as the workers can have them in progress."""
        while self._n_begun < len(self._tasks) and len(self._nbytes) < _AHEAD * self._n_threads:
            if self._next_nbytes is None:
                self._next_nbytes = self._tasks[self._n_begun].nbytes()
            if self._nbytes and sum(self._nbytes.values()) + self._next_nbytes > MAX_BYTES * self._n_workers:
                return
            self._nbytes[self._n_begun], self._next_nbytes = self._next_nbytes, None
            self._n_begun += 1
            self._submit(self._n_begun - 1)

    def _work(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function that does a task on a worker, and what it must know of it."""
        task = self._tasks[index]
        image = (str(task.image.path), task.image.name, task.image.problem)
        return do_image, (*image, task.output_name, task.scale, task.with_thresholds)

    def _submit(self, index: int, attempt: str = "") -> None:
        function, arguments = self._work(index)
        try:
            future = self._client.submit(
                function,
                str(self._out.absolute()),
                self._order_file,
                arguments,
                key=f"{self._prefix}-{index}{attempt}",
                pure=False,
            )
        except Exception as error:
            self._raise_if_closed(error)
            raise
        self._futures[index] = future
        future.add_done_callback(lambda future: self._done.put((index, future)))

    def _collect(self) -> None:
        """Wait for a task to end; look after the cluster meanwhile."""
        try:
            index, future = self._done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            self._look()
            return
        if self._futures.get(index) is not future:  # stopped
            return
        outcome = self._outcome(index, future)
        del self._futures[index]
        if outcome is None:
            self._submit(index, f"-{self._n_cancelled[index]}")
        else:
            self._early[index] = outcome
        self._look()

    def _outcome(self, index: int, future: Any) -> Outcome[Finished] | None:
        """Return what became of a task whose ``future`` has ended; None if it must be handed out again."""
        from distributed import CancelledError, KilledWorker

        try:
            answer = self._result(future)
        except KilledWorker:
            return _SUSPECT
        except CancelledError as error:  # somebody cancelled it, or the scheduler was away and forgot it
            self._raise_if_closed(error)
            self._n_cancelled[index] += 1
            if self._n_cancelled[index] <= CANCELLED_TRIES:
                return None
            return Outcome(
                error=DataError(
                    f"its task was cancelled on the cluster {self._n_cancelled[index]} times "
                    f"({getattr(error, 'reason', error)}); given up: run again, which tries it again"
                )
            )
        except BackendUnavailableError:
            raise
        except Exception as error:
            if future.status != "error":
                raise self._lost() from error
            raise BackendUnavailableError(  # errors of the work itself are answers
                f"{self._address}: a worker cannot run cellseg-deploy ({type(error).__name__}: {error}); install "
                "cellseg-deploy[cluster] of the same version on all machines"
            ) from error
        return Outcome(error=answer[ERROR]) if ERROR in answer else Outcome(self._finished(answer))

    def _result(self, future: Any) -> Any:
        """Return what the task of ``future``, which has ended, returned; it runs again if its worker died since."""
        while True:
            try:
                return future.result(timeout=_LOOK_SECONDS)
            except OSError:  # not there in time, or its worker or the scheduler did not answer
                if future.status == "error":
                    raise
                time.sleep(_POLL_SECONDS)
                self._look()

    def _finished(self, answer: dict[str, Any]) -> Finished:
        """Return the files that a worker wrote. Raises ``OutputError`` if this machine does not see them."""
        with reading_of_a_worker():
            record = image_of_line((self._out / answer["record"]).read_bytes())
            files = {place: self._out / name for place, name in answer["files"].items()}
            sizes = {place: path.stat().st_size for place, path in files.items()}
        if record is None or sizes != {file.path: file.size for file in record.outputs}:
            raise OutputError(f"{self._out}: files of a worker are incomplete; check free space and the file system")
        self._network_seconds += answer["seconds"].get("network", 0.0)
        (self._out / answer["record"]).unlink(missing_ok=True)
        return Finished(record, {**files}, answer["seconds"])

    def _alone(self, index: int) -> Outcome[Finished]:
        """Try a task whose workers died again, with no other in flight: another task may have ended them."""
        while self._futures:
            self._collect()
        self._submit(index, "-alone")
        while index not in self._early:
            self._collect()
        outcome = self._early.pop(index)
        if outcome is not _SUSPECT:
            return outcome
        return Outcome(
            error=DataError(
                "the worker processes that work on this image end, also when it is the only one: out of memory, or a "
                "crash in a library; given up"
            )
        )

    def _look(self) -> None:
        """Learn how many workers there are. Raises ``BackendUnavailableError`` if scheduler or workers are gone."""
        now = time.monotonic()
        self._raise_if_closed()
        if self._n_workers and now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self._client.status != "running":
            return
        try:
            threads = self._client.nthreads()
        except Exception as error:
            self._raise_if_closed(error)
            if now - self._seen_worker > WAIT_SECONDS:
                raise self._lost() from error
            return  # Dask is connecting again; it closes the client when it gives up
        if self._n_workers and not threads:
            _log.warning("%s: no worker is left; waiting for one", self._address)
        self._n_workers, self._n_threads = len(threads), sum(threads.values())
        if threads:
            self._seen_worker = now
        elif now - self._seen_worker > WAIT_SECONDS:
            raise BackendUnavailableError(
                f"{self._address}: no worker for {WAIT_SECONDS:.0f} s; start workers (dask worker {self._address}) and "
                "run again, which resumes the run"
            )

    def _raise_if_closed(self, error: Exception | None = None) -> None:
        """Raise ``BackendUnavailableError`` if Dask has given up connecting to the scheduler."""
        if self._client.status in ("closed", "closing"):
            raise self._lost() from error

    def _lost(self) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"{self._address}: the connection to the scheduler was lost; what is done is kept: run again, which "
            "resumes the run"
        )
