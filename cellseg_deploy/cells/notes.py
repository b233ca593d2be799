"""Notes on one image: a sentence for the user, and its kind, by which a run counts notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

Kind = Literal[
    "conversion",
    "damage",
    "pages",
    "bit depth",
    "pixel size",
    "cell size",
    "lost cells",
    "field of view",
    "negative",
    "annotations",
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


def first_warnings(notes: Iterable[str]) -> dict[str, str]:
    """Return kind -> text of the first of ``notes`` of that kind, on one line; conversions are left out."""
    found = dict[str, str]()
    for note in notes:
        if kind_of(note) != "conversion":
            found.setdefault(kind_of(note), " ".join(note.split()))
    return found


def count_warnings(of_images: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, dict[str, Any]]:
    """Return kind -> ``images``, the number of images with it, and ``first``, name and text of the first of them.

    ``of_images``: name and ``first_warnings`` of each image. Sorted by kind.
    """
    kinds = dict[str, dict[str, Any]]()
    for image, warnings in of_images:
        for kind, text in warnings.items():
            kinds.setdefault(kind, {"images": 0, "first": {"image": image, "warning": text}})["images"] += 1
    return dict(sorted(kinds.items()))
