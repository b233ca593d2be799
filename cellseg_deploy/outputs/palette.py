"""Colours of cells in every picture and format."""

from __future__ import annotations

COUNTED_RGB = (0, 255, 80)
"""A green that neither violet stain, nor red cells, nor a grey field contain."""

NOT_COUNTED_RGB = (150, 150, 150)
"""Cells that were found, but that the count rule leaves out."""
