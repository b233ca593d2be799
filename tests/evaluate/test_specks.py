"""Which objects of a truth are specks, and that whoever drops some says so and remembers by which rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from conftest import draw_discs, make_spec

from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate import command
from cellseg_deploy.errors import ModelError
from cellseg_deploy.evaluate.specks import areas_of, speck_limit
from cellseg_deploy.models.spec import MIN_OBJECT_REL, from_json, to_json


def test_the_limit_is_a_share_of_the_median_of_what_is_no_speck() -> None:
    cells, crumbs = np.full(50, 8178), np.full(200, 3)
    limit = speck_limit(np.concatenate([cells, crumbs]), share=0.1)
    assert (limit.px, limit.dropped, limit.total) == (0, 0, 250)  # mostly crumbs: then these are the objects
    limit = speck_limit(np.concatenate([cells, crumbs[:30]]), share=MIN_OBJECT_REL)
    assert (limit.px, limit.share, limit.dropped) == (200, pytest.approx(0.0245, abs=1e-4), 30)
    assert "30 of 80 in the masks dropped" in limit.words


def test_crumbs_do_not_move_the_limit() -> None:
    areas = np.concatenate([np.arange(1000, 2000), np.full(900, 2)])
    assert speck_limit(areas, share=0.1).px == speck_limit(areas[:1000], share=0.1).px == 150


def test_numbers_that_no_object_has_are_no_objects() -> None:
    labels = np.zeros((4, 4), np.int32)
    labels[0, :3], labels[3, 3] = 7, 2
    assert areas_of([labels, np.zeros((2, 2), np.int32)]).tolist() == [1, 3]


def test_small_cells_are_kept_and_a_given_limit_holds() -> None:
    nuclei = np.arange(40, 400)
    assert speck_limit(nuclei, share=MIN_OBJECT_REL).dropped == 0
    limit = speck_limit(nuclei, share=MIN_OBJECT_REL, given_px=200)
    assert (limit.px, limit.dropped) == (200, 160)
    assert limit.share == pytest.approx(200 / np.median(nuclei[nuclei >= 200]), abs=1e-4)
    assert speck_limit(np.zeros(0, np.int64), share=0.1).total == 0


def test_a_model_remembers_its_limit_and_older_ones_load() -> None:
    spec = make_spec(min_object_rel=0.1)
    assert from_json(to_json(spec), source="m").min_object_rel == 0.1
    old = json.loads(to_json(spec))
    del old["min_object_rel"]
    assert from_json(json.dumps(old), source="m").min_object_rel is None
    with pytest.raises(ModelError, match="min_object_rel"):
        from_json(to_json(msgspec.structs.replace(spec, min_object_rel=-1.0)), source="m")


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    """Discs of radius 6 (about 113 px) and 3 (about 29 px): all below the 200 px of full-size photographs."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    image = np.minimum(
        draw_discs((80, 90), [(20, 20), (60, 30), (40, 60)], radius=6), draw_discs((80, 90), [(70, 70)], radius=3)
    )
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    cv2.imwrite(str(tmp_path / "masks" / "a.png"), np.where(image[..., 0] < 200, 255, 0).astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("share", "extra", "dropped", "limit"),
    [(None, [], 0, 3), (0.5, [], 1, 56), (0.5, ["--min-object", 10], 0, 10), (None, ["--min-area", 200], 4, 200)],
)
def test_an_evaluation_takes_the_models_share_and_says_what_it_dropped(
    nuclei: Path,
    onnx_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    share: float | None,
    extra: list[object],
    dropped: int,
    limit: int,
) -> None:
    model = onnx_file(spec=make_spec(min_object_rel=share))
    data = ["--model", model, "--images", nuclei / "images", "--masks", nuclei / "masks", "-o", nuclei / "out", *extra]
    assert console.run(command, [str(argument) for argument in data]) == 0
    record = json.loads((nuclei / "out" / "metrics.json").read_text("utf-8"))
    assert (record["n_true_dropped"], record["n_true"]) == (dropped, 4 - dropped)
    assert record["min_area_px"] == pytest.approx(limit, abs=1)
    assert f"{dropped} of 4 in the masks dropped" in capsys.readouterr().out
