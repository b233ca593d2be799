"""Models that must not be run: each is refused before work begins, with one line that says why, and nothing is written.

Engines of TensorRT, and files whose hash is not the recorded one, are with the tests of their backends.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_models import BAD_MODELS, BadModel, with_external_weights
from conftest import ROOT, make_onnx
from running import infer

from cellseg_deploy import models
from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.errors import ModelError

ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.reliability
posix = pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")

ENGINES = ("onnxruntime", "openvino")


def made(case: BadModel, folder: Path) -> Path:
    folder.mkdir()
    return case.make(folder)


@pytest.mark.parametrize("case", BAD_MODELS, ids=[case.name for case in BAD_MODELS])
def test_a_run_with_it_stops_before_work(
    case: BadModel, smears: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = made(case, tmp_path / "folder")
    assert infer(smears, "-o", tmp_path / "out", "--model", path) == 5
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {path}: "), said.err
    assert said.err.count("\n") == 1
    assert re.search(case.words, said.err), said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", BAD_MODELS, ids=[case.name for case in BAD_MODELS])
def test_no_engine_opens_it(case: BadModel, engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(engine)
    path = made(case, tmp_path / "folder")
    with pytest.raises(ModelError, match=case.words) as caught:
        open_backend(path, EngineOptions(backend=engine, threads=1))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_sound_model_runs(onnx_file: Callable[..., Path], smears: Path, tmp_path: Path) -> None:
    """What all of them were made from: it is not for another reason that they are refused."""
    assert infer(smears, "-o", tmp_path / "out", "--model", onnx_file(), "-q") == 0


@pytest.mark.parametrize("kind", ["beside", "hard link"])
def test_onnx_runtime_itself_would_follow(kind: str, tmp_path: Path) -> None:
    """Why embedded weights only: the engine reads the other file, wherever its name leads."""
    path = with_external_weights(tmp_path, kind)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    embedded = ort.InferenceSession(make_onnx().SerializeToString(), providers=["CPUExecutionProvider"])
    followed = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.array_equal(followed.run(None, {"tiles": tiles})[0], embedded.run(None, {"tiles": tiles})[0])


@posix
def test_weights_elsewhere_are_never_opened(tmp_path: Path) -> None:
    """The file that the model points at is a pipe, which whoever opens it waits for."""
    path = with_external_weights(tmp_path, "parent")
    (tmp_path / "elsewhere" / "weights.bin").unlink()
    os.mkfifo(tmp_path / "elsewhere" / "weights.bin")
    program = (
        "import sys\nfrom cellseg_deploy import EngineOptions, open_backend\n"
        "from cellseg_deploy.errors import ModelError\n"
        "try:\n    open_backend(sys.argv[1], EngineOptions(sys.argv[2]))\nexcept ModelError:\n    print('refused')"
    )
    for engine in ENGINES:
        pytest.importorskip(engine)
        words = [sys.executable, "-c", program, str(path), engine]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        assert done.stdout == "refused\n", done.stderr


def test_the_shipped_model_is_run_only_if_it_is_the_one_of_the_source(
    smears: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "DEFAULT_SHA256", "0" * 64)
    assert infer(smears, "-o", tmp_path / "out") == 5
    assert re.search(r"default\.onnx: not the model that this version ships with", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()
