"""Images in the forms Python users have them: a path, pixels, a PIL image, an open file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError, UsageError, check_types
from cellseg_deploy.images.decode import declared_pixels, decode_bytes, decode_pillow
from cellseg_deploy.images.limits import check_pixels
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, as_rgb, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike: TypeAlias = str | Path | npt.NDArray[np.uint8] | Image | BinaryIO
"""A path, uint8 RGB (h, w, 3), a PIL image, or a file open for reading bytes."""

UNNAMED = "image"


def load(image: ImageLike, options: ReadOptions) -> LoadedImage:
    """Load ``image`` as uint8 RGB, upright; files and PIL images are converted as by ``read_image``.

    Raises ``UsageError`` for anything else, ``DataError`` for an image that cannot be used.
    """
    check_types(ReadOptions, read=options)
    if isinstance(image, np.ndarray):
        check_array(image)
        return LoadedImage(image, ())
    if isinstance(image, (str, Path)):
        return read_image(Path(image), options)
    path = Path(name_of(image))
    if _is_pillow(image):
        check_pixels(path, image.width, image.height, options.max_pixels)
        try:
            return as_rgb(path, decode_pillow(path, image), options)
        except (OSError, SyntaxError) as error:  # Pillow decodes only when the pixels are accessed
            raise DataError(f"{path}: damaged or incomplete image: {error}") from error
    file: Any = image
    if not hasattr(file, "read"):
        raise UsageError(
            f"image must be a path, a uint8 RGB array (h, w, 3), a PIL image or a file opened in binary mode, got "
            f"{type(image).__name__}; call the segmenter once per image, or use map or run for many"
        )
    data = file.read()
    if not isinstance(data, bytes):
        raise UsageError(f"{path}: the file must be opened in binary mode ('rb'), but it gives {type(data).__name__}")
    return as_rgb(path, decode_bytes(path, data, options.max_pixels), options)


def name_of(image: ImageLike) -> str:
    """Name of the file without its folder, if ``image`` has one, else ``UNNAMED``."""
    if isinstance(image, (str, Path)):
        return Path(image).name
    name: Any = getattr(image, "filename", "") or getattr(image, "name", "")
    return Path(name).name if isinstance(name, (str, Path)) and name else UNNAMED


def pixels_of(image: ImageLike) -> int:
    """Number of pixels, without decoding; 0 if unknown."""
    if isinstance(image, (str, Path)):
        return declared_pixels(Path(image))
    if isinstance(image, np.ndarray):
        return int(np.prod(image.shape[:2]))
    return image.width * image.height if _is_pillow(image) else 0


def check_array(image_hwc: npt.NDArray[Any]) -> None:
    """Raise ``UsageError`` unless ``image_hwc`` is uint8 RGB (h, w, 3) and not empty."""
    if not isinstance(image_hwc, np.ndarray):
        raise UsageError(f"image must be an array, uint8 RGB (h, w, 3), got {type(image_hwc).__name__}")
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.size == 0:
        raise UsageError(
            f"image must be uint8 RGB (h, w, 3), got {image_hwc.dtype} {image_hwc.shape}; "
            "cellseg_deploy.images.read.read_image reads files to that"
        )


def _is_pillow(image: Any) -> TypeGuard[Image]:
    """Whether ``image`` is a PIL image, without importing PIL: whoever has such an image has imported it already."""
    return any(base.__module__ == "PIL.Image" and base.__name__ == "Image" for base in type(image).__mro__)
