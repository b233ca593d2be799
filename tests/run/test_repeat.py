"""What ``--like`` takes: a run.json, or the folder that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import THREE, draw_discs
from PIL import Image

from cellseg_deploy.errors import UsageError
from cellseg_deploy.run.repeat import read_run
from cellseg_deploy.segmenter import Segmenter


def test_an_output_folder_stands_for_its_run_json(model: Path, tmp_path: Path) -> None:
    Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / "a.png")
    with Segmenter.load(model, scale=None) as segmenter:
        out = segmenter.run(tmp_path / "a.png", tmp_path / "out").out
    assert read_run(out) == read_run(out / "run.json")


@pytest.mark.parametrize("content", [b"\x89PNG", b"[1]", b"{}", b"image,cells\n"])
def test_another_file_is_no_run_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match=r"x: not a run\.json of cellseg-infer; expected .* or the output folder"):
        read_run(tmp_path / "x")


def test_a_folder_without_run_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.json: cannot be read \(No such file"):
        read_run(tmp_path)
