"""What a streamed image costs: its pixels are read once, the labels of a block are made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import DarknessBackend, make_spec

from cellseg_deploy.cells import blocks
from cellseg_deploy.cells.blocks import BlockSettings
from cellseg_deploy.errors import OutputError
from cellseg_deploy.models.spec import ThresholdParams
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.label_file import LabelFile, bytes_of_labels
from cellseg_deploy.slides.region import ArrayReader, region_of
from cellseg_deploy.slides.run import run_slide
from cellseg_deploy.slides.samples import Samples

SETTINGS = BlockSettings(("foreground",), ThresholdParams(), 8.0, (120, 90), (120, 90), block_rows=40, overlap_rows=10)


def discs() -> np.ndarray:
    """Probabilities (1, 120, 90) of twelve squares, none of which reaches the end of a window."""
    planes = np.zeros((1, 120, 90), np.float32)
    for y in range(5, 120, 40):
        for x in range(4, 90, 24):
            planes[0, y : y + 9, x : x + 9] = 0.9
    return planes


def test_the_pixels_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (600, 200, 3)).astype(np.uint8)
    rows = 0
    read = ArrayReader.read

    def counting(self: ArrayReader, y: int, x: int, h: int, w: int, level: int) -> np.ndarray:
        nonlocal rows
        rows += h
        return read(self, y, x, h, w, level)

    monkeypatch.setattr(ArrayReader, "read", counting)
    run_slide(Segmenter(DarknessBackend(make_spec()), scale=0.5), region_of(ArrayReader(image)), tmp_path)
    assert 600 <= rows < 700


def test_samples_read_what_the_network_did_not() -> None:
    """As after a kill: the first rows were read by a process that is gone."""
    image = np.random.default_rng(1).integers(0, 255, (3000, 70, 3)).astype(np.uint8)
    labels = np.arange(3000 * 70, dtype=np.int32).reshape(3000, 70)
    samples = Samples((3000, 70), region_of(ArrayReader(image)).rows)
    samples.rows(700, 3000)
    for top in range(0, 3000, 512):
        samples.add(top, labels[top : top + 512])
    small, of_small = samples.overview()
    assert np.array_equal(small, image[::2, ::2])
    assert np.array_equal(of_small, labels[::2, ::2])


def test_the_labels_of_a_block_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    first_labels = blocks.first_labels

    def counting(*arguments: object, **named: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        return first_labels(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "first_labels", counting)
    planes = discs()
    path = tmp_path / "kept"
    path.write_bytes(b"of a killed run")
    with LabelFile(path) as kept:
        first = blocks.first_pass(lambda rows, columns: planes[:, rows, columns].copy(), SETTINGS, kept.keep)
        assert not first.waiting
        assert path.stat().st_size <= bytes_of_labels(SETTINGS)
        found = list(blocks.cells(lambda rows, columns: planes[:, rows, columns].copy(), SETTINGS, first))
    assert sum(len(part.first) for part in found) == 12
    assert calls == 3
    assert not path.exists()


def test_kept_labels_that_were_cut_short_are_an_error(tmp_path: Path) -> None:
    with LabelFile(tmp_path / "kept") as kept:
        read = kept.keep(np.ones((40, 50), np.int32))
        (tmp_path / "kept").write_bytes(b"")
        with pytest.raises(OutputError, match="cut short"):
            read()
