"""Evaluation as a library: pairs through a model side by side, in order, whole or not at all."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from made_jobs import our_threads
from PIL import Image

from cellseg_deploy.errors import DataError
from cellseg_deploy.evaluate.score import Predictor, predicted_pairs, score_pairs
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import Pair, pair_by_stem
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

N_PAIRS = 14


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Image number i is 60 + i px wide, with one disc, and with two where i is odd; the masks always have one."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(N_PAIRS):
        hw = (40, 60 + index)
        image = draw_discs(hw, [(15, 15), (45, 20)][: 1 + index % 2])
        mask = draw_discs(hw, [(15, 15)])[..., 0] < 200
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index:02}.png")
    return pair_by_stem(tmp_path / "images", tmp_path / "masks")


def predictor(backend: DarknessBackend | None = None, **settings: Any) -> Predictor:
    return Predictor(Segmenter(backend or DarknessBackend(), batch_size=5), ThreadPlan(None, 3), **settings)


@pytest.mark.parametrize("keep", [False, True])
def test_pairs_are_scored_in_order_as_each_alone(pairs: list[Pair], keep: bool) -> None:
    backend = DarknessBackend()
    found = list(score_pairs(pairs, predictor(backend, keep_probabilities=keep), min_area_px=50))
    assert [image.name for image in found] == [f"{index:02}" for index in range(N_PAIRS)]
    alone = Segmenter(DarknessBackend())
    for index, image in enumerate(found):
        one = alone(np.asarray(Image.open(pairs[index].image)))
        assert np.array_equal(image.labels, one.labels)
        assert (image.score.n_true, image.score.n_predicted) == (1, 1 + index % 2)
        assert image.true_labels.shape == (40, 60 + index)
        if keep:
            assert np.array_equal(image.probabilities_khw, one.probabilities_khw)
        else:
            assert image.probabilities_khw is None
    assert sum(backend.batches) == 2 * N_PAIRS  # tiles of 56 px
    assert max(backend.batches) <= 5


def test_label_images_are_scored_without_a_model(pairs: list[Pair]) -> None:
    own = [Pair(pair.stem, pair.mask, pair.mask) for pair in pairs]
    assert [image.score.n_predicted for image in score_pairs(own, None, min_area_px=50)] == [1] * N_PAIRS


def test_one_unusable_file_stops_it_after_those_before(pairs: list[Pair]) -> None:
    pairs[5].mask.write_bytes(b"")
    Image.fromarray(draw_discs((40, 41), [])).save(pairs[7].image)
    seen: list[str] = []
    with pytest.raises(DataError, match=r"05\.png.*empty"):
        seen.extend(image.name for image in score_pairs(pairs, predictor(), min_area_px=50))
    assert seen == ["00", "01", "02", "03", "04"]
    with pytest.raises(DataError, match="of one size"):
        list(score_pairs(pairs[6:], predictor(), min_area_px=50))


def test_leaving_early_ends_the_threads(pairs: list[Pair]) -> None:
    with closing(predicted_pairs(pairs, predictor(), lambda pair, true, found: (pair.stem, found.count))) as found:
        assert next(found) == ("00", 1)
        assert our_threads()
    assert not our_threads()


def test_photographs_that_are_too_large_are_refused(pairs: list[Pair]) -> None:
    with pytest.raises(DataError, match="`max_pixels`"):
        list(score_pairs(pairs, predictor(reading=ReadOptions(max_pixels=1000)), min_area_px=50))
