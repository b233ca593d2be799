"""The file of the network's answers: what a worker wrote is appended, and errors name the file that they concern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellseg_deploy.errors import OutputError
from cellseg_deploy.slides.network import ProbabilityFile


def test_rows_are_appended_from_memory_and_from_a_file_which_is_removed(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    stored, band = ProbabilityFile(tmp_path / "stored", 2, (4, 3)), tmp_path / "band"
    band.write_bytes(rows[2:].tobytes())
    stored.append(rows[:2])
    stored.append(band)
    assert not band.exists()
    assert np.array_equal(stored.read(slice(0, 4), slice(0, 3)), rows.transpose(1, 0, 2))


def test_a_file_of_a_worker_that_is_gone_is_what_cannot_be_read(tmp_path: Path) -> None:
    stored = ProbabilityFile(tmp_path / "stored", 2, (4, 3))
    with pytest.raises(OutputError, match=r"band: cannot be read \(No such file or directory\)"):
        stored.append(tmp_path / "band")
    assert stored.rows_done == 0
