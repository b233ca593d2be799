"""The overlay picture: the image, each cell's exact outline, its number if requested, and the count in a corner.

If cells have classes, an outline has the colour of its class, uncounted cells have a dashed outline, and the lower left
corner, or a strip below a small picture, shows the class colours with the number of cells per class.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.label_runs import bands
from cellseg_deploy.errors import plural
from cellseg_deploy.outputs import picture_file
from cellseg_deploy.outputs.legend import with_legend
from cellseg_deploy.outputs.palette import CLASS_RGB, COUNTED_RGB, SEVERAL_RGB

OUTLINE_RGB = COUNTED_RGB
_NOT_COUNTED_RGB = (255, 160, 0)  # a thin grey line is invisible on a grey field and on pale cells
_SHORTEST_SIDE = 320  # smaller images are enlarged, so that outline and count can be seen
_LONGEST_SIDE = 16_384  # JPEG's limit is 65,535 px, most viewers much earlier
_PLATE_RGB = (16, 16, 16)
_FIELD_RGB, _HATCH_LIGHTER = (255, 255, 255), 70  # grey levels: visible on black and white surroundings
_DASH_THICKNESSES = 4
_ROWS_PER_MARGIN = 8  # of a band, whose margins above and below are computed twice


def encode(
    image_hwc: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32],
    field: npt.NDArray[np.bool_] | None = None,
    counted: npt.NDArray[np.bool_] | None = None,
    numbers_xy: npt.NDArray[np.float64] | None = None,
    *,
    classes: CellClasses | None = None,
    by_class: Mapping[str, int] | None = None,
    suffix: str = picture_file.JPG,
    several: npt.NDArray[np.bool_] | None = None,
    over_image: bool = False,
) -> bytes:
    """Encode the result of ``draw`` as a picture file."""
    picture = draw(image_hwc, labels, numbers_xy, field, counted, classes, several, over_image=over_image)
    return picture_file.encode(picture if classes is None else with_legend(picture, classes, by_class or {}), suffix)


def draw(
    image_hwc: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32],
    numbers_xy: npt.NDArray[np.float64] | None = None,
    field: npt.NDArray[np.bool_] | None = None,
    counted: npt.NDArray[np.bool_] | None = None,
    classes: CellClasses | None = None,
    several: npt.NDArray[np.bool_] | None = None,
    *,
    over_image: bool = False,
) -> npt.NDArray[np.uint8]:
    """Draw the outlines of ``labels`` (h, w) and their number on ``image_hwc`` (h, w, 3), returned as RGB.

    Outlines are the cells' own border pixels, so two touching cells have two lines between them. ``numbers_xy``: where
    to write each cell's label, its centre in px of ``labels`` (n, 2), for labels 1..n. Small images are enlarged by an
    integer factor and huge ones reduced. Everything outside ``field`` (h, w) is darkened. ``counted``: bool (n,), None
    if all are; uncounted labels have an orange outline, or with ``classes`` a dashed one in their colour.
    ``several``: bool (n,), cells with a magenta outline, as they look like several cells; the caption says how many.
    A picture too small for the count gets a margin. ``over_image``: draw into ``image_hwc`` where no other picture has
    to be made.
    """
    if image_hwc.shape[:2] != labels.shape:
        raise ValueError(f"image {image_hwc.shape[:2]} and labels {labels.shape} must be of one size")
    count = int(labels.max(initial=0)) if counted is None else len(counted)  # a small copy may lack some labels
    width = labels.shape[1]
    if field is not None:
        image_hwc = dimmed(image_hwc, field)
    image_hwc, labels = to_viewing_size(image_hwc, labels)
    picture = image_hwc
    if not (over_image and picture.flags.c_contiguous and picture.flags.writeable):
        picture = image_hwc.copy()
    colours = np.full((count + 1, 3), OUTLINE_RGB, np.uint8)
    if classes is not None:
        colours[1:] = np.array(CLASS_RGB, np.uint8)[classes.index % len(CLASS_RGB)]
    elif counted is not None:
        colours[1:][~counted] = _NOT_COUNTED_RGB
    if several is not None:
        colours[1:][several] = SEVERAL_RGB
    is_dashed = None if classes is None or counted is None else np.append(False, ~counted)
    # The colour of a one-pixel line cannot be seen.
    thickness = max(1 if classes is None else 2, round(min(labels.shape) / 600))
    for rows in bands((labels.shape[0], labels.shape[1]), at_least=_ROWS_PER_MARGIN * thickness):
        around = slice(max(0, rows.start - thickness), rows.stop + thickness)
        inner = slice(rows.start - around.start, rows.stop - around.start)
        outline = outlines(labels[around], thickness=thickness)[inner]
        if is_dashed is not None:
            outline &= ~(is_dashed[labels[rows]] & _gaps(rows, labels.shape[1], _DASH_THICKNESSES * thickness))
        picture[rows][outline] = colours[labels[rows][outline]]
    if numbers_xy is not None:
        diameter = float(np.sqrt(4 / np.pi * np.count_nonzero(labels) / max(1, count)))  # mean cell's
        _write_numbers(picture, (numbers_xy + 0.5) * (labels.shape[1] / width), diameter)
    caption = plural(count, "cell")
    n_counted = count if counted is None else int(counted.sum())
    if classes is not None:  # some classes are not cells
        caption = f"{count} found, {n_counted} counted"
    elif n_counted != count:
        caption = f"{caption}, {n_counted} counted"
    if several is not None and several.any():
        caption = f"{caption}; magenta: {several.sum()} may be several"
    return with_caption(picture, caption)


def _gaps(rows: slice, width: int, length: int) -> npt.NDArray[np.bool_]:
    """Return where ``rows`` of a picture of ``width`` px hide dashed outlines, (rows, width): slanted stripes."""
    y, x = np.ogrid[rows.start : rows.stop, :width]
    return np.asarray((2 * y + x) % (2 * length) < length)


def outlines(labels: npt.NDArray[np.int32], *, thickness: int) -> npt.NDArray[np.bool_]:
    """Mask (h, w) of the pixels of each label that lie within ``thickness`` px of a pixel of another value."""
    import cv2

    border = np.zeros(labels.shape, np.uint8)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    border[1:] |= vertical
    border[:-1] |= vertical
    border[:, 1:] |= horizontal
    border[:, :-1] |= horizontal
    if thickness > 1:
        side = 2 * thickness - 1
        border = np.asarray(cv2.dilate(border, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))))
    return (border > 0) & (labels > 0)


def dimmed(image_hwc: npt.NDArray[np.uint8], field: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Darken and hatch ``image_hwc`` (h, w, 3) outside ``field`` (h, w), and draw a line around the field."""
    picture = image_hwc.copy()
    thickness = max(2, round(min(field.shape) / 400))
    y, x = np.ogrid[: field.shape[0], : field.shape[1]]
    hatch = (y + x) % (12 * thickness) < thickness
    picture[~field] //= 3
    picture[~field & hatch] += _HATCH_LIGHTER
    picture[outlines(field.astype(np.int32), thickness=thickness)] = _FIELD_RGB
    return picture


