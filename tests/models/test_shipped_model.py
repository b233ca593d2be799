"""The model that ships: what it says of itself, and what it counts on smears whose truth is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cellseg_deploy import Segmenter
from cellseg_deploy.annotations.read import read_annotations
from cellseg_deploy.annotations.score import pool_marks, score_marks
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cells.classes import counting_labels
from cellseg_deploy.cells.metrics import pool, score_image
from cellseg_deploy.images.read import pair_by_stem, read_image, read_labels
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.samples import make_smear, random_params

MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def segmenter():
    pytest.importorskip("onnxruntime")
    with Segmenter.load(scale=None) as opened:
        yield opened


def test_it_is_one_small_file_that_was_verified():
    path = default_model_path()
    assert path.stat().st_size <= MAX_BYTES
    spec = read_model_file(path).spec
    assert spec.variant == "boundary"
    assert spec.classes == ("red", "white", "platelet")
    assert spec.operating_points.keys() == {"counting", "confluence"}
    assert spec.parity.startswith("verified")


def test_its_card_names_the_file_that_lies_beside_it():
    path = default_model_path()
    card = path.with_suffix(".md").read_text()
    for file in (path, path.with_suffix(".safetensors")):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    for word in ("BBBC041", "CC BY-NC-SA 3.0", "cellseg-train"):
        assert word in card


def test_its_weights_are_those_of_the_onnx_file(segmenter):
    torch = pytest.importorskip("torch")
    from cellseg_export.gate.torch_backend import TorchBackend
    from cellseg_train.checkpoint import load_network

    loaded = load_network(default_model_path().with_suffix(".safetensors"))
    assert loaded.spec.operating_points == segmenter.backend.spec.operating_points
    smear = make_smear(random_params(np.random.default_rng(8), size_hw=(450, 600)), seed=8)
    with TorchBackend(loaded, "cpu") as backend, torch.inference_mode():
        reference = Segmenter(backend)(smear.image_hwc)
    result = segmenter(smear.image_hwc)
    assert np.array_equal(reference.labels, result.labels)
    assert np.abs(reference.probabilities_khw - result.probabilities_khw).max() < 1e-3


@pytest.fixture(scope="module")
def smears():
    rng = np.random.default_rng(2026)
    return [make_smear(random_params(rng, size_hw=(900, 1200)), seed=seed) for seed in range(6)]


def test_it_counts_sample_smears(segmenter, smears):
    pooled = pool([score_image(smear.labels_hw, segmenter(smear.image_hwc).labels) for smear in smears])
    assert pooled["f1"] >= 0.9
    assert pooled["dice"] >= 0.95


def test_a_shifted_tile_grid_changes_the_count_by_at_most_one_percent(segmenter, smears):
    """Cutting rows and columns off moves every seam; cells far from the cut are the same and must be counted so."""
    far = 46 + 150  # px; no cell that the largest cut touches has its centre there
    counts = np.zeros(4, int)
    for smear in smears:
        for i, shift in enumerate((0, 10, 20, 46)):
            columns = segmenter(smear.image_hwc[shift:, shift:]).table.columns
            counts[i] += ((columns["centroid_x_px"] + shift > far) & (columns["centroid_y_px"] + shift > far)).sum()
    assert counts[0] > 200
    assert np.abs(counts - counts[0]).max() <= 0.01 * counts[0], counts


@pytest.mark.parametrize("hw", [(1, 1), (13, 700), (224, 224), (225, 301)])
def test_any_size_works_and_nothing_is_seen_in_an_empty_field(segmenter, hw):
    result = segmenter(np.full((*hw, 3), 235, np.uint8))
    assert result.labels.shape == hw
    assert result.count == 0


def test_batch_size_and_threads_change_nothing(segmenter, smears):
    expected = segmenter(smears[0].image_hwc).labels
    for settings in ({"batch_size": 1}, {"batch_size": 16}, *({"engine": EngineOptions(threads=n)} for n in (1, 2))):
        with Segmenter.load(scale=None, **settings) as other:
            assert np.array_equal(other(smears[0].image_hwc).labels, expected)


@pytest.mark.real
def test_it_holds_its_floor_on_the_validation_photographs(segmenter, real_data: Path):
    """By boxes, which have every overlapping cell, and by masks without objects at the border, which lack slivers."""
    folder = real_data / "bbbc041seg" / "val"
    pairs = pair_by_stem(folder / "images", folder / "masks")
    images = {pair.image.name: read_image(pair.image).pixels_hwc for pair in pairs}
    sizes = {name: image.shape[:2] for name, image in images.items()}
    boxes = read_annotations(real_data / "bbbc041_boxes" / "boxes_90.csv", "boxes", sizes)
    by_masks, by_boxes = [], []
    for pair in pairs:
        found = segmenter(images[pair.image.name])
        labels = counting_labels(found.labels, found.classes)  # without platelets, which have neither mask nor box
        by_masks.append(score_image(read_labels(pair.mask), labels))
        by_boxes.append(score_marks(boxes.by_image[pair.image.name], labels))
    pooled, marks = pool(by_masks), pool_marks(by_boxes)
    assert pooled["dice_inner"] >= 0.96
    assert marks["f1"] >= 0.94
    assert marks["recall_overlapping"] >= 0.87
    assert abs(marks["count_bias"]) <= 2.5
