"""``log.csv`` and TensorBoard of a run, cut back to the last checkpoint when it is resumed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from cellseg_deploy.files.atomic import write_bytes

LOG_FILE = "log.csv"


class TrainingLog:
    """One row per epoch, on disk as soon as it is added."""

    def __init__(self, run: Path, keep_epochs: int) -> None:
        """Drop rows after ``keep_epochs``: they were written by updates that were lost when the run was killed."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / LOG_FILE
        self._rows = [row for row in read_log(run) if int(row["epoch"]) <= keep_epochs]
        self._board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=keep_epochs + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Append ``row``; numbers also go to TensorBoard under their column's name."""
        self._rows.append({name: _text(value) for name, value in row.items()})
        # Rewritten each time: validation adds columns to some epochs, and a truncated last line would break resuming.
        columns = list(dict.fromkeys(name for entry in self._rows for name in entry))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_bytes(self._path, buffer.getvalue().encode())
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self._board.add_scalar(name.replace("val_", "val/"), value, row["epoch"])
        self._board.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._board.close()


def read_log(run: Path) -> list[dict[str, str]]:
    """Rows of ``log.csv``; empty if the file does not exist yet."""
    path = run / LOG_FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
