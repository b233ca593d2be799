"""report.html and the files for MultiQC: self-contained, escaped, the same after a resume, and what they point out."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, make_spec
from odd_run import HOSTILE, make_images, run, segmenter
from PIL import Image
from running import results

from cellseg_deploy.cells.stain import colours
from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.images.read import read_image, read_labels
from cellseg_deploy.models.spec import DataSummary, Spread, TrainingInfo
from cellseg_deploy.report import flags, thumbnails
from cellseg_deploy.report import page as page_of
from cellseg_deploy.report.multiqc import GROUPS_MQC, IMAGES_MQC
from cellseg_deploy.report.page import REPORT_HTML
from cellseg_deploy.report.results import ImageRow
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import reporting, session
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.record import Inputs
from cellseg_deploy.run.session import RunSetup
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

pytestmark = pytest.mark.usefixtures("quick_disk")
VENDOR = Path(flags.__file__).parent / "vendor"


@pytest.fixture
def smears(tmp_path: Path) -> Path:
    return make_images(tmp_path / "in")


def embedded(page: str, name: str) -> Any:
    """The JSON data ``name`` of a page."""
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_is_one_file_and_names_are_text(smears: Path, tmp_path: Path) -> None:
    run(smears, tmp_path / "out")
    page = (tmp_path / "out" / REPORT_HTML).read_text(encoding="utf-8")
    for name in ("d3.min.js", "plot.umd.min.js"):
        assert (VENDOR / name).read_text(encoding="utf-8") in page
        assert "Permission to use, copy, modify" in (VENDOR / f"{name.partition('.')[0]}.LICENSE").read_text()
        page = page.replace((VENDOR / name).read_text(encoding="utf-8"), "")
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)(?!data:)\w+://""", page) == []
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>") == 5
    assert HOSTILE in [image["name"].partition("/")[2] for image in embedded(page, "data")["images"]]
    assert "1 failed" in page
    pictures = embedded(page, "small")
    assert [bool(picture) for picture in pictures].count(False) == 1  # of the image that failed
    picture = next(filter(None, pictures))
    assert max(Image.open(io.BytesIO(base64.b64decode(picture))).size) <= thumbnails.longest_side(len(pictures))


def test_a_resumed_run_has_the_same_report(smears: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "PICTURES_AT_A_STOP", 4)
    options = {"report_thresholds": 3, "group_by": "^[ab]"}
    run(smears, tmp_path / "whole", **options)
    images = find_images([smears])

    class StopError(Exception):
        pass

    done = list[str]()

    def stop_at_the_fifth(result: Any) -> None:
        done.append(result.image)
        if len(done) == 5:
            raise StopError

    arguments: dict[str, Any] = {"options": RunOptions(**options)}
    with pytest.raises(StopError):
        run_folder(segmenter(), images, tmp_path / "parts", on_result=stop_at_the_fifth, **arguments)
    stopped = (tmp_path / "parts" / REPORT_HTML).read_text(encoding="utf-8")
    assert not any(embedded(stopped, "small"))  # somebody waits for the run to end
    assert len(embedded(stopped, "data")["images"]) == 5
    run_folder(segmenter(), images, tmp_path / "parts", **arguments)
    whole, parts = results(tmp_path / "whole"), results(tmp_path / "parts")
    assert {name for name in whole if whole[name] != parts.get(name)} == set()
    page = whole[REPORT_HTML].decode()
    assert len(embedded(page, "data")["thresholds"]) == 3
    assert embedded(page, "data")["counts"]["groups"] == ["(none)", "a", "b"]


def test_a_watched_run_has_its_pictures_when_it_is_stopped(
    smears: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "PICTURES_AT_A_STOP", 3)

    def rounds() -> Iterator[list[FoundImage]]:
        yield find_images([smears])[:4]
        raise KeyboardInterrupt

    threads = ThreadPlan(None, 1)
    setup = RunSetup(segmenter(), tmp_path / "out", RunOptions(), threads, Inputs.of([smears]), tables_seconds=30)
    with pytest.raises(KeyboardInterrupt):
        session.run(setup, rounds())
    page = (tmp_path / "out" / REPORT_HTML).read_text(encoding="utf-8")
    assert [bool(picture) for picture in embedded(page, "small")].count(True) == 4


