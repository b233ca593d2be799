"""Colours of cells in every picture and format."""

from __future__ import annotations

COUNTED_RGB = (0, 255, 80)
"""A green that neither violet stain, nor red cells, nor a grey field contain."""

NOT_COUNTED_RGB = (150, 150, 150)
"""Cells that were found, but that the count rule leaves out."""

CLASS_RGB = (
    (0, 200, 140),
    (240, 228, 66),
    (235, 90, 0),
    (0, 114, 178),
    (204, 121, 167),
    (86, 180, 233),
    (0, 0, 0),
)
"""Of the first, second, ... class of a model; the eighth has the first one again. Colours of Okabe and Ito (Color
Universal Design, 2008), which eyes that lack a kind of cones tell apart, the first three made brighter for outlines on
stained cells: without red, green or blue cones the first three are 29, any two 11 apart in CIELAB."""


def class_rgb(index: int) -> tuple[int, int, int]:
    """Colour of the class number ``index`` of a model, from 0."""
    return CLASS_RGB[index % len(CLASS_RGB)]
