"""Warnings are seen: by kind on the screen, in ``--json`` and run.json, also of images that were done before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import draw_discs
from PIL import Image
from running import infer, save

from cellseg_deploy.cells.notes import Note, kind_of


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two images whose cells are far too large for the model, one that is right, one that was only converted."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    spots = [(40 + 60 * x, 40 + 60 * y) for y in range(4) for x in range(5)]
    image = draw_discs((300, 340), spots)
    save(folder / "a fine.png", image)
    for name in ("b large.png", "c large.png"):
        Image.fromarray(image).resize((680, 600), Image.Resampling.NEAREST).save(folder / name)
    Image.fromarray(image).convert("L").save(folder / "d grey.png")
    return folder


def test_kinds_of_notes() -> None:
    assert kind_of("grey image converted to RGB") == "conversion"
    assert kind_of(Note("cells are large", "cell size")) == "cell size"
    assert Note("cells are large", "cell size") == "cells are large"


def test_the_last_lines_name_each_kind_with_its_first_image(
    model: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(mixed, "-o", tmp_path / "out", "--model", model, "--scale", 1) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("warning")]
    assert len(lines) == 1
    assert lines[0].startswith("warning  cell size, 2 images: b large.png: cells are about ")
    assert "onnxruntime fp32 on cpu, scale 1 (cells about " in said.err


def test_machines_get_them_too_and_a_run_that_is_resumed_says_the_same(
    model: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    hidden = (mixed / "c large.png").rename(tmp_path / "c large.png")
    assert infer(mixed, "-o", out, "--model", model, "-q", "--scale", 1) == 0
    hidden.rename(mixed / "c large.png")
    capsys.readouterr()
    assert infer(mixed, "-o", out, "--model", model, "--json", "--scale", 1) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skipped"] == 3
    assert found["warnings"]["cell size"]["images"] == 2
    assert found["warnings"]["cell size"]["first"]["image"] == "b large.png"
    assert json.loads((out / "run.json").read_text())["warnings"] == found["warnings"]


def test_quiet_says_nothing(model: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(mixed, "-o", tmp_path / "out", "--model", model, "-q", "--scale", 1) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ""


def test_an_image_that_has_another_result_has_other_warnings(
    model: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(mixed, "-o", tmp_path / "out", "--model", model, "-q", "--scale", 1) == 0
    save(mixed / "b large.png", draw_discs((300, 340), [(40, 40), (100, 100)]))
    capsys.readouterr()
    assert infer(mixed, "-o", tmp_path / "out", "--model", model, "--json", "--scale", 1) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert warnings["cell size"]["images"] == 1
    assert warnings["cell size"]["first"]["image"] == "c large.png"
