"""Corrections on a disk that is full: refused with the reason, nothing is lost, and they resume when there is room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import fill, small_disk
from test_corrections import hashes, state
from view_stub import StubWorkspace

from cellseg_deploy.errors import OutputError
from cellseg_deploy.view.corrections import JOURNAL
from cellseg_deploy.view.source import image_id, open_source

pytestmark = pytest.mark.reliability
KEY = image_id("a.png")


@pytest.fixture
def disk(out: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes with a run in ``out``."""
    place = tmp_path / "disk"
    with small_disk(place, "size=4m"):
        shutil.copytree(out, place / "out")
        yield place


def edit_until_refused(workspace: Any) -> int:
    """Change a class to and fro until the journal's last block is full; gives how many edits were made."""
    made = 0

    def edit_on() -> None:
        nonlocal made
        for number in range(200):
            workspace.edit(KEY, {"op": "class", "cells": [1], "class": ("red", "white")[number % 2]})
            made += 1

    with pytest.raises(OutputError, match="No space left on device"):
        edit_on()
    return made


def test_the_first_edit_on_a_full_disk_changes_nothing(disk: Path) -> None:
    filler = fill(disk)
    before = hashes(disk / "out")
    with StubWorkspace(open_source(disk / "out")) as workspace:
        cells = state(workspace, KEY)
        with pytest.raises(OutputError, match="No space left on device"):
            workspace.edit(KEY, {"op": "delete", "cells": [2]})
        assert state(workspace, KEY) == cells
        assert {
            name: text for name, text in hashes(disk / "out").items() if not name.startswith("corrections")
        } == before
        filler.unlink()
        assert workspace.edit(KEY, {"op": "delete", "cells": [2]})["found"] == 1


def test_edits_made_before_the_disk_was_full_are_there_again(disk: Path) -> None:
    with StubWorkspace(open_source(disk / "out")) as workspace:
        workspace.edit(KEY, {"op": "delete", "cells": [2]})
        filler = fill(disk)
        made = edit_until_refused(workspace)
        assert made > 0
        assert (disk / "out" / JOURNAL).read_bytes().endswith(b"\n")  # no torn line
        with pytest.raises(OutputError, match="No space left on device"):
            workspace.save()  # the label image waits; the journal has all
        seen = workspace.cells(KEY)
        assert seen["edits"] == made + 1
        assert "No space left on device" in seen["warnings"][-1]
        after_a_kill = StubWorkspace(open_source(disk / "out")).cells(KEY)
        assert after_a_kill["cells"] == seen["cells"]
        filler.unlink()
        assert workspace.edit(KEY, {"op": "class", "cells": [1], "class": "platelet"})["edits"] == made + 2
        assert workspace.save() == ["corrections/a.png.tif"]
    with StubWorkspace(open_source(disk / "out")) as again:
        rows, edits = state(again, KEY)
        assert (list(rows), rows[1][1], edits) == ([1], "platelet", made + 2)


def test_a_viewer_that_ends_on_a_full_disk_says_what_waits(disk: Path) -> None:
    """The last label image cannot be written: the command ends with that error, and the next viewer writes it."""
    workspace = StubWorkspace(open_source(disk / "out"))
    workspace.__enter__()
    workspace.edit(KEY, {"op": "delete", "cells": [2]})
    filler = fill(disk)
    with pytest.raises(OutputError, match="No space left on device"):
        workspace.__exit__(None, None, None)
    filler.unlink()
    with StubWorkspace(open_source(disk / "out")) as again:
        assert state(again, KEY)[1] == 1
    assert (disk / "out" / "corrections" / "a.png.tif").is_file()
