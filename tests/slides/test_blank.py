"""Blank tiles: the network is asked once per colour, nothing changes, and the share is said and shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import DarknessBackend, make_spec
from PIL import Image
from stopping import StopAfter
from test_run_slide import BoundaryBackend, mosaic

from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import files
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.network import bands_of
from cellseg_deploy.slides.region import ArrayReader, region_of
from cellseg_deploy.slides.run import run_slide


def sparse(noise: int = 0) -> npt.NDArray[np.uint8]:
    """A smear in the middle of glass of two colours, 660 x 780 px."""
    image = np.empty((660, 780, 3), np.uint8)
    image[:330], image[330:] = (236, 230, 228), (255, 255, 255)
    image[220:440, 260:520] = mosaic(1, 1)
    shift = np.random.default_rng(7).integers(-noise, noise + 1, image.shape)
    return np.clip(image + shift, 0, 255).astype(np.uint8)


class Vignette(DarknessBackend):
    """Sees cells on bright tiles too, in their left upper corner: a blank tile is not background to every network."""

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        out = super()._predict(tiles_nhwc)
        out[:, 0, 12:30, 12:30] = np.where(tiles_nhwc.mean(axis=(1, 2, 3)) > 200, 0.9, 0.1)[:, None, None]
        return out


@pytest.mark.parametrize("backend", [BoundaryBackend, Vignette])
def test_tiles_of_one_colour_change_nothing(tmp_path: Path, backend: type[DarknessBackend]) -> None:
    image = sparse()
    whole_of, model = (Segmenter(backend(make_spec(variant="boundary")), scale=0.8, batch_size=5) for _ in range(2))
    whole = whole_of(image, field="full")
    result = run_slide(model, region_of(ArrayReader(image)), tmp_path)
    assert np.array_equal(tifffile.imread(tmp_path / files.LABELS), whole.labels)
    assert whole.count > 15
    share = result.row["blank_share"]
    assert 0.5 < share < 0.9
    asked, tiles = (sum(each.backend.batches) for each in (model, whole_of))  # type: ignore[attr-defined]
    rest, spec = round(tiles * (1 - share)), model.backend.spec
    n_bands = len(bands_of(scaled_size((image.shape[0], image.shape[1]), 0.8), spec.tile_size, model.halo))
    assert rest < asked <= rest + 2 * n_bands < tiles  # a band asks for a tile of each of its colours
    assert not [note for note in result.notes if "blank" in note]


def test_the_overview_shows_which_tiles_are_blank(tmp_path: Path) -> None:
    image = sparse()
    run_slide(
        Segmenter(BoundaryBackend(make_spec(variant="boundary")), scale=0.8), region_of(ArrayReader(image)), tmp_path
    )
    overview = np.asarray(Image.open(tmp_path / slides.OVERVIEW)).astype(int)
    is_blue = (overview == (image.astype(int) + files.BLANK_RGB) // 2).all(axis=2)
    assert is_blue[:100].all()
    assert is_blue[-100:].all()
    assert is_blue[:, :100].mean() > 0.8  # tiles that hold both colours are not blank
    assert not is_blue[220:440, 260:520].any()


def test_glass_with_noise_is_skipped_only_if_asked_for(tmp_path: Path) -> None:
    image = sparse(noise=6)
    spec = make_spec(variant="boundary")
    exact = run_slide(Segmenter(BoundaryBackend(spec), scale=1.0), region_of(ArrayReader(image)), tmp_path / "exact")
    assert exact.row["blank_share"] == 0
    skipped = run_slide(
        Segmenter(BoundaryBackend(spec), scale=1.0), region_of(ArrayReader(image)), tmp_path / "skip", skip_blank=True
    )
    assert skipped.row["blank_share"] > 0.4
    assert [note for note in skipped.notes if "of the tiles were taken for blank" in note]
    assert "taken for blank" in skipped.row["warning"]
    labels = [tifffile.imread(tmp_path / name / files.LABELS) for name in ("exact", "skip")]
    assert np.array_equal(*labels)


@pytest.mark.parametrize("flags", ["more", "fewer"])
def test_a_run_that_died_knows_what_was_blank(tmp_path: Path, flags: str) -> None:
    region, spec = region_of(ArrayReader(sparse())), make_spec(variant="boundary")
    whole = run_slide(Segmenter(BoundaryBackend(spec), scale=1.0), region, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_slide(Segmenter(BoundaryBackend(spec), scale=1.0), region, out, progress=StopAfter(5).progress)
    with (out / slides.UNFINISHED / "blank.bin").open("ab") as file:
        if flags == "more":
            file.write(b"\1\1\1")  # of a band whose answers were not written
        else:
            file.truncate(3)  # those bands are computed again
    again = run_slide(Segmenter(BoundaryBackend(spec), scale=1.0), region, out)
    assert again.row == whole.row
    for name in (slides.OVERVIEW, slides.IMAGES):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
