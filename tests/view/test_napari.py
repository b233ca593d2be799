"""napari's reader, asked as napari asks it: through npe2 and the manifest. napari itself is not needed."""

from __future__ import annotations

import csv
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import ROOT, draw_discs
from PIL import Image
from view_stub import make_run

from cellseg_deploy.errors import UsageError
from cellseg_deploy.view import napari_reader
from cellseg_deploy.view.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, about npe2's own models
MANIFEST = ROOT / "cellseg_deploy" / "view" / "napari.yaml"


@pytest.fixture(scope="module")
def npe2() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about npe2's own models
        return pytest.importorskip("npe2", reason="pip install -e '.[dev]'")


@pytest.fixture
def manager(npe2: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """npe2's manager with this plugin alone."""
    found = npe2.PluginManager()
    found.register(npe2.PluginManifest.from_file(MANIFEST))
    monkeypatch.setattr(npe2.PluginManager, "instance", lambda: found)
    return found


def opened(manager: Any, path: Path) -> list[Any]:
    import npe2

    assert npe2.PluginManager.instance() is manager
    found: list[Any] = npe2.read([str(path)], stack=False)
    return found


def test_the_manifest_is_valid_and_found_by_its_entry_point(npe2: Any) -> None:
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert manifest.name == project["project"]["name"]
    assert project["project"]["entry-points"]["napari.manifest"] == {manifest.name: "cellseg_deploy.view:napari.yaml"}
    assert "view/napari.yaml" in project["tool"]["setuptools"]["package-data"]["cellseg_deploy"]


def test_a_run_opens_as_photographs_labels_and_tables(manager: Any, out: Path) -> None:
    layers = opened(manager, out)
    assert [(about["name"], kind) for _, about, kind in layers] == [  # the image that failed has none
        ("a.png", "image"),
        ("a.png cells", "labels"),
        ("sub/b<i>.png", "image"),
        ("sub/b<i>.png cells", "labels"),
    ]
    assert [about["visible"] for _, about, _ in layers] == [True, True, False, False]
    (pixels, *_), (labels, about, _) = layers[:2]
    assert pixels.shape == (*labels.shape, 3)
    assert np.array_equal(labels, tifffile.imread(out / "labels" / "a.png.tif"))
    with (out / "cells.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == "a.png"]
    features = about["features"]
    assert features["index"] == features["label"] == [1, 2]
    assert features["area_px"] == [int(row["area_px"]) for row in rows]
    assert features["solidity"] == [float(row["solidity"]) for row in rows]
    assert features["counted"] == [True, True]
    assert {len(column) for column in features.values()} == {2}


def test_classes_stay_text_even_if_they_are_numbers(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"label": "1", "area_px": "40", "solidity": "0.5000", "class": "1", "counted": "true", "left_out_by": "class"}
    monkeypatch.setattr(Source, "cells_of", lambda *_: [row, row | {"class": "true", "left_out_by": ""}])
    features = napari_reader.read(str(out))[1][1]["features"]
    assert features["class"] == ["1", "true"]
    assert features["left_out_by"] == ["class", ""]
    assert (features["area_px"], features["solidity"], features["counted"]) == ([40, 40], [0.5, 0.5], [True, True])


def test_a_label_image_opens_its_image_alone_with_its_corrections(manager: Any, workspace: Any, ids: Any) -> None:
    out = workspace.source.out
    workspace.edit(ids.a, {"op": "delete", "cells": [2]})
    workspace.save()
    layers = opened(manager, out / "labels" / "a.png.tif")
    assert [about["name"] for _, about, _ in layers] == ["a.png", "a.png cells", "a.png corrected"]
    assert [int(data.max()) for data, *_ in layers[1:]] == [2, 1]


def test_other_files_are_left_to_other_readers(manager: Any, tmp_path: Path, out: Path) -> None:
    tifffile.imwrite(tmp_path / "labels.tif", np.zeros((4, 4), np.uint8))
    assert napari_reader.get_reader(str(tmp_path / "labels.tif")) is None
    assert napari_reader.get_reader(str(tmp_path)) is None
    assert napari_reader.get_reader([str(out)]) is None  # a stack of images
    with pytest.raises(ValueError, match="No readers"):
        opened(manager, tmp_path / "labels.tif")
    tifffile.imwrite(out / "labels" / "other.tif", np.zeros((4, 4), np.uint8))
    with pytest.raises(UsageError, match=r"other\.tif: belongs to no finished image of the run"):
        napari_reader.read(str(out / "labels" / "other.tif"))


def test_of_a_large_run_the_first_images_open_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(tmp_path / "in" / f"{name}.png")
    make_run(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr(napari_reader, "MOST_IMAGES", 2)
    with pytest.warns(UserWarning, match=r"the first 2 of 3 images are opened; open labels/NAME\.tif"):
        layers = napari_reader.read(str(tmp_path / "out"))
    assert [about["name"] for _, about, _ in layers[::2]] == ["a.png", "b.png"]
