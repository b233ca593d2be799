"""``cellseg-evaluate`` with ``--sweep``, ``--anatomy``, ``--calibrate``, ``--describe`` and ``--count-rule``."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_onnx, make_spec
from test_evaluate import evaluate, report, write

from cellseg_deploy.cli import calibrate
from cellseg_deploy.cli.evaluate import with_command
from cellseg_deploy.files import atomic
from cellseg_deploy.images import read
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.spec import ThresholdParams

PNG = b"\x89PNG\r\n\x1a\n"
PAIRS = [(15.0, 20.0), (34.0, 20.0), (60.0, 50.0)]


def draw(bridge: int) -> np.ndarray:
    """Three dark discs, the first two joined by a paler bridge of grey ``bridge``."""
    image = draw_discs((80, 90), PAIRS, radius=8)
    image[17:24, 22:28] = np.where(image[17:24, 22:28] > 200, bridge, image[17:24, 22:28])
    return image


@pytest.fixture
def smears(tmp_path: Path) -> Path:
    """Four photographs; the stub sees the bridge as cell with 0.7, so only a higher threshold parts the discs."""
    for name in "abcd":
        write(tmp_path / "images" / f"{name}.png", draw(bridge=121))
        discs = np.where(draw_discs((80, 90), PAIRS, radius=8)[..., 0] < 200, 255, 0)
        write(tmp_path / "masks" / f"{name}.png", discs.astype(np.uint8))
    return tmp_path


@pytest.fixture
def model(onnx_file: Callable[..., Path]) -> Path:
    pytest.importorskip("onnxruntime")
    points = {task: ThresholdParams(foreground_threshold=0.5) for task in ("counting", "confluence")}
    return onnx_file(model=make_onnx(make_spec(operating_points=points, cell_diameter_px=16.0)))


def run(smears: Path, model: Path, *arguments: object, out: str = "out") -> int:
    common = ["--model", model, "--images", smears / "images", "--masks", smears / "masks", "-q"]
    return evaluate(*common, "--min-area", 50, "-o", smears / out, *arguments)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_and_anatomy_run_the_network_once(
    smears: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cellseg_deploy import segmenter

    calls: list[int] = []
    original = segmenter.Segmenter.segment

    def counted(self: Any, image: Any, *more: Any, **settings: Any) -> Any:
        calls.append(1)
        return original(self, image, *more, **settings)

    monkeypatch.setattr(segmenter.Segmenter, "segment", counted)
    assert run(smears, model, "--sweep", "--anatomy") == 0
    assert len(calls) == 4
    out = smears / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *("anatomy", "anatomy.csv", "metrics.csv", "metrics.json", "reliability.json", "reliability.png"),
            *("sweep.csv", "sweep.png"),
        ]
    )
    swept = {float(row["threshold"]): row for row in table(out / "sweep.csv")}
    assert (float(swept[0.5]["f1"]), float(swept[0.9]["f1"])) == (0.4, 1)
    assert (swept[0.5]["merges"], swept[0.9]["merges"]) == ("4", "0")
    for name in ("sweep.png", "reliability.png"):
        assert (out / name).read_bytes().startswith(PNG)
    found = table(out / "anatomy.csv")
    assert [(row["image"], row["kind"], row["page"]) for row in found] == [
        (name, "merge", f"merge-01.jpg, {place}") for place, name in enumerate("abcd", start=1)
    ]
    assert (found[0]["true_labels"], found[0]["left_px"], found[0]["width_px"]) == ("1 2", "7", "36")
    result = report(out)
    assert (result["anatomy"]["merge"], result["anatomy"]["miss"]) == (4, 0)
    assert result["anatomy"]["by_image"]["b"]["merge"] == 1
    assert 0 < result["ece"] == json.loads((out / "reliability.json").read_text())["ece"] < 0.1


def test_pages_of_an_earlier_evaluation_do_not_stay(smears: Path, model: Path) -> None:
    assert run(smears, model, "--anatomy") == 0
    assert (smears / "out" / "anatomy" / "merge-01.jpg").is_file()
    assert (
        evaluate("--labels", smears / "masks", "--masks", smears / "masks", "-q", "--anatomy", "-o", smears / "out")
        == 0
    )
    assert not list((smears / "out" / "anatomy").iterdir())
    assert table(smears / "out" / "anatomy.csv") == []


def test_calibrate_writes_a_better_model_of_the_same_identity(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", model, "--images", smears / "images", "--masks", smears / "masks", "--min-area", 50]
    assert evaluate("--calibrate", *arguments, "-o", smears / "new" / "better.onnx") == 0
    said = capsys.readouterr().out
    assert "used to choose the settings" in said
    assert "f1_apart          1.0000  [1.0000, 1.0000]   before 0.4000" in said
    before, after = read_model_file(model), read_model_file(smears / "new" / "better.onnx")
    assert after.identity == before.identity
    assert after.spec.operating_points["counting"].foreground_threshold == 0.8
    assert before.spec.operating_points["counting"].foreground_threshold == 0.5
    record = json.loads((smears / "new" / "better.calibration.json").read_text())
    counting = record["tasks"]["counting"]
    assert counting["chosen"]["foreground_threshold"] == 0.8
    assert counting["matters"]["foreground_threshold"] == {
        "metric": "f1_apart",
        "lowest": pytest.approx(0.4),
        "highest": 1,
    }
    assert len(counting["chosen_by_fold"]) == 4
    assert (counting["held_out"]["f1_apart"], counting["before_on_these_images"]["f1_apart"]) == (1, pytest.approx(0.4))
    assert (smears / "new" / "better.calibration.png").read_bytes().startswith(PNG)
    assert record["written"] == {"file": "better.onnx", "file_sha256": after.file_sha256}
    assert run(smears, smears / "new" / "better.onnx") == 0
    assert report(smears / "out")["f1"] == 1
    assert run(smears, model, "--calibrate", out=model.name) == 0  # in place
    assert read_model_file(model).spec == after.spec


def test_a_failed_evaluation_leaves_the_earlier_anatomy(smears: Path, model: Path) -> None:
    assert run(smears, model, "--anatomy") == 0
    pages = {path.name: path.read_bytes() for path in (smears / "out/anatomy").iterdir()}
    (smears / "masks/d.png").write_bytes(b"no picture")
    assert run(smears, model, "--anatomy") == 3
    assert {path.name: path.read_bytes() for path in (smears / "out/anatomy").iterdir()} == pages
    assert sorted(path.name for path in (smears / "out").iterdir()) == [
        *("anatomy", "anatomy.csv", "metrics.csv", "metrics.json"),
    ]


def test_extras_of_an_earlier_evaluation_go_and_other_files_stay(smears: Path, model: Path) -> None:
    assert run(smears, model, "--anatomy", "--sweep") == 0
    (smears / "out/anatomy/split-2024-party.jpg").write_bytes(b"mine")
    assert run(smears, model) == 0
    assert sorted(path.name for path in (smears / "out").iterdir()) == ["anatomy", "metrics.csv", "metrics.json"]
    assert [path.name for path in (smears / "out/anatomy").iterdir()] == ["split-2024-party.jpg"]


def test_a_folder_named_anatomy_that_is_not_ours_is_left_alone(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(smears / "out/anatomy/merge-01.jpg", draw(bridge=121))
    assert run(smears, model, "--anatomy") == 6
    assert "anatomy: not written by cellseg-evaluate" in capsys.readouterr().err
    assert (smears / "out/anatomy/merge-01.jpg").is_file()


def test_calibrate_stays_out_of_its_input_and_off_other_files(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(smears, model, "--calibrate", out="images/m.onnx") == 2
    assert "is in the folder of images or masks" in capsys.readouterr().err
    (smears / "m.calibration.json").write_text('{"mine": 1}')
    assert run(smears, model, "--calibrate", out="m.onnx") == 6
    assert "m.calibration.json: not written by cellseg-evaluate" in capsys.readouterr().err
    assert not (smears / "m.onnx").exists()


def test_nothing_is_calibrated_without_a_true_cell(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        write(smears / "masks" / f"{name}.png", np.zeros((80, 90), np.uint8))
    assert run(smears, model, "--calibrate", out="m.onnx") == 3
    assert "contain no cell" in capsys.readouterr().err
    assert not (smears / "m.onnx").exists()


@pytest.mark.parametrize("mode", ["--sweep", "--calibrate", "--describe"])
def test_modes_that_know_no_count_rule_refuse_one(
    mode: str, smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(smears, model, mode, "--count-rule", "frame", out="m.onnx") == 2
    refused = "--count-rule and --sweep exclude each other" if mode == "--sweep" else "No such option '--count-rule'"
    assert refused in capsys.readouterr().err


def test_calibrate_replaces_no_other_file(smears: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (smears / "notes.onnx").write_text("mine")
    other = make_onnx(contrast=9.0)
    (smears / "other.onnx").write_bytes(other.SerializeToString())
    for name, code, words in (
        ("folder", 2, "ending in .onnx"),
        ("notes.onnx", 6, "not a cellseg model file"),
        ("other.onnx", 6, "a different network"),
    ):
        assert run(smears, model, "--calibrate", out=name) == code
        assert words in capsys.readouterr().err
    assert (smears / "notes.onnx").read_text() == "mine"
    for name in "bcd":
        (smears / "images" / f"{name}.png").unlink()
        (smears / "masks" / f"{name}.png").unlink()
    assert run(smears, model, "--calibrate", out="one.onnx") == 2
    assert "at least 2 images" in capsys.readouterr().err
    assert not (smears / "one.onnx").exists()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_report_never_speaks_of_a_model_that_is_not_there(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after that many files of the second calibration; then the next one may go on."""
    out = tmp_path / "m.onnx"
    report, figure = tmp_path / "m.calibration.json", tmp_path / "m.calibration.png"

    def about(model: bytes) -> bytes:
        return json.dumps({"program": "cellseg-evaluate", "of": model.decode()}).encode()

    calibrate._replace(out, b"first", about(b"first"), b"figure")
    original, done = atomic.write_bytes, list[Path]()

    def cut_off(path: Path, data: bytes) -> None:
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(path)
        original(path, data)

    monkeypatch.setattr(atomic, "write_bytes", cut_off)
    with pytest.raises(KeyboardInterrupt):
        calibrate._replace(out, b"second", about(b"second"), b"figure")
    assert out.read_bytes() == (b"first" if written == 0 else b"second")
    assert report.exists() == (written == 2)
    if written == 2:
        assert report.read_bytes() == about(b"second")
    assert not figure.exists()
    calibrate.check_report(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --images DIR for a model to count, or --labels DIR"),
        (("--images", "i"), "give --masks DIR, the ground truth (or --boxes, --points or --counts FILE.csv)"),
        (("--images", "i", "--calibrate", "-o", "x.onnx"), "Missing option '--masks'"),
        (("calibrate", "--images", "i", "-o", "x.onnx"), "Missing option '--masks'"),
        (("calibrat", "--images", "i", "-o", "x.onnx"), "No such command 'calibrat'"),
        (("--images", "i", "--masks", "m"), "give -o OUT, the folder for the results"),
        (("--images", "i", "--masks", "m", "--calibrate"), "Missing option '-o'"),
        (("--images", "i", "--describe"), "Missing option '-o'"),
        (("--images", "i", "--masks", "m", "-o", "x.onnx"), "named as a model file, which only the commands"),
        (("--images", "i", "--masks", "m", "-o", "x.onnx", "--sweep"), "named as a model file"),
        (("--images", "i", "--describe", "--sweep", "-o", "o"), "No such option '--sweep'"),
        (("--images", "i", "--masks", "m", "--calibrate", "--task", "counting"), "No such option '--task'"),
        (("--labels", "l", "--describe", "-o", "o"), "No such option '--labels'"),
        (("--labels", "l", "--calibrate", "-o", "o"), "No such option '--labels'"),
        (("--labels", "l", "--sweep", "-o", "o"), "--sweep and --labels exclude each other"),
        (("--images", "i", "--masks", "nowhere", "-o", "o"), "no such file or folder"),
        (("--images", "nowhere", "--describe", "-o", "o"), "nowhere"),
    ],
)
def test_each_mistake_is_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "i" / "a.png", draw(bridge=230))
    (tmp_path / "m").mkdir()
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.lower().startswith("error")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "--sweep"), "No such option '--sweep'"),
        (("--calibrate", "--describe"), "--describe and --calibrate exclude each other"),
        (("--describe", "--anatomy"), "No such option '--anatomy'"),
        (("--describe", "--save-labels"), "No such option '--save-labels'"),
        (("--count-rule", "most"), "count-rule"),
    ],
)
def test_modes_that_exclude_each_other(
    arguments: tuple[str, ...], message: str, smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(smears, model, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sweep", "--calibrate", "--describe"])
def test_without_matplotlib_the_install_command_is_named(
    option: str, smears: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run(smears, model, option, out="x.onnx" if option == "--calibrate" else "x") == 8
    assert "pip install 'cellseg-deploy[plots]'" in capsys.readouterr().err
    assert not (smears / "x.onnx").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["score"]),
        (["--images", "i", "-o", "describe"], ["score", "--images", "i", "-o", "describe"]),
        (["-v", "--describe", "--images", "i"], ["describe", "-v", "--images", "i"]),
        (["--images", "i", "--calibrate"], ["calibrate", "--images", "i"]),
        (["score", "--calibrate"], ["score", "--calibrate"]),
        (["--help"], ["--help"]),
        (["--images", "i", "--help"], ["score", "--images", "i", "--help"]),
    ],
)
def test_a_command_line_of_earlier_versions_names_its_command(given: list[str], expected: list[str]) -> None:
    assert with_command(given) == expected


