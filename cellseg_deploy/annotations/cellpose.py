"""Cellpose's ``NAME_seg.npy``: a pickled dictionary, whose ``masks`` are the label image.

A pickle can run any program when it is opened. Here only what Cellpose writes can be made: numpy arrays, types and
numbers, and Python's own containers; a name of anything else raises before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError

_EXPECTED = "expected NAME_seg.npy of Cellpose, with a label image (height, width) as its masks, or that array alone"
_NUMPY = {  # numpy renamed the package between versions 1 and 2
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
}


class _OnlyArrays(pickle.Unpickler):
    """Makes numpy arrays and plain containers, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor of numpy. Raises ``pickle.UnpicklingError`` for every other name."""
        if (module, name) in _NUMPY:
            return super().find_class(module, name)
        if module == "numpy.dtypes" and name.endswith("DType") and name.isidentifier():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is no array; nothing of it was run")


def read_masks(path: Path) -> npt.NDArray[np.integer[Any]]:
    """Return the label image (h, w) in ``path``, integers from 0. Raises ``DataError``; runs nothing from the file."""
    try:
        data = path.read_bytes()
        content = _content(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: no array that can be read: {error or type(error).__name__}; {_EXPECTED}") from error
    if isinstance(content, dict):
        if "masks" not in content:
            raise DataError(f"{path}: no masks among {', '.join(map(str, list(content)[:8]))}; {_EXPECTED}")
        content = content["masks"]
    if not isinstance(content, np.ndarray) or content.ndim != 2 or content.dtype.kind not in "iub" or not content.size:
        said = f"{content.dtype} {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__
        raise DataError(f"{path}: {said}; {_EXPECTED}")
    labels = content.astype(np.int64)
    if int(labels.min()) < 0 or int(labels.max()) >= 2**31:
        raise DataError(f"{path}: numbers from {labels.min()} to {labels.max()}; {_EXPECTED}")
    return labels


def _content(data: bytes) -> Any:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read_header[version](file)
    if not dtype.hasobject:
        return np.load(io.BytesIO(data), allow_pickle=False)
    array = _OnlyArrays(file).load()
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError("its header and its content differ")
    return array.item() if array.size == 1 else array
