"""``cellseg-infer`` a second time: going on, doing the same again, showing what would be done, following a folder."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_discs, make_onnx, make_spec
from PIL import Image
from running import files, infer, results, rows

from cellseg_deploy import models, segmenter
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.errors import ModelError
from cellseg_deploy.run.repeat import read_run


@pytest.fixture
def out(model: Path, smears: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q") == 0
    return tmp_path / "out"


# --- going on


def test_a_second_start_says_what_is_done(
    model: Path,
    smears: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(smears / "z.png")
    assert infer(smears, "-o", out, "--model", model) == 0
    said = capsys.readouterr()
    assert "4 of 5 images done already" in said.err
    assert "1/1 images" in said.err
    assert "images   5, 4 of them before this run" in said.out
    assert "cells    8" in said.out
    assert infer(smears / "z.png", "-o", out, "--model", model, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert {name: summary[name] for name in ("found", "done", "skipped", "failed", "others", "cells")} == {
        **{"found": 1, "done": 0, "skipped": 1, "failed": 0},
        **{"others": 4, "cells": 1},
    }


def test_another_model_is_refused(
    smears: Path,
    out: Path,
    onnx_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = onnx_file(model=make_onnx(contrast=9.0), name="other.onnx")
    assert infer(smears, "-o", out, "--model", other, "-q") == 6
    said = capsys.readouterr().err
    assert "model sha256 (--model)" in said
    assert "--overwrite" in said


def test_a_run_that_goes_on_keeps_its_engine(
    model: Path,
    smears: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever ``auto`` would choose now: OpenVINO here, which a run that is named another one does not go on with."""
    pytest.importorskip("openvino")
    opened: list[Any] = []
    real = segmenter.open_backend

    def now_openvino(path: Path, engine: EngineOptions, **settings: Any) -> Any:
        chosen = replace(engine, backend="openvino") if engine.backend == "auto" else engine
        opened.append(real(path, chosen, **settings))
        return opened[-1]

    monkeypatch.setattr(segmenter, "open_backend", now_openvino)
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(smears / "z.png")
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert opened[-1].name == "onnxruntime"
    assert infer(smears, "-o", out, "--model", model, "-q", "--backend", "openvino") == 6
    assert "--backend" in capsys.readouterr().err
    assert infer(smears, "-o", out, "--model", model, "-q", "--overwrite") == 0
    assert opened[-1].name == "openvino"


def test_nothing_to_do_leaves_the_folder_as_it_was(model: Path, smears: Path, out: Path) -> None:
    """Tables and run.json too; a table that is gone comes back."""
    record = (out / "run.json").read_bytes()
    expected = results(out)
    (out / "cells.csv").unlink()
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert results(out) == expected
    assert (out / "run.json").read_bytes() == record
    (out / "labels/a.png.tif").unlink()
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert results(out) == expected
    again, before = json.loads((out / "run.json").read_text()), json.loads(record)
    assert again["backend"] == before["backend"]
    assert again["identity"] == before["identity"]


