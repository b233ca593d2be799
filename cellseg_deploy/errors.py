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
commands in ``cli`` turn them into text and an exit code.
"""

from __future__ import annotations


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
