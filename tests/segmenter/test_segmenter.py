"""Segmenter: settings, scale, tiles, and what comes out of one image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_spec
from PIL import Image

import cellseg_deploy
from cellseg_deploy import segmenter as pipeline
from cellseg_deploy.errors import DataError, ModelError, UsageError
from cellseg_deploy.segmenter import Segmenter, resize
from cellseg_deploy.threads import ThreadPlan

README = Path(__file__).parents[2] / "README.md"
CENTRES = [(20, 20), (60, 22), (100, 70), (130, 110), (55, 90)]


@pytest.fixture
def image() -> np.ndarray:
    return draw_discs((140, 171), CENTRES)


def test_counts_the_discs_where_they_are(image: np.ndarray) -> None:
    result = Segmenter(DarknessBackend())(image)
    assert result.count == len(CENTRES)
    assert result.labels.shape == image.shape[:2]
    assert result.labels.dtype == np.int32
    assert result.probabilities_khw.shape == (1, 140, 171)
    found = np.column_stack([result.table.columns["centroid_x_px"], result.table.columns["centroid_y_px"]])
    assert sorted(found.tolist()) == pytest.approx(np.array(sorted(CENTRES)), abs=0.1)
    assert result.confluence == pytest.approx(len(CENTRES) * np.pi * 100 / (140 * 171), rel=0.02)
    assert set(result.seconds) == {"read", "resize", "tile", "network", "label", "measure"}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_result_does_not_depend_on_batch_size(image: np.ndarray, batch_size: int) -> None:
    backend = DarknessBackend()
    reference = Segmenter(DarknessBackend(), batch_size=5)(image)
    result = Segmenter(backend, batch_size=batch_size)(image)
    assert np.array_equal(result.probabilities_khw, reference.probabilities_khw)
    assert np.array_equal(result.labels, reference.labels)
    assert max(backend.batches) <= batch_size


def test_tiled_equals_untiled_for_a_local_network(image: np.ndarray) -> None:
    tiled = Segmenter(DarknessBackend())(image)
    whole = Segmenter(DarknessBackend(make_spec(tile_size=182, halo=0)))(image)
    assert np.array_equal(tiled.probabilities_khw, whole.probabilities_khw)
    assert np.array_equal(tiled.labels, whole.labels)


@pytest.mark.parametrize("hw", [(1, 1), (13, 5000), (57, 55), (56, 56), (3, 200)])
def test_any_size_works_without_cells(hw: tuple[int, int]) -> None:
    result = Segmenter(DarknessBackend())(np.full((*hw, 3), 230, np.uint8))
    assert result.labels.shape == hw
    assert result.count == 0
    assert len(result.table) == 0
    assert result.confluence == 0


def test_image_smaller_than_a_tile_keeps_its_cell() -> None:
    assert Segmenter(DarknessBackend())(draw_discs((30, 31), [(15, 15)])).count == 1


def test_scale_from_cell_diameter_gives_the_same_cells(image: np.ndarray) -> None:
    twice = np.repeat(np.repeat(image, 2, 0), 2, 1)
    by_diameter = Segmenter(DarknessBackend(), cell_diameter_px=40)
    assert by_diameter.scale == 0.5
    result = by_diameter(twice)
    assert result.count == len(CENTRES)
    assert result.labels.shape == twice.shape[:2]
    assert result.probabilities_khw.shape == (1, 140, 171)
    assert result.table.columns["equivalent_diameter_px"] == pytest.approx(40, rel=0.05)
    assert np.array_equal(Segmenter(DarknessBackend(), scale=0.5)(twice).labels, result.labels)


def test_default_scale_is_the_models() -> None:
    assert Segmenter(DarknessBackend(make_spec(image_scale=0.5))).scale == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "curing"}, "curing.*counting"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 1e9}, "scale"),
        ({"cell_diameter_px": -1.0}, "diameter"),
        ({"scale": 1.0, "cell_diameter_px": 20.0}, "exclude"),
        ({"batch_size": 0}, "batch size"),
        ({"halo": 28}, "halo 28.*56.*27"),
        ({"halo": -1}, "halo"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Segmenter(DarknessBackend(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 4), (0, 5, 3), (1, 5, 5, 3)])
def test_only_rgb_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="RGB"):
        Segmenter(DarknessBackend())(np.zeros(shape, np.uint8))


def test_logits_are_not_clipped_to_a_mask(image: np.ndarray) -> None:
    class Logits(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            return super()._predict(tiles_nhwc) * 20 - 10

    with pytest.raises(ModelError, match="sigmoid"):
        Segmenter(Logits())(image)


def test_rounding_past_one_is_clipped(image: np.ndarray) -> None:
    class Rounded(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            return super()._predict(tiles_nhwc) * np.float32(1.001)

    image[image < 200] = 0
    assert Segmenter(Rounded())(image).probabilities_khw.max() == 1.0


def test_nan_is_never_no_cells(image: np.ndarray) -> None:
    class Broken(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            return super()._predict(tiles_nhwc) * np.float32("nan")

    with pytest.raises(DataError, match="NaN"):
        Segmenter(Broken())(image)


def test_many_images_run_as_the_backend_and_the_plan_of_threads_want(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DarknessBackend()
    backend.batch_step = 3
    given: list[dict[str, object]] = []
    monkeypatch.setattr(pipeline, "Overlapped", lambda jobs, predict, **settings: given.append(settings))
    segmenter = Segmenter(backend, batch_size=5)
    segmenter.overlapped([], ThreadPlan(1, 7, exclusive=True))
    segmenter.overlapped([], ThreadPlan(None, 2))
    common = {"batch": 5, "step": 3}
    assert given == [common | {"helpers": 7, "exclusive": True}, common | {"helpers": 2, "exclusive": False}]


def test_resize_keeps_at_least_a_pixel_and_refuses_giants() -> None:
    assert resize(np.zeros((1, 40, 3), np.uint8), 0.1).shape == (1, 4, 3)
    with pytest.raises(DataError, match="`scale`"):
        resize(np.zeros((2000, 2000, 3), np.uint8), 30)


def test_halving_takes_the_mean_of_each_area() -> None:
    """As in training; a bilinear resize of odd ratio would skip pixels."""
    checks = (np.indices((12, 12)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = np.repeat(checks[..., None], 3, axis=2)
    assert np.abs(resize(image, 0.5).astype(int) - 128).max() <= 1
    quarter = resize(
        np.repeat((np.arange(12) % 4 == 0).astype(np.uint8)[None, :, None] * 200, 12, 0).repeat(3, 2), 0.25
    )
    assert quarter.shape == (3, 3, 3)
    assert (quarter == 50).all()


def test_context_manager_closes_the_backend() -> None:
    backend = DarknessBackend()
    with Segmenter(backend):
        pass
    assert backend.closed


def test_public_names_are_lazy_and_complete() -> None:
    assert cellseg_deploy.Segmenter is Segmenter
    assert set(dir(cellseg_deploy)) == {
        *("CellsegError", "EngineOptions", "Evaluation", "FolderResult", "ModelSpec", "ReadOptions", "Segmentation"),
        *("Segmenter", "__version__", "evaluate", "open_backend", "open_cluster", "parity"),
    }
    for name in cellseg_deploy.__all__:
        assert getattr(cellseg_deploy, name)
    with pytest.raises(AttributeError, match="nothing_here"):
        cellseg_deploy.nothing_here  # noqa: B018


def test_a_path_and_a_pil_image_are_taken_as_well(image: np.ndarray, tmp_path: Path) -> None:
    segmenter = Segmenter(DarknessBackend())
    expected = segmenter(image).labels
    picture = Image.fromarray(image)
    assert np.array_equal(segmenter(picture).labels, expected)
    picture.convert("L").save(tmp_path / "grey.png")
    for path in (tmp_path / "grey.png", str(tmp_path / "grey.png")):
        found = segmenter(path)
        assert np.array_equal(found.labels, expected)
        assert "grey image converted to RGB" in found.notes


@pytest.mark.parametrize("wrong", [["a.png", "b.png"], None, 3, b"bytes"])
def test_what_is_no_image_is_refused_by_its_type(wrong: object) -> None:
    with pytest.raises(UsageError, match=f"in binary mode, got {type(wrong).__name__}"):
        Segmenter(DarknessBackend())(wrong)
