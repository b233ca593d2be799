"""All errors that this package raises on purpose.

    CellsegError                    exit code
    |-- UsageError                      2      an invalid setting or argument
    |-- DataError                       3      one image, mask or label file (the run continues without it)
    |-- NothingToDoError                4      no image where images were expected
    |-- ModelError                      5      a model file that is not ours, damaged or too new
    |   `-- ParityError                 5      two forms of a model do not count the same
    |-- OutputError                     6      an output folder that cannot be written, or belongs to another run
    |   `-- OutputInUseError            7      another process is writing there
    `-- BackendUnavailableError         8      the requested engine or device is unavailable

A message states what was received, what was expected and how to fix it. Library code raises these errors; only the
commands in ``cli`` turn them into text and an exit code. ``check_types`` raises one for an argument of a wrong type,
which would otherwise fail later, elsewhere, or not at all; ``plural`` is for numbers in messages.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any


class CellsegError(Exception):
    """Root of the tree; ``exit_code`` is the exit code of a command that this error stops.

    >>> try:
    ...     model("missing.png")
    ... except CellsegError as error:
    ...     print(error)
    missing.png: cannot be read: No such file or directory
    """

    exit_code = 1


class UsageError(CellsegError, ValueError):
    """A setting is out of range, or two settings contradict each other."""

    exit_code = 2


class DataError(CellsegError):
    """An image, mask or label file cannot be used. A folder run records it and continues."""

    exit_code = 3


class NothingToDoError(CellsegError):
    """There is no input to process."""

    exit_code = 4


class ModelError(CellsegError):
    """A model file is missing, damaged, not written by cellseg-export, or too new for this version."""

    exit_code = 5


class ParityError(ModelError):
    """Two forms of one network differ by more than the policy allows, or too little data was compared to decide."""


class OutputError(CellsegError):
    """The output folder cannot be written, or holds files that do not belong to this run."""

    exit_code = 6


class OutputInUseError(OutputError):
    """Another process holds the lock of the output folder."""

    exit_code = 7


class BackendUnavailableError(CellsegError):
    """The requested inference engine or device is not available here."""

    exit_code = 8


def concerns_one_image(error: BaseException) -> bool:
    """Whether ``error`` ends the work on one image only; otherwise it ends the whole run.

    True for ``DataError``, lack of memory, and unforeseen errors: those are our bugs, but must not cost the other ten
    thousand images of the night. Errors of model, engine, output or settings would affect every image, and an
    interrupt means the whole run.
    """
    return isinstance(error, DataError) or (isinstance(error, Exception) and not isinstance(error, CellsegError))


def plural(n: int, noun: str, plural_noun: str = "") -> str:
    """Return ``n`` and the noun: ``1 image``, ``3 images``.

    ``plural_noun``: for nouns whose plural is not the noun with an s.
    """
    return f"{n} {noun if n == 1 else plural_noun or f'{noun}s'}"


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
    "an open cluster (with open_cluster(...) as cluster)": lambda value: (
        hasattr(value, "outcomes") and hasattr(value, "slide")
    ),
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
