"""Every error this package raises on purpose.

    CellsegError                    exit code
    |-- UsageError                      2      a setting or argument that cannot be meant
    |-- DataError                       3      one image, mask or label file (the run goes on without it)
    |-- NothingToDoError                4      no image where images were expected
    |-- ModelError                      5      a model file that is not ours, damaged or too new
    |   `-- ParityError                 5      two forms of a model do not count the same
    |-- OutputError                     6      an output folder that cannot be written, or is another run's
    |   `-- OutputInUseError            7      another process is writing there
    `-- BackendUnavailableError         8      the asked-for engine or device is not here

A message says what was received, what was expected and how to put it right. Library code raises these; only the
commands in ``cli`` turn them into text and an exit code.
"""

from __future__ import annotations


class CellsegError(Exception):
    """Root of the tree; ``exit_code`` is what a command ends with when this error stops it.

    >>> try:
    ...     model("missing.png")
    ... except CellsegError as error:
    ...     print(error)
    missing.png: cannot be read: No such file or directory
    """

    exit_code = 1


class UsageError(CellsegError, ValueError):
    """A setting outside its range, or two that contradict each other."""

    exit_code = 2


class DataError(CellsegError):
    """An image, mask or label file that cannot be used. A folder run records it and goes on."""

    exit_code = 3


class NothingToDoError(CellsegError):
    """There was no input to work on."""

    exit_code = 4


class ModelError(CellsegError):
    """A model file that is missing, damaged, not written by cellseg-export, or too new for this version."""

    exit_code = 5


class ParityError(ModelError):
    """Two forms of one network disagree by more than the policy allows, or too little was seen to judge."""


class OutputError(CellsegError):
    """The output folder cannot be written, or holds something that is not this run's."""

    exit_code = 6


class OutputInUseError(OutputError):
    """Another process holds the lock of the output folder."""

    exit_code = 7


class BackendUnavailableError(CellsegError):
    """The inference engine or device that was asked for is not available here."""

    exit_code = 8


def concerns_one_image(error: BaseException) -> bool:
    """Whether ``error`` ends the work on one image and no more; else the whole run ends.

    That is ``DataError``, lack of memory, and what nobody foresaw: ours to mend, but the other ten thousand images of
    the night must not pay for it. Errors of model, engine, output or settings would meet every image; an interrupt
    means all of them.
    """
    return isinstance(error, DataError) or (isinstance(error, Exception) and not isinstance(error, CellsegError))
