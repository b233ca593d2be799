"""cellseg-train --corrections: corrected images train, every second one is held out, nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from view_stub import StubWorkspace, make_run

from cellseg_deploy.cli import console
from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.read import pair_by_stem
from cellseg_deploy.samples import write_samples
from cellseg_deploy.view.source import open_source
from cellseg_train import corrected
from cellseg_train.checkpoint import load_network
from cellseg_train.cli import command

FAST = [
    "--tile-size", "112", "--tiny-width", "48", "--tiny-depth", "2", "--decoder-channels", "32,24,16", "--epochs", "2",
    "--image-skip", "16,16,16", "--batch-size", "8", "--patches-per-image", "2", "--image-scale", "0.4",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """A run over seven smears: five are corrected or confirmed, one was and is no more, one is untouched."""
    folder = tmp_path_factory.mktemp("counted")
    write_samples(folder, 7, 3, (150, 200))
    out = make_run(folder / "images", folder / "out")
    with StubWorkspace(open_source(out)) as workspace:
        keys = list(workspace.source.images)
        for number, key in enumerate(keys[:6]):
            workspace.edit(key, {"op": "draw", "outline": [[0, 0], [12, 0], [12, 9], [0, 9]], "class": "white"})
            if number == 2:
                workspace.undo(key)
            if number == 3:
                workspace.undo(key)
                workspace.confirm(key, value=True)
    return out


def stems(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.iterdir())]


def test_every_second_image_is_held_out_and_stays_there(counted, tmp_path) -> None:
    taken = corrected.take(counted, tmp_path, hold_out=True)
    assert stems(taken.images) == stems(taken.masks) == ["0001-smear-000", "0005-smear-004"]
    assert taken.held_out is not None
    assert stems(taken.held_out / "images") == ["0002-smear-001", "0004-smear-003", "0006-smear-005"]
    assert len(pair_by_stem(taken.held_out / "images", taken.held_out / "masks")) == 3  # as cellseg-evaluate reads it
    everything = corrected.take(counted, tmp_path / "all", hold_out=False)
    assert (everything.n_train, everything.held_out) == (5, None)


def test_labels_are_the_corrected_ones_and_photographs_the_originals(counted, tmp_path) -> None:
    taken = corrected.take(counted, tmp_path, hold_out=True)
    for stem in stems(taken.images):
        name = f"{stem.partition('-')[2]}.png"
        assert (taken.images / f"{stem}.png").read_bytes() == (counted.parent / "images" / name).read_bytes()
        made = tifffile.imread(taken.masks / f"{stem}.tif")
        assert (made == tifffile.imread(counted / "corrections" / f"{name}.tif")).all()
        assert made.max() == tifffile.imread(counted / "labels" / f"{name}.tif").max() + 1
    with taken.classes.open() as file:
        rows = file.read().splitlines()
    assert rows[0] == "image,label,class"
    assert sum(row.startswith("train/images/") and row.endswith(",white") for row in rows) == 2


def test_a_photograph_that_moved_is_named_and_few_corrections_are_refused(counted, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"has no corrections/corrections\.jsonl"):
        corrected.take(tmp_path, tmp_path / "run", hold_out=True)
    folder = tmp_path / "few"
    folder.mkdir()
    Image.fromarray(np.full((40, 40, 3), 60, np.uint8)).save(folder / "a.png")
    out = make_run(folder, tmp_path / "out")
    with StubWorkspace(open_source(out)) as workspace:
        workspace.confirm(next(iter(workspace.source.images)), value=True)
    with pytest.raises(UsageError, match="1 images to train on and 0 held out"):
        corrected.take(out, tmp_path / "run", hold_out=True)


def test_a_network_learns_from_corrections(counted, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert console.run(command, ["--corrections", str(counted), "-o", str(run), *FAST]) == 0
    split = json.loads((run / "split.json").read_text())
    assert sorted(split["train"] + split["val"]) == ["0001-smear-000", "0005-smear-004"]
    assert load_network(run).spec.training.n_train_images == 1
    said = capsys.readouterr().err
    assert "2 corrected images to train on, 3 held out" in said
    assert f"cellseg-evaluate --images {run / 'corrected' / 'held-out' / 'images'}" in said


@pytest.mark.parametrize(
    "options", [["--images", ".", "--masks", ".", "--no-hold-out"], ["--corrections", ".", "--masks", "."]]
)
def test_options_that_do_not_fit_are_refused(tmp_path, options) -> None:
    assert console.run(command, [*options, "-o", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
