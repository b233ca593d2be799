"""Tasks done by the workers of a Dask cluster: handed out and taken in order, whatever happens to a worker.

No more tasks are handed out than workers can have in progress. A result counts once, when it is taken, however often
its task ran.
"""

from __future__ import annotations

import logging
import queue
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from cellseg_deploy.batching import MAX_BYTES, Outcome
from cellseg_deploy.cluster.work_order import WorkOrder, write_order
from cellseg_deploy.cluster.worker import ERROR
from cellseg_deploy.errors import BackendUnavailableError, DataError, OutputError
from cellseg_deploy.files.atomic import remove_stale

WAIT_SECONDS = 600.0
"""How long a run waits while the cluster has no worker at all."""
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
CANCELLED_TRIES = 5
"""How often a task is handed out again because it was cancelled, or its result lost."""
_AHEAD = 2  # tasks handed out per thread of the workers: one in progress, one waiting at the worker
_SUSPECT = Outcome[Any](error=RuntimeError("ended its workers"))

T = TypeVar("T")
_log = logging.getLogger(__name__)


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


class Workers:
    """The workers of the cluster of a Dask ``client`` at ``address``: ``count`` of them, with ``threads`` in all."""

    def __init__(self, client: Any, address: str) -> None:
        self.client, self.address = client, address
        self.count = self.threads = 0
        self._seen = self._looked = time.monotonic()

    def look(self) -> None:
        """Learn how many there are. Raises ``BackendUnavailableError`` if scheduler or workers are gone."""
        now = time.monotonic()
        self.raise_if_closed()
        if self.count and now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self.client.status != "running":
            return
        try:
            threads = self.client.nthreads()
        except Exception as error:
            self.raise_if_closed(error)
            if now - self._seen > WAIT_SECONDS:
                raise self.lost() from error
            return  # Dask is connecting again; it closes the client when it gives up
        if self.count and not threads:
            _log.warning("%s: no worker is left; waiting for one", self.address)
        self.count, self.threads = len(threads), sum(threads.values())
        if threads:
            self._seen = now
        elif now - self._seen > WAIT_SECONDS:
            raise BackendUnavailableError(
                f"{self.address}: no worker for {WAIT_SECONDS:.0f} s; start workers (dask worker {self.address}) and "
                "run again, which resumes the run"
            )

    def wait_from_now(self) -> None:
        """Restart the time without workers: they were not checked for long."""
        self._seen = time.monotonic()

    def raise_if_closed(self, error: Exception | None = None) -> None:
        """Raise ``BackendUnavailableError`` if Dask has given up connecting to the scheduler."""
        if self.client.status in ("closed", "closing"):
            raise self.lost() from error

    def lost(self) -> BackendUnavailableError:
        """Return the error of a lost connection."""
        return BackendUnavailableError(
            f"{self.address}: the connection to the scheduler was lost; what is done is kept: run again, which "
            "resumes the run"
        )


