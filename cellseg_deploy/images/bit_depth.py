"""Number of a sample's bits that the camera really used: from the file and its pixels; and the scaling to 8 bit.

A 12-bit camera usually writes 16-bit files whose upper bits are zero; scaled by their full range they are black. The
scaling follows the user's setting, else the file, else the range of the file format: never the pixels, which would
scale two photographs of one slide differently. The pixels decide only whether there is a warning, which names the
depth to set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.notes import Note

_MAX_SAMPLE_VALUE = 281  # TIFF 6.0
_OME_BITS = re.compile(r"""<(?:\w+:)?Pixels\b[^<>]*\bSignificantBits\s*=\s*["'](\d{1,3})["']""")
_IMAGEJ_MIN_MAX = re.compile(r"^(min|max)=([0-9.]+)\s*$", re.MULTILINE)
_USUAL = (10, 12, 14)  # bit depths of cameras
_STRAY = 0.001  # share of hot pixels and of letters with soft edges
_OVERLAY = 0.05  # largest share of an image that a scale bar of one colour takes
_LOOKED_AT = 1_000_000  # samples examined; enough to see how they were written


@dataclass(frozen=True)
class SaidBits:
    """Number of bits used per sample, as stated by the part ``source`` of the file.

    ``may_be_scaled``: the format wants such samples scaled to its full range (PNG's sBIT), but not all writers do it.
    ``is_hint``: the value only tells how the image was last displayed, and is used for a warning only.
    """

    bits: int
    source: str
    may_be_scaled: bool = False
    is_hint: bool = False


def of_png(sbit: bytes, colour_type: int) -> SaidBits | None:
    """Parse the content of a PNG's sBIT chunk: one byte per channel, the last is alpha for colour types 4 and 6."""
    colours = sbit[:-1] if colour_type & 4 else sbit
    return _credible(max(colours, default=0), "PNG sBIT", may_be_scaled=True)


def of_tiff(tiff: Any, page: Any) -> SaidBits | None:
    """Read ``page`` of a ``tifffile.TiffFile``: OME's SignificantBits, MaxSampleValue, ImageJ's display range."""
    ome = _OME_BITS.search(tiff.pages[0].description) if tiff.is_ome else None
    if ome and (said := _credible(int(ome[1]), "OME SignificantBits")) and said.bits < page.bitspersample:
        return said  # if equal to the file format's bits, it is a default without meaning
    tag = page.tags.get(_MAX_SAMPLE_VALUE)
    highest = 0 if tag is None else max(np.atleast_1d(tag.value).tolist(), default=0)
    if bits := _bits_of_limit(highest):
        return _credible(bits, "TIFF MaxSampleValue")
    if tiff.is_imagej:
        shown = {name: float(value) for name, value in _IMAGEJ_MIN_MAX.findall(page.imagej_description or "")}
        if shown.get("min", 0.0) == 0 and (bits := _bits_of_limit(shown.get("max", 0.0))):
            return _credible(bits, "ImageJ's display range", is_hint=True)
    return None


def bits_to_scale(
    samples: npt.NDArray[Any], bits: int, said: SaidBits | None, given: int | None
) -> tuple[int, list[Note]]:
    """Return the number of bits whose range is scaled to 8 bit, and notes. ``samples``: unsigned, of ``bits`` each.

    ``given``: set by the user. Samples above the range are clipped by ``scale_to_8`` and counted here.
    """
    used, source = bits, ""
    if given is not None:
        used, source = given, "`bit_depth`"
    elif said is not None and not said.is_hint and said.bits < bits:
        is_scaled = said.may_be_scaled and _is_scaled(samples, said.bits, bits)
        used, source = (bits, "") if is_scaled else (said.bits, said.source)
    by = f" ({source})" if source and given is None else ""
    notes = [Note(f"{used}-bit samples{by} scaled to 8 bit")]
    histogram = np.bincount(samples.ravel(), minlength=2**used)
    above = int(histogram[2**used :].sum())
    if above:
        notes.append(
            Note(
                f"{above} of {samples.size} samples ({above / samples.size:.2g} of all) are larger than {2**used - 1}, "
                f"the largest of {used} bits ({source}), and were clipped",
                "bit depth",
            )
        )
    likely = _likely_bits(histogram)
    if likely <= used - 2:
        hint = f", as {said.source} has it" if said is not None and said.is_hint and said.bits == likely else ""
        advice = (
            f"if the camera has {likely} bits{hint}, give `bit_depth={likely}`"
            if likely > 8
            else "save it as an 8-bit image, or give `bit_depth` if the camera has 9 to 15 bits"
        )
        largest = int(np.flatnonzero(histogram)[-1])
        notes.append(
            Note(
                f"almost all samples are below {2**likely} of {2**used} (the largest is {largest}): the image will "
                f"look very dark to the model; {advice}",
                "bit depth",
            )
        )
    return used, notes


def scale_to_8(samples: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """``samples * 255 // (2 ** bits - 1)`` as uint8, larger samples clipped; for 16 bit this is ``// 257``."""
    if bits == 8:
        return np.minimum(samples, 255).astype(np.uint8) if samples.dtype != np.uint8 else samples
    table = (np.arange(2**bits, dtype=np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
    # A table is faster than division.
    scaled: npt.NDArray[np.uint8] = table[samples if bits == 16 else np.minimum(samples, 2**bits - 1)]
    return scaled


def _likely_bits(histogram: npt.NDArray[np.int64]) -> int:
    """Return 8 or the usual camera depth that ``histogram`` of samples fits, apart from hot pixels and a scale bar."""
    total = int(histogram.sum())
    for bits in (8, *_USUAL):
        above = histogram[2**bits :]
        overlay = int(above.max(initial=0))  # letters and scale bars have one colour
        if int(above.sum()) - overlay <= _STRAY * total and overlay <= _OVERLAY * total:
            return bits
    return 16


def _is_scaled(samples: npt.NDArray[Any], used: int, bits: int) -> bool:
    """Whether samples of ``used`` bits were scaled to ``bits``: shifted, bits repeated, or multiplied (PNG, 12.4).

    In that case the upper bits determine the lower ones.
    """
    some = samples.ravel()[:: samples.size // _LOOKED_AT + 1].astype(np.int64)
    upper = some >> (bits - used)
    shifted = upper << (bits - used)
    multiplied = np.rint(upper * ((2**bits - 1) / (2**used - 1))).astype(np.int64)
    repeated = shifted | (upper >> max(2 * used - bits, 0))
    return bool(np.mean((some == shifted) | (some == multiplied) | (some == repeated)) >= 0.99)


def _credible(bits: int, source: str, **settings: bool) -> SaidBits | None:
    return SaidBits(bits, source, **settings) if 8 <= bits <= 16 else None


def _bits_of_limit(highest: float) -> int:
    """Number of bits, 9 to 15, whose largest value is ``highest``; else 0: it is the brightest pixel, not a limit."""
    return next((bits for bits in range(9, 16) if highest == 2**bits - 1), 0)
