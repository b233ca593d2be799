"""Small pictures of discs of which a part shows no specimen, or which are negatives: files for the corpus."""

from __future__ import annotations

import cv2
import numpy as np
from made_images import encoded
from PIL import Image

H, W = 240, 320


def discs() -> np.ndarray:
    """48 separate dark discs on a bright field, RGB (h, w, 3)."""
    y, x = np.mgrid[:H, :W]
    inside = np.hypot(y % 40 - 20, x % 40 - 20) <= 10
    return np.where(inside[..., None], (120, 40, 90), (230, 228, 232)).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "JPEG", quality=90)


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG")


def _round(radius: float, centre: tuple[float, float] = (H / 2, W / 2)) -> np.ndarray:
    y, x = np.ogrid[:H, :W]
    return np.hypot(y - centre[0], x - centre[1])[..., None] <= radius


def eyepiece() -> bytes:
    return jpeg(np.where(_round(110), discs(), 4).astype(np.uint8))


def oval() -> bytes:
    """An eyepiece seen from the side, through a telephone."""
    mask = cv2.ellipse(np.zeros((H, W), np.uint8), (W // 2, H // 2), (140, 100), 20, 0, 360, 1, -1)
    return jpeg(np.where(mask[..., None] > 0, discs(), 9).astype(np.uint8))


def rounded_frame() -> bytes:
    """The dark grey mask of a camera, with rounded corners."""
    mask = cv2.dilate(np.pad(np.ones((100, 180), np.uint8), 70), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (81, 81)))
    return jpeg(np.where(mask[..., None] > 0, discs(), 34).astype(np.uint8))


def glare() -> bytes:
    """An eyepiece whose black surround mirrors a lamp."""
    y, x = np.mgrid[:H, :W]
    distance, angle = np.hypot(y - H / 2, x - W / 2), np.arctan2(y - H / 2, x - W / 2)
    light = 60 * np.exp(-(((distance - 128) / 5) ** 2) - ((angle - 0.6) / 0.4) ** 2)
    return jpeg(np.where(_round(110), discs(), 6 + light[..., None]).astype(np.uint8))


def letterbox() -> bytes:
    pixels = discs()
    pixels[:30] = pixels[-30:] = 255
    return png(pixels)


def turned() -> bytes:
    matrix = cv2.getRotationMatrix2D((W / 2, H / 2), 9, 1)
    return jpeg(np.asarray(cv2.warpAffine(discs(), matrix, (W, H))))


def band() -> bytes:
    pixels = discs()
    pixels[-24:] = 0
    cv2.putText(pixels, "x100  20 um", (8, H - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1)
    return png(pixels)


def pointer() -> bytes:
    pixels = discs()
    needle = np.array([(160, 100), (162, 104), (W, 170), (W, 158)], np.int32)
    return png(cv2.fillConvexPoly(pixels, needle, (12, 10, 10)))


def scale_bar() -> bytes:
    pixels = discs()
    cv2.rectangle(pixels, (200, 200), (300, 208), (0, 0, 0), -1)
    return png(pixels)


def plate() -> bytes:
    """A black plate in a corner, as under a date: no field of view is convex around it."""
    pixels = discs()
    pixels[-60:, -150:] = 0
    return png(pixels)


def fluorescence() -> bytes:
    rng = np.random.default_rng(0)
    photons = rng.poisson(np.where(discs()[..., 0] < 200, 50, 0.5)) * 3 + rng.normal(6, 2, (H, W))
    return png(np.stack([photons * 0.1, photons, photons * 0.15], axis=2).clip(0, 255).astype(np.uint8))


def dark_field() -> bytes:
    rng = np.random.default_rng(0)
    rims = np.hypot(*np.gradient(255.0 - discs().mean(axis=2))) * 2
    return png((rims + rng.normal(8, 2, (H, W))).clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2))
