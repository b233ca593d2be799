"""``cellseg-infer`` and the folder run from files to files, with a tiny ONNX model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT, THREE, draw_discs, run_obeying_permissions
from PIL import Image
from running import files, infer, results, rows

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command
from cellseg_deploy.run.folder import RunOptions
from cellseg_deploy.run.output_folder import ALWAYS
from cellseg_deploy.threads import ThreadPlan

# --- the main job


def test_a_folder_becomes_counts_labels_and_pictures(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert infer(smears, "-o", out, "--model", model, "--threads", 1) == 0
    names = ["a.jpg", "a.png", "empty.png", "sub/small.tif"]
    assert files(out) == sorted(
        [*ALWAYS, "journal.jsonl", "run.json"]
        + [f"labels/{name}.tif" for name in names]
        + [f"overlays/{name}.jpg" for name in names]
    )
    images = rows(out / "images.csv")
    assert list(images[0]) == [
        "image",
        "status",
        "cells",
        "counted",
        "confluence",
        "field_of_view_share",
        "median_cell_area_px",
        "scale",
        "warning",
        "error",
    ]
    assert [(row["image"], row["status"], row["cells"]) for row in images] == [
        ("a.jpg", "done", "3"),
        ("a.png", "done", "3"),
        ("empty.png", "done", "0"),
        ("sub/small.tif", "done", "1"),
    ]
    labels = tifffile.imread(out / "labels/a.png.tif")
    assert labels.shape == (100, 130)
    assert [labels[y, x] for x, y in THREE] == [1, 2, 3]
    assert float(images[1]["confluence"]) == pytest.approx((labels > 0).mean(), abs=1e-4)
    assert images[2]["confluence"] == "0.0000"
    assert images[2]["median_cell_area_px"] == ""
    cells = rows(out / "cells.csv")
    assert [row["image"] for row in cells] == ["a.jpg"] * 3 + ["a.png"] * 3 + ["sub/small.tif"]
    assert int(cells[3]["area_px"]) == (labels == 1).sum()
    assert float(cells[4]["centroid_x_px"]) == pytest.approx(60, abs=0.2)
    assert np.asarray(Image.open(out / "overlays/sub/small.tif.jpg")).ndim == 3
    said = capsys.readouterr()
    assert "images   4" in said.out
    assert "cells    7" in said.out
    assert "4/4 images" in said.err


def test_run_json_says_what_ran(model: Path, smears: Path, tmp_path: Path) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "--task", "confluence", "--batch-size", 3) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["totals"] == {"found": 4, "done": 4, "failed": 0, "remaining": 0, "cells": 7, "counted": 7}
    assert record["task"] == "confluence"
    assert record["operating_point"]["foreground_threshold"] == 0.5
    assert record["settings"]["batch_size"] == 3
    assert record["backend"]["name"] == "onnxruntime"
    assert record["backend"]["device"] == "cpu"
    assert record["backend"]["precision"] == "fp32"
    assert len(record["model"]["model_identity"]) == 64
    assert record["model"]["parity"] == "unverified"
    assert set(record["stage_seconds"]) == {"read", "resize", "tile", "network", "label", "measure", "write"}
    assert 0 < record["stage_seconds"]["network"] <= record["wall_seconds"]
    wall, network = record["wall_seconds"], record["stage_seconds"]["network"]
    rounding = 5e-4 * (1 + record["engine_busy"]) + 5e-5 * wall  # seconds to thousandths, the share to ten-thousandths
    assert record["engine_busy"] * wall == pytest.approx(network, rel=0, abs=rounding)
    assert set(record["threads"]) == {"engine", "helpers", "exclusive"}
    assert record["settings"]["save"] == ["labels", "overlays"]


@pytest.mark.reliability
def test_two_runs_give_the_same_bytes_for_any_batch_size_and_order(model: Path, smears: Path, tmp_path: Path) -> None:
    common = ["--model", model, "-q"]
    assert infer(smears, "-o", tmp_path / "one", *common, "--batch-size", 1, "--threads", 1) == 0
    singles = [smears / name for name in ("sub/small.tif", "empty.png", "a.png", "a.jpg")]
    assert infer(smears, "-o", tmp_path / "two", *common, "--batch-size", 16, "--threads", 2) == 0
    for name in files(tmp_path / "one"):
        if name not in ("run.json", "journal.jsonl"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert infer(*singles[1:], "-o", tmp_path / "three", *common) == 0
    assert (tmp_path / "three/labels/a.png.tif").read_bytes() == (tmp_path / "one/labels/a.png.tif").read_bytes()


def test_cell_diameter_brings_other_magnifications_to_the_models_scale(
    model: Path, smears: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    Image.open(smears / "a.png").resize((390, 300), Image.Resampling.NEAREST).save(large / "a.png")
    assert infer(large, "-o", tmp_path / "out", "--model", model, "--cell-diameter", 60, "-q") == 0
    assert rows(tmp_path / "out/images.csv")[0]["cells"] == "3"
    assert tifffile.imread(tmp_path / "out/labels/a.png.tif").shape == (300, 390)


def test_save_chooses_the_files(model: Path, smears: Path, tmp_path: Path) -> None:
    for choice, folders in (("labels", {"labels"}), ("overlays", {"overlays"}), ("none", set())):
        out = tmp_path / choice
        assert infer(smears / "a.png", "-o", out, "--model", model, "--save", choice, "-q") == 0
        assert {path.name for path in out.iterdir() if path.is_dir()} == folders
        assert rows(out / "images.csv")[0]["cells"] == "3"


def test_json_summary_is_all_of_stdout(
    model: Path, smears: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "--json") == 0
    summary = json.loads(capfd.readouterr().out)
    assert (summary["found"], summary["done"], summary["failed"], summary["cells"]) == (4, 4, 0, 7)


def test_a_reader_that_went_away_is_no_internal_error(model: Path, smears: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "from cellseg_deploy.cli.infer import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, smears, "-o", tmp_path / "out", "--model", model, "-v"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("arguments", [[], ["-q"], ["-v"]])
def test_a_stderr_that_nobody_reads_stops_nothing(
    model: Path, smears: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (smears / "b.png").write_bytes(b"")
    (smears / "c.bmp").write_bytes(b"")
    program = "from cellseg_deploy.cli.infer import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program, smears, "-o", tmp_path / "out", "--model", model, *arguments],
        stdout=subprocess.PIPE,
        stderr=writer,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 3
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "finished"
    assert len(rows(tmp_path / "out/images.csv")) == 5
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q") == 3


def test_images_that_are_not_read_are_mentioned(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (smears / "c.bmp").write_bytes(b"")
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q", "--cell-diameter", 20) == 0
    assert capsys.readouterr().err == (
        "WARNING: not read: 1 .bmp; expected files ending in .png, .jpg, .jpeg, .jpe, .jfif, .jif, .tif, .tiff; "
        "convert other images to PNG or TIFF\n"
    )


def test_quiet_says_nothing(model: Path, smears: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q", "--cell-diameter", 20) == 0
    assert capfd.readouterr() == ("", "")


def test_cells_are_measured_unless_a_size_is_given(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model) == 0
    said = capsys.readouterr().err
    assert said.count("fewer than 3 whole cells of one size to estimate it from") == 1  # for three groups, once
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["scale"] == "measured"
    assert infer(smears, "-o", tmp_path / "given", "--model", model, "--scale", 1) == 0
    assert "whole cells" not in capsys.readouterr().err
    assert json.loads((tmp_path / "given/run.json").read_text())["settings"]["scale"] == 1


# --- failures


def test_one_bad_image_never_stops_the_run(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (smears / "b.png").write_bytes((smears / "a.png").read_bytes()[:-20])
    (smears / "b.tif").write_bytes(b"")
    os.mkfifo(smears / "c.png")
    (smears / "d.png").symlink_to(tmp_path / "nothing")
    (smears / "=e.png").write_text("<html>")
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(smears / "z.png")
    out = tmp_path / "out"
    assert infer(smears, "-o", out, "--model", model) == 3
    images = {row["image"]: row for row in rows(out / "images.csv")}
    failed = {name: row["error"] for name, row in images.items() if row["status"] == "failed"}
    assert set(failed) == {"'=e.png", "b.png", "b.tif", "c.png", "d.png"}
    assert "cut short" in failed["b.png"]
    assert str(tmp_path) not in failed["b.png"]
    assert images["b.png"]["cells"] == images["b.png"]["confluence"] == ""
    assert images["z.png"]["cells"] == "1"
    totals = json.loads((out / "run.json").read_text())["totals"]
    assert (totals["found"], totals["done"], totals["failed"]) == (10, 5, 5)
    said = capsys.readouterr()
    assert "failed: b.tif: the file is empty" in said.err
    assert "failed   5" in said.out
    assert "images   5 of 10" in said.out
    assert len(files(out / "labels")) == 5


def test_notes_become_warnings(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/dark.tif", np.full((60, 60), 4000, np.uint16))
    assert infer(tmp_path / "in", "-o", tmp_path / "out", "--model", model, "-q") == 0
    assert "`bit_depth" in rows(tmp_path / "out/images.csv")[0]["warning"]
    assert infer(tmp_path / "in", "-o", tmp_path / "out2", "--model", model, "-q", "--bit-depth", 12) == 0
    assert "give --bit-depth" not in rows(tmp_path / "out2/images.csv")[0]["warning"]


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "missing.onnx"], 5, "missing.onnx"),
        (["--device", "cuda"], 8, "cellseg-deploy\\[gpu\\]"),
    ],
)
def test_exit_codes(
    model: Path,
    smears: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    code: int,
    words: str,
) -> None:
    import re

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    settings = arguments if "--model" in arguments else ["--model", model, *arguments]
    assert infer(smears, "-o", tmp_path / "out", *settings) == code
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_there(model: Path, tmp_path: Path) -> None:
    assert infer(tmp_path / "nowhere", "-o", tmp_path / "out", "--model", model) == 2


def test_output_folder_of_somebody_else(model: Path, smears: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    assert infer(smears, "-o", out, "--model", model, "--overwrite") == 6
    (tmp_path / "file").touch()
    assert infer(smears, "-o", tmp_path / "file", "--model", model) == 6


def test_earlier_results_are_replaced_only_when_asked(model: Path, smears: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    (smears / "a.jpg").unlink()
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert len(rows(out / "images.csv")) == 4
    assert "labels/a.jpg.tif" in files(out)
    assert infer(smears, "-o", out, "--model", model, "-q", "--overwrite") == 0
    assert len(rows(out / "images.csv")) == 3
    assert "labels/a.jpg.tif" not in files(out)


def test_output_in_use(model: Path, smears: Path, tmp_path: Path) -> None:
    from cellseg_deploy.files.lock import exclusive

    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out"):
        assert infer(smears, "-o", tmp_path / "out", "--model", model) == 7
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q") == 0


def test_read_only_output(model: Path, smears: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    done = run_obeying_permissions("infer", smears, "-o", tmp_path / "out", "--model", model)
    assert done.returncode == 6, done.stderr
    assert "Permission denied" in done.stderr


# --- light start


def test_help_is_light_and_shows_examples() -> None:
    program = (
        "import sys\nfrom cellseg_deploy.cli.infer import main\nsys.argv = ['cellseg-infer', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'numpy', 'onnxruntime', 'onnx', 'skimage', 'cv2', 'torch', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "cellseg-infer smears/ -o counts/" in done.stdout


def test_every_output_is_named_in_the_help() -> None:
    from cellseg_deploy.outputs.formats import NAMES

    (save,) = (option for option in command.params if option.name == "save")
    assert all(name in save.help for name in NAMES)  # type: ignore[attr-defined]


def test_package_import_is_light() -> None:
    program = "import sys, cellseg_deploy\nassert not {'numpy', 'onnxruntime', 'onnx', 'skimage'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_options_default_to_those_of_the_library() -> None:
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.segmenter import BATCH_SIZE

    defaults = command.make_context("cellseg-infer", ["in", "-o", "out"]).params
    assert console.engine_options(defaults, ThreadPlan(None, 1)) == EngineOptions()
    assert console.read_options(defaults) == ReadOptions() == RunOptions().reading
    assert defaults["batch_size"] == BATCH_SIZE
    assert (defaults["overwrite"], defaults["save"]) == (RunOptions().overwrite, ",".join(RunOptions().save))


@pytest.mark.parametrize(("rule", "number"), [("half", 7), ("all", 7), ("exclude-border", 6), ("frame", 6)])
def test_cells_cut_by_the_border_count_as_the_rule_says(
    rule: str, number: int, model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cells are labelled and measured under every rule; the column ``counted`` says which count."""
    Image.fromarray(draw_discs((60, 60), [(2, 30)])).save(smears / "sub" / "small.tif")
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "--count-rule", rule) == 0
    images, cells = rows(tmp_path / "out/images.csv"), rows(tmp_path / "out/cells.csv")
    assert [row["cells"] for row in images] == ["3", "3", "0", "1"]
    assert sum(int(row["counted"]) for row in images) == number == sum(row["counted"] == "true" for row in cells)
    assert cells[-1]["counted"] == ("true" if rule in ("half", "all") else "false")
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert (record["settings"]["count_rule"], record["totals"]["counted"]) == (rule, number)
    assert (f"{number} counted" in capsys.readouterr().out) == (rule not in ("half", "all"))


