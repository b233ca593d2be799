"""``cellseg-serve`` as a process: who may reach it, how it ends, what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import pytest
from conftest import ROOT
from service_stub import png

from cellseg_deploy.cli import console
from cellseg_deploy.cli.serve import TOKEN_VARIABLE, command

httpx = pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytestmark = pytest.mark.reliability
posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs and signals are those of POSIX")


class Server:
    """A service with the stub network. ``gated``: each batch waits for ``open_gate``; otherwise each image that is
    accepted is told on stdout."""

    def __init__(self, folder: Path, *arguments: object, gated: bool = True) -> None:
        self.fifo = folder / "gate"
        if gated and not self.fifo.exists():
            os.mkfifo(self.fifo)
        words = [ROOT / "tests" / "helpers" / "service_stub.py", "--port", 0, "--cell-diameter", 20, *arguments]
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **({"CELLSEG_TEST_FIFO": str(self.fifo)} if gated else {}),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'tests' / 'helpers'}",
            },
        )
        self.address = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def open_gate(self) -> None:
        """Let the batch that waits be run."""
        self.fifo.write_bytes(b"")

    def segment(self) -> Any:
        return httpx.post(f"{self.address}/v1/segment", content=png(hw=(30, 40), centres=[(20, 15)]), timeout=60)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code, and stderr."""
        self.process.send_signal(number)
        _, words = self.process.communicate(timeout=60)
        return self.process.returncode, words


@contextmanager
def started(folder: Path, *arguments: object, gated: bool = True) -> Iterator[Server]:
    server = Server(folder, *arguments, gated=gated)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@posix
def test_a_stop_answers_what_was_accepted(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        answers: list[Any] = []
        asking = Thread(target=lambda: answers.append(server.segment()))
        asking.start()
        assert server.line() == "batch"  # the network is at it
        server.process.send_signal(signal.SIGTERM)
        server.open_gate()
        asking.join()
        assert answers[0].json()["count"] == 1
        _, words = server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        assert "Traceback" not in words
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.address)


@posix
def test_a_stop_under_load_loses_no_accepted_image(tmp_path: Path) -> None:
    with started(tmp_path, gated=False) as server:
        image, answered, answers = png(hw=(300, 400)), list[str](), Semaphore(0)

        def ask(client_number: int) -> None:
            with httpx.Client(base_url=server.address, timeout=60) as client:
                for index in count():
                    name = f"{client_number}-{index}.png"
                    try:
                        answer = client.post(f"/v1/segment?name={name}", content=image)
                    except httpx.TransportError:
                        return  # not taken any more
                    assert answer.json()["count"] == 3
                    answered.append(name)
                    answers.release()

        with ThreadPoolExecutor(8) as clients:
            asking = [clients.submit(ask, number) for number in range(8)]
            for _ in range(16):
                assert answers.acquire(timeout=60)
            server.process.send_signal(signal.SIGTERM)
        assert [each.result() for each in asking] == [None] * 8
        accepted, words = server.process.communicate(timeout=60)
        assert (server.process.returncode, words.count("Traceback")) == (0, 0)
        assert sorted(accepted.split()) == sorted(answered)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.address)


@posix
def test_after_a_kill_jobs_are_lost_and_not_unknown(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    with started(tmp_path, "--jobs", jobs) as server:
        place = httpx.post(f"{server.address}/v1/jobs", content=png()).headers["location"]
        assert server.line() == "batch"
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with started(tmp_path, "--jobs", jobs) as server:
        job = httpx.get(f"{server.address}{place}").json()
        assert job["state"] == "lost"
        assert "send the image again" in job["error"]
        assert server.end(signal.SIGTERM)[0] == 0


@posix
def test_a_stop_finishes_accepted_jobs(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    small = png(hw=(30, 40), centres=[(20, 15)])
    with started(tmp_path, "--jobs", jobs) as server:
        place = httpx.post(f"{server.address}/v1/jobs", content=small).headers["location"]
        assert server.line() == "batch"
        server.process.send_signal(signal.SIGTERM)
        server.open_gate()
        server.process.communicate(timeout=60)
    with started(tmp_path, "--jobs", jobs) as server:
        assert httpx.get(f"{server.address}{place}/result").json()["count"] == 1
        assert "another" in refusal(tmp_path, "--jobs", jobs)


def refusal(folder: Path, *arguments: object) -> str:
    """Stderr of a service that does not start."""
    server = Server(folder, *arguments)
    _, words = server.process.communicate(timeout=60)
    assert server.process.returncode == 7
    return words


@posix
def test_a_body_over_the_limit_is_refused_by_the_server_too(tmp_path: Path) -> None:
    with started(tmp_path, "--max-body", 1) as server:
        answer = httpx.post(f"{server.address}/v1/segment", content=bytes(3 << 20))
        assert (answer.status_code, "1 MB" in answer.json()["detail"]) == (413, True)


@pytest.mark.parametrize(
    ("arguments", "variable", "words"),
    [
        (["--host", "0.0.0.0"], "", "needs a token"),
        (["--host", "0.0.0.0"], "short", "at least 16 characters"),
        (["--host", "example.org"], "", "is not an IP address"),
        (["--token-file", "/nowhere/token"], "", "cannot be read"),
    ],
)
def test_it_does_not_start_for_others_without_a_token(
    arguments: list[str], variable: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, variable)
    assert console.run(command, [*arguments, "--port", "0"]) == 2
    assert words in capsys.readouterr().err


@posix
def test_on_another_address_the_token_is_asked_for_and_any_host_will_do(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-sixteen-and-more\n")
    with started(tmp_path, "--host", "0.0.0.0", "--token-file", tmp_path / "token") as server:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        host = {"Host": "cells.example"}
        assert httpx.get(f"{address}/healthz", headers=host).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=host).status_code == 401
        with_token = host | {"Authorization": "Bearer a-token-of-sixteen-and-more"}
        assert httpx.get(f"{address}/v1/models", headers=with_token).status_code == 200
        evil = with_token | {"Origin": "http://evil.example"}
        assert httpx.get(f"{address}/v1/models", headers=evil).status_code == 403


def test_room_for_waiting_files_below_one_request_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command, ["--port", "0", "--max-body", "5", "--max-waiting", "1"]) == 2
    assert "raise the first (--max-waiting), or lower the second (--max-body)" in capsys.readouterr().err
