"""evaluate() and parity.compare() from Python: the figures of the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_discs, make_onnx, make_spec
from PIL import Image

import cellseg_deploy as cs
from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate import command
from cellseg_deploy.errors import DataError, NothingToDoError, ParityError, UsageError
from cellseg_deploy.images import read_image, read_labels
from cellseg_deploy.outputs import label_tiff

CENTRES = [[(30, 30), (80, 32), (130, 90), (40, 100)], [(25, 25), (90, 60)], []]


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """Three images of 4, 2 and 0 discs of 26 px, and masks in which one disc is missing and one is a speck."""
    folder = tmp_path / "val"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, centres in enumerate(CENTRES):
        image = draw_discs((130, 170), centres, radius=13)
        labels = np.zeros(image.shape[:2], np.int32)
        for label, centre in enumerate(centres[number == 1 :], start=1):
            labels[draw_discs((130, 170), [centre], radius=13)[..., 0] < 200] = label
        if number == 0:
            labels[120:122, 160:162] = labels.max() + 1
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        (folder / "masks" / f"{number}.tif").write_bytes(label_tiff.encode(labels))
    return folder


def by_command(out: Path, *arguments: object) -> dict[str, float]:
    assert console.run(command, [*map(str, arguments), "-o", str(out), "-q"]) == console.EXIT_OK
    found: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return found


def expect_the_same(score: cs.Evaluation, by_command: dict[str, float]) -> None:
    for name, value in score.metrics.items():
        assert by_command[name] == (None if np.isnan(value) else value), name
    assert by_command["min_area_px"] == score.specks.px


@pytest.mark.parametrize("scale", ["auto", None])
def test_a_model_is_scored_as_by_the_command(val: Path, model: Path, tmp_path: Path, scale: str | None) -> None:
    with cs.Segmenter.load(model, scale=scale) as segmenter:  # type: ignore[arg-type]
        score = cs.evaluate(val / "images", str(val / "masks"), segmenter)
        assert segmenter.measured_scales == {}  # the caller's segmenter stays as it was
    options = () if scale == "auto" else ("--scale", 1)
    expect_the_same(score, by_command(tmp_path / "out", "--images", val / "images", "--masks", val / "masks",
                                      "--model", model, *options))  # fmt: skip
    assert (score.merges, score.splits, score.precision, score.recall) == (0, 0, 5 / 6, 1.0)
    assert score.count_bias == pytest.approx(1 / 3)
    assert score.count_mae == pytest.approx(1 / 3)
    assert 0.8 < score.dice < 1
    assert list(score.images) == ["0", "1", "2"]
    assert score.specks.dropped == 1


def test_the_scale_is_measured_once_for_images_of_one_size(model: Path, tmp_path: Path) -> None:
    """Two cells of 26 px in each of two images: too few to measure in one, enough in both."""
    centres = [(17, 17), (48, 48)]
    image = draw_discs((66, 66), centres, radius=13)
    labels = np.zeros((66, 66), np.int32)
    for label, centre in enumerate(centres, start=1):
        labels[draw_discs((66, 66), [centre], radius=13)[..., 0] < 200] = label
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for stem in ("a", "b"):
        Image.fromarray(image).save(tmp_path / "images" / f"{stem}.png")
        (tmp_path / "masks" / f"{stem}.tif").write_bytes(label_tiff.encode(labels))
    with cs.Segmenter.load(model) as segmenter:
        assert segmenter(tmp_path / "images" / "a.png").scale == 1.0
        score = cs.evaluate(tmp_path / "images", tmp_path / "masks", segmenter)
    with cs.Segmenter.load(model, scale=None) as segmenter:
        assert score.dice < cs.evaluate(tmp_path / "images", tmp_path / "masks", segmenter).dice
    options = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--model", model)
    expect_the_same(score, by_command(tmp_path / "out", *options))


def test_label_images_are_scored_as_by_the_command(val: Path, tmp_path: Path) -> None:
    score = cs.evaluate(None, val / "masks", val / "masks", count_rule="all", min_area_px=3)
    options = ("--labels", val / "masks", "--masks", val / "masks", "--count-rule", "all", "--min-area", 3)
    expect_the_same(score, by_command(tmp_path / "out", *options))
    assert score.f1 == 1.0


def test_what_cannot_be_scored(val: Path, model: Path, tmp_path: Path) -> None:
    with cs.Segmenter.load(model) as segmenter:
        with pytest.raises(UsageError, match="images must be the folder of photographs"):
            cs.evaluate(None, val / "masks", segmenter)
        with pytest.raises(DataError, match="max_pixels"):
            cs.evaluate(val / "images", val / "masks", segmenter, read=cs.ReadOptions(max_pixels=99))
        (val / "masks" / "0.tif").unlink()
        with pytest.raises(DataError):
            cs.evaluate(val / "images", val / "masks", segmenter)
    (tmp_path / "none").mkdir()
    with pytest.raises(NothingToDoError):
        cs.evaluate(None, tmp_path / "none", tmp_path / "none")


def test_the_room_is_a_package_and_a_function() -> None:
    import cellseg_deploy.evaluate.score
    from cellseg_deploy.evaluate.api import evaluate

    assert cellseg_deploy.evaluate.score.PROGRAM == "cellseg-evaluate"
    with pytest.raises(UsageError, match="images must be"):
        cs.evaluate(None, "masks", cs.Segmenter.__new__(cs.Segmenter))
    assert evaluate.__doc__ is not None


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.fixture
def crowd(tmp_path: Path) -> Path:
    """Images and masks of 240 discs."""
    folder = tmp_path / "crowd"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    centres = [(20 + 30 * x, 20 + 30 * y) for x in range(12) for y in range(10)]
    image = draw_discs((330, 390), centres)
    labels = np.zeros(image.shape[:2], np.int32)
    for label, (x, y) in enumerate(centres, start=1):
        labels[y - 10 : y + 11, x - 10 : x + 11][image[y - 10 : y + 11, x - 10 : x + 11, 0] < 200] = label
    for stem in ("a", "b"):
        Image.fromarray(image).save(folder / "images" / f"{stem}.png")
        (folder / "masks" / f"{stem}.tif").write_bytes(label_tiff.encode(labels))
    return folder


def test_two_files_are_compared_on_a_folder(crowd: Path, onnx_file: Callable[..., Path]) -> None:
    pytest.importorskip("onnxruntime")
    reference, same = onnx_file(name="one.onnx"), onnx_file(name="two.onnx")
    report = cs.parity.compare(reference, str(same), images=str(crowd / "images"), masks=crowd / "masks")
    assert report.passed
    assert report.reasons == ()
    assert (report.images_from, report.reference.backend, report.n_true_cells) == ("folder images", "onnxruntime", 240)
    with cs.open_backend(reference) as first, cs.open_backend(same) as second:
        images = [(f"{stem}.png", read_image(crowd / "images" / f"{stem}.png").pixels_hwc) for stem in "ab"]
        in_memory = cs.parity.compare(first, second, images)
        assert in_memory.passed
        assert not in_memory.has_truth
        tiles = np.zeros((1, 56, 56, 3), np.uint8)
        assert second.predict(tiles).shape == (1, 1, 56, 56)  # it is the caller's to close


def test_a_form_that_counts_otherwise_fails_with_reasons(crowd: Path, onnx_file: Callable[..., Path]) -> None:
    pytest.importorskip("onnxruntime")
    blind = onnx_file(name="blind.onnx", model=make_onnx(contrast=-8.0))
    report = cs.parity.compare(onnx_file(name="one.onnx"), blind, crowd / "images")
    assert not report.passed
    assert report.reasons
    other = onnx_file(name="other.onnx", model=make_onnx(make_spec(cell_diameter_px=30.0)))
    with pytest.raises(ParityError, match="not two forms of one network"):
        cs.parity.compare(onnx_file(name="one.onnx"), other, crowd / "images")


def test_truth_is_given_once_and_with_its_images(crowd: Path, model: Path) -> None:
    def truth(name: str) -> np.ndarray:
        return read_labels(crowd / "masks" / f"{name}.tif")

    with pytest.raises(UsageError, match="exclude each other"):
        cs.parity.compare(model, model, crowd / "images", masks=crowd / "masks", truth=truth)
    with pytest.raises(UsageError, match="masks belong to a folder"):
        cs.parity.compare(model, model, [], masks=crowd / "masks")
    (crowd / "images" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png.*empty"):
        cs.parity.compare(model, model, crowd / "images")