def test_a_run_without_any_count_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.png").write_bytes(b"no picture")
    run(tmp_path / "in", tmp_path / "out")
    page = (tmp_path / "out" / REPORT_HTML).read_text(encoding="utf-8")
    assert embedded(page, "data")["distributions"] == []
    assert "1 failed" in page


def test_it_can_be_left_out(smears: Path, tmp_path: Path) -> None:
    run(smears, tmp_path / "out", report=False)
    assert not {REPORT_HTML, IMAGES_MQC, GROUPS_MQC} & {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out/summary.csv").is_file()


def test_without_overlays_outlines_are_drawn_from_labels(smears: Path, tmp_path: Path) -> None:
    run(smears, tmp_path / "out", save=("labels",))
    page = (tmp_path / "out" / REPORT_HTML).read_text(encoding="utf-8")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(embedded(page, "small")[-1]))))
    assert picture[0, -1].min() > 240
    assert picture[20, 20].max() < 240


def test_a_damaged_overlay_costs_its_picture_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 no picture")
    assert thumbnails.thumbnails([(tmp_path / "a.jpg", None), (None, None)]) == ["", ""]
    assert "no picture of it in the report" in caplog.text


def test_pictures_end_where_the_page_would_become_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg")
    one = len(thumbnails.thumbnail(tmp_path / "a.jpg", None, side=320))
    monkeypatch.setattr(thumbnails, "MAX_BYTES", 3 * one)
    assert [bool(text) for text in thumbnails.thumbnails([(tmp_path / "a.jpg", None)] * 5)] == [True] * 3 + [False] * 2


def row(name: str, counted: int, **values: Any) -> ImageRow:
    plain = {
        "cells": counted,
        "counted": counted,
        "confluence": 0.3,
        "median_cell_area_px": 310.0 + counted,
        "scale": 1.0,
    }
    return ImageRow(name, ".", "done", plain | {"field_px": 10**6} | values)


def test_outliers_are_those_of_the_robust_z() -> None:
    images = [row(f"{number}.png", 50 + number) for number in range(9)]
    assert flags.outliers(images) == []
    found = flags.outliers([*images, row("odd.png", 70, confluence=0.9)])
    # Median 54.5 and MAD 2.5 with the odd one among them: z = 0.6745 * 15.5 / 2.5
    assert [(one.image, one.what) for one in found] == [
        ("odd.png", "counted cells per megapixel"),
        ("odd.png", "median cell area at the network's scale, px"),
    ]
    assert found[0].typical == "median of the run 54.5, robust z +4.2"
    assert flags.outliers([*images[:6], row("odd.png", 500)]) == []  # too few images to say


def test_images_unlike_the_training_images_are_named() -> None:
    spread = Spread(median=0.3, p05=0.2, p95=0.4)
    training = TrainingInfo(data_summary=DataSummary(version=1, n_images=9, n_cells=90, values={"covered": spread}))
    spec = make_spec(training=training)
    images = [row("a.png", 9), row("b.png", 9, confluence=0.6), row("c.png", 9, median_cell_area_px=900.0)]
    found = flags.unlike_training(images, spec)
    assert [(one.image, one.what.partition(",")[0]) for one in found] == [
        ("b.png", "covered share"),
        ("c.png", "cell diameter at the network's scale"),
    ]
    assert flags.unlike_training([row("b.png", 9, confluence=0.6)], make_spec()) == []  # the model does not say


