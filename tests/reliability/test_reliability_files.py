"""Names that bite, links, pipes, files that go or change: what a folder may hold besides images.

All through ``cellseg-infer``, with a tiny model: what counts is what a run leaves and says.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import running
import tifffile
from conftest import draw_discs, run_obeying_permissions
from PIL import Image
from running import rows

from cellseg_deploy.files import regular
from cellseg_deploy.images import decode

pytestmark = pytest.mark.reliability
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, links and names as POSIX has them")

TABLES = ("images.csv", "cells.csv")


def infer(*arguments: object) -> int:
    return running.infer(*arguments, "--threads", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def smear(path: Path, cells: int = 1) -> Path:
    Image.fromarray(draw_discs((40, 130), [(20 + 45 * i, 20) for i in range(cells)])).save(path, "PNG")
    return path


def status(out: Path) -> dict[str, str]:
    return {row["image"]: row["status"] for row in rows(out / "images.csv")}


# --- names

NAMES = {
    "formula": "=cmd|calc.png",
    "tag": "<img src=x onerror=alert(1)>.png",
    "option": "-rf.png",
    "line end": "new\nline.png",
    "no unicode": os.fsdecode(b"a\xff.png"),
    "longest": "x" * 251 + ".png",
    "composed": unicodedata.normalize("NFC", "e\u0301.png"),
    "decomposed": "e\u0301.png",
    "upper": "CASE.PNG",
    "lower": "case.png",
    "two endings": "a.png",
    "the other": "a.jpg",
    "spaces": ' a , "b" \'.png',
    "terminal": "\x1b[31mred.png",
}


@posix
def test_names_that_bite(model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each image has its own files and its own rows, with its own number of cells."""
    expected = {}
    for number, name in enumerate(sorted(NAMES.values())):
        smear(folder / name, cells=number % 3)
        expected[name] = number % 3
    out = tmp_path / "out"
    assert infer(folder, "-o", out, "--model", model) == 0
    assert "\x1b[31mred" not in capfd.readouterr().err  # a name is no command to the terminal
    labels = list((out / "labels").iterdir())
    assert len({unicodedata.normalize("NFC", path.name).casefold() for path in labels}) == len(NAMES)
    assert sorted(int(tifffile.imread(path).max()) for path in labels) == sorted(expected.values())
    found = rows(out / "images.csv")
    assert len({row["image"] for row in found}) == len(NAMES)
    assert sum(int(row["cells"]) for row in found) == sum(expected.values()) == len(rows(out / "cells.csv"))
    for table in TABLES:
        for row in rows(out / table):  # a spreadsheet takes none of them for a formula
            assert not row["image"].startswith(("=", "+", "-", "@", "\t", "\r"))
    by_name = {row["image"]: int(row["cells"]) for row in found}
    for name in ("case.png", "CASE.PNG", "a.png", "a.jpg", NAMES["composed"], NAMES["decomposed"]):
        assert by_name[name] == expected[name]


@posix
def test_a_name_that_looks_like_an_option(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smear(folder / "-rf.png", cells=2)
    monkeypatch.chdir(folder)
    assert infer("./-rf.png", "-o", tmp_path / "out", "--model", model, "-q") == 0
    assert status(tmp_path / "out") == {"'-rf.png": "done"}


# --- what is no file


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo.png": (os.mkfifo, "not a regular file"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "link to a file that does not exist"),
    "loop.png": (lambda path: path.symlink_to(path.name), "link"),
    "out.png": (lambda path: path.symlink_to(path.parent.parent / "outside.png"), "follow_links=True"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "follow_links=True"),
}


@posix
def test_what_is_no_file_fails_and_the_run_goes_on(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "folder.png").mkdir()
    smear(tmp_path / "outside.png")
    smear(folder / "good.png")
    for name, (make, _) in STRANGE.items():
        make(folder / name)
    assert infer(folder, "-o", tmp_path / "out", "--model", model, "-q") == 3
    said = capsys.readouterr().err
    found = {row["image"]: row for row in rows(tmp_path / "out" / "images.csv")}
    assert set(found) == {"good.png", *STRANGE}  # the folder is no image
    assert found["good.png"]["cells"] == "1"
    for name, (_, words) in STRANGE.items():
        assert found[name]["status"] == "failed"
        assert words in found[name]["error"], found[name]["error"]
        assert f"failed: {name}: " in said


