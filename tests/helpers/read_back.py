"""Output files as the programs they are for see them: regions of ImageJ, objects of QuPath, masks of COCO."""

from __future__ import annotations

import contextlib
import io
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# pycocotools 2.0.11 decodes by a call that numpy 2 advises against.
quiet_decoding = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def regions(data: bytes) -> Iterator[Any]:
    """The regions of a ROI zip, in order."""
    roifile = pytest.importorskip("roifile")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} <= {(1980, 1, 1, 0, 0, 0)}  # the same bytes tomorrow
        for name in archive.namelist():
            roi = roifile.ImagejRoi.frombytes(archive.read(name))
            assert name == f"{roi.name}.roi"
            yield roi


def rings_of(roi: Any) -> list[np.ndarray]:
    """Corners of each ring, and that the kind of region is one that ImageJ makes of such corners."""
    import roifile

    expected = roifile.ROI_TYPE.RECT if roi.composite else roifile.ROI_TYPE.TRACED
    assert roi.roitype == expected
    return [np.asarray(ring, int) for ring in roi.coordinates(multi=True)]


def area_of(roi: Any) -> float:
    """Area that ImageJ measures: rings one way round count, those the other way are holes."""
    shapely = pytest.importorskip("shapely")
    area = 0.0
    for ring in rings_of(roi):
        area += shapely.Polygon(ring).area * (1 if shapely.LinearRing(ring).is_ccw else -1)
    return area


def check_qupath(content: Any) -> None:
    """What QuPath 0.4 to 0.6 reads of a GeoJSON file, and of what type (its GsonTools and their tests)."""
    assert content["type"] == "FeatureCollection"
    ids = [feature["id"] for feature in content["features"]]
    assert len(set(ids)) == len(ids)
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        uuid.UUID(feature["id"])
        kind, coordinates = feature["geometry"]["type"], feature["geometry"]["coordinates"]
        assert kind in ("Polygon", "MultiPolygon")
        for polygon in [coordinates] if kind == "Polygon" else coordinates:
            assert all(ring[0] == ring[-1] and len(ring) >= 5 for ring in polygon)
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert isinstance(properties["name"], str)
        assert isinstance(properties["classification"]["name"], str)
        assert all(type(part) is int and 0 <= part <= 255 for part in properties["classification"]["color"])
        assert len(properties["classification"]["color"]) == 3
        for name, value in properties["measurements"].items():
            assert isinstance(name, str)
            assert type(value) in (int, float)  # Map<String, Double>: true, null and text are refused


def coco_of(path: Path) -> Any:
    """The ``pycocotools.coco.COCO`` of a file, read without the lines it prints."""
    coco = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        return coco.COCO(str(path))
