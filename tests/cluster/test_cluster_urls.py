"""Images in a bucket, read by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import infer, results
from s3_server import S3Server, started

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from distributed import Client, LocalCluster

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cluster import worker
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.errors import UsageError
from cellseg_deploy.files import urls
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def s3(four: Path) -> Iterator[S3Server]:
    urls._system.cache_clear()
    with started() as server:
        server.put(four, "in")
        yield server
    urls._system.cache_clear()


@pytest.fixture
def on_cluster(s3: S3Server, model: Path, tmp_path: Path) -> Iterator[Callable[..., RunSummary]]:
    def run(before: Callable[[], Any] = lambda: None) -> RunSummary:
        with (
            LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
            Client(cluster, set_as_default=False) as client,
            Segmenter.load(model, engine=EngineOptions(backend="onnxruntime", threads=1), scale=None) as segmenter,
        ):
            images = find_images([Path(f"s3://{s3.bucket.name}/in")])
            before()
            elsewhere = ClusterEngine(client, "tcp://x", threads=2)
            return run_folder(
                segmenter, images, tmp_path / "out", options=RunOptions(report=False), elsewhere=elsewhere
            )

    yield run
    for name in list(worker._engines):
        worker._engines.pop(name).close()


def test_workers_read_the_bucket_themselves(
    on_cluster: Callable[..., RunSummary], model: Path, four: Path, tmp_path: Path
) -> None:
    assert on_cluster().done == 4
    assert infer(four, "-o", tmp_path / "one", "--model", model, "--scale", 1, "-q", "--no-report") == 0
    assert results(tmp_path / "out") == results(tmp_path / "one")


def test_a_worker_without_credentials(
    on_cluster: Callable[..., RunSummary], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget() -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(
        UsageError, match=r"worker \S+: s3://smears/in: cannot be listed from this machine \(no credentials; set AWS_"
    ):
        on_cluster(forget)