@pytest.mark.parametrize("command", ["score", "calibrate", "describe"])
def test_the_commands_do_what_the_flags_did(command: str, smears: Path, model: Path) -> None:
    common = ["--model", model, "--images", smears / "images", "--masks", smears / "masks", "-q", "--min-area", 50]
    suffix = ".onnx" if command == "calibrate" else ""
    flags = [] if command == "score" else [f"--{command}"]
    assert evaluate(command, *common, "-o", smears / f"new{suffix}") == 0
    assert evaluate(*flags, *common, "-o", smears / f"old{suffix}") == 0
    if suffix:
        assert (smears / "new.onnx").read_bytes() == (smears / "old.onnx").read_bytes()
        return
    new, old = ({path.name: path.read_bytes() for path in (smears / name).iterdir()} for name in ("new", "old"))
    assert new == old
    assert ("metrics.json" if command == "score" else "data.json") in new


def test_the_count_rule_reaches_the_report(smears: Path, model: Path) -> None:
    """A disc cut by the left side is in the photograph of a, but not in its mask."""
    image = draw(bridge=230)
    image[60:78, :8] = 60
    write(smears / "images" / "a.png", image)
    errors = {}
    for rule in ("all", "exclude-border", "frame"):
        assert run(smears, model, "--count-rule", rule) == 0
        result = report(smears / "out")
        assert result["count_rule"] == rule
        errors[rule] = int(table(smears / "out" / "metrics.csv")[0]["count_error"])
        assert table(smears / "out" / "metrics.csv")[0]["n_predicted"] == "4"
    assert errors == {"all": 1, "exclude-border": 0, "frame": 0}


