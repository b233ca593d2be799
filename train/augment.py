"""Random augmentation of one training tile: position, size and colours.

Smears differ between laboratories in magnification, stain, light and focus far more than cells differ in shape, and
the training set comes from few laboratories: these ranges are all the network sees of the others. Pure functions of
their inputs and a numpy generator, so that a tile depends only on (seed, epoch, image, patch).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_train.config import AugmentConfig

Image = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]

# Optical-density vectors of haematoxylin, eosin and a residual (Ruifrok & Johnston 2001), one stain per row. Giemsa's
# azure and eosin are close enough for this purpose: colours should vary along directions that real stains take.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_UNMIX = np.linalg.inv(_STAINS)


def random_affine(
    rng: np.random.Generator, image_hw: tuple[int, int], tile_size: int, scale: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """2 x 3 matrix from tile to image coordinates (pixel centres, x before y): random scale, angle, flip and position.

    The tile's centre falls where the unrotated tile lies inside the image, so corners may extend past the border.
    """
    factor = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
    angle = rng.uniform(0, 2 * math.pi)
    flip = rng.choice((-1.0, 1.0))
    half = tile_size / (2 * factor)
    centre = [rng.uniform(min(half, side / 2), max(side - half, side / 2)) for side in (image_hw[1], image_hw[0])]
    return _affine(centre, 1 / factor, angle, flip, tile_size)


def plain_crop(rng: np.random.Generator, image_hw: tuple[int, int], tile_size: int) -> npt.NDArray[np.float64]:
    """Same as ``random_affine`` without scale, rotation and flip: a random crop on whole pixels."""
    top, left = (int(rng.integers(0, max(side - tile_size, 0) + 1)) for side in image_hw)
    return np.array([[1.0, 0.0, left], [0.0, 1.0, top]])


def cut(
    image_hwc: Image,
    labels_hw: npt.NDArray[np.integer],
    labels_scale: float,
    matrix: npt.NDArray[np.float64],
    tile_size: int,
    margin: int = 0,
) -> tuple[Image, npt.NDArray[np.int32]]:
    """Tile (S, S, 3) and its labels int32 (S + 2 margin, same) under the same ``matrix`` of ``random_affine``.

    ``margin``: px on each side by which the labels extend past the tile, so that cells cut by the tile are whole.

    ``labels_hw`` may lie on a finer grid with ``labels_scale`` px per image px: sampled once from full size, so that
    gaps of two pixels survive which a halved label image would have lost. Past the border both are mirrored.
    """
    tile = _warp(image_hwc, matrix, tile_size, cv2.INTER_LINEAR)
    around = matrix.copy()
    around[:, 2] -= matrix[:, :2].sum(axis=1) * margin
    fine = around * labels_scale
    fine[:, 2] += (labels_scale - 1) / 2  # pixel centres: x_fine + 0.5 = labels_scale * (x + 0.5)
    labels = _warp(labels_hw, fine, tile_size + 2 * margin, cv2.INTER_NEAREST)
    return np.asarray(tile, np.uint8), labels.astype(np.int32)


def _warp(
    array: npt.NDArray[np.generic], matrix: npt.NDArray[np.float64], tile_size: int, interpolation: int
) -> npt.NDArray[np.generic]:
    # Only the part that the tile covers: OpenCV's warp supports neither sides over 32,767 px nor int32.
    corners = matrix @ np.array([[0, tile_size, 0, tile_size], [0, 0, tile_size, tile_size], [1, 1, 1, 1]])
    low, high = np.floor(corners.min(axis=1)).astype(int) - 2, np.ceil(corners.max(axis=1)).astype(int) + 3
    left, top = (int(np.clip(low[i], 0, array.shape[1 - i] - 1)) for i in (0, 1))
    part = array[top : max(int(high[1]), top + 1), left : max(int(high[0]), left + 1)]
    if part.dtype != np.uint8:
        part = part.astype(np.float32)
    shifted = matrix.copy()
    shifted[:, 2] -= (left, top)
    size, flags = (tile_size, tile_size), interpolation | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(part, shifted, size, flags=flags, borderMode=cv2.BORDER_REFLECT))


def recolour(rng: np.random.Generator, tile_hwc: Image, config: AugmentConfig) -> Image:
    """Vary stain, colour, light, focus and sensor noise as between laboratories; uint8 in, uint8 out."""
    image: FloatImage = tile_hwc.astype(np.float32) / np.float32(255)
    if config.stain:
        image = vary_stain(rng, image, config.stain)
    image = vary_colour(rng, image, config)
    if config.illumination:
        image *= light_field(rng, image.shape[:2], config.illumination)[..., None]
    if rng.random() < config.blur_p:
        sigma = rng.uniform(0.3, config.blur_sigma_px)
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)
    elif rng.random() < config.sharpen_p:
        image += rng.uniform(0.3, 1.0) * (image - np.asarray(cv2.GaussianBlur(image, (0, 0), 1.0), np.float32))
    if rng.random() < config.noise_p:
        image += rng.normal(0, rng.uniform(0.2, 1.0) * config.noise_sigma / 255, image.shape).astype(np.float32)
    out = np.asarray(np.clip(image * 255 + 0.5, 0, 255), np.uint8)
    if rng.random() < config.jpeg_p:
        quality = int(rng.integers(40, 95))
        _, code = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])
        out = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8)
    return out


def vary_stain(rng: np.random.Generator, image: FloatImage, spread: float) -> FloatImage:
    """Scale and shift each stain's concentration in optical density (Tellez et al. 2018); RGB floats in [0, 1]."""
    density = -np.log(np.clip(image, 1 / 255, 1)).reshape(-1, 3)
    strength = rng.uniform(1 - spread, 1 + spread, 3).astype(np.float32)
    offset = rng.uniform(-spread, spread, 3).astype(np.float32) * 0.1
    stained = (density @ _UNMIX * strength + offset) @ _STAINS
    return np.asarray(np.exp(-stained), np.float32).reshape(image.shape)