class ClusterOutcomes(ABC, Generic[T]):
    """Yields one outcome per task, in order; see ``elsewhere.Outcomes``. Subclasses know what a task is."""

    def __init__(
        self,
        workers: Workers,
        out: Path,
        order: WorkOrder,
        tasks: Sequence[Any],
        *,
        beside: ClusterOutcomes[Any] | None = None,
    ) -> None:
        """``out``: folder that all machines see, for files of the workers. ``beside``: other tasks of the same order
        and folder, which are in flight meanwhile and end later."""
        self.workers, self.out, self.order = workers, out, order
        self._tasks, self._beside = tasks, beside
        self._order_file = ""
        self._prefix = f"cellseg-{secrets.token_hex(6)}"
        self._futures: dict[int, Any] = {}  # in flight, by index of their task
        self._nbytes: dict[int, int] = {}  # of tasks that were handed out and are not yet yielded
        self._next_nbytes: int | None = None
        self._n_begun = 0
        self._n_cancelled = Counter[int]()  # by index of their task
        self._early: dict[int, Outcome[T]] = {}
        self._done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    @abstractmethod
    def _work(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function that does a task on a worker, and what it must know of it."""

    @abstractmethod
    def _finished(self, answer: dict[str, Any]) -> T:
        """Return what a worker made. Raises ``OutputError`` if this machine does not see its files."""

    def _nbytes_of(self, index: int) -> int:
        """Return the memory that a task takes on its worker."""
        nbytes: int = self._tasks[index].nbytes()
        return nbytes

    def __enter__(self) -> Self:
        self._order_file = write_order(self.order, self.out) if self._beside is None else self._beside._order_file
        return self

    def __iter__(self) -> Iterator[Outcome[T]]:
        self.workers.wait_from_now()  # reading a slide may have taken long
        self.workers.look()
        if not self.workers.count:
            _log.warning("%s: waiting for a worker", self.workers.address)
        for index in range(len(self._tasks)):
            self._begin_more()
            yield self._take(index)
            del self._nbytes[index]

    def stop(self) -> None:
        """Begin no new tasks; does not wait for running ones."""
        futures, self._futures = self._futures, {}
        with suppress(Exception):  # the scheduler may be what failed
            self.workers.client.cancel(list(futures.values()), force=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._beside is None:
            with suppress(OSError):
                remove_stale(self.out)  # the order, and files of tasks that ran twice

    def _begin_more(self) -> None:
        """Hand out tasks in order as long as the workers can have them in progress."""
        while self._n_begun < len(self._tasks) and len(self._nbytes) < _AHEAD * self.workers.threads:
            if self._next_nbytes is None:
                self._next_nbytes = self._nbytes_of(self._n_begun)
            if self._nbytes and sum(self._nbytes.values()) + self._next_nbytes > MAX_BYTES * self.workers.count:
                return
            self._nbytes[self._n_begun], self._next_nbytes = self._next_nbytes, None
            self._n_begun += 1
            self._submit(self._n_begun - 1)

    def _submit(self, index: int, attempt: str = "") -> None:
        function, arguments = self._work(index)
        try:
            future = self.workers.client.submit(
                function,
                str(self.out.absolute()),
                self._order_file,
                arguments,
                key=f"{self._prefix}-{index}{attempt}",
                pure=False,
            )
        except Exception as error:
            self.workers.raise_if_closed(error)
            raise
        self._futures[index] = future
        future.add_done_callback(lambda future: self._done.put((index, future)))

    def _take(self, index: int) -> Outcome[T]:
        """Wait for the outcome of a task; meanwhile, hand out others."""
        while index not in self._early:
            self._collect()
            self._begin_more()
        outcome = self._early.pop(index)
        return self._alone(index) if outcome is _SUSPECT else outcome

    def _collect(self) -> None:
        """Wait for a task to end; look after the cluster meanwhile."""
        try:
            index, future = self._done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            self.workers.look()
            return
        if self._futures.get(index) is not future:  # stopped
            return
        outcome = self._outcome(index, future)
        del self._futures[index]
        if outcome is None:
            self._submit(index, f"-{self._n_cancelled[index]}")
        else:
            self._early[index] = outcome
        self.workers.look()

    def _outcome(self, index: int, future: Any) -> Outcome[T] | None:
        """Return what became of a task whose ``future`` has ended; None if it must be handed out again."""
        from distributed import CancelledError, KilledWorker

        try:
            answer = self._result(future)
        except KilledWorker:
            return _SUSPECT
        except CancelledError as error:  # somebody cancelled it, or the scheduler was away and forgot it
            self.workers.raise_if_closed(error)
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
                raise self.workers.lost() from error
            raise BackendUnavailableError(  # errors of the work itself are answers
                f"{self.workers.address}: a worker cannot run cellseg-deploy ({type(error).__name__}: {error}); "
                "install cellseg-deploy[cluster] of the same version on all machines"
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
                self.workers.look()

    def _alone(self, index: int) -> Outcome[T]:
        """Try a task whose workers died again, with no other in flight: another task may have ended them."""
        self._drain()
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

    def _drain(self) -> None:
        """Wait until no task is in flight, nor one of those beside."""
        while self._futures:
            self._collect()
        if self._beside is not None:
            self._beside._drain()
