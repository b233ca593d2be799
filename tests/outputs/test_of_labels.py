"""A label image as a result, without a network."""

from __future__ import annotations

import numpy as np

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.outputs.segmentation import of_labels


def test_the_edge_of_the_field_cuts_cells_and_classes_are_columns() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[10:18, 8:16], labels[10:18, 24:32] = 1, 2
    field = np.zeros(labels.shape, np.bool_)
    field[:, 8:] = True
    classes = CellClasses(("red", "white"), ("red",), np.array([0, 1]), np.array([0.9, 0.8]))
    pixels = np.zeros((*labels.shape, 3), np.uint8)
    found = of_labels(labels, measure(labels), pixels, field=field, classes=classes, model="drawn")
    assert found.measured.columns["touches_border"].tolist() == [True, False]
    assert found.measured.columns["class"].tolist() == ["red", "white"]
    whole = of_labels(labels, measure(labels), pixels, field=None, classes=None, model="drawn")
    assert not whole.measured.columns["touches_border"].any()
    assert "class" not in whole.measured.columns
