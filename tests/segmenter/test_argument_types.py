"""Arguments of a wrong type: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import THREE, DarknessBackend, draw_discs
from PIL import Image

import cellseg_deploy as cs
from cellseg_deploy.segmenter import Segmenter

Call = Callable[[Any, Segmenter], Any]  # of the package, and of a segmenter


WRONG: list[tuple[str, Call]] = [
    ("`threads` must be a whole number or None, got '2' (str)", lambda c, _: c.EngineOptions(threads="2")),
    ("`threads` must be a whole number or None, got True (bool)", lambda c, _: c.EngineOptions(threads=True)),
    ("`device` must be a name or None, got 0 (int)", lambda c, _: c.EngineOptions(device=0)),
    ("`rebuild` must be True or False, got 'no' (str)", lambda c, _: c.EngineOptions(rebuild="no")),
    ("unknown precision 16; expected one of fp32", lambda c, _: c.EngineOptions(precision=16)),
    ("`max_pixels` must be a whole number, got 1000000.0", lambda c, _: c.ReadOptions(max_pixels=1e6)),
    ("`bit_depth` must be a whole number or None, got '12'", lambda c, _: c.ReadOptions(bit_depth="12")),
    ("`pixel_size_um` must be a number or None, got '0.1'", lambda c, _: c.ReadOptions(pixel_size_um="0.1")),
    ("`model` must be a path or None, got 3 (int)", lambda c, _: c.Segmenter.load(3)),
    ("`engine` must be EngineOptions(...), got 'onnxruntime'", lambda c, _: c.Segmenter.load(engine="onnxruntime")),
    ("`engine` must be EngineOptions(...), got None", lambda c, _: c.Segmenter.load(engine=None)),
    ("`given` must be a path or None, got 3", lambda c, _: c.Segmenter.load(given=3)),
    ("`path` must be a path, got None", lambda c, _: c.open_backend(None)),
    ("`backend` must be Backend(...), got 'my.onnx' (str)", lambda c, _: c.Segmenter("my.onnx")),
    ("`batch_size` must be a whole number, got 1.5 (float)", lambda c, m: c.Segmenter(m.backend, batch_size=1.5)),
    ("`halo` must be a whole number or None, got '8'", lambda c, m: c.Segmenter(m.backend, halo="8")),
    ("`task` must be a name, got ['counting'] (list)", lambda c, m: c.Segmenter(m.backend, task=["counting"])),
    ("`classes` must be a sequence of names, got 'red'", lambda c, m: c.Segmenter(m.backend, classes="red")),
    ("`scale` must be a number, got [1] (list)", lambda c, m: c.Segmenter(m.backend, scale=[1])),
    ("`cell_diameter_px` must be a number", lambda c, m: c.Segmenter(m.backend, cell_diameter_px=[60])),
    ("border cells must be one of", lambda c, m: c.Segmenter(m.backend, border_cells=None)),
    ("`read` must be ReadOptions(...), got {'bit_depth': 12}", lambda _, m: m("a.png", read={"bit_depth": 12})),
    ("`scale` must be a number, got '1'", lambda _, m: m("a.png", scale="1")),
    ("field must be one of auto, full, got None", lambda _, m: m("a.png", field=None)),
    ("image must be an array, uint8 RGB (h, w, 3), got str", lambda _, m: m.probabilities("a.png")),
    ("`images` must be several images, such as a list, got 'a.png'", lambda _, m: m.map("a.png")),
    ("`images` must be several images, such as a list, got 3", lambda _, m: m.map(3)),
    ("`images` must be several images, such as a list, got array", lambda _, m: m.map(np.zeros((9, 9, 3), np.uint8))),
    ("`images` must be several images, such as a list, got", lambda _, m: m.map(Image.new("RGB", (9, 9)))),
    ("`images` must be several images, such as a list, got", lambda _, m: m.map(io.BytesIO(b"x"))),
    ("`read` must be ReadOptions(...), got None", lambda _, m: list(m.map(["a.png"], read=None))),
    ("`images` must be a path or a list of paths, got [array", lambda _, m: m.run([np.zeros((2, 2))], "out")),
    ("`images` must be a path or a list of paths, got 3", lambda _, m: m.run(3, "out")),
    ("`out` must be a path, got None", lambda _, m: m.run("a.png", None)),
    ("`save` must be a sequence of names, got 'labels'", lambda _, m: m.run("a.png", "out", save="labels")),
    ("`save` must be a sequence of names, got 3", lambda _, m: m.run("a.png", "out", save=3)),
    ("`read` must be ReadOptions(...), got {}", lambda _, m: m.run("a.png", "out", read={})),
    ("`overwrite` must be True or False, got 'False'", lambda _, m: m.run("a.png", "out", overwrite="False")),
    ("`report` must be True or False, got 0", lambda _, m: m.run("a.png", "out", report=0)),
    ("`group_by` must be a path, got 3", lambda _, m: m.run("a.png", "out", group_by=3)),
    ("`follow_links` must be True or False, got 1", lambda _, m: m.run("a.png", "out", follow_links=1)),
    ("`on_image` must be a function, got None", lambda _, m: m.run("a.png", "out", on_image=None)),
    ("`image` must be a path, got None", lambda _, m: m.run_slide(None, "out")),
    ("`out` must be a path, got 3", lambda _, m: m.run_slide("a.png", 3)),
    (
        "`cluster` must be an open cluster (with open_cluster(...) as cluster) or None, got 'local'",
        lambda _, m: m.run_slide("a.png", "out", cluster="local"),
    ),
    (
        "`cluster` must be an open cluster (with open_cluster(...) as cluster) or None, got 'local'",
        lambda _, m: m.run("in", "out", cluster="local"),
    ),
    (
        "`cluster` must be an open cluster (with open_cluster(...) as cluster) or None, got <contextlib",
        lambda c, m: m.run("in", "out", cluster=c.open_cluster("local")),
    ),
    ("`region` must be four whole numbers", lambda _, m: m.run_slide("a.png", "out", region="0,0,9,9")),
    ("`region` must be four whole numbers", lambda _, m: m.run_slide("a.png", "out", region=(0, 0, 9))),
    ("`level` must be a whole number, got '1'", lambda _, m: m.run_slide("a.png", "out", level="1")),
    ("`memory` must be a whole number or None, got '4GB'", lambda _, m: m.run_slide("a.png", "out", memory="4GB")),
    ("`read` must be ReadOptions(...), got {}", lambda _, m: m.run_slide("a.png", "out", read={})),
    ("`skip_blank` must be True or False, got 1", lambda _, m: m.run_slide("a.png", "out", skip_blank=1)),
    ("`save` must be a sequence of names, got 'zarr'", lambda _, m: m.run_slide("a.png", "out", save="zarr")),
    ("`path` must be a path, got 3 (int)", lambda _, m: m("a.png").save(3)),
    ("`path` must be a path, got None", lambda _, m: m("a.png").overlay(None)),
    ("`kind` must be a name or None, got 3", lambda _, m: m("a.png").save("a.tif", 3)),
    ("`path` must be a path, got None", lambda _, m: m("a.png").table.to_csv(None)),
    ("`images` must be a path or None, got ['a.png']", lambda c, m: c.evaluate(["a.png"], "masks", m)),
    ("`masks` must be a path, got None", lambda c, m: c.evaluate("images", None, m)),
    ("`predicted` must be a path, got 3", lambda c, _: c.evaluate("images", "masks", 3)),
    ("`read` must be ReadOptions(...), got {}", lambda c, m: c.evaluate("images", "masks", m, read={})),
    ("`min_area_px` must be a whole number", lambda c, m: c.evaluate("images", "masks", m, min_area_px="9")),
    ("count rule must be one of", lambda c, _: c.evaluate(None, "masks", "tool", count_rule="most")),
    ("field must be one of", lambda c, _: c.evaluate(None, "masks", "tool", field="most")),
    ("`reference` must be a path, got 3", lambda c, m: c.parity.compare(3, m.backend, "images")),
    ("`candidate` must be a path, got None", lambda c, m: c.parity.compare(m.backend, None, "images")),
    ("`images` must be several images", lambda c, m: c.parity.compare(m.backend, m.backend, 3)),
    ("pairs (name, pixels), got str", lambda c, m: c.parity.compare(m.backend, m.backend, ["a.png"])),
    ("`policy` must be ParityPolicy(...)", lambda c, m: c.parity.compare(m.backend, m.backend, [], policy="int8")),
    ("`masks` must be a path or None", lambda c, m: c.parity.compare(m.backend, m.backend, "images", masks=["m"])),
    ("`truth` must be a function or None", lambda c, m: c.parity.compare(m.backend, m.backend, [], truth="masks")),
]


@pytest.mark.parametrize(("words", "call"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_type_is_named(words: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cs.CellsegError) as raised:
        call(cs, Segmenter(DarknessBackend()))
    assert words in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_numbers_of_numpy_and_paths_of_any_kind_are_taken(tmp_path: Path) -> None:
    Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / "a.png")
    segmenter = Segmenter(DarknessBackend(), batch_size=np.int64(2), scale=np.float32(1))  # type: ignore[arg-type]
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert [cells.count for cells in segmenter.map(np.stack([pixels, pixels]))] == [3, 3]
    assert [cells.count for cells in segmenter.map(path for path in [tmp_path / "a.png"])] == [3]


def test_an_empty_name_is_not_the_shipped_model() -> None:
    with pytest.raises(cs.CellsegError):
        cs.Segmenter.load("")


def test_run_reads_links_out_of_the_folder_if_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / "a.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "a.png")
    segmenter = Segmenter(DarknessBackend())
    (refused,) = segmenter.run(tmp_path / "in", tmp_path / "out").failed
    assert "to read it anyway, give `follow_links=True`" in refused.error
    assert segmenter.run(tmp_path / "in", tmp_path / "out", follow_links=True).cells == 3
