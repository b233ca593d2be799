"""What a run was given is what it goes on with, and what it is done again with: model, engine, scale, paths, names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_discs, make_onnx, make_spec, run_obeying_permissions
from PIL import Image
from running import infer, results, rows, save

from cellseg_deploy.backends.device_class import device_class, engine_version
from cellseg_deploy.backends.records import ParityRecord, Timing, add_record, form_sha256, records_path
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.inputs import GivenPaths, expanded
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.run.record import Inputs, inputs_in
from cellseg_deploy.run.repeat import read_run


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
    assert infer("--like", out / "run.json", "-o", again, "-q") == 0
    assert capsys.readouterr().err == ""
    assert results(again) == expected
    identities = [json.loads((folder / "run.json").read_text())["identity"] for folder in (out, again)]
    assert identities[0] == identities[1] == record["identity"]
    # One run, whichever way it is gone on with.
    assert infer("--like", out / "run.json", "-o", out, "-q") == 0
    assert infer(smears, "-o", again, "--model", with_form, "-q") == 0
    # The form alone makes the same labels, but is another thing to be given.
    with_form.unlink()
    assert infer("--like", out / "run.json", "-o", tmp_path / "form", "-q") == 0
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
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "--model", kept, "-q") == 0
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
    assert infer("--like", tmp_path / "out/run.json", "-o", tmp_path / "again", "-q") == 0
    assert results(tmp_path / "again") == results(tmp_path / "out")


# --- paths and names


def test_names_are_those_that_were_given_a_pattern_and_a_folder_in_it(model: Path, tmp_path: Path) -> None:
    """A name begins in the nearest folder, whichever of both came to the image first."""
    for name in ("a/x.png", "b/x.png", "b/y.png"):
        field(tmp_path / "r" / name)
    out = tmp_path / "out"
    assert infer(tmp_path / "r/*/x.png", tmp_path / "r/b", "-o", out, "--model", model, "-q") == 0
    names = [("b/x.png", "done"), ("b/y.png", "done"), ("r/a/x.png", "done")]
    assert images(out) == names
    assert infer(tmp_path / "r/b", tmp_path / "r/*/x.png", "-o", out, "--model", model, "-q") == 0
    assert images(out) == names
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 0
    assert images(tmp_path / "again") == names
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["identity"]["inputs"] == [str(tmp_path / "r"), str(tmp_path / "r/b")]
    assert recorded["inputs"]["folders"] == [str(tmp_path / "r/b")]


def test_a_folder_that_a_pattern_matched_is_no_image_when_it_is_gone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/x.png", "b/x.png"):
        field(tmp_path / "r" / name)
    out = tmp_path / "out"
    assert infer(tmp_path / "r/*", "-o", out, "--model", model, "-q") == 0
    shutil.rmtree(tmp_path / "r/b")
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 2
    assert "r/b: no such file or folder" in capsys.readouterr().err


def test_a_run_json_of_an_earlier_version_is_enough(model: Path, tmp_path: Path) -> None:
    """It names neither folders nor the model's file that was given."""
    folder, out = tmp_path / "r", tmp_path / "out"
    for name in ("a/x.png", "b/x.png"):
        field(folder / name)
    assert infer(folder / "*/x.png", "-o", out, "--model", model, "-q") == 0
    record = json.loads((out / "run.json").read_text())
    for section, key in (("inputs", "folders"), ("model", "given")):
        del record[section][key]
    (out / "run.json").write_text(json.dumps(record))
    (folder / "b/x.png").unlink()
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 3
    assert images(tmp_path / "again") == [("a/x.png", "done"), ("b/x.png", "failed")]
    record["inputs"] = {"paths": [str(folder)], "follow_links": False}
    record["identity"]["inputs"] = [str(folder)]
    (out / "run.json").write_text(json.dumps(record))
    given = read_run(out / "run.json").given
    assert given == GivenPaths((folder,), (folder,), frozenset())


