"""Types of the arguments of public functions, checked where a wrong one would fail later, elsewhere, or not at all."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from cellseg_deploy.errors import UsageError

_OR_NONE = " or None"


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


def _several(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_one, value))


_is_name, _is_path = _is(str), _is(str, os.PathLike)
_KINDS: dict[str, Callable[[Any], bool]] = {
    "True or False": lambda value: isinstance(value, bool),
    "a function": callable,
    "a name": _is_name,
    "a number": _is(Real),
    "a path": _is_path,
    "a path or a list of paths": lambda value: _is_path(value) or _several(_is_path)(value),
    "a sequence of names": _several(_is_name),
    "a whole number": _is(Integral),
    # One image can be iterated over too: an array by rows, an open file by lines.
    "several images, such as a list": lambda value: (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, os.PathLike))
        and not hasattr(value, "read")
        and getattr(value, "ndim", 4) == 4
    ),
}


def check_types(kind: str | type, /, **arguments: object) -> None:
    """Raise ``UsageError`` for the first of ``arguments``, by name, that is no ``kind``.

    ``kind``: a class, or a key of ``_KINDS``, which with `` or None`` at its end accepts None as well.

    >>> check_types("a whole number or None", threads=None, streams=2)
    >>> check_types("a whole number", threads="2")
    Traceback (most recent call last):
    cellseg_deploy.errors.UsageError: `threads` must be a whole number, got '2' (str)
    """
    if isinstance(kind, type):
        words, fits = f"{kind.__name__}(...)", _is(kind)
    else:
        words, fits = kind, _KINDS[kind.removesuffix(_OR_NONE)]
    for name, value in arguments.items():
        if not (fits(value) or (value is None and words.endswith(_OR_NONE))):
            got = "None" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
            raise UsageError(f"`{name}` must be {words}, got {got}")
