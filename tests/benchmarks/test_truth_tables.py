"""``python -m cellseg_benchmarks truths``: its tables hold the recorded numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cellseg_benchmarks.quality.truths import read_scores, truths_command
from cellseg_deploy.errors import DataError, UsageError


def write(folder: Path, name: str, **metrics: Any) -> None:
    place = folder / name
    place.mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps(metrics))


def test_a_row_per_network_with_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    white = {"WBC": {"n": 12, "recall": 0.75}}
    write(tmp_path, "masks-0/bccd", f1=0.8, recall_overlapping=0.5, n_overlapping=4, by_class=white)
    write(tmp_path, "masks-1/bccd", f1=0.9, recall_overlapping=0.7, n_overlapping=4, by_class=white)
    write(
        tmp_path,
        "with-instances-0/bccd",
        f1=0.95,
        recall_overlapping=1.0,
        n_overlapping=0,
        by_class={"leukocyte": {"n": 1, "recall": 1.0}},
    )
    done = CliRunner().invoke(truths_command, [str(tmp_path), "--networks", "with-instances,masks"])
    assert done.exit_code == 0, done.output
    f1, overlapping, whites = done.output.split("**")[2::2]
    assert "| `with-instances` | 1 | 0.950 |\n| `masks` | 2 | 0.850 ± 0.071 |" in f1
    assert "| `with-instances` | 1 |  |\n| `masks` | 2 | 0.600 ± 0.141 |" in overlapping
    assert "| `masks` | 2 | 0.750 ± 0.000 |" in whites


def test_what_is_not_an_evaluation_against_boxes_or_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected files NETWORK-SEED/FIELDS/metrics[.]json"):
        read_scores(tmp_path)
    write(tmp_path, "masks-0/val", dice=0.9)
    with pytest.raises(DataError, match="expected an evaluation with --boxes or --points"):
        read_scores(tmp_path)