def to_viewing_size(
    image_hwc: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Enlarge both by an integer factor if they are small; take every n-th pixel if they are huge."""
    longest = max(labels.shape)
    if longest > _LONGEST_SIDE:
        step = -(-longest // _LONGEST_SIDE)
        return image_hwc[::step, ::step], labels[::step, ::step]
    factor = min(-(-_SHORTEST_SIDE // min(labels.shape)), max(1, _LONGEST_SIDE // 8 // longest))
    if factor <= 1:
        return image_hwc, labels
    return (
        image_hwc.repeat(factor, axis=0).repeat(factor, axis=1),
        labels.repeat(factor, axis=0).repeat(factor, axis=1),
    )


def with_caption(picture: npt.NDArray[np.uint8], text: str) -> npt.NDArray[np.uint8]:
    """Write ``text`` on a dark plate in the upper left corner of ``picture``, adding a margin if it does not fit."""
    import cv2

    scale = max(0.6, min(picture.shape[:2]) / 1200)
    stroke = max(1, round(2 * scale))
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, stroke)
    margin = max(4, round(height * 0.5))
    plate_h, plate_w = height + below + 2 * margin, width + 2 * margin
    missing_h, missing_w = max(0, plate_h - picture.shape[0]), max(0, plate_w - picture.shape[1])
    if missing_h or missing_w:  # below and to the right of a strip of an image: the plate is then next to the pixels
        missing_h = plate_h if missing_w else missing_h
        picture = np.pad(picture, ((missing_h, 0), (0, missing_w), (0, 0)), constant_values=_PLATE_RGB[0])
    picture = np.ascontiguousarray(picture)
    plate = picture[:plate_h, :plate_w]
    plate[:] = plate // 4 + np.array(_PLATE_RGB, np.uint8)  # cells below it stay visible
    origin = (margin, margin + height)
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), stroke, cv2.LINE_AA)
    return picture


def write_centred(picture: npt.NDArray[np.uint8], text: str, centre_xy: tuple[float, float], scale: float) -> None:
    """Write ``text`` centred on ``centre_xy`` of ``picture``, white with a dark rim, legible on any background."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=30 * scale)
    rim = max(1, round(2.5 * scale))
    left, top, right, bottom = (round(side) for side in font.getbbox(text, stroke_width=rim))
    width, height = right - left, bottom - top
    x, y = round(centre_xy[0] - width / 2), round(centre_xy[1] - height / 2)
    plate_x, plate_y = max(x, 0), max(y, 0)
    plate = picture[plate_y : max(y + height, 0), plate_x : max(x + width, 0)]
    if not plate.size:
        return
    drawn = Image.fromarray(plate)
    at = (x - left - plate_x, y - top - plate_y)
    ImageDraw.Draw(drawn).text(at, text, (255, 255, 255), font=font, stroke_width=rim, stroke_fill=(0, 0, 0))
    plate[:] = np.asarray(drawn)


def _write_numbers(picture: npt.NDArray[np.uint8], centres_xy: npt.NDArray[np.float64], diameter_px: float) -> None:
    scale = max(0.4, 0.3 * diameter_px / 30)  # 0.3 at 30 px: numbers grow with the cells
    for number, (x, y) in enumerate(centres_xy.tolist(), start=1):
        write_centred(picture, str(number), (x, y), scale)
