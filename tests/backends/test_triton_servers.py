"""Real servers of the v2 protocol serve our model: the same bytes as here, also after they were killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="no client: pip install 'cellseg-deploy[triton]'")

from v2_servers import Served, served

from cellseg_deploy import EngineOptions, Segmenter
from cellseg_deploy.backends import open_backend
from cellseg_deploy.errors import BackendUnavailableError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.samples import write_samples
from cellseg_export.forms.triton import export_triton

WAYS = [("mlserver", "grpc"), ("kserve", "grpc"), ("kserve", "http")]


def labels_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "labels").iterdir()}


class Calls:
    """Counts the calls of the network of ``segmenter``, and ends ``server`` at the one numbered ``last``, once an image
    is finished."""

    def __init__(self, segmenter: Segmenter, server: Served, last: int | None = None) -> None:
        self.n, self.one_is_finished = 0, threading.Event()
        predict = segmenter.backend.predict

        def counted(tiles_nhwc: np.ndarray) -> np.ndarray:
            self.n += 1
            if self.n == last:
                assert self.one_is_finished.wait(60)
                server.kill()
            return predict(tiles_nhwc)

        segmenter.backend.predict = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_a_killed_server_ends_the_run_and_the_resumed_run_has_the_bytes_of_the_local_one(
    kind: str, way: str, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    model = onnx_file()
    entry = export_triton(model, tmp_path / "repository", name="cells")
    write_samples(tmp_path / "samples", 8, 0, (240, 320))
    images = tmp_path / "samples" / "images"
    (tmp_path / "server").mkdir()
    settings = {"scale": 0.4, "batch_size": 1}
    with Segmenter.load(model, engine=EngineOptions(threads=1), **settings) as here:
        here.run(images, tmp_path / "here")
    expected = labels_of(tmp_path / "here")
    assert len(expected) == 8
    with served(kind, entry, tmp_path / "server") as server:
        address = getattr(server, way)
        with Segmenter.load(address, **settings) as there:
            calls = Calls(there, server)
            there.run(images, tmp_path / "whole")
        assert labels_of(tmp_path / "whole") == expected
        with Segmenter.load(address, **settings) as there:
            until = Calls(there, server, last=calls.n // 2)
            with pytest.raises(BackendUnavailableError, match=f"^{address}: ") as raised:
                there.run(images, tmp_path / "there", on_image=lambda _: until.one_is_finished.set())
        assert raised.value.exit_code == 8
        assert 0 < len(labels_of(tmp_path / "there")) < 8
        server.start()
        with Segmenter.load(address, **settings) as there:
            result = there.run(images, tmp_path / "there")
    assert not result.failed
    assert labels_of(tmp_path / "there") == expected
    assert (tmp_path / "there" / "cells.csv").read_bytes() == (tmp_path / "here" / "cells.csv").read_bytes()


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_the_service_outlives_its_server(kind: str, way: str, onnx_file: Callable[..., Path], tmp_path: Path) -> None:
    for package in ("httpx", "starlette", "prometheus_client"):
        pytest.importorskip(package, reason="pip install -e '.[serve]'")
    from service_stub import ask, png, service

    entry = export_triton(onnx_file(), tmp_path / "repository", name="cells")
    (tmp_path / "server").mkdir()
    with (
        served(kind, entry, tmp_path / "server") as server,
        open_backend(getattr(server, way)) as backend,
        service(backend) as opened,
    ):

        def status() -> int:
            return int(ask(opened, "POST", "/v1/segment", content=png()).status_code)

        assert status() == 200
        server.kill()
        assert status() == 503
        assert ask(opened, "GET", "/healthz").status_code == 200
        server.start()
        assert status() == 200


@pytest.mark.night
@pytest.mark.real
def test_photographs_give_the_bytes_of_the_local_engine(real_data: Path, tmp_path: Path) -> None:
    entry = export_triton(default_model_path(), tmp_path / "repository", name="cells")
    images = real_data / "bbbc041seg" / "val" / "images"
    (tmp_path / "server").mkdir()
    with Segmenter.load() as here:
        here.run(images, tmp_path / "here")
    with served("kserve", entry, tmp_path / "server") as server, Segmenter.load(server.grpc) as there:
        there.run(images, tmp_path / "there")
    assert labels_of(tmp_path / "there") == labels_of(tmp_path / "here")
