"""The Python API: what goes in, what comes out, the same bytes as a folder run, from any number of threads."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import DarknessBackend, draw_discs
from PIL import Image

import cellseg_deploy as cs
from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command
from cellseg_deploy.errors import DataError, OutputError, UsageError
from cellseg_deploy.outputs.formats import FORMATS, NAMES
from cellseg_deploy.samples import SmearParams, make_smear
from cellseg_deploy.segmenter import Segmenter

CENTRES = [(20, 20), (60, 22), (100, 70), (130, 110), (55, 90), (5, 60)]
HW = (140, 171)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A TIFF of discs whose pixel size is known."""
    file = tmp_path / "in" / "discs.tif"
    file.parent.mkdir()
    resolution = {"resolution": (10_000 / 0.35,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(file, draw_discs(HW, CENTRES), photometric="rgb", **resolution)
    return file


def stub(**settings: Any) -> Segmenter:
    return Segmenter(DarknessBackend(), **settings)


# ------------------------------------------------------------------------------------------------------ what goes in


def test_every_kind_of_image_gives_the_same_cells(path: Path) -> None:
    expected = stub()(path)
    assert expected.count == len(CENTRES)
    with path.open("rb") as file, Image.open(path) as pillow:
        named = [(image, "discs.tif") for image in (str(path), pillow, file)]
        for image, name in [*named, (draw_discs(HW, CENTRES), "image"), (io.BytesIO(path.read_bytes()), "image")]:
            found = stub()(image)
            assert np.array_equal(found.labels, expected.labels), type(image)
            assert found.name == name


def pillow_of(kind: str) -> tuple[Image.Image, bytes]:
    """An image in PIL's mode ``kind``, and it as a PNG."""
    pixels = draw_discs(HW, CENTRES)
    if kind == "I;16":
        image = Image.fromarray(pixels[..., 1].astype(np.uint16) * 257)
    elif kind == "RGBA":
        image = Image.fromarray(np.dstack([pixels, np.where(pixels[..., 0] < 200, 255, 90).astype(np.uint8)]))
    else:
        image = Image.fromarray(pixels).convert(kind)
    file = io.BytesIO()
    exif = Image.Exif()
    if kind == "RGB":
        exif[0x0112] = 6
        image.getexif()[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    return image, file.getvalue()


@pytest.mark.parametrize("kind", ["RGB", "L", "P", "1", "RGBA", "I;16"])
def test_a_pil_image_is_converted_as_its_file_is(kind: str) -> None:
    image, data = pillow_of(kind)
    # Black discs would else be drawn marks and no cells.
    found, expected = stub()(image, field="full"), stub()(io.BytesIO(data), field="full")
    assert np.array_equal(found.pixels_hwc, expected.pixels_hwc)
    assert found.labels.shape == (HW[::-1] if kind == "RGB" else HW)  # turned upright
    assert np.array_equal(found.labels, expected.labels)
    assert found.count > 0


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (Image.new("F", (9, 9)), DataError, "pixel format F"),
        (Image.new("RGB", (2000, 9)), DataError, "2000 x 9 px are more than the limit"),
        (io.StringIO("text"), UsageError, r"binary mode \('rb'\)"),
        (io.BytesIO(b""), DataError, "empty"),
        (io.BytesIO(b"plain text"), DataError, "not a PNG, JPEG or TIFF"),
        ([1, 2], UsageError, "got list; call the segmenter once per image"),
        (np.zeros((5, 5), np.uint8), UsageError, "uint8 RGB"),
    ],
)
def test_what_is_no_image(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        stub()(image, read=cs.ReadOptions(max_pixels=10_000))


def test_a_closed_segmenter_begins_no_run(path: Path, tmp_path: Path) -> None:
    segmenter = stub()
    segmenter.close()
    with pytest.raises(UsageError, match="engine was closed; open the model again"):
        segmenter.run(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 0}, "scale must lie between"),
        ({"scale": float("nan")}, "scale must lie between"),
        ({"scale": "auto"}, "`scale` must be a number, got 'auto'"),
        ({"count_rule": "most"}, "count rule must be one of"),
    ],
)
def test_settings_of_a_call_that_cannot_be(path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        stub()(path, **settings)
    with pytest.raises(UsageError, match=words):
        list(stub().map([path], **settings))


def test_a_truncated_pil_image_is_damaged() -> None:
    file = io.BytesIO()
    Image.fromarray(draw_discs(HW, CENTRES)).save(file, "JPEG")
    with Image.open(io.BytesIO(file.getvalue()[:-300])) as image, pytest.raises(DataError, match="damaged"):
        stub()(image)


def test_how_it_is_read_and_counted_is_asked_for(path: Path) -> None:
    found = stub()(path, read=cs.ReadOptions(pixel_size_um=0.5), count_rule="exclude-border", scale=1.0)
    assert (found.pixel_size_um, found.counted().sum(), found.table["counted"].sum()) == (0.5, 5, 5)
    assert found.counted("all").sum() == 6
    assert np.allclose(found.table["area_um2"], found.table["area_px"] * 0.25)


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("format", [format for format in FORMATS if format.encoder], ids=lambda f: f.name + f.suffix)
def test_saved_files_are_those_of_a_folder_run(path: Path, tmp_path: Path, format: Any) -> None:
    for package in format.packages:
        pytest.importorskip(package)
    stub().run(path.parent, out=tmp_path / "out", save=[format.name])
    found, ours = stub()(path), tmp_path / f"ours{format.suffix}"
    found.save(ours, format.name)
    assert ours.read_bytes() == (tmp_path / "out" / format.place(path.name)).read_bytes()
    found.table.to_csv(tmp_path / "cells.csv")
    assert (tmp_path / "cells.csv").read_bytes() == (tmp_path / "out" / "cells.csv").read_bytes()


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        *((".tif", "labels"), (".TIFF", "labels"), (".jpg", "overlays"), (".jpeg", "overlays")),
        *((".geojson", "geojson"), (".json", "coco"), (".zip", "rois")),
    ],
)
def test_the_ending_chooses_the_format(path: Path, tmp_path: Path, ending: str, name: str) -> None:
    format = next(format for format in FORMATS if format.name == name)
    for package in format.packages:
        pytest.importorskip(package)
    found = stub()(path)
    found.save(tmp_path / f"x{ending}")
    assert (tmp_path / f"x{ending}").read_bytes() == format.encode(found.segmented)


