"""Memory of worker processes: Dask starts them so that the C library returns freed memory to the system at once.

Dask sets ``MALLOC_TRIM_THRESHOLD_=65536`` for them, which suits clusters that keep data in memory. Here each image
frees large arrays and the next one takes them again, so the system has to clear their pages for every image. A folder
of 60 photographs took a quarter longer on one local worker of two cores.
"""

from __future__ import annotations

import ctypes
import os
import sys

_OF_DASK = "65536"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20
"""Where glibc's own adjustment ends in a process that frees large arrays: the most that ``M_MMAP_THRESHOLD`` may be."""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next image, as in a process that Dask did not start.

    Source of the numbers: mallopt(3). Does nothing for another C library, or another value of the variable.
    """
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_") != _OF_DASK:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _MMAP_BYTES)
