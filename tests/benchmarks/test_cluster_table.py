"""``python -m cellseg_benchmarks cluster``: the same results in one process and on clusters, and their times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import cluster
from cellseg_benchmarks.harness.timer import Plan
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError


def test_the_command_compares_a_cluster_with_one_process(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    out = tmp_path / "out"
    size = ["--images", "2", "--megapixels", "0.1", "--rounds", "1", "--workers", "1"]
    assert run(cli.command, ["cluster", *size, "-q", "-o", str(out)]) == 0
    found = json.loads((out / "cluster.json").read_text())
    assert list(found["runs"]) == [cluster.ALONE, "a cluster of 1 worker"]
    assert found["start_seconds"]["a cluster of 1 worker"] > 0
    assert "label images and tables are the same" in (out / "cluster.md").read_text()


@pytest.mark.parametrize("other", ["labels", "cells.csv"])
def test_other_results_are_an_error(tmp_path: Path, other: str) -> None:
    def count(out: Path, text: str) -> None:
        (out / "labels").mkdir(parents=True)
        (out / "labels/a.tif").write_text(text if other == "labels" else "same")
        (out / "cells.csv").write_text(text if other == "cells.csv" else "same")

    runs = {cluster.ALONE: lambda out: count(out, "a"), "another": lambda out: count(out, "b")}
    with pytest.raises(DataError, match="another are not those of one process"):
        cluster.measure(runs, tmp_path, Plan(1, 1, 0, 0), say=lambda _: None)
    assert cluster.measure({cluster.ALONE: runs[cluster.ALONE]}, tmp_path, Plan(1, 1, 0, 0), say=lambda _: None)
