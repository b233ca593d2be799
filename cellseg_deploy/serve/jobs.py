"""Long images: accepted now, answered later. A journal says which jobs there were, so that a job whose process was
killed is reported as lost.

OUT/jobs.jsonl      one line when a job is accepted, and one when it ends (``files.checked_lines``)
OUT/ID.result       the answer of a finished job
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cellseg_deploy.errors import plural
from cellseg_deploy.files import checked_lines, lock
from cellseg_deploy.files.atomic import make_folder, remove, remove_stale, write_bytes, writing
from cellseg_deploy.files.checked_lines import AppendedFile
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.serve.engine import Answer, Engine, Task, TaskCancelledError
from cellseg_deploy.serve.limits import Limits, QueueFullError, Waiting
from cellseg_deploy.serve.outputs import named
from cellseg_deploy.serve.service import RefusedError, why

_log = logging.getLogger(__name__)

JOURNAL = "jobs.jsonl"
LOST = "the service ended before this job was done; send the image again"
MISSING = "the file with the result of this job is missing; send the image again"
RETRY_SECONDS = 10

State = Literal["queued", "running", "done", "failed", "lost"]


@dataclass(eq=False)
class Job:
    """``id``: its name in addresses. ``image``, ``output``: names. ``state``: as journalled; a task that is being run
    says more. ``code``, ``error``: why it failed. ``head``: counts and warnings of the answer."""

    id: str
    image: str
    output: str
    state: State = "queued"
    code: int = 0
    error: str = ""
    head: tuple[int, int, tuple[str, ...]] = (0, 0, ())
    task: Task | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "lost")

    def to_json(self) -> dict[str, Any]:
        """Describe it for its owner. ``tiles_done`` of ``tiles``: where it is in the network."""
        content: dict[str, Any] = {"id": self.id, "image": utf8(self.image), "output": self.output}
        task = self.task
        state = "running" if task is not None and task.is_running and not self.has_ended else self.state
        content["state"] = state
        if state == "running" and task is not None:
            content |= {"tiles": task.tiles, "tiles_done": task.tiles_done}
        if state == "done":
            content |= {"count": self.head[0], "counted": self.head[1], "warnings": list(self.head[2])}
        if state in ("failed", "lost"):
            content |= {"code": self.code, "error": utf8(self.error)}
        return content


class Jobs:
    """Jobs in ``folder``, run one after the other by ``engine``, whose batches they share with other requests."""

    def __init__(self, folder: Path, engine: Engine, limits: Limits, journal: AppendedFile) -> None:
        self._folder, self._engine, self._limits, self._journal = folder, engine, limits, journal
        self.waiting = Waiting(limits.held_bytes, lambda: RETRY_SECONDS)
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._runner = ThreadPoolExecutor(1, "cellseg-jobs")
        self._futures: list[Future[None]] = []

    @classmethod
    @contextmanager
    def open(cls, folder: Path, engine: Engine, limits: Limits) -> Iterator[Self]:
        """Open the jobs of ``folder``, which is made if missing. Jobs that an earlier process did not end are lost.

        At the end of the block, accepted jobs are finished. Raises ``OutputError``, and
        ``OutputInUseError`` if another service has the folder.
        """
        make_folder(folder)
        with lock.exclusive(folder):
            remove_stale(folder)
            earlier = _read(folder)
            _write(folder, earlier)
            with AppendedFile(folder / JOURNAL) as journal:
                jobs = cls(folder, engine, limits, journal)
                jobs._jobs = earlier
                try:
                    yield jobs
                finally:
                    jobs.close()

    def close(self) -> None:
        """Finish accepted jobs, for at most ``Limits.grace_seconds``; the next start reports the others as lost."""
        try:
            wait(self._futures, self._limits.grace_seconds)
        finally:
            for job in list(self._jobs.values()):
                if (task := job.task) is not None:
                    task.cancel()
            self._runner.shutdown(wait=True, cancel_futures=True)

    def submit(self, task: Task) -> Job:
        """Accept ``task``: on return it is in the journal. Raises ``QueueFullError``, ``OutputError``."""
        job = Job(secrets.token_hex(8), task.name, task.output.name, task=task)
        with self._lock:
            self._check_room()
            self._journal.append(_line(job))
            self._jobs[job.id] = job
            future = self._runner.submit(self._run, job, task)
            self._futures = [each for each in self._futures if not each.done()] + [future]
        return job

    def check_room(self) -> None:
        """Raise ``QueueFullError`` if no further job would be accepted."""
        with self._lock:
            self._check_room()

    def _check_room(self) -> None:
        if sum(not each.has_ended for each in self._jobs.values()) >= self._limits.jobs:
            raise QueueFullError(f"the queue of {plural(self._limits.jobs, 'job')} is full", RETRY_SECONDS)

    def all(self) -> list[dict[str, Any]]:
        """Describe all jobs, oldest first."""
        with self._lock:
            return [job.to_json() for job in self._jobs.values()]

    def get(self, number: str) -> Job:
        """Return the job ``number``. Raises ``RefusedError`` if there is none."""
        job = self._jobs.get(number)
        if job is None:
            raise RefusedError(404, "there is no such job; it may have been deleted")
        return job

    def result(self, number: str) -> Answer:
        """Return the answer of a finished job. Raises ``RefusedError`` if it is not done, or will never be."""
        job = self.get(number)
        if job.state in ("failed", "lost"):
            raise RefusedError(410, job.error)
        if job.state != "done":
            raise RefusedError(409, "the job is not done yet")
        found, counted, warnings = job.head
        path = self._place(job)
        try:
            return Answer(named(job.output), path.read_bytes(), found, counted, warnings)
        except FileNotFoundError:
            raise RefusedError(404, "there is no such job; it was deleted while it was asked for") from None

    def delete(self, number: str) -> None:
        """Forget a job and its result; cancel it if it has not ended. Raises as ``get``, and ``OutputError``."""
        with self._lock:
            job = self.get(number)
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._journal.append(checked_lines.line_of({"id": job.id, "state": "deleted"}))
        del self._jobs[job.id]
        if (task := job.task) is not None:
            task.cancel()
        remove(self._place(job))

    def _place(self, job: Job) -> Path:
        return self._folder / f"{job.id}.result"

    def _run(self, job: Job, task: Task) -> None:
        try:
            answer = self._engine.run(task)
            with self._lock:
                if job.id in self._jobs:
                    write_bytes(self._place(job), answer.body)
                    job.head, job.state = (answer.found, answer.counted, answer.warnings), "done"
                    self._journal.append(_line(job))
        except TaskCancelledError:
            pass  # deleted
        except BaseException as error:
            with self._lock:
                job.code, job.error = why(error, task.name)
                job.state = "failed"
                try:
                    if job.id in self._jobs:  # a line after that of its deletion would bring it back
                        self._journal.append(_line(job))
                except Exception:  # the next start reports it as lost
                    _log.exception("job %s failed, which could not be recorded", job.id)
        finally:
            job.task = None  # holds the image
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        with self._lock:
            ended = [job for job in self._jobs.values() if job.has_ended]
            for job in ended[: max(0, len(ended) - self._limits.kept_jobs)]:
                self._forget(job)


def _line(job: Job) -> bytes:
    content = {"id": job.id, "state": job.state, "image": job.image, "output": job.output, "time": int(time.time())}
    if job.state == "done":
        content |= {"found": job.head[0], "counted": job.head[1], "warnings": list(job.head[2])}
    if job.state in ("failed", "lost"):
        content |= {"code": job.code, "error": job.error}
    return checked_lines.line_of(content)


def _read(folder: Path) -> dict[str, Job]:
    """Return the jobs of the journal in ``folder``; those that have not ended are lost, and so are results whose file
    is missing."""
    path = folder / JOURNAL
    jobs: dict[str, Job] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        content = checked_lines.content_of(line) if line.endswith(b"\n") else None
        if content is None:  # it was being written when the process died
            continue
        number = content["id"]
        if content["state"] == "deleted":
            jobs.pop(number, None)
            continue
        job = jobs.setdefault(number, Job(number, content["image"], content["output"]))
        job.state, job.code, job.error = content["state"], content.get("code", 0), content.get("error", "")
        job.head = (content.get("found", 0), content.get("counted", 0), tuple(content.get("warnings", ())))
    for job in jobs.values():
        is_missing = job.state == "done" and not (folder / f"{job.id}.result").is_file()
        if not job.has_ended or is_missing:
            job.state, job.code, job.error = "lost", 410, MISSING if is_missing else LOST
    return jobs


def _write(folder: Path, jobs: dict[str, Job]) -> None:
    """Replace the journal in ``folder`` by one with one line per job, and remove results without a job."""
    with writing(folder / JOURNAL):
        for file in folder.glob("*.result"):
            if file.stem not in jobs:
                remove(file)
    write_bytes(folder / JOURNAL, b"".join(map(_line, jobs.values())))
