"""Whether a result file can be read at all, to tell a file somebody edited from one damaged on disk."""

from __future__ import annotations

import logging
import warnings
import zipfile
import zlib
from pathlib import Path

import msgspec

_DEFLATE = (8, 32946)  # values of TIFF's Compression


def is_readable(path: Path) -> bool:
    """Return whether the file ``path`` decodes as its suffix says, whoever wrote it and whatever its content.

    A picture may have any format that Pillow or tifffile know: editors do not always keep the format. The whole
    picture is decoded, in memory. Raises ``OSError`` if the file itself cannot be read.
    """
    data = path.read_bytes()
    if not data:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about content, which is not judged here
        try:
            _DECODERS[path.suffix.lower()](path, data)
        except Exception:  # a dozen types, by library and damage: each means unreadable
            logging.getLogger(__name__).debug("%s: cannot be decoded", path, exc_info=True)
            return False
    return True


def _picture(path: Path, data: bytes) -> None:
    from PIL import Image

    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        import tifffile

        with tifffile.TiffFile(path) as file:
            for page in file.pages:
                page.asarray(maxworkers=1)
                if page.compression in _DEFLATE:  # tifffile's decoder ignores the checksum
                    for segment, _ in file.filehandle.read_segments(page.dataoffsets, page.databytecounts):
                        zlib.decompress(segment or b"")
        return
    with Image.open(path) as picture:
        picture.load()


def _archive(path: Path, _data: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(damaged)


def _json(_path: Path, data: bytes) -> None:
    msgspec.json.decode(data)


def _text(_path: Path, data: bytes) -> None:
    data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")


_DECODERS = {".tif": _picture, ".jpg": _picture, ".zip": _archive, ".json": _json, ".geojson": _json, ".csv": _text}
