"""The size of a pixel: what files say of it, what is believed, and what the user says."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_images import picture, save, tiff, write
from PIL import Image

from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, read_image
from cellseg_deploy.images.resolution import GIVEN, UNKNOWN, PixelSize, checked_by_cells

GREY = picture(1)


def loaded(tmp_path: Path, data: bytes, **settings: Any) -> LoadedImage:
    return read_image(write(tmp_path / "a.tif", data), ReadOptions(**settings))


def ome(pixels: str) -> bytes:
    """An OME-TIFF whose Pixels element is ``pixels``."""
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><{pixels}><Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData/></Pixels></Image>'
        "</OME>"
    )
    return tiff(GREY, description=xml.encode("utf-8"), metadata=None)


OME = 'Pixels DimensionOrder="XYCZT" ID="P" SizeC="1" SizeT="1" SizeX="60" SizeY="40" SizeZ="1" Type="uint8" '

KNOWN: dict[str, tuple[bytes, float]] = {
    "resolution in cm": (tiff(GREY, resolution=(1e4 / 0.065, 1e4 / 0.065), resolutionunit="CENTIMETER"), 0.065),
    "resolution in inch": (tiff(GREY, resolution=(25_400 / 0.32, 25_400 / 0.32), resolutionunit="INCH"), 0.32),
    "imagej um": (tiff(GREY, imagej=True, resolution=(1 / 0.25, 1 / 0.25), metadata={"unit": "um"}), 0.25),
    "imagej micron": (tiff(GREY, imagej=True, resolution=(4, 4), metadata={"unit": "micron"}), 0.25),
    "imagej escaped": (tiff(GREY, imagej=True, resolution=(4, 4), metadata={"unit": "\\u00B5m"}), 0.25),
    "imagej mm": (tiff(GREY, imagej=True, resolution=(4e3, 4e3), metadata={"unit": "mm"}), 0.25),
    "imagej nm": (tiff(GREY, imagej=True, resolution=(0.004, 0.004), metadata={"unit": "nm"}), 250 / 1000),
    "ome by tifffile": (
        tiff(GREY, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}),
        0.5,
    ),
    "ome without unit": (ome(OME + 'PhysicalSizeX="0.345" PhysicalSizeY="0.345"'), 0.345),
    "ome nm": (
        ome(OME + 'PhysicalSizeX="345" PhysicalSizeXUnit="nm" PhysicalSizeY="345" PhysicalSizeYUnit="nm"'),
        0.345,
    ),
    "ome with entity": (ome(OME + 'PhysicalSizeX="0.345" PhysicalSizeXUnit="&#181;m"'), 0.345),
    "ome before resolution": (
        tiff(
            GREY,
            ome=True,
            resolution=(72, 72),
            resolutionunit="INCH",
            metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
        ),
        0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_files_that_say_their_pixel_size(tmp_path: Path, case: str) -> None:
    data, expected = KNOWN[case]
    image = loaded(tmp_path, data)
    assert image.pixel_size.um == pytest.approx(expected, rel=1e-4)
    assert not any("resolution" in note for note in image.notes)
    assert loaded(tmp_path, data, pixel_size_um=0.1).pixel_size.um == 0.1


NOT_BELIEVED: dict[str, tuple[bytes, str]] = {
    "72 dpi": (tiff(GREY, resolution=(72, 72), resolutionunit="INCH"), "72 dpi"),
    "96 dpi": (tiff(GREY, resolution=(96, 96), resolutionunit="INCH"), "96 dpi"),
    "300 dpi in cm": (tiff(GREY, resolution=(118.11, 118.11), resolutionunit="CENTIMETER"), "300 dpi"),
    "one metre": (tiff(GREY, imagej=True, resolution=(1, 1), metadata={"unit": "m"}), "not a microscope"),
    "an atom": (ome(OME + 'PhysicalSizeX="0.0001"'), "not a microscope"),
    "oblong": (tiff(GREY, resolution=(1e5, 5e4), resolutionunit="CENTIMETER"), "not square"),
    "oblong ome": (ome(OME + 'PhysicalSizeX="0.3" PhysicalSizeY="0.5"'), "not square"),
}


@pytest.mark.parametrize("case", NOT_BELIEVED)
def test_what_no_microscope_has_is_not_believed_and_said(tmp_path: Path, case: str) -> None:
    data, words = NOT_BELIEVED[case]
    image = loaded(tmp_path, data)
    assert image.pixel_size.um is None
    (note,) = [note for note in image.notes if "`pixel_size_um`" in note]
    assert words in note
    told = loaded(tmp_path, data, pixel_size_um=0.2)
    assert told.pixel_size.um == 0.2
    assert not any("`pixel_size_um`" in note for note in told.notes)  # nothing left to say


def without_denominator(data: bytes) -> bytes:
    """The TIFF with resolutions of something by nothing."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name in ("XResolution", "YResolution"):
            offset = file.pages[0].tags[name].valueoffset  # type: ignore[union-attr]
            changed[offset + 4 : offset + 8] = b"\0" * 4
    return bytes(changed)


