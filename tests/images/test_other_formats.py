"""Files that are no PNG, JPEG or TIFF are named, whatever they are called."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from made_images import encoded, picture, write
from PIL import Image

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.read import read_image


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "x")
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, picture())
    return buffer.getvalue()


def box(brand: bytes, *compatible: bytes) -> bytes:
    """The start of an ISO base media file."""
    content = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (4 + len(content)).to_bytes(4) + content + bytes(300)


MADE = {  # what Pillow and Python write
    **{f"a {name} image": encoded(Image.fromarray(picture()), kind) for kind, name in (("BMP", "BMP"), ("GIF", "GIF"))},
    "a WebP image": encoded(Image.fromarray(picture()), "WEBP"),
    "an AVIF image": encoded(Image.fromarray(picture()), "AVIF"),
    "a JPEG 2000 image": encoded(Image.fromarray(picture()), "JPEG2000"),
    "a PNM image": encoded(Image.fromarray(picture()), "PPM"),
    "a PDF document": encoded(Image.fromarray(picture()), "PDF"),
    "a ZIP archive": archive(),
    "a NumPy array": array(),
}
BY_HAND = {
    "a HEIC photograph": box(b"mif1", b"mif1", b"heic"),
    "an AVIF image": box(b"mif1", b"mif1", b"avif"),
    "a camera's raw file": box(b"crx ", b"crx "),
    "a video": box(b"isom", b"isom", b"mp42"),
    "a Zeiss CZI file": b"ZISRAWFILE" + bytes(300),
    "an OLE file": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(300),
    "a web page": b"\xef\xbb\xbf\n<HTML><body>sign in</body></HTML>",
    "a DICOM file": bytes(128) + b"DICM" + bytes(100),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize(("what", "data"), [*MADE.items(), *BY_HAND.items()], ids=[*MADE, *(f"{x} 2" for x in BY_HAND)])
def test_other_formats_are_named_with_a_way_out(tmp_path: Path, what: str, data: bytes) -> None:
    path = write(tmp_path / "IMG_0001.JPG", data)
    with pytest.raises(
        DataError, match=f"not a PNG, JPEG or TIFF, whatever its name says: this is {what}.*; .*"
    ) as caught:
        read_image(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_not_known_is_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it starts with b'abcdefgh'"):
        read_image(write(tmp_path / "a.jpg", b"abcdefghijk"))
