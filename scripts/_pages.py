"""Shared by screenshot and frame-times: an installed chromium, and cellseg-view on a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

READY = "window.cellsegView?.state.last.found !== undefined"
"""Whether the viewer shows an image with its cells."""


@contextmanager
def chromium(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A page in chromium; faults of its scripts go to stderr."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("error: no chromium: apt-get install chromium, or name it in $CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        # Playwright waits by evaluating text, which the viewer's policy forbids.
        page = browser.new_page(viewport={"width": width, "height": height}, bypass_csp=True)
        page.set_default_timeout(300_000)
        page.on("pageerror", lambda error: sys.stderr.write(f"error in the page: {error}\n"))
        yield page
        browser.close()


@contextmanager
def viewer(out: Path) -> Iterator[str]:
    """``cellseg-view OUT`` in a process of its own; gives its address."""
    code = "from cellseg_deploy.cli.view import main; main()"
    command = [sys.executable, "-c", code, str(out), "--no-browser", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            if not address:
                sys.exit(server.wait())
            yield address
        finally:
            server.terminate()
