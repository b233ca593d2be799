"""What can be wrong with a cluster: one clear sentence each, and an exit code; on a cluster within this process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DarknessBackend
from running import infer, results, rows

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from certificates import authority
from distributed import Client, Future, LocalCluster, Scheduler
from distributed.security import Security
from distributed.utils import LoopRunner, sync

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cluster import connection, engine, outcomes, work_order, worker
from cellseg_deploy.cluster.connection import TlsFiles, check_address, connected
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.errors import BackendUnavailableError, ModelError, OutputError, UsageError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import RunSummary, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def on_cluster(client: Any, model: Path, four: Path, tmp_path: Path) -> Iterator[Callable[..., RunSummary]]:
    """Runs ``four`` on the cluster."""

    def run(before: Callable[[], Any] = lambda: None, through: Any = client, **callbacks: Any) -> RunSummary:
        with Segmenter.load(model, engine=EngineOptions(backend="onnxruntime", threads=1), scale=None) as segmenter:
            before()
            elsewhere = ClusterEngine(through, "tcp://x", threads=2)
            return run_folder(segmenter, find_images([four]), tmp_path / "out", elsewhere=elsewhere, **callbacks)

    yield run
    for name in list(worker._engines):
        worker._engines.pop(name).close()


def test_the_worker_leaves_no_file_behind(
    on_cluster: Callable[..., RunSummary], model: Path, four: Path, tmp_path: Path
) -> None:
    assert on_cluster().done == 4
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert infer(four, "-o", tmp_path / "one", "--model", model, "--scale", 1, "-q") == 0
    assert results(tmp_path / "out") == results(tmp_path / "one")


def test_a_model_that_is_missing_on_a_worker(on_cluster: Callable[..., RunSummary], model: Path) -> None:
    with pytest.raises(ModelError, match=r"worker inproc://\S+: .*stub\.onnx"):
        on_cluster(model.unlink)
    assert ModelError.exit_code == 5


def test_another_model_on_a_worker(
    on_cluster: Callable[..., RunSummary], model: Path, onnx_file: Callable[..., Path]
) -> None:
    from conftest import make_spec

    with pytest.raises(BackendUnavailableError, match=r"worker \S+: would not give the results .*model sha256"):
        on_cluster(lambda: onnx_file(make_spec(name="other")))


def test_other_versions_on_a_worker(on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch) -> None:
    own = worker.identity_of
    other = {"numpy": "1.0"}
    monkeypatch.setattr(worker, "identity_of", lambda *a: replace(own(*a), versions={**own(*a).versions, **other}))
    with pytest.raises(BackendUnavailableError, match=r"numpy: \S+ there, 1\.0 now; install the same versions"):
        on_cluster()


def test_images_that_a_worker_does_not_see(
    on_cluster: Callable[..., RunSummary], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = work_order.WorkOrder.of
    monkeypatch.setattr(
        work_order.WorkOrder, "of", staticmethod(lambda *a, **k: replace(order(*a, **k), roots=("/not/there",)))
    )
    with pytest.raises(UsageError, match=r"worker \S+: /not/there: no such folder of images on this machine"):
        on_cluster()


def test_a_model_that_is_in_no_file(client: Any, four: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a model that was loaded from a file"):
        Segmenter(DarknessBackend()).run(four, tmp_path / "out", cluster=ClusterEngine(client, "tcp://x"))


def test_an_output_folder_that_a_worker_does_not_see(
    on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "write_order", lambda order, out: ".cellseg-elsewhere.tmp")
    with pytest.raises(OutputError, match=r"worker \S+: .*not the output folder of this run"):
        on_cluster()


def test_an_output_folder_that_a_worker_cannot_write(
    on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "temporary_in", lambda out: out / "no-such-folder" / ".cellseg-0.tmp")
    with pytest.raises(OutputError, match=r"cannot be written .*check free space"):
        on_cluster()
    monkeypatch.undo()
    assert on_cluster().done == 4


def test_files_of_a_worker_that_do_not_arrive(
    on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine.do_image

    def lose(out: str, order: str, task: Any) -> dict[str, Any]:
        answer = own(out, order, task)
        (Path(out) / answer["record"]).unlink()
        return answer

    monkeypatch.setattr(engine, "do_image", lose)
    with pytest.raises(OutputError, match="written by a worker, and cannot be read here"):
        on_cluster()


def test_a_worker_without_this_package(on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'cellseg_deploy'")

    monkeypatch.setattr(engine, "do_image", missing)
    with pytest.raises(BackendUnavailableError, match=r"install cellseg-deploy\[cluster\] of the same version"):
        on_cluster()


# --- tasks that the cluster loses


@pytest.fixture
def cancelling(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Counter[int]]:
    """Cancels each task when it is handed out, for a number of times per image; counts how often it was."""

    def cancel(times: int) -> Counter[int]:
        submit, n_submitted = outcomes.ClusterOutcomes._submit, Counter[int]()

        def cancelled(self: Any, index: int, attempt: str = "") -> None:
            submit(self, index, attempt)
            n_submitted[index] += 1
            if n_submitted[index] <= times:
                self._futures[index].cancel(force=True)

        monkeypatch.setattr(outcomes.ClusterOutcomes, "_submit", cancelled)
        return n_submitted

    return cancel


def test_a_cancelled_task_is_handed_out_again(
    on_cluster: Callable[..., RunSummary],
    cancelling: Callable[[int], Counter[int]],
    model: Path,
    four: Path,
    tmp_path: Path,
) -> None:
    n_submitted = cancelling(outcomes.CANCELLED_TRIES)
    assert on_cluster().done == 4
    assert n_submitted == dict.fromkeys(range(4), outcomes.CANCELLED_TRIES + 1)
    assert infer(four, "-o", tmp_path / "one", "--model", model, "--scale", 1, "-q") == 0
    assert results(tmp_path / "out") == results(tmp_path / "one")


def test_an_image_whose_task_is_always_cancelled_is_reported(
    on_cluster: Callable[..., RunSummary], cancelling: Callable[[int], Counter[int]], tmp_path: Path
) -> None:
    n_submitted = cancelling(outcomes.CANCELLED_TRIES + 1)
    assert on_cluster().failed == 4
    assert n_submitted == dict.fromkeys(range(4), outcomes.CANCELLED_TRIES + 1)
    for row in rows(tmp_path / "out/images.csv"):
        assert row["error"].startswith("its task was cancelled on the cluster 6 times"), row
        assert "run again, which tries it again" in row["error"]


def test_a_result_that_cannot_be_fetched_at_once_is_asked_for_again(
    on_cluster: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, n_asked = Future.result, Counter[str]()

    def late(self: Any, timeout: float | None = None) -> Any:
        n_asked[self.key] += 1
        if n_asked[self.key] == 1:
            raise OSError("Timed out trying to connect to tls://n1:1 after 30 s")
        return fetch(self, timeout)

    monkeypatch.setattr(Future, "result", late)
    assert on_cluster().done == 4
    assert set(n_asked.values()) == {2}


@pytest.fixture
def ten(four: Path) -> int:
    """More images than are handed out at a time."""
    for number in range(6):
        (four / f"e{number}.png").write_bytes((four / "a.png").read_bytes())
    return 10


def test_a_connection_that_breaks_is_made_again(
    on_cluster: Callable[..., RunSummary], client: Any, ten: int, four: Path, model: Path, tmp_path: Path
) -> None:
    broken: list[Any] = []

    def cut(_: Any) -> None:
        if not broken:
            broken.append(client.scheduler_comm.comm)
            client.loop.add_callback(broken[0].abort)

    assert on_cluster(on_result=cut).done == ten
    assert client.scheduler_comm.comm is not broken[0]
    assert infer(four, "-o", tmp_path / "one", "--model", model, "--scale", 1, "-q") == 0
    assert results(tmp_path / "out") == results(tmp_path / "one")


def test_a_connection_that_is_lost_for_good(
    on_cluster: Callable[..., RunSummary], client: Any, ten: int, tmp_path: Path
) -> None:
    with (
        Client(client.cluster, set_as_default=False) as own,
        pytest.raises(BackendUnavailableError, match=r"the connection to the scheduler was lost; .*run again"),
    ):
        on_cluster(through=own, on_result=lambda _: own.close())
    n_done = len(rows(tmp_path / "out/images.csv"))
    assert 1 <= n_done < ten
    again = on_cluster()
    assert (again.skipped, again.done) == (n_done, ten - n_done)


# --- the way to the scheduler


@pytest.mark.parametrize(
    "address", ["local", "tcp://127.0.0.1:8786", "tcp://localhost:1", "tcp://[::1]:1", "tls://a:1"]
)
def test_a_safe_address_is_accepted(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://10.0.0.5:8786", "is not encrypted"),
        ("tcp://node7:8786", "is not encrypted"),
        ("tcp://127.0.0.1.evil.org:8786", "is not encrypted"),
        ("tcp://[::2]:8786", "is not encrypted"),
        ("http://127.0.0.1:8786", "must be local, tcp://HOST:PORT or tls://HOST:PORT"),
        ("127.0.0.1:8786", "must be local"),
        ("tls://host", "must be local"),
        ("", "must be local"),
    ],
)
def test_any_other_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_address(address)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"address": 5}, "`address` must be a name, got 5"),
        ({"address": "local", "workers": 0}, "`workers` must be at least 1, got 0"),
        ({"address": "local", "workers": -1}, "`workers` must be at least 1, got -1"),
        ({"address": "local", "workers": "2"}, "`workers` must be a whole number or None, got '2'"),
        ({"address": "local", "threads": 0}, "`threads` must be at least 1, got 0"),
        ({"address": "tls://a:1", "workers": 4}, "`workers` is for the address local"),
        ({"address": "tcp://127.0.0.1:1", "tls": {"ca": "ca.pem"}}, "`tls` must be TlsFiles(...)"),
        (
            {"address": "tcp://127.0.0.1:1", "tls": TlsFiles(ca_file=Path("ca.pem"))},
            "files for TLS go with an address tls://",
        ),
    ],
)
def test_wrong_arguments_of_open_cluster(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)), engine.open_cluster(**given):
        pass


def test_the_command_says_what_is_wrong(
    model: Path, four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    base = (four, "-o", tmp_path / "out", "--model", model)
    for options, code, said in (
        (("--scheduler", "tcp://127.0.0.1:1"), 8, "error: tcp://127.0.0.1:1: no scheduler answers there"),
        (("--scheduler", "tcp://10.0.0.5:8786"), 2, "is not encrypted"),
        (("--scheduler", "tls://127.0.0.1:1"), 2, "tls:// needs --tls-ca-file, --tls-cert, --tls-key"),
        (("--scheduler", "tls://127.0.0.1:1", "--tls-ca-file", "no.pem"), 2, "no.pem: no such file"),
        (("--workers", "2"), 2, "--workers needs --scheduler"),
        (("--scheduler", "tcp://127.0.0.1:1", "--workers", "2"), 2, "needs --scheduler local"),
    ):
        assert infer(*base, *options) == code, options
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_versions_of_dask() -> None:
    def versions(**changes: str) -> dict[str, Any]:
        return {"packages": {"python": "3.11.2.final.0", "distributed": "2026.8.0", "msgpack": "1.1.0"} | changes}

    def told(scheduler: dict[str, Any], of_worker: dict[str, Any]) -> Any:
        found = {"client": versions(), "scheduler": scheduler, "workers": {"tls://n1:9": of_worker}}
        return SimpleNamespace(get_versions=lambda check: found)

    connection._check_versions(told(versions(), versions(python="3.11.9.final.0")), "tls://s:1")
    with pytest.raises(BackendUnavailableError, match=r"tls://s:1: the scheduler has distributed 2024\.1\.0"):
        connection._check_versions(told(versions(distributed="2024.1.0"), versions()), "tls://s:1")
    with pytest.raises(BackendUnavailableError, match=r"worker tls://n1:9 has python 3\.12, this machine 3\.11"):
        connection._check_versions(told(versions(), versions(python="3.12.1.final.0")), "tls://s:1")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Path]]:
    return authority(tmp_path_factory.mktemp("tls"))


def connect_with_tls(server: dict[str, Path], own: dict[str, Path]) -> Any:
    """What ``connected`` gives for a scheduler with the certificate ``server``."""
    names = {"tls_ca_file": "ca", "tls_scheduler_cert": "cert", "tls_scheduler_key": "key"}
    of_server = {name: str(server[key]) for name, key in names.items()}
    valid = {f"tls_{who}_{what}": str(own[what]) for who in ("client", "worker") for what in ("cert", "key")}
    security = Security(require_encryption=True, **of_server, **valid)
    runner = LoopRunner(asynchronous=False)
    runner.start()

    async def start() -> Any:
        return await Scheduler(protocol="tls://", host="127.0.0.1", port=0, dashboard_address=":0", security=security)

    scheduler = sync(runner.loop, start)
    try:
        files = TlsFiles(own["ca"], own["cert"], own["key"])
        with connected(scheduler.address, workers=1, threads_per_worker=1, tls=files) as client:
            return client.scheduler_info()["workers"]
    finally:
        sync(runner.loop, scheduler.close)
        runner.stop()


def test_tls(certificates: Callable[[str, int], dict[str, Path]]) -> None:
    valid = certificates("valid", 2)
    assert connect_with_tls(valid, valid) == {}
    expired = certificates("expired", -1)
    with pytest.raises(BackendUnavailableError, match=r"certificate was refused \(certificate has expired\)"):
        connect_with_tls(expired, valid)
    with pytest.raises(UsageError, match="cannot be used"):
        connect_with_tls(valid, {**valid, "key": expired["key"]})
