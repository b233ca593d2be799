"""``cellseg-evaluate --counts``: tables that people write, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_discs
from test_evaluate import evaluate, write
from test_evaluate_modes import table

from cellseg_deploy.cli import evaluate_counts

CENTRES: dict[str, list[tuple[float, float]]] = {
    "a": [(20, 20), (60, 30), (40, 60)],
    "b": [(30, 40), (3, 3)],  # the second is cut by the top and the left side
    "c": [],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, centres in CENTRES.items():
        image = draw_discs((80, 90), centres)
        write(tmp_path / "images" / f"{name}.png", image)
        write(tmp_path / "labels" / f"{name}.png", np.where(image[..., 0] < 200, 255, 0).astype(np.uint8))
    return tmp_path


def run(folder: Path, text: str | bytes, *arguments: object) -> int:
    (folder / "counts.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    given = arguments if "--images" in arguments else ("--labels", folder / "labels", *arguments)
    return evaluate(*given, "--counts", folder / "counts.csv", "-o", folder / "out")


def test_label_images_against_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "image,count\na.png,4\nb,2\nc.tif,0\n") == 0
    record = json.loads((folder / "out" / "agreement.json").read_text("utf-8"))
    assert (record["program"], record["count_rule"], record["min_area_px"]) == ("cellseg-evaluate", "half", 0)
    assert (record["n_images"], record["true"], record["found"]) == (3, 6, 5)
    assert record["difference"]["bias"]["value"] == pytest.approx(-1 / 3)
    assert (record["mape"], record["ratio"]["n"]) == (1 / 8, 2)
    rows = table(folder / "out" / "agreement.csv")
    assert [list(row.values()) for row in rows] == [
        ["a", "4", "3", "-1", "0.7500"],
        ["b", "2", "2", "0", "1.0000"],
        ["c", "0", "0", "0", ""],
    ]
    assert (folder / "out" / "agreement.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "5 found, 6 by hand" in said
    assert "without 1 image" in said


def test_a_model_counts_by_the_rule(folder: Path, onnx_file: Callable[..., Path]) -> None:
    found = {}
    for rule in ("all", "frame", "exclude-border"):
        given = ("--images", folder / "images", "--model", onnx_file(), "--scale", "1", "--count-rule", rule, "-q")
        assert run(folder, "image,count\na,3\nb,1\nc,0\n", *given) == 0
        found[rule] = [row["found"] for row in table(folder / "out" / "agreement.csv")]
    assert found["all"] == ["3", "2", "0"]
    assert found["frame"] == found["exclude-border"] == ["3", "1", "0"]


def test_specks_count_unless_they_are_left_out() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[2:8, 2:8], labels[10, 10], labels[12:15, 0:3] = 1, 2, 5
    assert [evaluate_counts.count_cells(labels, "all", least) for least in (0, 1, 2, 10, 37)] == [3, 3, 2, 1, 0]
    assert evaluate_counts.count_cells(labels, "exclude-border", 0) == 2
    assert evaluate_counts.count_cells(np.zeros((4, 4), np.int32), "all", 0) == 0
    assert evaluate_counts.count_cells(np.ones((4, 4), np.int32), "all", 0) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfimage;count\r\na.png;3\r\nb.png;2\r\nc.png;0\r\n",  # Excel, German
        "image\tcount\na\t3\nb\t2\nc\t0\n".encode("utf-16"),
        b"Count , Image\n3,a\n 2 ,b\n\n,\n0,c",
        b'image,count,\n"a.png","3",\nb,2\nc,0,\n'.replace(b"b,2\n", b"b,2,\n"),
    ],
)
def test_tables_as_programs_write_them(folder: Path, text: bytes) -> None:
    assert run(folder, text, "-q") == 0
    assert [row["count"] for row in table(folder / "out" / "agreement.csv")] == ["3", "2", "0"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("image,count\na,3\nb,\nc,0\n", ["line 3", "''"]),
        ("image,count\na,3\nb,-2\nc,0\n", ["line 3", "'-2'"]),
        ("image;count\na;3\nb;2,5\nc;0\n", ["line 3", "'2,5'", "whole number"]),
        ("image,count\na,3\n\nb,2.0\nc,0\n", ["line 4", "'2.0'"]),
        ("image,count\na,1,234\nb,2\nc,0\n", ["line 2", "3 cells"]),
        ("image,count\na\nb,2\n", ["line 2", "1 cells"]),
        ("image,count\na,3\nb,two\nc,0\n", ["line 3", "'two'"]),
        ("image,count\na,3\nb,2\na.png,3\nc,0\n", ["lines 2 and 4", "image a"]),
        ("image,count\n,3\n", ["line 2", "names no image"]),
        ("a,3\nb,2\nc,0\n", ["line 1", "image and count", "found a, 3"]),
        ("image,count,class\na,3,red\n", ["column class", "--classes NAME"]),
        ("image,count,white\na,3,1\n", ["column white", "--classes NAME"]),
        ("image,count\n", ["lists no image"]),
        ("", ["line 1", "found nothing"]),
        (b"image,count\na,3\n\xe4,2\n", ["line 3", "UTF-8"]),
        ('image,count\na,"3\n', ["not valid CSV"]),
        ("image,count\na,3\nb,2\n", ["1 without a count", "c.png"]),
        ("image,count\na,3\nb,2\nc,0\nd.png,7\n", ["1 not found as an image", "d.png (line 5)"]),
    ],
)
def test_what_is_no_count_ends_with_3_and_its_line(
    folder: Path, text: str | bytes, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, text) == 3
    said = capsys.readouterr().err
    assert "counts.csv" in said
    assert all(message in said for message in messages), said
    assert not (folder / "out").exists()


@pytest.mark.parametrize("option", ["--sweep", "--anatomy", "--calibrate", "--describe", "--save-labels", "--masks"])
def test_what_needs_places_excludes_counts(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = (folder / "labels",) if option == "--masks" else ()
    assert run(folder, "image,count\na,3\n", "--images", folder / "images", option, *more) == 2
    mode = option in ("--calibrate", "--describe")
    refused = "No such option '--counts'" if mode else f"{option} and --counts exclude each other"
    assert refused in capsys.readouterr().err


def test_no_image_and_no_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert evaluate("--labels", folder / "empty", "--counts", folder / "no.csv", "-o", folder / "out") == 3
    assert "cannot be read" in capsys.readouterr().err
    (folder / "counts.csv").write_text("image,count\na,3\n")
    assert evaluate("--labels", folder / "empty", "--counts", folder / "counts.csv", "-o", folder / "out") == 4


def test_without_matplotlib_the_install_command_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run(folder, "image,count\na,3\nb,2\nc,0\n") == 8
    assert "pip install 'cellseg-deploy[plots]'" in capsys.readouterr().err