@posix
def test_a_folder_called_as_an_image_is_said_and_no_failure(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "folder.png").mkdir()
    smear(folder / "folder.png" / "inside.png")
    assert infer(folder, "-o", tmp_path / "out", "--model", model, "-v") == 0
    assert "folder.png: a folder, not an image" in capsys.readouterr().err
    assert status(tmp_path / "out") == {"folder.png/inside.png": "done"}


@posix
def test_links_out_of_the_folder_are_followed_only_when_asked(model: Path, folder: Path, tmp_path: Path) -> None:
    smear(tmp_path / "outside.png", cells=2)
    smear(folder / "inside.png")
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "same.png").symlink_to("inside.png")
    assert infer(folder, "-o", tmp_path / "one", "--model", model, "-q") == 3
    assert status(tmp_path / "one") == {"inside.png": "done", "out.png": "failed", "same.png": "done"}
    assert infer(folder, "-o", tmp_path / "two", "--model", model, "-q", "--follow-links") == 0
    assert [row["cells"] for row in rows(tmp_path / "two" / "images.csv")] == ["1", "2", "1"]


def test_an_empty_folder_is_nothing_to_do(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(folder, "-o", tmp_path / "out", "--model", model) == 4
    assert "no image found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- files that may not be read, go, or change


@posix
def test_a_file_that_nobody_may_read_fails(model: Path, folder: Path, tmp_path: Path) -> None:
    """In a process without root's right to read everything."""
    smear(folder / "a.png")
    smear(folder / "secret.png").chmod(0)
    done = run_obeying_permissions("infer", folder, "-o", tmp_path / "out", "--model", model)
    assert done.returncode == 3, done.stderr
    assert "failed: secret.png: cannot be read: Permission denied" in done.stderr
    assert status(tmp_path / "out") == {"a.png": "done", "secret.png": "failed"}


def replace_os(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., object]) -> None:
    """``module`` sees an ``os`` with these functions, and nobody else does."""
    own = {name: getattr(os, name) for name in dir(os)} | functions
    monkeypatch.setattr(module, "os", SimpleNamespace(**own))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    """Other bytes of the same number, and later."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


@posix
@pytest.mark.parametrize("change", [grow, cut, rewrite])
def test_a_file_that_changes_while_it_is_read(
    change: Callable[[Path], None], model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes whenever somebody looks at it: what was read is neither the one image nor the other."""
    for name in ("a.png", "b.png", "c.png"):
        smear(folder / name)
    victim, real = folder / "b.png", os.fstat

    def then_change(descriptor: int) -> os.stat_result:
        seen = real(descriptor)
        if os.path.samestat(seen, victim.stat()):
            change(victim)
        return seen

    replace_os(monkeypatch, decode, fstat=then_change)
    assert infer(folder, "-o", tmp_path / "out", "--model", model, "-q") == 3
    assert status(tmp_path / "out") == {"a.png": "done", "b.png": "failed", "c.png": "done"}
    assert "changed while it was read" in rows(tmp_path / "out" / "images.csv")[1]["error"]
    assert not list((tmp_path / "out").rglob("*b.png*"))


@posix
def test_a_file_that_vanishes_before_its_turn_fails(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        smear(folder / name)
    real: Any = os.open

    def gone(path: Any, *arguments: Any, **settings: Any) -> int:
        if str(path).endswith("b.png"):
            (folder / "b.png").unlink(missing_ok=True)
        return int(real(path, *arguments, **settings))

    replace_os(monkeypatch, regular, open=gone)
    assert infer(folder, "-o", tmp_path / "out", "--model", model, "-q") == 3
    assert status(tmp_path / "out") == {"a.png": "done", "b.png": "failed", "c.png": "done"}
    assert "No such file" in rows(tmp_path / "out" / "images.csv")[1]["error"]
    totals = json.loads((tmp_path / "out" / "run.json").read_text())["totals"]
    assert (totals["found"], totals["done"], totals["failed"]) == (3, 2, 1)
