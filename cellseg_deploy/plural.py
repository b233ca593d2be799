"""A number with its noun, for messages."""

from __future__ import annotations


def plural(n: int, noun: str, plural_noun: str = "") -> str:
    """Return ``n`` and the noun: ``1 image``, ``3 images``.

    ``plural_noun``: for nouns whose plural is not the noun with an s.
    """
    return f"{n} {noun if n == 1 else plural_noun or f'{noun}s'}"
