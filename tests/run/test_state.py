"""What a run knows, from its journal alone."""

from __future__ import annotations

from pathlib import Path

from run_records import identity

from cellseg_deploy.run.journal import Entry, ImageRecord, JournalContent, OutputFile
from cellseg_deploy.run.state import RunState


def entry(name: str, status: str = "done", output_name: str = "", *files: str) -> Entry:
    outputs = tuple(OutputFile(path, 1, "ab") for path in files)
    return Entry(ImageRecord(name, status, {}, output_name=output_name, outputs=outputs), 0, 1)  # type: ignore[arg-type]


def test_a_new_run_knows_nothing() -> None:
    state = RunState.of(None)
    assert (state.in_order, state.output_names, state.image_files, state.done("a")) == ([], {}, set(), None)


def test_the_last_line_of_an_image_holds() -> None:
    first = entry("b", "done", "b", "labels/b.tif", "overlays/b.jpg")
    content = JournalContent(Path("j"), identity(), "", {"b": first}, (), 1, {"g": 0.5}, {"cells.csv": {"ab"}})
    state = RunState.of(content)
    assert (state.scales, state.files) == ({"g": 0.5}, {"cells.csv": {"ab"}})
    state.entries["a"] = entry("a", "done", "a~2", "labels/a~2.tif")
    assert [row.record.image for row in state.in_order] == ["a", "b"]
    assert state.output_names == {"a": "a~2", "b": "b"}
    assert state.image_files == {"labels/a~2.tif", "labels/b.tif", "overlays/b.jpg"}
    assert state.done("b") is first
    state.entries["b"] = failure = entry("b", "failed")
    assert state.in_order[1] is failure
    assert state.done("b") is None
    assert state.output_names == {"a": "a~2"}
    assert state.image_files == {"labels/a~2.tif"}
