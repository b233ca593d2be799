"""Remarks on one image: a sentence for people, with the kind of it, by which a run counts them."""

from __future__ import annotations

from typing import Literal, Self

Kind = Literal[
    "conversion", "damage", "pages", "bit depth", "pixel size", "cell size", "lost cells", "field of view", "negative"
]
"""``conversion``: how the pixels were converted, nothing to worry about. All others are warnings."""


class Note(str):
    """A sentence about one image. Plain text counts as a conversion.

    >>> Note("12-bit samples scaled to 8 bit", "bit depth").kind
    'bit depth'
    """

    kind: Kind

    def __new__(cls, text: str, kind: Kind = "conversion") -> Self:
        """``text`` with its ``kind``."""
        note = super().__new__(cls, text)
        note.kind = kind
        return note


def kind_of(note: str) -> Kind:
    """The kind of ``note``; of plain text ``conversion``."""
    return note.kind if isinstance(note, Note) else "conversion"
