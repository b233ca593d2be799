"""The page in Chromium: look, zoom, correct with mouse and keys, die and come back, add an image."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import fill, small_disk
from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
pytest.importorskip("starlette", reason="pip install -e '.[view]'")
if CHROMIUM is None:
    pytest.skip("no chromium: apt-get install chromium, or name it in $CHROMIUM", allow_module_level=True)

TESTS = Path(__file__).resolve().parent.parent
FAR_MS = 120_000


class Server:
    """``cellseg-view OUT`` with the stub network, in a process of its own."""

    def __init__(self, out: Path) -> None:
        path = os.pathsep.join([str(TESTS), str(TESTS / "helpers"), *sys.path])
        program = TESTS / "helpers" / "view_stub.py"
        self.process = subprocess.Popen(
            [sys.executable, program, out, "--no-browser", "--quiet"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def server(out: Path) -> Iterator[Server]:
    started = Server(out)
    yield started
    if started.process.poll() is None:
        assert started.end() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Page:
    """The page, what the tests ask of it, and what must not happen in it."""

    def __init__(self, browser: Any, address: str) -> None:
        # Playwright waits by evaluating text, which the page's policy forbids; one test below runs under it.
        self.page = browser.new_page(viewport={"width": 1400, "height": 800}, bypass_csp=True)
        self.page.set_default_timeout(FAR_MS)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.open(address)

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_function("window.cellsegView?.state.last.found !== undefined")
        self.settle()

    def settle(self) -> None:
        self.page.evaluate("cellsegView.settled()")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def ask(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    @property
    def found(self) -> int:
        return int(self.ask("cellsegView.state.last.found"))

    @property
    def selected(self) -> list[int]:
        return sorted(self.ask("[...cellsegView.state.selected]"))

    @property
    def rows(self) -> dict[str, Any]:
        return dict(
            self.ask(
                "Object.fromEntries([...cellsegView.state.rows].map(([n, r]) => [n, [r.rings, r.class, r.counted]]))"
            )
        )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Place on the screen of a point of the image."""
        script = """([x, y]) => {
            const { picture } = cellsegView, box = picture.canvas.getBoundingClientRect(), view = picture.view;
            return [box.left + view.x + x * view.scale, box.top + view.y + y * view.scale];
        }"""
        left, top = self.ask(script, [x, y])
        return left, top

    def click(self, x: float, y: float, **more: Any) -> None:
        self.page.mouse.click(*self.place(x, y), **more)
        self.settle()

    def drag(self, *points: tuple[float, float]) -> None:
        self.page.mouse.move(*self.place(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.place(*point), steps=4)
        self.page.mouse.up()
        self.settle()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    opened = Page(browser, server.address)
    yield opened
    assert opened.errors == []
    opened.page.close()


def wait_for_selection(page: Page, n: int) -> None:
    page.page.wait_for_function("n => cellsegView.state.selected.has(n)", arg=n)


def test_a_run_is_shown_with_its_images_cells_and_failures(page) -> None:
    names = page.page.locator("#list b").all_inner_texts()
    assert names == ["a.png", "bad.png", "sub/b<i>.png"]  # markup in a name is text
    assert page.page.locator("#count b").inner_text() == "2"
    assert page.page.locator("#rows tr").count() == 2
    page.page.locator("#list li", has_text="bad.png").click()
    page.page.wait_for_selector("#problem:not([hidden])")
    assert "cut short" in page.page.locator("#problem").inner_text()
    page.page.select_option("#filter", "look")
    assert page.page.locator("#list b").all_inner_texts() == ["bad.png"]


def test_zooming_in_enlarges_and_fit_brings_it_back(page) -> None:
    before = page.ask("cellsegView.picture.view.scale")
    page.press("+", "+")
    page.page.wait_for_function("before => cellsegView.picture.view.scale > 1.5 * before", arg=before)
    page.page.mouse.wheel(0, -200)
    page.press("f")
    page.page.wait_for_function("before => Math.abs(cellsegView.picture.view.scale / before - 1) < 0.01", arg=before)


def test_small_outlines_are_thinned_by_less_than_a_pixel_of_the_screen(page) -> None:
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([50 + 40 * np.cos(angle), 60 + 40 * np.sin(angle)], axis=1)
    script = "async ([ring, apart]) => (await import('/static/picture.js')).thinned(ring, apart)"
    found = np.reshape(page.ask(script, [circle.ravel().tolist(), 8]), (-1, 2))
    assert 20 < len(found) < 35
    lost = np.linalg.norm(circle[:, None] - found[None], axis=2).min(axis=1)
    assert lost.max() < 8
    square = [0, 0, 9, 0, 9, 9, 0, 9]
    assert page.ask(script, [square, 8]) == square
    assert page.ask(script, [square, 64]) == square  # nothing would be left


def test_picture_and_table_select_the_same_cell(page) -> None:
    page.click(100, 70)
    wait_for_selection(page, 2)
    assert page.page.locator("#rows tr.selected td").first.inner_text() == "2"
    page.page.locator("#rows tr").first.click()
    assert page.selected == [1]
    page.page.locator("#columns button", has_text="Area").click()
    assert page.page.locator("#rows tr td:first-child").all_inner_texts() == ["2", "1"]  # the smaller first


def test_cells_are_corrected_with_the_mouse_and_survive_a_kill(page, server, out, browser) -> None:
    page.page.click("[data-tool=split]")
    page.drag((39, 10), (39, 30), (39, 50))
    assert page.found == 3
    assert page.selected == [1, 3]
    page.page.click("#merge")
    page.settle()
    assert page.found == 2
    page.page.click("#undo")
    page.settle()
    page.page.click("[data-tool=draw]")
    page.drag((10, 70), (40, 70), (40, 90), (10, 90), (10, 71))
    assert page.found == 4
    page.page.locator("#classes button", has_text="platelet").click()
    page.settle()
    page.page.click("[data-tool=select]")
    page.click(100, 70)
    wait_for_selection(page, 2)
    page.page.click("#delete")
    page.settle()
    page.page.click("#confirm")
    page.settle()
    assert page.page.locator("#count b").inner_text() == "2"  # a platelet does not count
    before = page.rows
    assert len(before) == 3
    server.end(signal.SIGKILL)
    again = Server(out)
    page.open(again.address)
    assert page.rows == before
    assert page.page.locator("#confirm").get_attribute("aria-pressed") == "true"
    page.press("Control+z")
    assert page.found == 4
    assert again.end() == 0


def test_everything_works_by_keyboard_alone(page) -> None:
    page.press(".")
    assert page.selected == [1]
    page.press("s")
    for key in ["ArrowUp"] * 1:
        page.press(key)
    page.ask("cellsegView.picture.cross = [39, 10]")
    page.press(" ")
    while page.ask("cellsegView.picture.cross[1]") < 50:
        page.press("Shift+ArrowDown")
    page.press("Enter")
    assert page.found == 3
    page.press("Escape", ".", "<")
    assert page.selected == [1, 3]
    page.press("m")
    assert page.found == 2
    page.press("z", "y", "z")
    assert page.found == 3
    page.press("Escape", ".", "2")
    assert page.rows[str(page.selected[0])][1] == "white"
    page.press("x")
    assert page.found == 2
    page.press("c")
    assert page.page.locator("#confirm").get_attribute("aria-pressed") == "true"
    page.press("n")
    assert page.page.locator("#list li[aria-selected=true] b").inner_text() == "bad.png"
    page.press("?")
    assert page.page.locator("#keys").is_visible()


def test_what_cannot_be_done_is_said(page) -> None:
    page.page.click("[data-tool=split]")
    page.drag((5, 80), (20, 80))
    page.page.wait_for_selector("#toasts .bad")
    assert "crosses no cell" in page.page.locator("#toasts .bad").last.inner_text()
    page.ask("cellsegView.state.selected = new Set([1, 2])")
    page.press("m")
    assert "touches none of the others" in page.page.locator("#toasts .bad").last.inner_text()


@pytest.mark.reliability
def test_a_full_disk_is_said_and_the_edit_made_when_there_is_room(browser, out, tmp_path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=4m"):
        shutil.copytree(out, disk / "out")
        started = Server(disk / "out")
        page = Page(browser, started.address)
        filler = fill(disk)
        page.press(".", "x")
        page.page.wait_for_selector("#toasts .bad")
        assert "No space left on device" in page.page.locator("#toasts .bad").last.inner_text()
        assert page.found == 2
        filler.unlink()
        page.press("Escape", ".", "x")
        assert page.found == 1
        started.end(signal.SIGKILL)
        again = Server(disk / "out")
        page.open(again.address)
        assert page.found == 1
        assert again.end() == 0
        assert page.errors == []
        page.page.close()


def test_an_image_is_added_and_counted_and_a_corrupt_one_refused(page, tmp_path) -> None:
    pixels = np.full((60, 80, 3), 230, np.uint8)
    pixels[20:40, 20:40] = 40
    Image.fromarray(pixels).save(tmp_path / "new.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "new.png").read_bytes()[:-20])
    page.page.set_input_files("#file", str(tmp_path / "new.png"))
    page.page.wait_for_function(
        "[...document.querySelectorAll('#toasts div')].some(t => t.textContent === 'new.png: 1 cells')"
    )
    assert page.page.locator("#list li[aria-selected=true] b").inner_text() == "uploads/new.png"
    page.page.set_input_files("#file", str(tmp_path / "cut.png"))
    page.page.wait_for_selector("#toasts .bad")
    assert "cut.png: the PNG is cut short" in page.page.locator("#toasts .bad").last.inner_text()


def test_the_page_works_under_its_own_policy(browser, server) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.address)
    sync_api.expect(page.locator("#count b")).to_have_text("2", timeout=FAR_MS)
    assert page.url.partition("#")[0] == server.address.partition("?")[0]  # the token is not in the history
    assert said == []
    page.close()


def test_without_the_token_there_is_no_page(browser, server) -> None:
    page = browser.new_page()
    response = page.goto(server.address.partition("?")[0])
    assert response.status == 403
    assert "open the address that cellseg-view printed" in page.content()
    page.close()