def test_labels_and_confluence_show_what_no_rule_counts(model: Path, smears: Path, tmp_path: Path) -> None:
    """Every file has the cells cut by the border, whatever the count rule; which of them count is said in each."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(draw_discs((400, 400), [(-5, 30), (200, 402), (200, 200)])).save(folder / "a.png")
    seen = {}
    for rule, expected in {"half": [False, True, False], "all": [True] * 3, "frame": [False, True, False]}.items():
        out = tmp_path / rule
        saved = ("--save", "labels,overlays,coco")
        assert infer(folder, "-o", out, "--model", model, "--count-rule", rule, "-q", *saved) == 0
        cells, (image,) = rows(out / "cells.csv"), rows(out / "images.csv")
        assert [row["counted"] == "true" for row in cells] == expected
        assert [one["counted"] for one in json.loads((out / "coco/a.png.json").read_text())["annotations"]] == expected
        assert (image["cells"], image["counted"]) == ("3", str(sum(expected)))
        labels = tifffile.imread(out / "labels/a.png.tif")
        seen[rule] = (labels.tobytes(), image["confluence"])
        picture = np.asarray(Image.open(out / "overlays/a.png.jpg").convert("RGB")).astype(int)
        for number, is_counted in enumerate(expected, start=1):
            line = picture[labels == number]
            assert (line[:, 1] > 200).any() == is_counted, "a green outline"
            assert (line[:, 0] > 200).any() == (not is_counted), "an orange outline"
    assert len(set(seen.values())) == 1


def test_a_run_of_an_earlier_version_gives_its_numbers_again(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run.json says nothing of border cells: those below the model's limit were not labelled then."""
    shown = draw_discs((60, 60), [(-6, 30), (30, 30)])  # a sliver of 0.14 of the model's cell, whose limit is 0.2
    Image.fromarray(shown).save(smears / "sliver.png")
    before, now, again = tmp_path / "before", tmp_path / "now", tmp_path / "again"
    as_then = ("--scale", "1", "--count-rule", "all", "--border-cells", "model", "--field", "full")
    assert infer(smears, "-o", before, "--model", model, "-q", *as_then) == 0
    record = json.loads((before / "run.json").read_text())
    for setting in ("border_cells", "field_of_view"):
        del record["identity"]["settings"][setting]
    (before / "run.json").write_text(json.dumps(record))
    assert infer(smears, "--like", before / "run.json", "-o", again, "-q") == 0
    assert results(again) == results(before)
    assert capsys.readouterr().err == ""
    assert infer(smears, "-o", now, "--model", model, "--scale", "1", "-q") == 0
    found = [row for out in (before, now) for row in rows(out / "images.csv") if row["image"] == "sliver.png"]
    assert [(row["cells"], row["counted"]) for row in found] == [("1", "1"), ("2", "1")]


def test_a_cuda_graph_needs_tensorrt(
    model: Path, smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "--cuda-graph") == 2
    assert "--cuda-graph belongs to --backend tensorrt" in capsys.readouterr().err
