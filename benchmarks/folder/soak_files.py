"""Small synthetic images with a known number of cells, some of them damaged."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.files.atomic import make_folder, writing

SIZE_HW = (80, 120)
CELL_DIAMETER_PX = 20
_PITCH = 40  # a grid of 2 x 3 places, so that discs never touch each other or the border
_PLACES = [(y, x) for y in range(_PITCH // 2, SIZE_HW[0], _PITCH) for x in range(_PITCH // 2, SIZE_HW[1], _PITCH)]
_PER_FOLDER = 1000


def picture(number: int) -> tuple[npt.NDArray[np.uint8], int]:
    """An RGB image (h, w, 3), distinct for each ``number`` below 100,000, and its number of dark discs: 0 to 6."""
    cells = number % (len(_PLACES) + 1)
    # The background colour encodes the picture's number, so that no two files are the same.
    image = np.empty((*SIZE_HW, 3), np.uint8)
    image[:] = (200 + number % 50, 200 + number // 50 % 50, 200 + number // 2500 % 50)
    y, x = np.mgrid[: SIZE_HW[0], : SIZE_HW[1]]
    for centre_y, centre_x in _PLACES[:cells]:
        image[(y - centre_y) ** 2 + (x - centre_x) ** 2 <= (CELL_DIAMETER_PX / 2) ** 2] = (120, 40, 90)
    return image, cells


def _encoded(image: npt.NDArray[np.uint8], kind: str) -> bytes:
    import tifffile
    from PIL import Image

    buffer = io.BytesIO()
    if kind == "tif":
        tifffile.imwrite(buffer, image, photometric="rgb", compression="zlib", metadata=None)
    else:
        Image.fromarray(image).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind], quality=95)
    return buffer.getvalue()


def _wrong_checksum(png: bytes) -> bytes:
    """Change one bit of the pixel data."""
    at = png.index(b"IDAT") + 8
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def _no_width(png: bytes) -> bytes:
    header = struct.pack(">I", 0) + png[20:29]
    return png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]


# Name -> suffix, and the damage done to a sound file.
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut png": ("png", lambda data: data[: len(data) // 2]),
    "cut jpg": ("jpg", lambda data: data[: len(data) // 2]),
    "cut tif": ("tif", lambda data: data[: len(data) // 2]),
    "empty": ("png", lambda _: b""),
    "text": ("jpg", lambda _: b"<html><body>404 not found</body></html>"),
    "checksum": ("png", _wrong_checksum),
    "no width": ("png", _no_width),
}
_SUFFIXES = ("png", "jpg", "png", "tif")


def make_files(folder: Path, n_files: int, n_bad: int, seed: int) -> dict[str, int | None]:
    """Write ``n_files`` images to ``folder``, ``n_bad`` of them damaged, cycling through ``DAMAGES``.

    Returns the number of cells by name relative to ``folder``, None for damaged files. The same seed damages the same
    files. Raises ``OutputError``.
    """
    bad = np.random.default_rng(seed).permutation(n_files)[:n_bad]
    damages = {int(number): list(DAMAGES.values())[turn % len(DAMAGES)] for turn, number in enumerate(bad)}
    made: dict[str, int | None] = {}
    for number in range(n_files):
        image, cells = picture(number)
        suffix, damage = damages.get(number, (_SUFFIXES[number % len(_SUFFIXES)], bytes))
        name = f"{number // _PER_FOLDER:02}/{number:05}.{suffix}"
        if number % _PER_FOLDER == 0:
            make_folder((folder / name).parent)
        with writing(folder / name):
            (folder / name).write_bytes(damage(_encoded(image, suffix)))
        made[name] = None if number in damages else cells
    return made
