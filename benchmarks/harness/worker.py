"""A separate process for each subject of a measurement, called by the timer in turns.

    this process                        worker: python -m cellseg_benchmarks.harness.worker
    Worker("form", {...})   ------->    opens the subject, describes it
    .turn("predict")(8)     ------->    runs it 8 times between two reads of its own clock, answers the seconds
    .ask("run", ...)        ------->    does something once, answers the result
    .peak()                 ------->    answers its peak memory
    .close()                ------->    ends

So each form has its own peak memory, thread pools and settings of one library do not affect another, a crash costs
one row, and rounds are still interleaved. Requests and answers are lines of JSON on stdin and stdout; anything
a library prints goes to stderr, whose end is reported as the reason when the process dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

from cellseg_benchmarks.harness.memory import peak_rss_bytes
from cellseg_benchmarks.harness.timer import Turn, turn_of
from cellseg_deploy.errors import BackendUnavailableError, CellsegError

SUBJECTS = {
    "form": ("cellseg_benchmarks.harness.forms", "subject"),
    "limits": ("cellseg_benchmarks.engine.limit_subjects", "subject"),
    "folder": ("cellseg_benchmarks.folder.subject", "subject"),
    "cellpose": ("cellseg_benchmarks.folder.peer_tools", "cellpose"),
    "stardist": ("cellseg_benchmarks.folder.peer_tools", "stardist"),
    "instanseg": ("cellseg_benchmarks.folder.peer_tools", "instanseg"),
}
"""Kind of subject -> module and function that returns a ``Subject``."""

START_SECONDS = 1800.0
"""Limit for starting a worker: compiling a large network takes minutes."""
ANSWER_SECONDS = 6 * 3600.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LAST_LINES = 4


class WorkerError(BackendUnavailableError):
    """The worker's measurement failed: it refused, crashed or did not answer."""


@dataclass(frozen=True)
class Subject:
    """A subject to measure. ``calls``: by name, what is timed. ``questions``: by name, what is done once and answered
    in JSON. ``sync``: see ``timer.turn_of``. ``gpu_bytes``: GPU memory in use, None without a GPU. ``close``:
    releases its resources."""

    calls: Mapping[str, Callable[[], object]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    questions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    sync: Callable[[], object] = lambda: None
    gpu_bytes: Callable[[], int | None] = lambda: None
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Peak:
    """Peak memory of a worker, libraries included, and of the GPU if it uses one."""

    rss_bytes: int
    gpu_bytes: int | None


class Worker:
    """A started worker process; raises ``WorkerError`` if it cannot do what is requested."""

    def __init__(self, kind: str, arguments: Mapping[str, Any], *, threads: int | None = None) -> None:
        """Start a process, open the subject ``kind`` with ``arguments`` (JSON) in it, and wait until it is ready.

        ``threads``: of OpenMP, MKL and OpenBLAS; None leaves them as they are.
        """
        environment = os.environ | ({} if threads is None else dict.fromkeys(_THREADS, str(threads)))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cellseg_benchmarks.harness.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
            )
        except BaseException:
            self._stderr.close()
            raise
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._closed = False
        try:
            ready = self._request({"kind": kind, "arguments": dict(arguments)}, START_SECONDS)
        except BaseException:
            self.kill()
            raise
        self.facts: dict[str, Any] = ready["facts"]
        self.names: list[str] = ready["calls"]

    def turn(self, name: str) -> Turn:
        """The subject's call ``name`` as an entry for the timer."""
        return lambda calls: float(self._request({"do": "turn", "name": name, "calls": calls})["seconds"])

    def ask(self, question: str, **arguments: Any) -> Any:
        """Answer of the subject to ``question``."""
        return self._request({"do": "ask", "name": question, "arguments": arguments})["answer"]

    def peak(self) -> Peak:
        """Peak memory so far."""
        answer = self._request({"do": "peak"})
        return Peak(answer["rss_bytes"], answer["gpu_bytes"])

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        if self._closed:
            return
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._closed = True
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # an interrupted worker may be in the middle of a long call
            self.kill()

    def _request(self, request: Mapping[str, Any], timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        if self._closed:
            raise WorkerError("the worker process has ended already")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._why_it_died()) from None
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise WorkerError(f"no answer within {timeout:.0f} s; ended") from None
        except BaseException:  # after a signal this answer would be taken for that of the next request
            self.kill()
            raise
        if not line:
            raise WorkerError(self._why_it_died())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def _why_it_died(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").splitlines()
        last = " ".join(" ".join(words[-_LAST_LINES:]).split())
        how = f"signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}{': ' if last else ''}{last}"


def serve(read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer requests, one per line, until ``read`` returns nothing. The first request opens the subject."""
    subject: Subject | None = None
    while line := read():
        request = json.loads(line)
        try:
            if subject is None:
                module, function = SUBJECTS[request["kind"]]
                subject = getattr(import_module(module), function)(**request["arguments"])
                answer: dict[str, Any] = {"facts": dict(subject.facts), "calls": list(subject.calls)}
            else:
                answer = _answered(subject, request)
        except (CellsegError, MemoryError, ImportError) as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        except Exception as error:  # from a library: reported in a row of the table, and the benchmark continues
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        write(json.dumps(answer) + "\n")
    if subject is not None:
        subject.close()


def _answered(subject: Subject, request: Mapping[str, Any]) -> dict[str, Any]:
    if request["do"] == "turn":
        call = turn_of(subject.calls[request["name"]], sync=subject.sync)
        return {"seconds": call(request["calls"])}
    if request["do"] == "ask":
        return {"answer": subject.questions[request["name"]](**request["arguments"])}
    return {"rss_bytes": peak_rss_bytes(), "gpu_bytes": subject.gpu_bytes()}


def main() -> None:
    """Entry point of the worker process."""
    for name in ("SIGINT", "SIGHUP"):  # sent by the terminal to all processes: the measuring process ends this one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def write(line: str) -> None:
        answers.write(line)
        answers.flush()

    serve(sys.stdin.readline, write)


if __name__ == "__main__":
    main()