def test_light_and_stain_are_compared_with_the_training_images() -> None:
    usual = {"field_lightness": Spread(median=80, p05=60, p95=90), "stain_red": Spread(median=0.1, p05=0.1, p95=0.1)}
    training = TrainingInfo(data_summary=DataSummary(version=1, n_images=9, n_cells=90, values=usual))
    spec = make_spec(training=training)

    def seen(name: str, light: float, stain: float) -> ImageRow:
        return row(name, 9, colours={"field_lightness": light, "stain_red": stain})

    images = [seen("a.png", 61, 0.14), seen("b.png", 98, 0.06), seen("c.png", 80, 0.16), row("older.png", 9)]
    found = flags.unlike_training([*images, seen("dark.png", 40, 0.1)], spec)
    assert [(one.image, one.what) for one in found] == [  # 60 to 90 and a quarter of 30; 0.1 and the tolerance of 0.05
        ("b.png", "lightness of the background"),
        ("dark.png", "lightness of the background"),
        ("c.png", "stain in red light"),
    ]
    assert found[1].typical == "training images 80, mostly 60 to 90"
    dark = flags.unlike_training([seen(f"{n}.png", 30 + n, 0.1) for n in range(5)], spec)
    assert [(one.image, one.what, one.value) for one in dark] == [
        (flags.WHOLE_RUN, "lightness of the background, median", 32)
    ]
    of_later = TrainingInfo(data_summary=DataSummary(version=2, n_images=9, n_cells=90, values=usual))
    assert flags.unlike_training(images, make_spec(training=of_later)) == []


def test_a_dark_run_says_so_and_the_journal_has_its_colours(smears: Path, tmp_path: Path) -> None:
    """Light and stain are measured in every image of a run, as ``cellseg-evaluate describe`` measures them."""
    usual = {"field_lightness": Spread(median=10, p05=9, p95=11)}
    training = TrainingInfo(data_summary=DataSummary(version=1, n_images=9, n_cells=90, values=usual))
    spec = make_spec(training=training)
    run_folder(Segmenter(DarknessBackend(spec)), find_images([smears]), tmp_path / "out", options=RunOptions())
    record = journals.read(tmp_path / "out" / "journal.jsonl").entries["a/shades.png"].record
    image = read_image(smears / "a/shades.png").pixels_hwc
    expected = colours(image, read_labels(tmp_path / "out" / "labels/a/shades.png.tif") > 0)
    found = record.result["colours"]
    assert len(found) == 8
    assert found == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "(whole run)" in page
    assert "lightness of the background, median" in page
    assert "Nothing stands out" not in page
    assert "<b>The whole run</b> needs a look" in page
    assert "<b>0</b>" not in page.partition('id="look"')[0]
    assert re.search(r">1 value unlike the training images<", page)


def test_warnings_that_differ_in_numbers_are_said_once() -> None:
    said = {"a.png": "dark (L* 29 of 100)", "b.png": "dark (L* 30.5 of 100)", "c.png": "no field at all"}
    images = [row(name, 9, warnings={"negative": text}) for name, text in said.items()]
    assert page_of._warnings_by_kind([*images, row("d.png", 9)]) == [
        ("negative", "dark (L* 29 of 100) (numbers of a.png)", [("a.png", ""), ("b.png", ""), ("c.png", said["c.png"])])
    ]
    assert page_of._warnings_by_kind(images[:1]) == [("negative", said["a.png"], [("a.png", "")])]


def test_multiqc_files_have_rows_of_images_and_groups(smears: Path, tmp_path: Path) -> None:
    run(smears, tmp_path / "out")
    images, groups = (json.loads((tmp_path / "out" / name).read_bytes()) for name in (IMAGES_MQC, GROUPS_MQC))
    assert images["plot_type"] == groups["plot_type"] == "table"
    assert images["data"]["a › shades"]["counted"] == 5
    assert images["data"]["a › bad"] == {"warnings": 0, "failed": 1}
    assert groups["data"]["a"]["failed"] == 1
    assert not [name for name in images["data"] if "<" in name or "/" in name]  # it would cut or run them
    assert len(images["data"]) == 12
    assert set(groups["data"]["a"]) <= set(groups["headers"])
    assert {images["parent_name"], groups["parent_name"]} == {"cellseg-infer"}


@pytest.mark.parametrize("number", [-1, 25])
def test_a_number_of_sliders_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match=f"must be 0 to 24 images, got {number}"):
        RunOptions(report_thresholds=number)
