"""Long images as jobs: accepted, watched, fetched, deleted; and what a kill leaves of them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from service_stub import GatedBackend, access, ask, png, service, until

from cellseg_deploy.errors import OutputInUseError
from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.jobs import JOURNAL, LOST, Jobs
from cellseg_deploy.serve.limits import Limits

pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")


@contextmanager
def jobs_service(folder: Path, backend: Any = None, limits: Limits | None = None) -> Any:
    """Ask a service with jobs in ``folder``."""
    import httpx

    limits = limits or Limits()
    with service(backend, limits=limits) as opened, Jobs.open(folder, opened.engine, limits) as jobs:
        app = make_app(opened, access(), jobs)

        def talk(method: str, path: str, **more: Any) -> Any:
            async def run() -> Any:
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8123") as client:
                    return await client.request(method, path, **more)

            return anyio.run(run)

        talk.jobs, talk.opened = jobs, opened  # type: ignore[attr-defined]
        try:
            yield talk
        finally:
            if isinstance(backend, GatedBackend):
                backend.gate.set()


def finished(talk: Any, number: str) -> dict[str, Any]:
    """The job once it has ended."""
    anyio.run(until, lambda: talk.jobs.get(number).has_ended)
    return talk("GET", f"/v1/jobs/{number}").json()


def test_a_job_is_accepted_watched_fetched_and_deleted(tmp_path: Path) -> None:
    backend = GatedBackend()
    with jobs_service(tmp_path / "jobs", backend) as talk:
        answer = talk("POST", "/v1/jobs?name=a.png", content=png(), headers={"Accept": "image/tiff"})
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        place = answer.headers["location"]
        wait_for_tiles(talk, job["id"])
        running = talk("GET", place).json()
        assert (running["state"], running["tiles_done"]) == ("running", 0)
        assert running["tiles"] > 0
        assert talk("GET", f"{place}/result").status_code == 409
        backend.gate.set()
        done = finished(talk, job["id"])
        assert (done["state"], done["count"], done["output"]) == ("done", 3, "labels.tif")
        result = talk("GET", f"{place}/result")
        alone = talk("POST", "/v1/segment?name=a.png", content=png(), headers={"Accept": "image/tiff"})
        assert result.content == alone.content
        assert result.headers["content-type"] == "image/tiff"
        assert result.headers["cellseg-count"] == "3"
        assert [each["id"] for each in talk("GET", "/v1/jobs").json()["jobs"]] == [job["id"]]
        assert talk("DELETE", place).json() == {"status": "deleted"}
        assert talk("GET", place).status_code == talk("DELETE", place).status_code == 404
        assert [path.name for path in (tmp_path / "jobs").glob("*.result")] == []


def wait_for_tiles(talk: Any, number: str) -> None:
    """Return once the job is in the network."""
    task = talk.jobs.get(number).task
    anyio.run(until, lambda: task.tiles > 0)


def test_a_bad_image_fails_with_the_readers_sentence_and_the_next_is_done(tmp_path: Path) -> None:
    with jobs_service(tmp_path) as talk:
        bad = talk("POST", "/v1/jobs?name=b.png", content=png()[:-30]).json()
        good = talk("POST", "/v1/jobs", content=png()).json()
        failed = finished(talk, bad["id"])
        assert (failed["state"], failed["code"]) == ("failed", 422)
        assert failed["error"].startswith("the PNG is cut short")
        answer = talk("GET", f"/v1/jobs/{bad['id']}/result")
        assert (answer.status_code, answer.json()["detail"]) == (410, failed["error"])
        assert finished(talk, good["id"])["count"] == 3


def test_a_deleted_job_is_not_run_to_its_end(tmp_path: Path) -> None:
    backend = GatedBackend()
    with jobs_service(tmp_path, backend) as talk:
        # Three batches and more: the third is not cut once the job is deleted.
        job = talk("POST", "/v1/jobs", content=png([], (600, 600))).json()
        wait_for_tiles(talk, job["id"])
        task = talk.jobs.get(job["id"]).task
        assert talk("DELETE", f"/v1/jobs/{job['id']}").status_code == 200
        backend.gate.set()
    assert sum(backend.batches) < task.tiles
    with jobs_service(tmp_path) as talk:
        assert talk("GET", "/v1/jobs").json() == {"jobs": []}


def test_a_job_that_fails_after_it_was_deleted_does_not_come_back(tmp_path: Path) -> None:
    backend = GatedBackend()
    with jobs_service(tmp_path, backend) as talk:
        talk("POST", "/v1/jobs", content=png([], (600, 600)))
        job = talk("POST", "/v1/jobs", content=b"not an image").json()
        opened = talk.jobs.get(job["id"])
        task = opened.task
        assert talk("DELETE", f"/v1/jobs/{job['id']}").status_code == 200
        task.is_cancelled.clear()  # as if it had been deleted just after the last look
        backend.gate.set()
        anyio.run(until, lambda: opened.task is None)
    with jobs_service(tmp_path) as talk:
        assert [each["id"] for each in talk("GET", "/v1/jobs").json()["jobs"] if each["id"] == job["id"]] == []


def test_too_many_jobs_are_refused_and_old_results_are_dropped(tmp_path: Path) -> None:
    backend = GatedBackend()
    with jobs_service(tmp_path, backend, Limits(jobs=2, kept_jobs=1)) as talk:
        first, second = (talk("POST", "/v1/jobs", content=png()).json() for _ in range(2))

        async def unread() -> Any:
            pytest.fail("the body was read")
            yield b""

        full = talk("POST", "/v1/jobs", content=unread())
        assert (full.status_code, full.headers["retry-after"]) == (429, "10")
        backend.gate.set()
        finished(talk, second["id"])
        anyio.run(until, lambda: len(talk.jobs.all()) == 1)
        assert talk("GET", f"/v1/jobs/{first['id']}").status_code == 404
        assert talk("GET", f"/v1/jobs/{second['id']}/result").status_code == 200


def test_finished_jobs_are_there_after_a_restart_and_others_are_lost(tmp_path: Path) -> None:
    with jobs_service(tmp_path) as talk:
        done = talk("POST", "/v1/jobs?name=a.png", content=png()).json()
        finished(talk, done["id"])
        body = talk("GET", f"/v1/jobs/{done['id']}/result").content
        bad = talk("POST", "/v1/jobs", content=b"x").json()
        finished(talk, bad["id"])
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    # As a kill leaves it: the job's first line, and half of its last.
    accepted = next(line for line in lines if b'"queued"' in line and bad["id"].encode() in line)
    ended = next(line for line in lines if b'"failed"' in line)
    journal.write_bytes(b"".join(line for line in lines if bad["id"].encode() not in line) + accepted + ended[:20])
    (tmp_path / "0123456789abcdef.result").write_bytes(b"of nobody")
    with jobs_service(tmp_path) as talk:
        lost = talk("GET", f"/v1/jobs/{bad['id']}").json()
        assert (lost["state"], lost["error"]) == ("lost", LOST)
        assert talk("GET", f"/v1/jobs/{bad['id']}/result").status_code == 410
        assert talk("GET", f"/v1/jobs/{done['id']}/result").content == body
        assert not (tmp_path / "0123456789abcdef.result").exists()
        with pytest.raises(OutputInUseError), Jobs.open(tmp_path, talk.opened.engine, Limits()):
            pass


def test_without_a_folder_there_are_no_jobs() -> None:
    with service() as opened:
        answer = ask(opened, "POST", "/v1/jobs", content=png())
        assert answer.status_code == 404
        assert "--jobs DIR" in answer.json()["detail"]
        assert "/v1/jobs" not in ask(opened, "GET", "/openapi.json").json()["paths"]
