"""Workers: a process for each thing that is measured; what they answer, and what becomes of those that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellseg_benchmarks.harness import memory, worker
from cellseg_benchmarks.harness.worker import Subject, Worker, WorkerError, serve
from cellseg_deploy.errors import DataError

NUMPY = {"part": "numpy", "device": "cpu", "size": 32, "threads": None}


@pytest.fixture
def numpy_worker() -> Iterator[Worker]:
    with Worker("limits", NUMPY) as opened:
        yield opened


def answers(subject: Callable[..., Subject], *requests: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``serve`` answers to ``requests`` after the one that opens ``subject``."""
    monkeypatch.setattr(worker, "import_module", lambda _: SimpleNamespace(subject=subject))
    lines = [json.dumps(request) for request in ({"kind": "form", "arguments": {"a": 1}}, *requests)]
    written: list[str] = []
    serve(lambda: lines.pop(0) if lines else "", written.append)
    return [json.loads(line) for line in written]


def test_requests_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    made = Subject(
        calls={"predict": lambda: log.append("call")},
        facts={"precision": "fp32"},
        questions={"double": lambda x: 2 * x},
        sync=lambda: log.append("sync"),
        gpu_bytes=lambda: 7,
        close=lambda: log.append("closed"),
    )
    opened, turn, asked, peak = answers(
        lambda a: made if a == 1 else None,  # type: ignore[arg-type,return-value]
        {"do": "turn", "name": "predict", "calls": 3},
        {"do": "ask", "name": "double", "arguments": {"x": 21}},
        {"do": "peak"},
        monkeypatch=monkeypatch,
    )
    assert opened == {"facts": {"precision": "fp32"}, "calls": ["predict"]}
    assert log == ["sync", "call", "call", "call", "sync", "closed"]
    assert turn["seconds"] > 0
    assert asked == {"answer": 42}
    assert peak["gpu_bytes"] == 7
    assert peak["rss_bytes"] > 1e6


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("the network\nanswered with NaN"), "the network answered with NaN"),
        (MemoryError(), "MemoryError"),
        (ImportError("No module named 'cellpose'"), "No module named 'cellpose'"),
        (RuntimeError("of a library"), "RuntimeError: of a library"),
    ],
)
def test_errors_are_answers_and_the_worker_goes_on(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    made = Subject(calls={"bad": fail, "good": lambda: None})
    turns = [{"do": "turn", "name": name, "calls": 1} for name in ("bad", "good")]
    _, bad, good = answers(lambda a: made, *turns, monkeypatch=monkeypatch)
    assert bad == {"error": words}
    assert "seconds" in good


def test_a_worker_measures_in_a_process_of_its_own(numpy_worker: Worker) -> None:
    assert numpy_worker.names == ["gemm fp32"]
    assert numpy_worker.facts["library"].startswith("numpy ")
    one, many = (numpy_worker.turn("gemm fp32")(calls) for calls in (1, 2000))
    assert 0 < one < many
    peak = numpy_worker.peak()
    assert peak.rss_bytes > 10e6
    assert peak.gpu_bytes is None


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def popen(*args: Any, env: dict[str, str], **_: Any) -> Any:
        seen.update(env)
        raise OSError("no more processes")

    monkeypatch.setattr(worker.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more processes"):
        Worker("limits", NUMPY, threads=3)
    assert [seen[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")] == ["3"] * 3


def test_what_a_subject_refuses_is_the_reason() -> None:
    with pytest.raises(WorkerError, match="unknown limit 'abacus'; expected one of numpy, torch"):
        Worker("limits", NUMPY | {"part": "abacus"})


def test_a_worker_that_dies_says_how(numpy_worker: Worker) -> None:
    numpy_worker._process.kill()
    with pytest.raises(WorkerError, match=r"ended with signal 9 \(out of memory\?\)"):
        numpy_worker.turn("gemm fp32")(1)


def test_the_last_words_of_a_worker_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def popen(_: Any, **options: Any) -> Any:
        return real([sys.executable, "-c", "import sys; sys.exit('no such kernel')"], **options)

    monkeypatch.setattr(worker.subprocess, "Popen", popen)
    with pytest.raises(WorkerError, match="exit code 1: no such kernel"):
        Worker("limits", NUMPY)


def test_a_worker_that_does_not_answer_is_ended(numpy_worker: Worker) -> None:
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        numpy_worker._request({"do": "turn", "name": "gemm fp32", "calls": 10**9}, 0.05)
    assert numpy_worker._process.poll() is not None
    with pytest.raises(WorkerError, match="ended already"):
        numpy_worker.peak()


def test_an_interrupt_leaves_no_process() -> None:
    opened = Worker("limits", NUMPY)
    with pytest.raises(KeyboardInterrupt), opened:
        raise KeyboardInterrupt
    assert opened._process.poll() is not None


def test_every_subject_can_be_named() -> None:
    folder = Path(worker.__file__).parents[1]
    for module, function in worker.SUBJECTS.values():
        source = folder.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()
        assert f"\ndef {function}(" in source, module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_memory_is_of_this_process_alone() -> None:
    """A child of a process that once was large: ``ru_maxrss`` would give it the parent's peak."""
    ballast = bytearray(300 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from cellseg_benchmarks.harness.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 2**20
    assert memory.peak_rss_bytes() > 300 * 2**20
    del ballast
    if memory.reset_peak():
        rss = memory.rss_bytes()
        assert rss is not None
        assert memory.peak_rss_bytes() < rss + 50 * 2**20


def test_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_REFS", tmp_path / "none" / "none")
    assert memory.rss_bytes() is None
    assert not memory.reset_peak()
    if os.name == "posix":
        assert memory.peak_rss_bytes() > 1e6


def test_kilobyte_lines() -> None:
    assert memory._kilobytes("MemTotal:  16 kB\nHugePages_Total:  4\nVmHWM:\t2 kB") == {
        "MemTotal": 16384,
        "VmHWM": 2048,
    }
