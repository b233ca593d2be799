"""cells.csv as Parquet, for pandas, polars, DuckDB and R: the same rows and values, typed and much smaller.

Written when the run ends, from the finished cells.csv: Parquet's index is at the end of the file, so a file that grew
during the run would be lost if the process were killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellseg_deploy.cells.classes import CLASS
from cellseg_deploy.files.atomic import atomic_file, writing
from cellseg_deploy.outputs.segmented import COUNTED, LEFT_OUT_BY

_TEXTS = ("image", CLASS, LEFT_OUT_BY)
_BOOLEANS = ("touches_border", COUNTED)
_BLOCK_BYTES = 1 << 22


def write(cells_csv: Path, path: Path) -> None:
    """Write the table ``cells_csv`` to ``path``: text, integers, booleans, and doubles for everything else.

    Values are those of the CSV, with its number of digits. A few megabytes of the table are in memory at a time.
    Raises ``OutputError`` if ``path`` cannot be written.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    with cells_csv.open(encoding="utf-8", newline="") as file:
        schema = pa.schema([(name, _type(name, pa)) for name in file.readline().rstrip("\n").split(",")])
    reader = csv.open_csv(
        cells_csv,
        read_options=csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=schema, strings_can_be_null=False),
    )
    with (
        reader,
        atomic_file(path) as out,
        writing(path),
        parquet.ParquetWriter(out, schema, compression="zstd") as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)


def _type(column: str, pa: Any) -> Any:
    if column in _TEXTS:
        return pa.string()
    if column in _BOOLEANS:
        return pa.bool_()
    return pa.int64() if column in ("label", "area_px") or column.startswith("bbox") else pa.float64()
