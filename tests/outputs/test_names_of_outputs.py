"""A name that no output can have costs its image, not the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import infer, rows


def test_what_stands_where_an_output_belongs_costs_one_image(
    model: Path,
    smears: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert infer(smears / "a.png", "-o", out, "--model", model, "-q") == 0
    (out / "labels" / "b.png.tif").mkdir()
    shutil.copy(smears / "a.png", smears / "b.png")
    shutil.copy(smears / "a.png", smears / "c.png")
    arguments = [smears / name for name in ("a.png", "b.png", "c.png")]
    assert infer(*arguments, "-o", out, "--model", model, "-q") == 3
    assert {row["image"]: row["status"] for row in rows(out / "images.csv")} == {
        "a.png": "done",
        "b.png": "failed",
        "c.png": "done",
    }
    assert "its results cannot be written under its name" in capsys.readouterr().err


def test_a_run_json_without_its_engine(
    model: Path,
    smears: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert infer(smears / "a.png", "-o", tmp_path / "out", "--model", model, "-q") == 0
    file = tmp_path / "out" / "run.json"
    content = json.loads(file.read_text())
    del content["identity"]["backend"]["name"]
    file.write_text(json.dumps(content))
    assert infer("--like", file, "-o", tmp_path / "again") == 2
    assert "not a run.json of this version" in capsys.readouterr().err