def test_describe_by_masks_and_by_the_model(smears: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--describe", "--model", model, "--images", smears / "images", "--min-area", 50]
    assert evaluate(*common, "--masks", smears / "masks", "-o", smears / "by-masks") == 0
    said = capsys.readouterr()
    assert "fewer than 20 whole cells" in said.err
    assert "12, 3.0 an image" in said.out
    by_masks = json.loads((smears / "by-masks" / "data.json").read_text())
    assert by_masks["n_cells"] == 12
    assert by_masks["sizes"] == {"90x80": 4}
    assert by_masks["crowded_share"] == pytest.approx(2 / 3)
    assert by_masks["median_diameter_px"] == pytest.approx(15.8, abs=0.2)
    assert by_masks["training"]["median_diameter_px"] == 16
    assert (smears / "by-masks" / "data.png").read_bytes().startswith(PNG)
    assert [row["cells"] for row in table(smears / "by-masks" / "data.csv")] == ["3"] * 4
    assert evaluate(*common, "-o", smears / "by-model", "-q") == 0
    by_model = json.loads((smears / "by-model" / "data.json").read_text())
    assert (by_model["cells_from"], by_model["n_cells"]) == ("the model", 8)
    (smears / "theirs").mkdir()
    (smears / "theirs" / "data.csv").write_text("mine")
    assert evaluate(*common, "-o", smears / "theirs") == 6
    assert (smears / "theirs" / "data.csv").read_text() == "mine"


@pytest.mark.real
@pytest.mark.slow
def test_sweep_and_anatomy_of_the_photographs_take_minutes_at_most(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "bbbc041seg" / "val"
    start = time.monotonic()
    common = ["--images", folder / "images", "--masks", folder / "masks", "-q"]
    assert evaluate(*common, "--sweep", "--anatomy", "-o", tmp_path / "out") == 0
    assert time.monotonic() - start < 300
    result = report(tmp_path / "out")
    assert 0.04 * 0.9 < result["n_clumps"] / result["n_true"] < 0.09
    assert result["f1_apart"] > result["f1"]


def test_the_bridge_is_seen_as_the_tests_take_it() -> None:
    tile = np.full((1, 56, 56, 3), 121, np.uint8)
    assert DarknessBackend().predict(tile)[0, 0, 0, 0] == pytest.approx(0.706, abs=0.002)


def test_cells_below_the_model_s_limit_at_the_border_are_found_unless_that_is_asked_for(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = draw(bridge=230)
    image[60:78, :2] = 60  # 36 px; the model's cell has 201, its limit is 0.2
    write(smears / "images" / "a.png", image)
    found = {}
    for border in ("visible", "model"):
        assert run(smears, model, "--border-cells", border, "--min-area", "0") == 0
        assert report(smears / "out")["model"]["border_cells"] == border
        found[border] = int(table(smears / "out" / "metrics.csv")[0]["n_predicted"])
    assert found["visible"] == found["model"] + 1
    assert run(smears, model, "--calibrate", "--border-cells", "model", out="x.onnx") == 2
    assert "No such option '--border-cells'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [(), ("--sweep", "--anatomy"), ("--calibrate",), ("--describe",), ("--describe", "file")]
)
def test_each_mask_is_read_once(
    smears: Path, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """Though the limit of specks is a share of the objects of all masks, and is there before the first is judged."""
    opened: list[Path] = []
    decode = read.decode

    def listed(path: Path, *settings: Any, **more: Any) -> Any:
        opened.append(path)
        return decode(path, *settings, **more)

    monkeypatch.setattr(read, "decode", listed)
    to_file = arguments[-1:] in (("--calibrate",), ("file",))
    given = [argument for argument in arguments if argument != "file"]
    assert run(smears, model, *given, out="out.onnx" if to_file else "out") == 0
    masks = [path for path in opened if path.parent.name == "masks"]
    assert sorted(masks) == sorted((smears / "masks").iterdir())