def test_overlay_and_table_files(path: Path, tmp_path: Path) -> None:
    found = stub()(path)
    found.overlay(tmp_path / "o.jpg")
    found.save(str(tmp_path / "o.jpeg"))
    assert (tmp_path / "o.jpg").read_bytes() == (tmp_path / "o.jpeg").read_bytes()
    for name, kind in (("o.png", "overlays"), ("n.PNG", "numbered"), ("c.png", "confluence")):
        found.save(tmp_path / name, kind)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    found.overlay(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "o.png").read_bytes()
    with Image.open(tmp_path / "o.png") as lossless, Image.open(tmp_path / "o.jpg") as lossy:
        assert np.abs(np.asarray(lossless, int) - np.asarray(lossy, int)).mean() < 3
    found.save(tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == ["discs.tif"] * 6
    assert [int(row["area_px"]) for row in rows] == found.table["area_px"].tolist()


@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        ("a.png", None, r"a\.png: a result cannot be saved with this ending; expected \.tif .* kind='overlays'"),
        ("a.jpg", "labels", r"labels cannot be saved with this ending; expected \.tif$"),
        ("a.tif", "overlays", r"expected \.jpg or \.png$"),
        ("a.jpg", "parquet", r"parquet is a file of a whole run; write it with run\(\.\.\., save=\['parquet'\]\)"),
        ("a.tif", "maps", "cannot save maps; expected some of labels"),
        ("a", None, "ending"),
    ],
)
def test_files_that_nobody_can_write(path: Path, tmp_path: Path, file: str, kind: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        stub()(path).save(tmp_path / file, kind)
    with pytest.raises(OutputError, match="cannot be written"):
        stub()(path).overlay(tmp_path / "missing" / "a.jpg")


def test_the_table(path: Path) -> None:
    table = stub()(path).table
    assert len(table) == 6
    assert table["label"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table.columns["area_um2"].shape == (6,)
    with pytest.raises(KeyError, match="no column 'size'; there are label, area_px"):
        table["size"]


def test_the_table_in_pandas(path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = stub()(path).table
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["image", *table.columns]
    assert frame["area_px"].tolist() == table["area_px"].tolist()
    assert frame["counted"].dtype == bool


def test_without_pandas_the_install_command_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(cs.CellsegError, match=r"pip install 'cellseg-deploy\[pandas\]'"):
        stub()(path).table.to_pandas()


def test_a_result_says_what_it_is(path: Path) -> None:
    found = stub()(path)
    assert repr(found) == "Segmentation('discs.tif', 171 x 140 px, 6 cells)"
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again.labels, found.labels)
    assert again.count == 6


# ------------------------------------------------------------------------------------------------------ many images


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Eight images with 1 to 8 discs."""
    (tmp_path / "many").mkdir()
    paths = []
    for n in range(1, 9):
        centres = [(25 + 40 * (i % 4), 25 + 50 * (i // 4)) for i in range(n)]
        paths.append(tmp_path / "many" / f"{n}.png")
        Image.fromarray(draw_discs((110 + n, 180), centres)).save(paths[-1])
    return paths


@pytest.mark.usefixtures("no_thread_is_left")
def test_map_gives_what_calls_give_in_order(many: list[Path]) -> None:
    images = [*many[:4], *(Image.open(path) for path in many[4:6]), *(np.asarray(Image.open(p)) for p in many[6:])]
    found = list(stub(threads=2).map(images))  # type: ignore[arg-type]
    assert [one.count for one in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [one.name for one in found] == [*(f"{n}.png" for n in range(1, 7)), "image", "image"]
    for one, path in zip(found, many, strict=True):
        assert np.array_equal(one.labels, stub()(path).labels)


@pytest.mark.usefixtures("no_thread_is_left")
def test_map_ends_at_the_first_bad_image_and_may_be_left(many: list[Path]) -> None:
    many[2].write_bytes(b"no image")
    results = stub().map(many)
    assert [next(results).count, next(results).count] == [1, 2]
    with pytest.raises(DataError, match=r"3\.png"):
        next(results)
    results = stub().map(many)
    assert next(results).count == 1
    results.close()


def in_threads(function: Callable[[Path], Any], paths: list[Path]) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, paths))


def test_eight_threads_get_exact_answers(many: list[Path]) -> None:
    segmenter = stub(cell_diameter_px="auto")
    alone = [stub(cell_diameter_px="auto")(path) for path in many]
    together = in_threads(segmenter, many * 4)
    for found, expected in zip(together, alone * 4, strict=True):
        assert np.array_equal(found.labels, expected.labels)
        assert found.table.csv() == expected.table.csv()
        assert found.segmented.table is found.measured


def test_eight_threads_share_the_shipped_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    paths = []
    for seed in range(8):
        paths.append(tmp_path / f"{seed}.png")
        smear = make_smear(SmearParams(size_hw=(200, 260), cell_diameter_px=48, n_cells=8), seed)
        Image.fromarray(smear.image_hwc).save(paths[-1])
    with cs.Segmenter.load(engine=cs.EngineOptions(threads=1), cell_diameter_px=48) as segmenter:
        alone = [segmenter(path).labels for path in paths]
        assert sum(labels.max() for labels in alone) > 40
        for found, labels in zip(in_threads(segmenter, paths), alone, strict=True):
            assert np.array_equal(found.labels, labels)


# ------------------------------------------------------------------------------------------------------------ a folder


GROUPED = (("a", "1", "0"), ("b", "2", "1"), ("c", "1", "0"), ("d", "1", "0"))
"""Group, images and failed images."""


def test_a_folder_is_run_as_by_the_command(model: Path, folder: Path, tmp_path: Path) -> None:
    names: list[str] = []
    with cs.Segmenter.load(model, engine=cs.EngineOptions(threads=1)) as segmenter:
        result = segmenter.run(folder, out=tmp_path / "ours", save=("labels", "coco"), on_image=names.append)
        assert [image.name for image in result.failed] == ["bad.png"]
        assert "damaged" in result.failed[0].error or "cut short" in result.failed[0].error
        assert [image.name for image in result.images] == ["a.png", "b.png", "bad.png", "c.png", "d.png"] == names
        assert [image.cells for image in result.done] == [3, 3, 0, 1]
        assert (result.cells, result.counted, result.out) == (7, 7, tmp_path / "ours")
        again = segmenter.run([folder / "a.png", folder / "bad.png"], out=tmp_path / "two", report=False)
        assert [image.name for image in again.images] == ["a.png", "bad.png"]
        assert (tmp_path / "ours" / "report.html").is_file()
        assert not (tmp_path / "two" / "report.html").exists()
        grouped = segmenter.run(folder, out=tmp_path / "grouped", group_by="^[a-z]")
        lines = (grouped.out / "summary.csv").read_text(encoding="utf-8-sig").splitlines()
        assert [line.split(",")[:3] for line in lines[1:]] == [[name, n, f] for name, n, f in GROUPED]
        with pytest.raises(UsageError, match="is not a regular expression"):
            segmenter.run(folder, out=tmp_path / "grouped", group_by="(")
    words = [str(folder), "--model", str(model), "-q", "--save", "labels,coco"]
    assert console.run(command, [*words, "-o", str(tmp_path / "theirs")]) == console.EXIT_SOME_FAILED
    for name in ("cells.csv", "images.csv", "coco.json", "labels/a.png.tif"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    # Either goes on with a run of the other.
    (folder / "bad.png").unlink()
    before = (tmp_path / "ours" / "labels" / "a.png.tif").stat().st_mtime_ns
    assert console.run(command, [*words, "-o", str(tmp_path / "ours")]) == console.EXIT_OK
    assert (tmp_path / "ours" / "labels" / "a.png.tif").stat().st_mtime_ns == before


def test_one_image_has_the_scale_that_the_command_measures(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "smear.png"
    Image.fromarray(make_smear(SmearParams(size_hw=(380, 480), cell_diameter_px=45, n_cells=40), 3).image_hwc).save(
        file
    )
    assert console.run(command, [str(file), "-o", str(tmp_path / "out"), "-q", "--save", "all"]) == console.EXIT_OK
    with cs.Segmenter.load() as segmenter:
        found = segmenter(file)
        assert found.scale != pytest.approx(segmenter.backend.spec.image_scale)
    found.save(tmp_path / "smear.tif")
    found.overlay(tmp_path / "smear.jpg")
    found.save(tmp_path / "cells.csv")
    for ours, theirs in (("smear.tif", "labels/smear.png.tif"), ("smear.jpg", "overlays/smear.png.jpg")):
        assert (tmp_path / ours).read_bytes() == (tmp_path / "out" / theirs).read_bytes()
    assert (tmp_path / "cells.csv").read_bytes() == (tmp_path / "out" / "cells.csv").read_bytes()


def test_scales_that_are_passed(model: Path) -> None:
    def scale_of(**settings: Any) -> tuple[float, bool]:
        with cs.Segmenter.load(model, **settings) as segmenter:
            return segmenter.scale, segmenter.auto_scale

    assert scale_of() == scale_of(scale="auto") == scale_of(scale=None, cell_diameter_px="auto") == (1.0, True)
    assert scale_of(scale=None) == (1.0, False)
    assert scale_of(scale=0.5) == scale_of(cell_diameter_px=40) == (0.5, False)
    with pytest.raises(UsageError, match="exclude each other"):
        scale_of(scale=0.5, cell_diameter_px=40)


def test_names_of_formats_are_those_of_the_command(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"expected some of {', '.join(NAMES)}"):
        stub().run(path.parent, out=tmp_path / "out", save=["label"])
