"""What a run was given is what it goes on with, and what it is done again with: model, engine, scale, paths, names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import draw_discs, make_onnx, make_spec, run_obeying_permissions
from PIL import Image
from running import infer, results, rows, save

from cellseg_deploy.backends.device_class import device_class, engine_version
from cellseg_deploy.backends.records import ParityRecord, Timing, add_record, form_sha256, records_path
from cellseg_deploy.models.onnx_file import read_model_file


def images(out: Path) -> list[tuple[str, str]]:
    return [(row["image"], row["status"]) for row in rows(out / "images.csv")]


def field(path: Path) -> Path:
    """An image of one cell."""
    save(path, draw_discs((60, 60), [(30, 30)]))
    return path


# --- model and engine


@pytest.fixture
def with_form(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with an .xml beside it which is the fastest form by its records."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from cellseg_export.forms.openvino import export_openvino

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    form = export_openvino(model, model.with_name("stub.form.xml"), unverified=True, threads=1).path
    passed = ParityRecord(
        file=form.name,
        file_sha256=form_sha256(form),
        model_identity=read_model_file(model).identity,
        backend="openvino",
        precision="fp32",
        inference_precision="fp32",
        engine_version=str(engine_version("openvino")),
        device_class=device_class("cpu"),
        verdict="passed",
        policy="fp32",
        reference="onnxruntime",
        images_from="sample smears",
        timing=Timing(ms_per_tile=1, batch_size=8, calls=3),
    )
    add_record(records_path(model), passed)
    return model


def test_a_form_that_auto_chose_is_gone_on_with(
    with_form: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the records would choose another one by now; and another file beside is not the model given."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert infer(smears, "-o", out, "--model", with_form, "-q") == 0
    capsys.readouterr()  # the cells are too few to be measured
    record = json.loads((out / "run.json").read_text())
    assert [Path(record["model"][key]).name for key in ("path", "given")] == ["stub.form.xml", "stub.onnx"]
    expected = results(out)
    (out / "labels/a.png.tif").unlink()
    records_path(with_form).unlink()
    assert infer(smears, "-o", out, "--model", with_form, "-q") == 0, capsys.readouterr().err
    assert results(out) == expected
    assert infer(smears, "--like", out / "run.json", "-o", again, "-q") == 0
    assert capsys.readouterr().err == ""
    assert results(again) == expected
    identities = [json.loads((folder / "run.json").read_text())["identity"] for folder in (out, again)]
    assert identities[0] == identities[1] == record["identity"]
    # One run, whichever way it is gone on with.
    assert infer(smears, "--like", out / "run.json", "-o", out, "-q") == 0
    assert infer(smears, "-o", again, "--model", with_form, "-q") == 0
    # The form alone makes the same labels, but is another thing to be given.
    with_form.unlink()
    assert infer(smears, "--like", out / "run.json", "-o", tmp_path / "form", "-q") == 0
    assert results(tmp_path / "form") == expected
    assert infer(smears, "-o", out, "--model", with_form.with_name("stub.form.xml"), "-q") == 6
    assert "model given sha256" in capsys.readouterr().err


def test_a_model_that_is_called_otherwise_by_now(
    model: Path, onnx_file: Callable[..., Path], smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is given is run, also where another file has its former name; run.json names what was given."""
    out, kept = tmp_path / "out", model.with_name("kept.onnx")
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    capsys.readouterr()  # the cells are too few to be measured
    expected = results(out)
    model.rename(kept)
    onnx_file(model=make_onnx(contrast=9.0), name=model.name)
    assert infer(smears, "--like", out / "run.json", "-o", tmp_path / "again", "--model", kept, "-q") == 0
    assert results(tmp_path / "again") == expected
    (out / "labels/a.png.tif").unlink()
    assert infer(smears, "-o", out, "--model", kept, "-q") == 0
    assert results(out) == expected
    assert capsys.readouterr().err == ""
    recorded = json.loads((out / "run.json").read_text())["model"]
    assert (recorded["path"], recorded["given"]) == (str(kept), str(kept))
    assert infer(smears, "-o", out, "--model", model, "-q") == 6


