"""Notes on one image: a sentence for the user, and its kind, by which a run counts notes."""

from __future__ import annotations

from typing import Literal, Self

Kind = Literal[
    "conversion", "damage", "pages", "bit depth", "pixel size", "cell size", "lost cells", "field of view", "negative"
]
"""``conversion``: how the pixels were converted, which is harmless. All other kinds are warnings."""


class Note(str):
    """A sentence about one image. A plain string counts as a conversion.

    >>> Note("12-bit samples scaled to 8 bit", "bit depth").kind
    'bit depth'
    """

    kind: Kind

    def __new__(cls, text: str, kind: Kind = "conversion") -> Self:
        """Create a note from ``text`` and its ``kind``."""
        note = super().__new__(cls, text)
        note.kind = kind
        return note


def kind_of(note: str) -> Kind:
    """Kind of ``note``; ``conversion`` for a plain string."""
    return note.kind if isinstance(note, Note) else "conversion"
