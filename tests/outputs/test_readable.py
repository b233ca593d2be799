"""Files of results that can be read, whoever wrote them, and those that cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmented_images import odd_labels, segmented

from cellseg_deploy.outputs import label_tiff
from cellseg_deploy.outputs.formats import FORMATS, Format
from cellseg_deploy.outputs.readable import is_readable

PER_IMAGE = [format for format in FORMATS if format.folder]


@pytest.fixture(params=PER_IMAGE, ids=[f"{format.name}{format.suffix}" for format in PER_IMAGE])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of each kind."""
    format: Format = request.param
    for package in format.packages:
        pytest.importorskip(package)
    path = tmp_path / f"a{format.suffix}"
    path.write_bytes(format.encode(segmented(odd_labels(), name="a.png", pixel_size_um=0.25)))
    return path


def test_what_we_write_is_readable(written: Path) -> None:
    assert is_readable(written)


@pytest.mark.parametrize("content", [b"", b"\xff\xfegarbage", b"\0" * 300])
def test_garbage_is_not(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    # A table of zero bytes is text, and somebody's.
    assert is_readable(written) == (written.suffix == ".csv" and content[:1] == b"\0")


def test_half_a_file_is_not(written: Path) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: len(data) // 2])
    assert is_readable(written) == (written.suffix == ".csv")  # nothing tells half a table from a whole one


def test_one_bit_of_a_label_image_is_noticed(tmp_path: Path) -> None:
    """Of its pixels: each strip has a checksum."""
    path = tmp_path / "a.tif"
    whole = label_tiff.encode(np.arange(90_000, dtype=np.int32).reshape(300, 300))
    for at in range(4_000, len(whole) - 600, 10_007):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not is_readable(path), at
    path.write_bytes(whole)
    assert is_readable(path)


def test_a_picture_of_another_format_is(tmp_path: Path) -> None:
    """An editor that writes PNG whatever the name says; a user's work all the same."""
    for suffix in (".tif", ".jpg"):
        path = tmp_path / f"a{suffix}"
        Image.new("I;16", (5, 4)).save(path, "PNG")
        assert is_readable(path)
