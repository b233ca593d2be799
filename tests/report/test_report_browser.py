"""The report in a browser: sorting, enlarging, the slider, hostile names, downloads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_run import HOSTILE, make_images, run, shades
from PIL import Image
from running import rows, save

from cellseg_deploy.report.page import REPORT_HTML

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'cellseg-deploy[dev]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or name it in $CHROMIUM"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with sliders for all its images."""
    folder = tmp_path_factory.mktemp("report")
    run(make_images(folder / "in"), folder / "out", report_thresholds=24)
    return folder / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, out: Path) -> Iterator[Any]:
    """The report; any error in it, and any request but for the files of the run, fails the test."""
    opened, wrong = browser.new_page(), list[str]()
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url),
    )
    opened.goto((out / REPORT_HTML).as_uri())
    yield opened
    opened.close()
    assert wrong == []


def column(page: Any, number: int) -> list[str]:
    found: list[str] = page.locator(f"#table tbody tr td:nth-child({number})").all_inner_texts()
    return found


def test_a_column_sorts_both_ways_by_number(page: Any, out: Path) -> None:
    counts = sorted(int(row["counted"]) for row in rows(out / "images.csv") if row["counted"])
    assert column(page, 3) != [*map(str, counts), ""]
    page.click("#table th:nth-child(3) button")
    assert column(page, 3) == [*map(str, counts), ""]  # the failed one last
    page.click("#table th:nth-child(3) button")
    assert column(page, 3) == [*map(str, reversed(counts)), ""]
    assert page.get_attribute("#table th:nth-child(3)", "aria-sort") == "descending"


def test_names_are_filtered(page: Any) -> None:
    page.fill("#filter", "SHADES")
    assert page.locator("#table tbody tr:visible td:first-child").all_inner_texts() == ["a/shades.png"]


def test_a_hostile_name_is_shown_as_text(page: Any) -> None:
    page.wait_for_selector("#figures figure")
    page.locator("#pictures").scroll_into_view_if_needed()
    page.wait_for_selector("#gallery img")
    assert page.title().startswith("cellseg-infer")
    assert f"b/{HOSTILE}" in column(page, 1)
    assert any(HOSTILE in text for text in page.locator("#gallery span").all_inner_texts())
    page.locator("#table .go", has_text=HOSTILE).first.click()
    assert HOSTILE in page.inner_text("#large p")
    page.wait_for_timeout(100)
    assert page.title().startswith("cellseg-infer")


def test_a_picture_enlarges_with_and_without_the_overlays(page: Any, out: Path, tmp_path: Path) -> None:
    natural = "() => { const i = document.querySelector('#large img'); return i.complete && i.naturalWidth }"
    page.locator("#table .go", has_text="a/2.png").first.click()
    page.wait_for_function(natural)
    with Image.open(out / "overlays/a/2.png.jpg") as overlay:
        assert page.evaluate(natural) == overlay.width
    page.keyboard.press("ArrowRight")
    assert "a/4.png" in page.inner_text("#large p")
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()
    alone = shutil.copy(out / REPORT_HTML, tmp_path / "alone.html")  # as sent by mail
    page.goto(Path(alone).as_uri())
    page.locator("#table .go", has_text="a/2.png").first.click()
    page.wait_for_function(f"() => ({natural})() > 100")


@pytest.mark.parametrize("step", [3, 9, 15])
def test_the_slider_shows_what_a_run_at_that_threshold_counts(page: Any, tmp_path: Path, step: int) -> None:
    threshold = round(0.05 * (step + 1), 2)
    save(tmp_path / "in/shades.png", shades())
    run(tmp_path / "in", tmp_path / "out", threshold=threshold)
    (expected,) = rows(tmp_path / "out/images.csv")
    page.select_option("#which", label="a/shades.png")
    page.evaluate(f"() => {{ const s = document.getElementById('slider'); s.value = {step}; s.oninput(); }}")
    assert page.inner_text("#at").startswith(f"{threshold:.2f}")
    assert page.inner_text("#found") == f"{expected['counted']} counted, {expected['cells']} found"
    outlines = page.eval_on_selector_all(
        "#drawing path", "all => all.map(p => p.getAttribute('d').split('M').length - 1)"
    )
    assert sum(outlines) == int(expected["cells"])


def test_figures_are_downloaded_as_png_and_svg(page: Any, tmp_path: Path) -> None:
    assert page.locator("#figures figure").count() == 4
    for kind in ("PNG", "SVG"):
        with page.expect_download() as begun:
            page.locator("#figure-counts button", has_text=kind).click()
        assert begun.value.suggested_filename == f"counts.{kind.lower()}"
        begun.value.save_as(tmp_path / f"counts.{kind.lower()}")
    with Image.open(tmp_path / "counts.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 3 * 640
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    svg = (tmp_path / "counts.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "counted cells" in svg