SILENT: dict[str, bytes] = {
    "no unit": tiff(GREY),
    "unit none": tiff(GREY, resolution=(1000, 1000), resolutionunit="NONE"),
    "imagej pixels": tiff(GREY, imagej=True, resolution=(1, 1), metadata={"unit": "pixel"}),
    "imagej without unit": tiff(GREY, imagej=True),
    "imagej nonsense": tiff(GREY, imagej=True, resolution=(1, 1), metadata={"unit": "furlong"}),
    "ome without size": ome(OME),
    "ome nonsense": ome(OME + 'PhysicalSizeX="wide"'),
    "ome nan": ome(OME + 'PhysicalSizeX="nan"'),
    "ome zero": ome(OME + 'PhysicalSizeX="0"'),
    "ome negative": ome(OME + 'PhysicalSizeX="-0.5"'),
    "ome infinite": ome(OME + 'PhysicalSizeX="1e999"'),
    "ome reference frame": ome(OME + 'PhysicalSizeX="0.5" PhysicalSizeXUnit="reference frame"'),
    "resolution zero": tiff(GREY, resolution=((0, 1), (0, 1)), resolutionunit="CENTIMETER"),
    "resolution over zero": without_denominator(tiff(GREY, resolution=(9, 9), resolutionunit="CENTIMETER")),
}


@pytest.mark.parametrize("case", SILENT)
def test_files_that_say_nothing(tmp_path: Path, case: str) -> None:
    image = loaded(tmp_path, SILENT[case])
    assert image.pixel_size.um is None
    assert image.notes == ("grey image converted to RGB",)


def test_a_density_for_printers_is_not_read(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path / name, Image.fromarray(picture()), dpi=(25_400 / 0.5, 25_400 / 0.5))
        assert read_image(path).pixel_size.um is None
        assert read_image(path).notes == ()
        assert read_image(path, ReadOptions(pixel_size_um=0.5)).pixel_size.um == 0.5


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan, math.inf, 1001.0])
def test_sizes_that_nobody_means(tmp_path: Path, size: float) -> None:
    with pytest.raises(UsageError, match="pixel size"):
        loaded(tmp_path, tiff(GREY), pixel_size_um=size)


# --- doubted by the cells


@pytest.mark.parametrize(
    ("um", "source", "cell_px", "words"),
    [
        (25_400 / 2400, "TIFF", 83.5, "884 micrometres wide"),
        (0.065, "TIFF", 20, "1.3 micrometres wide"),
        (1.0, "OME", 80, "80 micrometres wide"),
        (1.0, "ImageJ", 31, "31 micrometres wide"),
    ],
)
def test_a_size_of_the_file_that_no_cell_has_is_not_used(um: float, source: str, cell_px: float, words: str) -> None:
    checked = checked_by_cells(PixelSize(um, source), np.array([cell_px, cell_px, 3.0]))
    assert (checked.um, checked.source) == (None, "")
    assert words in checked.note
    assert source in checked.note


@pytest.mark.parametrize(("um", "cell_px"), [(0.065, 110), (0.1, 20), (1.0, 8), (1.0, 30), (0.9, 80), (1.1, 80)])
def test_a_size_that_cells_have_stays(um: float, cell_px: float) -> None:
    size = PixelSize(um, "OME")
    assert checked_by_cells(size, np.full(3, float(cell_px))) is size


def test_a_given_size_is_used_and_doubted_in_words() -> None:
    checked = checked_by_cells(PixelSize(65.0, GIVEN), np.full(3, 110.0))
    assert (checked.um, checked.source) == (65.0, GIVEN)
    assert "7.15e+03 micrometres wide at the given pixel size of 65 micrometres" in checked.note
    assert checked_by_cells(PixelSize(1.0, GIVEN), np.full(3, 80.0)).note == ""


def test_nothing_is_doubted_without_cells() -> None:
    for size in (UNKNOWN, PixelSize(10.0, "TIFF")):
        assert checked_by_cells(size, np.array([])) is size


def test_what_is_not_believed_is_a_note_on_the_pixel_size(tmp_path: Path) -> None:
    notes = loaded(tmp_path, NOT_BELIEVED["72 dpi"][0]).notes
    assert [kind_of(note) for note in notes] == ["conversion", "pixel size"]


def test_a_description_of_a_megabyte_costs_nothing(tmp_path: Path) -> None:
    import time

    hostile = b"<OME " + b"<Pixels " * 100_000 + b' PhysicalSizeX="' * 20_000
    data = tiff(np.zeros((4, 4), np.uint8), description=hostile, metadata=None)
    start = time.monotonic()
    assert loaded(tmp_path, data).pixel_size.um is None
    assert time.monotonic() - start < 5
