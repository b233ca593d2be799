"""Images for the benchmarks: sample smears or the user's own, in any size, number and file format."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import MAX_PIXELS, check_same_size, pair_by_stem, read_image, read_labels
from cellseg_deploy.samples import Smear, SmearParams, make_smear
from cellseg_deploy.samples.write import sample_params

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]

FORMATS = ("png", "jpg", "tif")
JPEG_QUALITY = 92
_STRIP_ROWS = 256
SEED = 5150
DIFFERENT = 8
"""Number of different smears in a set; a longer set repeats them."""
DIAMETER_PX = SmearParams().cell_diameter_px
"""Cell diameter in a sample smear."""


def smears(n: int, hw: tuple[int, int] = (1200, 1600), *, seed: int = SEED) -> Iterator[Image]:
    """``n`` synthetic smears, RGB uint8 (h, w, 3)."""
    for index in range(n):
        yield smear_with_truth(hw, index, seed=seed).image_hwc


def smear_with_truth(hw: tuple[int, int] = (1200, 1600), index: int = 0, *, seed: int = SEED) -> Smear:
    """Smear ``index`` of the series, with its labels."""
    params, image_seed = sample_params(seed, index, hw, vary=False)
    return make_smear(params, image_seed)


def judged_pairs(
    images: Path, masks: Path, most: int | None = None, foreground: MaskForeground = "auto"
) -> Iterator[tuple[Image, Labels]]:
    """Images uint8 RGB (h, w, 3) with their true labels (h, w): from two folders, at most ``most``.
    ``foreground``: which mask values are cells, as in ``read_labels``.

    Raises ``DataError`` for a file without a partner, unreadable, or of another size than its partner.
    """
    for pair in pair_by_stem(images, masks)[:most]:
        image, labels = read_image(pair.image).pixels_hwc, read_labels(pair.mask, foreground=foreground)
        check_same_size(pair, (image.shape[0], image.shape[1]), (labels.shape[0], labels.shape[1]))
        yield image, labels


def given_images(paths: Sequence[Path], most: int | None = None) -> Iterator[Image]:
    """The images in the files and folders ``paths``, in order of their names, at most ``most``.

    Raises ``NothingToDoError`` if there is none, ``DataError`` for an unreadable image.
    """
    found = find_images(list(paths))[:most]
    if not found:
        raise NothingToDoError("no image to measure with; expected PNG, JPEG or TIFF files")
    for image in found:
        if image.problem:
            raise DataError(image.problem)
        yield read_image(image.path).pixels_hwc


def encoded(image_hwc: Image, file_format: str) -> bytes:
    """Bytes of a file in ``file_format`` (``FORMATS``): PNG and JPEG as Pillow writes them (JPEG quality 92), TIFF
    uncompressed, as cameras write it."""
    buffer = io.BytesIO()
    if file_format == "tif":
        import tifffile

        tifffile.imwrite(buffer, image_hwc, photometric="rgb", metadata=None, rowsperstrip=_STRIP_ROWS)
        return buffer.getvalue()
    from PIL import Image as Pillow

    if file_format == "png":
        Pillow.fromarray(image_hwc).save(buffer, "PNG")
    elif file_format == "jpg":
        Pillow.fromarray(image_hwc).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        raise UsageError(f"unknown image format {file_format!r}; expected one of {', '.join(FORMATS)}")
    return buffer.getvalue()


def write_set(
    folder: Path, images: Iterable[Image], formats: Sequence[str], n: int
) -> tuple[dict[str, Path], list[tuple[int, int]]]:
    """Write ``n`` files in each of ``formats``: ``folder/FORMAT/image-00000.FORMAT``, repeating ``images``.

    Returns the folder of each format, and (h, w) of each file of one. Raises ``NothingToDoError`` without an image.
    """
    sources: dict[str, list[Path]] = {name: [] for name in formats}
    sizes: list[tuple[int, int]] = []
    make_folder(folder / "sources")
    for image in images:
        for name, files in sources.items():
            files.append(folder / "sources" / f"source-{len(sizes):05d}.{name}")
            write_bytes(files[-1], encoded(image, name))
        sizes.append((image.shape[0], image.shape[1]))
    if not sizes:
        raise NothingToDoError("no image to measure with")
    folders = {name: folder / name for name in formats}
    for name, place in folders.items():
        link_copies(sources[name], place, n)
    return folders, [sizes[k % len(sizes)] for k in range(n)]


def size_for(megapixels: float, aspect: float = 4 / 3) -> tuple[int, int]:
    """Height and width for about ``megapixels`` million pixels; never more, so that a limit is kept."""
    height = max(1, int((megapixels * 1e6 / aspect) ** 0.5))
    return height, max(1, int(megapixels * 1e6 / height))


def write_mirrored(path: Path, image_hwc: Image, hw: tuple[int, int]) -> None:
    """Write a TIFF of ``hw`` pixels to ``path``: ``image_hwc``, mirrored at its edges as often as needed, so that
    cells are cut only at the rim. Never holds more than a few hundred rows of it."""
    import tifffile

    rows, columns = (reflected(side, length) for side, length in zip(hw, image_hwc.shape[:2], strict=True))

    def strips() -> Iterator[Image]:
        for start in range(0, hw[0], _STRIP_ROWS):
            yield image_hwc[rows[start : start + _STRIP_ROWS]][:, columns]

    tifffile.imwrite(
        path, strips(), shape=(*hw, 3), dtype=np.uint8, photometric="rgb", metadata=None, rowsperstrip=_STRIP_ROWS
    )


def write_mosaic(path: Path, photographs: Sequence[Image], hw: tuple[int, int]) -> None:
    """Write a TIFF of ``hw`` pixels to ``path``: ``photographs`` next to each other in turn, all cut to the size of the
    smallest, so that cells are cut and touch at every seam."""
    import tifffile

    height, width = (min(image.shape[axis] for image in photographs) for axis in (0, 1))
    across = -(-hw[1] // width)

    def strips() -> Iterator[Image]:
        for start in range(0, hw[0], _STRIP_ROWS):
            rows = [
                np.concatenate(
                    [
                        photographs[(y // height * across + k) % len(photographs)][y % height, :width]
                        for k in range(across)
                    ]
                )[: hw[1]]
                for y in range(start, min(start + _STRIP_ROWS, hw[0]))
            ]
            yield np.stack(rows)

    tifffile.imwrite(
        path, strips(), shape=(*hw, 3), dtype=np.uint8, photometric="rgb", metadata=None, rowsperstrip=_STRIP_ROWS
    )


def reflected(n: int, length: int) -> npt.NDArray[np.int64]:
    """Indices (n,) that run back and forth over ``length`` places: 0 1 2 2 1 0 0 1 ..."""
    place = np.arange(n) % (2 * length)
    return np.where(place < length, place, 2 * length - 1 - place)


def link_copies(files: Sequence[Path], folder: Path, n: int) -> None:
    """Make ``n`` files in ``folder`` (made if missing): links to ``files`` in turn, copies if links are unsupported."""
    make_folder(folder)
    for number in range(n):
        source = files[number % len(files)]
        target = folder / f"image-{number:05d}{source.suffix}"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def check_size(megapixels: float) -> None:
    """Raise ``UsageError`` for an invalid size."""
    if not 0 < megapixels < 100_000:
        raise UsageError(f"an image of {megapixels:g} megapixels cannot be made; expected more than 0")


def max_pixels_for(pixels: int) -> int:
    """Limit of the reader that admits an image of ``pixels``."""
    return max(MAX_PIXELS, pixels)
