"""Names, in commands and settings, for which numbers of a mask are cells."""

from __future__ import annotations

from typing import Literal

MaskForeground = Literal["auto", "light", "dark"]
MASK_FOREGROUNDS: tuple[MaskForeground, ...] = ("auto", "light", "dark")
"""``auto``: numbers above 0, but a mask that looks like a negative is refused; ``light``: numbers above 0, whatever the
mask looks like; ``dark``: the mask is a negative, its largest number is the background."""
