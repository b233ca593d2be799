"""Colours of cells in every picture and format."""

from __future__ import annotations

COUNTED_RGB = (0, 255, 80)
"""A green that occurs neither in violet stain, nor in red cells, nor in a grey field."""

NOT_COUNTED_RGB = (150, 150, 150)
"""For cells that were found but that the count rule leaves out."""

SEVERAL_RGB = (255, 0, 220)
"""For cells that look like several, see ``cells.several``; darker than the green for colour-blind viewers."""

CLASS_RGB = (
    (0, 200, 140),
    (240, 228, 66),
    (235, 90, 0),
    (0, 114, 178),
    (204, 121, 167),
    (86, 180, 233),
    (0, 0, 0),
)
"""Colours of a model's first, second, ... class; the eighth repeats the first. From Okabe and Ito (Color Universal
Design, 2008), distinguishable by colour-blind viewers, the first three brightened for outlines on stained cells:
without red, green or blue cones the first three are 29, any two 11 apart in CIELAB."""


def class_rgb(index: int) -> tuple[int, int, int]:
    """Return the colour of class ``index`` of a model, from 0."""
    return CLASS_RGB[index % len(CLASS_RGB)]