def test_a_model_that_is_gone_is_a_refused_model(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is gone on with, and beside a form of the recorded name."""
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q") == 0
    assert infer(smears, "-o", tmp_path / "out", "--model", model.with_name("gone.onnx"), "-q") == 5
    assert "gone.onnx" in capsys.readouterr().err


# --- the scale


def test_the_same_is_said_when_a_run_is_repeated(onnx_file: Callable[..., Path], tmp_path: Path) -> None:
    """``--like`` gives the scale that was recorded: one run, one images.csv."""
    pytest.importorskip("onnxruntime")
    model = onnx_file(make_spec(cell_diameter_px=9.0))
    (tmp_path / "in").mkdir()
    centres = [(20.0 + 30 * i, 20.0 + 30 * j) for i in range(5) for j in range(4)]
    Image.fromarray(draw_discs((140, 180), centres)).save(tmp_path / "in/a.png")
    assert infer(tmp_path / "in", "-o", tmp_path / "out", "--model", model, "-q", "--scale", 1) == 0
    assert "cells are about" in rows(tmp_path / "out/images.csv")[0]["warning"]
    assert infer(tmp_path / "in", "--like", tmp_path / "out/run.json", "-o", tmp_path / "again", "-q") == 0
    assert results(tmp_path / "again") == results(tmp_path / "out")


# --- paths and names


@pytest.mark.parametrize("as_list", [False, True])
def test_no_image_is_counted_twice_whichever_place_is_given_first(model: Path, tmp_path: Path, as_list: bool) -> None:
    field(tmp_path / "B/a.png")
    field(tmp_path / "B/s/y.png")
    places = [tmp_path / "B", tmp_path / "B/s"]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [places[1], places[0]]))
    run = ("-o", tmp_path / "out", "--model", model, "-q")
    assert infer(*places, *run) == 0
    assert infer(*(["--list", tmp_path / "list.txt"] if as_list else places[::-1]), *run) == 0
    assert images(tmp_path / "out") == [("a.png", "done"), ("s/y.png", "done")]
    assert len(rows(tmp_path / "out/cells.csv")) == 2


def test_a_path_in_a_list_must_exist(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text(f"{field(tmp_path / 'in/a.png')}\n{tmp_path / 'gone.png'}\n")
    assert infer("--list", tmp_path / "list.txt", "-o", tmp_path / "out", "--model", model, "-q") == 2
    assert "gone.png: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_one_name_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in ("mon", "tue"):
        field(tmp_path / day / "smears/a.png")
    run = ("-o", tmp_path / "out", "--model", model, "-q")
    assert infer(tmp_path / "mon/smears", tmp_path / "tue/smears", *run) == 2
    assert "have the same name; pass their common parent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert infer(tmp_path / "mon", tmp_path / "tue", *run) == 0
    assert images(tmp_path / "out") == [("mon/smears/a.png", "done"), ("tue/smears/a.png", "done")]
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'tue'}\n{tmp_path / 'mon'}\n")
    assert infer("--list", tmp_path / "list.txt", *run) == 0
    assert infer(tmp_path / "mon", *run) == 6  # names begin elsewhere: the same image would be counted twice
    assert "inputs" in capsys.readouterr().err


# --- paths that cannot be looked at


def test_a_link_to_where_nobody_may_look_fails_alone(model: Path, tmp_path: Path) -> None:
    """In a process that obeys permissions."""
    secret = field(tmp_path / "secret/s.png")
    field(tmp_path / "in/a.png")
    (tmp_path / "in/link.png").symlink_to(secret)
    secret.parent.chmod(0)
    try:
        done = run_obeying_permissions("infer", tmp_path / "in", "-o", tmp_path / "out", "--model", model, "-q")
    finally:
        secret.parent.chmod(0o755)
    assert done.returncode == 3, done.stderr
    assert images(tmp_path / "out") == [("a.png", "done"), ("link.png", "failed")]


def test_a_folder_to_watch_that_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(tmp_path / ("x" * 300), "-o", tmp_path / "out", "--watch") == 2
    assert "--watch follows one folder" in capsys.readouterr().err
