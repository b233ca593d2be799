"""Which numbers of a mask are cells, as commands and settings name it."""

from __future__ import annotations

from typing import Literal

MaskForeground = Literal["auto", "light", "dark"]
MASK_FOREGROUNDS: tuple[MaskForeground, ...] = ("auto", "light", "dark")
"""``auto``: numbers above 0, and a mask that looks like a negative is refused; ``light``: numbers above 0, whatever it
looks like; ``dark``: the mask is a negative, its largest number is the background."""
