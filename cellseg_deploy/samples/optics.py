"""From optical density to a photograph: lamp, slide, lens, sensor, file format and scale bar.

In the order of a microscope: light falls unevenly, the slide absorbs it, the lens blurs it, the sensor adds noise, the
camera sharpens and compresses.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.samples.params import RED_CELL_DIAMETER_UM, SmearParams

Frame = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]

_BRIGHTEST = -0.08  # limit of the light that a fringe gains, as a density
_LN10 = np.float32(np.log(10))


def smooth_noise(rng: np.random.Generator, size_hw: tuple[int, int], feature_px: float) -> Frame:
    """Return noise (h, w) float32 of zero mean and unit variance, isotropic, with features ``feature_px`` wide.

    White noise on a grid of a third of a feature is blurred there, where it is small, and then enlarged.
    """
    step = max(1.0, feature_px / 3)
    coarse_hw = tuple(int(length / step) + 4 for length in size_hw)
    coarse: Frame = cv2.GaussianBlur(rng.standard_normal(coarse_hw, dtype=np.float32), (0, 0), 0.4 * feature_px / step)
    coarse /= np.float32(max(float(coarse.std()), 1e-6))
    enlarged = (int(coarse_hw[1] * step) + 1, int(coarse_hw[0] * step) + 1)
    fine: Frame = cv2.resize(coarse, enlarged, interpolation=cv2.INTER_LINEAR)
    return fine[: size_hw[0], : size_hw[1]]


def residue(rng: np.random.Generator, params: SmearParams) -> Frame:
    """Return the density (h, w) of stain and plasma residue between the cells: clouds, and a finer mottle."""
    clouds = smooth_noise(rng, params.size_hw, 6.0 * params.cell_diameter_px)
    mottle = smooth_noise(rng, params.size_hw, 0.25 * params.cell_diameter_px)
    left = np.maximum(clouds + np.float32(0.5), 0) + np.float32(0.12) * mottle
    return np.asarray(left * np.float32(params.residue))


def photograph(rng: np.random.Generator, params: SmearParams, density_hwc: Frame) -> Image:
    """Render ``density_hwc`` (h, w, 3) as an RGB uint8 photograph."""
    light: Frame = cv2.exp(-_LN10 * np.maximum(density_hwc, np.float32(_BRIGHTEST)))
    light *= _illumination(rng, params)
    if params.blur_px > 0:
        light = cv2.GaussianBlur(light, (0, 0), params.blur_px)
    if params.sharpen > 0:
        soft = cv2.GaussianBlur(light, (0, 0), 1.5)
        light = cv2.addWeighted(light, 1 + params.sharpen, soft, -params.sharpen, 0)
    if params.noise > 0:
        light += _sensor_noise(rng, light, params.noise)
    image: Image = np.clip(light + np.float32(0.5), 0, 255).astype(np.uint8)
    if params.scale_bar:
        draw_scale_bar(rng, params, image)
    return _compress(image, params.jpeg_quality) if params.jpeg_quality else image


def draw_scale_bar(rng: np.random.Generator, params: SmearParams, image_hwc: Image) -> None:
    """Draw a scale bar with its length into a corner, in place, dark or on a white box."""
    height, width = params.size_hw
    px_per_um = params.cell_diameter_px / RED_CELL_DIAMETER_UM
    fitting = [um for um in (1, 2, 5, 10, 20) if um * px_per_um < 0.25 * width] or [1]
    length = round(fitting[-1] * px_per_um)
    thick = max(2, height // 300)
    margin = max(4, height // 50)
    size = max(0.35, height / 1500)
    text = f"{fitting[-1]} um"
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thick)
    block = max(length, text_width)
    left = margin if rng.random() < 0.3 else width - margin - block
    bottom = height - margin
    if rng.random() < 0.3:
        top_left = (left - margin // 2, bottom - text_height - 4 * thick - margin // 2)
        cv2.rectangle(image_hwc, top_left, (left + block + margin // 2, height - margin // 2), (255, 255, 255), -1)
    ink = (0, 0, 0) if rng.random() < 0.8 else (200, 30, 30)
    start = left + (block - length) // 2
    cv2.line(image_hwc, (start, bottom), (start + length, bottom), ink, thick)
    for end in (start, start + length):
        cv2.line(image_hwc, (end, bottom - 2 * thick), (end, bottom + 2 * thick), ink, thick)
    place = (left + (block - text_width) // 2, bottom - 4 * thick)
    cv2.putText(image_hwc, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, ink, thick, cv2.LINE_AA)


def _illumination(rng: np.random.Generator, params: SmearParams) -> Frame:
    """Return the light (h, w, 3) that an empty slide would show, in grey levels."""
    height, width = params.size_hw
    small_h, small_w = max(2, height // 16), max(2, width // 16)
    y, x = np.meshgrid(np.linspace(-1, 1, small_h), np.linspace(-1, 1, small_w), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    tint = rng.normal(1.0, 0.2, size=3)  # the lamp's colour shifts a little across the field
    slope = (x * np.cos(angle) + y * np.sin(angle) - 1) / 2 * params.gradient
    centre = rng.normal(0, 0.15, size=2)
    fall = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 2 * params.vignette
    field = (1 + slope[..., None] * tint - fall[..., None]) * np.array(params.background)
    light: Frame = cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return light


def _sensor_noise(rng: np.random.Generator, light_hwc: Frame, sigma: float) -> Frame:
    """Return noise in grey levels, partly correlated between neighbours as after demosaicing, lower in the dark.

    Uniform numbers, three times as fast to draw as normal ones; their 3 x 3 Gaussian mean is nearly normal.
    """
    noise: Frame = cv2.GaussianBlur(rng.random(light_hwc.shape, dtype=np.float32) - np.float32(0.5), (3, 3), 0.6)
    spread = 0.134  # standard deviation after the mean
    strength = np.float32(sigma / spread) * (np.float32(0.4) + light_hwc[..., 1] * np.float32(0.6 / 230))
    noise *= strength[..., None]
    return noise


def _compress(image_hwc: Image, quality: int) -> Image:
    """Return the image as decoded from a JPEG of that quality."""
    _, data = cv2.imencode(".jpg", image_hwc[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    back = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    assert back is not None, "OpenCV cannot read the JPEG it has just written"
    return np.asarray(back, dtype=np.uint8)
