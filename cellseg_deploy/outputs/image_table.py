"""The cells of one image as a table for Python users: columns by name, CSV as in cells.csv, pandas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from cellseg_deploy.cells.measure import CellTable
from cellseg_deploy.errors import check_types
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.outputs import tables
from cellseg_deploy.outputs.requirements import require_packages

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ImageTable(CellTable):
    """One row per cell, in order of label: the columns of cells.csv.

    ``image``: the image's name, the first column of the files. Micrometres are included if the pixel size is known.

    >>> table = model("smear.png").table
    >>> table["area_px"].shape == (len(table),)
    True
    >>> "solidity" in table.columns
    True
    """

    image: str = ""

    def __getitem__(self, column: str) -> npt.NDArray[Any]:
        """Return the values (n,) of ``column``: int64, float64 or bool. Raises ``KeyError`` for an unknown column."""
        try:
            return self.columns[column]
        except KeyError:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.columns)}") from None

    def to_csv(self, path: str | Path) -> None:
        """Write the table to ``path``, byte-equal to the cells.csv of a run over the image alone.

        Raises ``UsageError`` for another type of path, ``OutputError``.
        """
        check_types("a path", path=path)
        write_bytes(Path(path), self.csv())

    def csv(self) -> bytes:
        """Return the content that ``to_csv`` writes."""
        rows = zip(*(column.tolist() for column in self.columns.values()), strict=True)
        return tables.csv_rows([("image", *self.columns), *((self.image, *row) for row in rows)])

    def to_pandas(self) -> pandas.DataFrame:
        """Return a ``pandas.DataFrame`` with the column ``image`` first.

        Raises ``BackendUnavailableError`` if pandas is not installed.
        """
        require_packages("pandas", "pandas")
        import pandas

        frame = pandas.DataFrame(self.columns)
        frame.insert(0, "image", self.image)
        return frame