def test_an_engine_that_is_not_the_recorded_one_stops_the_run_before_work(
    model: Path,
    smears: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = segmenter.open_backend

    def another(*arguments: Any, **settings: Any) -> Any:
        backend = real(*arguments, **settings)
        backend.precision = "fp16"
        return backend

    monkeypatch.setattr(segmenter, "open_backend", another)
    (out / "labels/a.png.tif").unlink()
    assert infer(smears, "-o", out, "--model", model, "-q") == 6
    assert "backend precision (--precision): fp32 there, fp16 now" in capsys.readouterr().err
    assert not (out / "labels/a.png.tif").exists()


def test_a_folder_that_is_not_ours_is_refused_before_the_model_is_loaded(
    smears: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmenter, "open_backend", lambda *_, **__: pytest.fail("the model was opened"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    for overwrite in ([], ["--overwrite"]):
        assert infer(smears, "-o", tmp_path / "theirs", "-q", *overwrite) == 6


# --- the same again


def test_a_run_json_is_enough_to_do_it_again(
    model: Path,
    smears: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--task", "confluence", "--scale", 0.7, "--halo", 6, "--bit-depth", 12, "--pixel-size", 0.3]
    settings += ["--count-rule", "frame", "--save", "labels,confluence"]
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q", *settings) == 0
    assert infer(smears, "--like", tmp_path / "out/run.json", "-o", tmp_path / "again", "-q", "--batch-size", 1) == 0
    assert results(tmp_path / "again") == results(tmp_path / "out")
    assert capsys.readouterr().err == ""
    one = tmp_path / "one"
    assert infer(smears / "a.png", "--like", tmp_path / "out/run.json", "-o", one, "--save", "labels", "-q") == 0
    assert files(one / "labels") == ["a.png.tif"]
    assert (one / "labels/a.png.tif").read_bytes() == (tmp_path / "out/labels/a.png.tif").read_bytes()
    assert not (one / "confluence").exists()


def test_auto_scale_again(model: Path, smears: Path, tmp_path: Path) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q", "--cell-diameter", "auto") == 0
    assert infer(smears, "--like", tmp_path / "out/run.json", "-o", tmp_path / "again", "-q") == 0
    assert json.loads((tmp_path / "again/run.json").read_text())["settings"]["scale"] == "measured"
    assert results(tmp_path / "again") == results(tmp_path / "out")


def test_images_are_passed_as_always(
    smears: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 2
    assert "PATH" in capsys.readouterr().err
    recorded = json.loads((out / "run.json").read_text())["inputs"]
    assert recorded == {"paths": [str(smears)], "follow_links": False}


def test_the_model_is_checked(
    model: Path,
    smears: Path,
    out: Path,
    tmp_path: Path,
    onnx_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = out / "run.json"
    original = model.read_bytes()
    onnx_file(model=make_onnx(contrast=9.0), name=model.name)
    assert infer(smears, "--like", record, "-o", tmp_path / "again", "-q") == 5
    assert "SHA-256" in capsys.readouterr().err
    model.unlink()
    assert infer(smears, "--like", record, "-o", tmp_path / "again", "-q") == 5
    assert "pass it as --model" in capsys.readouterr().err
    (tmp_path / "moved.onnx").write_bytes(original)
    assert not (tmp_path / "again").exists()
    assert infer(smears, "--like", record, "-o", tmp_path / "again", "-q", "--model", tmp_path / "moved.onnx") == 0
    assert capsys.readouterr().err == ""  # its name does not matter
    assert results(tmp_path / "again") == results(out)


def test_other_versions_are_said(smears: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((out / "run.json").read_text())
    record["identity"]["versions"]["numpy"] = "1.0"
    (out / "run.json").write_text(json.dumps(record))
    assert infer(smears, "--like", out / "run.json", "-o", tmp_path / "again", "-q") == 0
    assert "labels may differ" in (said := capsys.readouterr().err)
    assert "versions numpy: 1.0 there" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a run.json"),
        ("[]", "not a run.json"),
        ('{"program": "cellseg-evaluate"}', "written by cellseg-evaluate"),
        ('{"program": "cellseg-infer", "status": "finished"}', "identity"),
        (None, "No such file"),
    ],
)
def test_files_that_record_no_run(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert infer("--like", tmp_path / "run.json", "-o", tmp_path / "again") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(("--task", "counting"), ("--scale", 1), ("--cell-diameter", "auto"), ("--backend", "openvino")),
        *(("--device", "cpu"), ("--precision", "fp32"), ("--halo", 3), ("--bit-depth", 10), ("--pixel-size", 1)),
        *(("--count-rule", "all"), ("--field", "full"), ("--border-cells", "model")),
    ],
)
def test_what_results_depend_on_is_not_given_twice(
    smears: Path, out: Path, tmp_path: Path, option: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(smears, "--like", out / "run.json", "-o", tmp_path / "again", *option) == 2
    assert f"{option[0]} and --like exclude each other" in capsys.readouterr().err


# --- the model that ships


def test_the_shipped_model_is_the_one_in_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = models.default_model_path()  # raises if it is another one: a new model needs its hash in models/__init__.py
    changed = tmp_path / "default.onnx"
    shutil.copy(path, changed)
    with changed.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(models, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match="SHA-256"):
        models.default_model_path()


def test_the_shipped_model_is_found_by_its_hash(out: Path) -> None:
    run = read_run(out / "run.json")
    assert run.model_file(None) == run.model
    shipped = json.loads((out / "run.json").read_text())
    shipped["identity"]["model"]["sha256"] = models.DEFAULT_SHA256
    shipped["model"]["path"] = "/of/another/machine/default.onnx"
    (out / "run.json").write_text(json.dumps(shipped))
    assert read_run(out / "run.json").model_file(None) is None
    assert read_run(out / "run.json").model_file(Path("x")) == Path("x")


# --- what would be done


def test_a_dry_run_writes_nothing(
    model: Path,
    smears: Path,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert infer(smears, "-o", tmp_path / "new", "--model", model, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 images: 4 to do, 0 done, 0 would fail"
    assert not (tmp_path / "new").exists()
    (smears / "l.png").symlink_to(tmp_path / "elsewhere.png")
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(tmp_path / "elsewhere.png")
    (out / "labels/a.png.tif").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert infer(smears, "-o", out, "--model", model, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["done   a.jpg", "to do  a.png (its file labels/a.png.tif is missing)"]
    assert "--follow-links" in said[3]
    assert said[-1] == "5 images: 1 to do, 3 done, 1 would fail"
    assert infer(smears, "-o", out, "--model", model, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["work"] == 1
    assert infer(smears, "-o", out, "--model", model, "--dry-run", "--task", "confluence") == 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


# --- lists and folders that fill


def test_a_folder_is_followed(model: Path, smears: Path, tmp_path: Path) -> None:
    """An image comes half a second after the start; the run ends when the folder is idle."""
    late = threading.Timer(0.5, Image.fromarray(draw_discs((40, 40), [(20, 20)])).save, [smears / "z.png"])
    late.start()
    try:
        settings = ["--watch", "--watch-idle", 2, "--watch-settle", 0.3, "--model", model, "-q"]
        assert infer(smears, "-o", tmp_path / "out", *settings) == 0
    finally:
        late.join()
    assert [row["cells"] for row in rows(tmp_path / "out/images.csv")] == ["3", "3", "0", "1", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--watch-idle", 5], "needs --watch"),
        (["--watch-settle", 5], "needs --watch"),
        (["--watch", "--dry-run"], "exclude"),
        (["--watch", "--watch-settle", 0], "quiet"),
        (["--watch", "--watch-idle", 0], "idle"),
        (["--save", "labels,none"], "none alone"),
    ],
)
def test_settings_that_cannot_be_meant(
    model: Path,
    smears: Path,
    tmp_path: Path,
    arguments: list[object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_folder_is_watched(smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([smears / "a.png"], [smears, smears / "sub"]):
        assert infer(*given, "-o", tmp_path / "out", "--watch") == 2
        assert "--watch follows one folder" in capsys.readouterr().err


def test_nothing_came(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    settings = ["--watch", "--watch-idle", 0.1, "--model", model, "-q"]
    assert infer(tmp_path / "in", "-o", tmp_path / "out", *settings) == 4


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import time

    from cellseg_deploy.cli import progress as _progress
    from cellseg_deploy.images.find import FoundImage
    from cellseg_deploy.run.folder import ImageResult
    from cellseg_deploy.run.plan import Planned, RunPlan

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    items = tuple(Planned(FoundImage(Path(f"{i}"), f"{i}"), "work", "", "", ()) for i in range(400))
    with _progress.RunProgress() as progress:
        progress.planned(RunPlan("fresh", items))
        for number in range(2):
            now[0] += 20
            progress.result(ImageResult(str(number), "failed" if number else "done", cells=7, error="no"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1/400 images, 0.05 images/s, 7 cells, 2 h 13 min left"
    now[0] += 3600  # a watched folder in which nothing came
    progress.total = progress.seen
    progress.planned(RunPlan("fresh", items[:2]))
    now[0] += 20
    progress.result(ImageResult("3", "done", cells=1))
    assert "0.05 images/s" in capsys.readouterr().err
    assert said[1:] == ["failed: 1: no", "2/400 images, 0.05 images/s, 14 cells, 1 failed, 2 h 12 min left"]
    assert [_progress.in_words(seconds) for seconds in (0.4, 59.6, 61, 3600)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
    ]


def test_progress_of_images_that_come_again_counts_them_once(capsys: pytest.CaptureFixture[str]) -> None:
    from cellseg_deploy.cli.progress import RunProgress
    from cellseg_deploy.run.record import ImageResult

    progress = RunProgress()
    for status, cells in (("failed", None), ("done", 3), ("done", 5)):
        progress.total += 1
        progress.result(ImageResult("a.png", status, cells))
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith("5 cells")
    assert "1 failed" in said[1]


def test_a_damaged_line_is_said(
    model: Path,
    smears: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = results(out)
    journal = out / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert [b'"kind":"scale"' in line for line in lines[1:5]] == [True, True, True, False]
    lines[4] = lines[4].replace(b'"done"', b'"DONE"')
    journal.write_bytes(b"".join(lines))
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert "journal.jsonl: damaged in line 5; their images will be done again" in capsys.readouterr().err
    assert results(out) == expected
    assert len(journal.read_bytes().splitlines()) == len(lines) + 1


def test_a_models_spec_belongs_to_its_bytes(
    smears: Path,
    out: Path,
    onnx_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same network with another operating point is another run."""
    points = make_spec().operating_points
    import msgspec

    changed = {name: msgspec.structs.replace(point, foreground_threshold=0.6) for name, point in points.items()}
    other = onnx_file(make_spec(operating_points=changed), name="other.onnx")
    assert infer(smears, "-o", out, "--model", other, "-q") == 6
    assert "operating point foreground threshold: 0.8 there, 0.6 now" in capsys.readouterr().err
