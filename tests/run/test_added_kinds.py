"""More kinds of files for a finished run: made from its label images, the same as if they had been saved at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DarknessBackend, draw_discs
from PIL import Image
from running import results

from cellseg_deploy.errors import OutputError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.folder import RunOptions, RunSummary, plan_folder, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")
FIRST, MORE = ("labels", "overlays"), ("rois", "geojson", "coco", "confluence", "parquet")


class NoNetwork(DarknessBackend):
    """A network that must not be asked."""

    def _predict(self, tiles_nhwc):  # type: ignore[no-untyped-def]
        raise AssertionError("the network was run")


def run(images: Path, out: Path, backend: DarknessBackend | None = None, **settings: object) -> RunSummary:
    options = RunOptions(**settings)  # type: ignore[arg-type]
    return run_folder(Segmenter(backend or DarknessBackend()), find_images([images]), out, options=options)


def test_kinds_are_added_without_the_network(folder: Path, tmp_path: Path) -> None:
    """A damaged image among them stays failed; with cells at the border, and few of them."""
    Image.fromarray(draw_discs((60, 90), [(3, 30), (50, 30)])).save(folder / "border.png")
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(folder, out, save=FIRST)
    run(folder, whole, save=(*FIRST, *MORE))
    summary = run(folder, out, NoNetwork(), save=MORE)
    assert (summary.skipped, summary.failed, summary.remaining) == (5, 1, 0)
    assert results(out) == results(whole)
    for record in (json.loads((place / "run.json").read_text()) for place in (out, whole)):
        assert record["settings"]["save"] == record["identity"]["saved"] == [*FIRST, *MORE]
    again = run(folder, out, NoNetwork(), save=("rois",))
    assert again.skipped == 5
    assert results(out) == results(whole)
    run(folder, out, NoNetwork(), save=(*FIRST, *MORE))
    assert results(out) == results(whole)


def test_images_that_came_later_get_all_kinds(four: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    last = (four / "d.png").read_bytes()
    (four / "d.png").unlink()
    run(four, out, save=FIRST)
    (four / "d.png").write_bytes(last)
    assert run(four, out, save=("rois",)).done == 1
    run(four, whole, save=(*FIRST, "rois"))
    assert results(out) == results(whole)


def test_edited_labels_are_no_source(four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(four, out, save=FIRST)
    (out / "labels" / "a.png.tif").write_bytes((out / "labels" / "d.png.tif").read_bytes())
    before = results(out)
    with pytest.raises(OutputError, match=r"a\.png: labels/a\.png\.tif was edited.*cellseg-measure"):
        run(four, out, save=("rois",))
    assert {name: data for name, data in results(out).items() if not name.startswith("rois")} == before


@pytest.mark.parametrize(
    ("changes", "first", "more"),
    [
        ({"count_rule": "all"}, FIRST, "rois"),
        ({}, ("overlays",), "rois"),
        ({}, FIRST, "probabilities"),
    ],
)
def test_another_run_stays_another_run(
    changes: dict[str, object], first: tuple[str, ...], more: str, four: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(four, out, save=first)
    before = results(out)
    with pytest.raises(OutputError, match="contains a different run"):
        run(four, out, save=(more,), **changes)
    assert results(out) == before


def test_a_dry_run_says_that_nothing_is_to_be_run(four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(four, out, save=FIRST)
    before = results(out)
    options = RunOptions(save=("rois",))
    plan = plan_folder(Segmenter(DarknessBackend()), find_images([four]), out, options=options)
    assert plan.counts == {"work": 0, "skip": 4, "fail": 0}
    assert results(out) == before


def test_a_kill_before_the_journal_is_replaced_changes_no_result(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(four, out, save=FIRST)
    monkeypatch.setattr(journals, "rewrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(four, out, save=("rois",))
    monkeypatch.undo()
    assert run(four, out, NoNetwork(), save=FIRST).skipped == 4  # the run is still the one that it was
    run(four, out, NoNetwork(), save=("rois",))
    run(four, whole, save=(*FIRST, "rois"))
    assert results(out) == results(whole)