@pytest.mark.parametrize("wrong", [{"folders": "/a"}, {"folders": [1]}, {"paths": [1]}, {"paths": None}, []])
def test_inputs_that_are_none(model: Path, tmp_path: Path, wrong: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert infer(field(tmp_path / "in/a.png"), "-o", out, "--model", model, "-q") == 0
    record = json.loads((out / "run.json").read_text())
    record["inputs"] = {**record["inputs"], **wrong} if isinstance(wrong, dict) else wrong
    (out / "run.json").write_text(json.dumps(record))
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 2
    assert "no run.json of this version" in capsys.readouterr().err
    assert inputs_in(out / "run.json", ["/in"]) is None


def test_what_several_calls_of_one_run_were_given(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/y.png"):
        field(tmp_path / "r" / name)
    folder, root = tmp_path / "r", str(tmp_path / "r")
    given = [expanded([folder / "*"]), expanded([folder / "*/x.png", folder / "b"])]
    first = Inputs.of(given[0].paths, given[0].roots, follow_links=True)
    assert (first.roots, first.folders) == ((root,), (f"{root}/a", f"{root}/b"))
    second = Inputs.of(given[1].paths, given[1].roots)
    assert second.roots == (root, f"{root}/b")
    both = second.after(first)
    assert both.paths == (f"{root}/a", f"{root}/b", f"{root}/a/x.png", f"{root}/b/x.png")
    assert set(both.folders) == {f"{root}/a", f"{root}/b"}
    assert both.follow_links is True  # an image of the first call is a link
    (tmp_path / "run.json").write_text(json.dumps({"program": "cellseg-infer", "inputs": both.to_json()}))
    assert inputs_in(tmp_path / "run.json", both.roots) == both
    (tmp_path / "run.json").write_text(json.dumps({"program": "another", "inputs": both.to_json()}))
    assert inputs_in(tmp_path / "run.json", both.roots) is None
    assert inputs_in(tmp_path / "none.json", both.roots) is None


def test_folders_of_an_earlier_call_stay_folders(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call with a part of the images does not make run.json forget what the others began with."""
    root, out = tmp_path / "r", tmp_path / "out"
    for name in ("a/x.png", "b/x.png"):
        field(root / name)
    assert infer(root / "*", "-o", out, "--model", model, "-q") == 0
    (out / "labels/a/x.png.tif").unlink()
    assert infer(root / "*/x.png", "-o", out, "--model", model, "-q") == 0
    assert json.loads((out / "run.json").read_text())["inputs"]["folders"] == [str(root / "a"), str(root / "b")]
    shutil.rmtree(root / "b")
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 2
    assert "r/b: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("as_list", [False, True])
def test_no_image_is_counted_twice_whichever_place_is_given_first(model: Path, tmp_path: Path, as_list: bool) -> None:
    field(tmp_path / "B/a.png")
    field(tmp_path / "B/s/y.png")
    places = [tmp_path / "B", tmp_path / "B/s"]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [places[1], places[0]]))
    run = ("-o", tmp_path / "out", "--model", model, "-q")
    assert infer(*places, *run) == 0
    assert infer(*(["--list", tmp_path / "list.txt"] if as_list else places[::-1]), *run) == 0
    assert images(tmp_path / "out") == [("B/a.png", "done"), ("s/y.png", "done")]
    assert len(rows(tmp_path / "out/cells.csv")) == 2


def test_a_file_of_two_patterns_that_comes_later_is_only_more(model: Path, tmp_path: Path) -> None:
    for name in ("d1/a.png", "d2/a.png"):
        field(tmp_path / "N" / name)
    patterns = [tmp_path / "N/d1/*.png", tmp_path / "N/*/a*.png"]
    run = ("-o", tmp_path / "out", "--model", model, "-q")
    assert infer(*patterns, *run) == 0
    field(tmp_path / "N/d1/b.png")
    assert infer(*patterns, *run) == 0
    assert infer(*patterns[::-1], *run) == 0
    assert images(tmp_path / "out") == [(name, "done") for name in ("N/d2/a.png", "d1/a.png", "d1/b.png")]


@pytest.mark.parametrize("name", ["b.bmp", "notes.txt", "Thumbs.db", "b.czi"])
def test_a_listed_file_of_any_ending_that_goes_fails_alone(model: Path, tmp_path: Path, name: str) -> None:
    field(tmp_path / "A/a.png")
    (tmp_path / "A" / name).write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'A/a.png'}\n{tmp_path / 'A' / name}\n")
    run = ("--list", tmp_path / "list.txt", "--model", model, "-q")
    assert infer(*run, "-o", tmp_path / "out") == 3
    (tmp_path / "A" / name).unlink()
    assert infer(*run, "-o", tmp_path / "out") == 3
    assert infer(*run, "-o", tmp_path / "new") == 3
    assert (
        sorted(images(tmp_path / "out"))
        == sorted(images(tmp_path / "new"))
        == sorted([("a.png", "done"), (name, "failed")])
    )


def test_a_listed_folder_with_an_ending_that_goes_is_one_still(model: Path, tmp_path: Path) -> None:
    for name in ("A/plate.v2/a.png", "A/b.png"):
        field(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'A/plate.v2'}\n{tmp_path / 'A/b.png'}\n")
    run = ("--list", tmp_path / "list.txt", "--model", model, "-q", "-o", tmp_path / "out")
    assert infer(*run) == 0
    (tmp_path / "A/plate.v2").rename(tmp_path / "away")
    assert infer(*run) == 3
    assert ("plate.v2/a.png", "done") in images(tmp_path / "out")
    (tmp_path / "away").rename(tmp_path / "A/plate.v2")
    assert infer(*run) == 0
    assert images(tmp_path / "out") == [("A/b.png", "done"), ("plate.v2/a.png", "done")]


def test_a_pattern_enters_no_linked_folder(tmp_path: Path) -> None:
    field(tmp_path / "L/x/p.png")
    (tmp_path / "L/loop").symlink_to(".")
    (tmp_path / "L/y").symlink_to("x")
    assert expanded([tmp_path / "L/**/*.png"]).paths == (tmp_path / "L/x/p.png",)
    assert tmp_path / "L/loop" not in expanded([tmp_path / "L/**"]).paths
    assert expanded([tmp_path / "L/*/p.png"]).paths == (tmp_path / "L/x/p.png", tmp_path / "L/y/p.png")


def test_a_pattern_that_leads_out_of_where_it_begins(model: Path, tmp_path: Path) -> None:
    for name in ("C/b1/i.png", "q/x.png"):
        field(tmp_path / name)
    assert infer(tmp_path / "C/b*/../../q/x.png", "-o", tmp_path / "out", "--model", model, "-q") == 0
    assert images(tmp_path / "out") == [("q/x.png", "done")]


def test_a_folder_to_watch_is_named_itself(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its images would be called otherwise than without ``--watch``."""
    field(tmp_path / "D/cam1/x.png")
    watch = ("--watch", "--watch-settle", 0.1, "--watch-idle", 0.5, "-o", tmp_path / "out", "--model", model, "-q")
    assert infer(tmp_path / "D/c*", *watch) == 2
    assert "no pattern" in capsys.readouterr().err
    assert infer(tmp_path / "D/cam1", *watch) == 0


def test_paths_of_a_run_json_that_lie_elsewhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert infer(field(tmp_path / "in/a.png"), "-o", out, "--model", model, "-q") == 0
    record = json.loads((out / "run.json").read_text())
    record["identity"]["inputs"] = [str(tmp_path / "elsewhere")]
    (out / "run.json").write_text(json.dumps(record))
    assert infer("--like", out / "run.json", "-o", tmp_path / "again", "-q") == 2
    assert "lies in none of the folders" in capsys.readouterr().err


def test_a_folder_of_a_list_that_is_away_for_a_day(model: Path, tmp_path: Path) -> None:
    """It fails alone, and the run is still the same one."""
    for name in ("mon/a.png", "tue/b.png"):
        field(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'mon'}\n{tmp_path / 'tue'}\n")
    run = ("--list", tmp_path / "list.txt", "-o", tmp_path / "out", "--model", model, "-q")
    whole = [("mon/a.png", "done"), ("tue/b.png", "done")]
    assert infer(*run) == 0
    assert images(tmp_path / "out") == whole
    (tmp_path / "tue").rename(tmp_path / "away")
    assert infer(*run) == 3
    assert images(tmp_path / "out") == [whole[0], ("tue", "failed"), whole[1]]
    assert infer(*run[:2], "-o", tmp_path / "new", *run[4:]) == 3
    (tmp_path / "away").rename(tmp_path / "tue")
    assert infer(*run) == 0
    assert infer(*run[:2], "-o", tmp_path / "new", *run[4:]) == 0
    assert images(tmp_path / "out") == images(tmp_path / "new") == whole


# --- paths that cannot be looked at


def test_a_path_in_a_list_that_is_too_long_fails_alone(model: Path, tmp_path: Path) -> None:
    good = field(tmp_path / "in/a.png")
    (tmp_path / "loop").symlink_to("loop")
    bad = [tmp_path / "in" / ("x" * 300 + ".png"), tmp_path / ("y" * 300) / "b.png", tmp_path / "loop" / "c.png"]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in (good, *bad)))
    assert infer("--list", tmp_path / "list.txt", "-o", tmp_path / "out", "--model", model, "-q") == 3
    found = {row["image"]: row for row in rows(tmp_path / "out/images.csv")}
    assert sorted(row["status"] for row in found.values()) == ["done", "failed", "failed", "failed"]
    assert found["in/a.png"]["status"] == "done"
    assert "internal error" not in "".join(row["error"] for row in found.values())


def test_paths_that_nobody_may_look_at_fail_alone(model: Path, tmp_path: Path) -> None:
    """A link into a folder that may not be entered, and a path into it, in a process that obeys permissions."""
    secret = field(tmp_path / "secret/s.png")
    field(tmp_path / "in/a.png")
    (tmp_path / "in/link.png").symlink_to(secret)
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'in'}\n{secret}\n")
    secret.parent.chmod(0)
    try:
        done = run_obeying_permissions(
            "infer", "--list", tmp_path / "list.txt", "-o", tmp_path / "out", "--model", model, "-q"
        )
    finally:
        secret.parent.chmod(0o755)
    assert done.returncode == 3, done.stderr
    assert images(tmp_path / "out") == [("in/a.png", "done"), ("in/link.png", "failed"), ("secret/s.png", "failed")]


def test_a_folder_to_watch_that_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(tmp_path / ("x" * 300), "-o", tmp_path / "out", "--watch") == 2
    assert "--watch follows one folder" in capsys.readouterr().err


def test_a_gone_folder_is_called_by_its_name(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert [image.name for image in find_images([gone], may_be_missing=[gone])] == ["gone"]