def vary_colour(rng: np.random.Generator, image: FloatImage, config: AugmentConfig) -> FloatImage:
    """Vary hue, saturation, gamma, contrast, brightness and white balance, in an order that keeps the range sane."""
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    if rng.random() < config.grey_p:
        image = np.repeat(grey[..., None], 3, axis=2)
    else:
        turn = _hue_matrix(math.radians(rng.uniform(-config.hue, config.hue)))
        image = image @ turn
        saturation = rng.uniform(1 - config.saturation, 1 + config.saturation)
        image = grey[..., None] + saturation * (image - grey[..., None])
    image = np.clip(image, 0, 1) ** rng.uniform(1 - config.gamma, 1 + config.gamma)
    middle = image.mean()
    image = middle + rng.uniform(1 - config.contrast, 1 + config.contrast) * (image - middle)
    brightness = rng.uniform(1 - config.brightness, 1 + config.brightness)
    balance = rng.uniform(1 - config.brightness / 3, 1 + config.brightness / 3, 3)
    return np.asarray(image * (brightness * balance), np.float32)


def light_field(rng: np.random.Generator, hw: tuple[int, int], strength: float) -> FloatImage:
    """Factor in [1 - strength, 1]: a slope across the tile, as uneven light and vignettes look within one tile."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.linspace(-0.5, 0.5, hw[0], dtype=np.float32), np.linspace(-0.5, 0.5, hw[1], dtype=np.float32)
    slope = math.cos(angle) * x[None, :] + math.sin(angle) * y[:, None]
    slope = (slope - slope.min()) / (slope.max() - slope.min() + 1e-6)
    return np.asarray(1 - rng.uniform(0, strength) * slope, np.float32)


def _affine(centre: list[float], factor: float, angle: float, flip: float, tile_size: int) -> npt.NDArray[np.float64]:
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    linear = np.array([[cos * flip, -sin], [sin * flip, cos]])
    middle = (tile_size - 1) / 2
    shift = np.array(centre) - 0.5 - linear @ np.array([middle, middle])
    return np.column_stack([linear, shift])


def _hue_matrix(angle: float) -> FloatImage:
    """Rotation of RGB about the grey axis (Rodrigues' formula), for row vectors."""
    cos, sin = math.cos(angle), math.sin(angle)
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return np.asarray(cos * np.eye(3) + (1 - cos) * axis + sin * cross, np.float32).T
