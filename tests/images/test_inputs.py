"""Patterns and lists of paths."""

from __future__ import annotations

import codecs
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.inputs import expanded, listed


@pytest.fixture
def there(tmp_path: Path) -> Path:
    for name in ("b.png", "a.png", "sub/c.png", "sub/deep/d.png", "x[1].png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["a.png", "b.png", "x[1].png"]),
        ("**/*.png", ["a.png", "b.png", "sub/c.png", "sub/deep/d.png", "x[1].png"]),
        ("?.png", ["a.png", "b.png"]),
        ("s*", ["sub"]),
        ("x[1].png", ["x[1].png"]),  # a file of that name is meant
        ("missing.png", ["missing.png"]),  # find_images says what is wrong with it
    ],
)
def test_patterns(there: Path, pattern: str, names: list[str]) -> None:
    assert expanded([there / pattern]).paths == tuple(there / name for name in names)


def test_names_begin_where_a_pattern_does(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else matches: a folder that comes later changes no name of an earlier image."""

    def names(*patterns: str | Path) -> list[str]:
        given = expanded([Path(pattern) for pattern in patterns])
        assert set(given.roots) == {image.root for image in find_images(given.paths, roots=given.roots)}
        return [image.name for image in find_images(given.paths, roots=given.roots)]

    (there / "sub2").mkdir()
    assert names(there / "s*/*.png") == ["sub/c.png"]
    (there / "sub2/e.png").touch()
    assert names(there / "s*/*.png") == ["sub/c.png", "sub2/e.png"]
    assert names(there / "s*") == ["sub/c.png", "sub/deep/d.png", "sub2/e.png"]  # folders that match, all that is in
    assert names(there / "sub/*.png") == ["c.png"]
    monkeypatch.chdir(there)
    assert names("**/[cd].png") == ["sub/c.png", "sub/deep/d.png"]
    assert names("s*/c.png", "sub2") == ["sub2/e.png", f"{there.name}/sub/c.png"]


def test_names_do_not_depend_on_whether_a_folder_has_images_yet(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one/a.png").touch()
    folders = [tmp_path / "one", tmp_path / "two"]
    assert [image.name for image in find_images(folders)] == ["one/a.png"]
    (tmp_path / "two/b.png").touch()
    assert [image.name for image in find_images(folders)] == ["one/a.png", "two/b.png"]


def test_a_pattern_without_a_match(there: Path) -> None:
    with pytest.raises(UsageError, match="matches"):
        expanded([there / "*.jpg"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
def test_lists(there: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [there / "b.png", there / "sub", there / os.fsdecode(b"\xff.png")]
    data = b"".join(os.fsencode(path) + end.encode() for path in paths)
    (there / "list.txt").write_bytes(data + (b"" if end == "\0" else end.encode()))
    assert listed(there / "list.txt") == paths
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert listed(Path("-")) == paths


def test_a_list_of_an_editor_that_marks_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    assert listed(tmp_path / "list.txt") == [Path("a.png"), Path("b.png")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\r\n", "\0"])
def test_a_list_of_powershell(tmp_path: Path, encoding: str, end: str) -> None:
    """Which writes UTF-16, two bytes a letter, with a mark in front."""
    text = f"\ufeffZellen/a ä.png{end}Zellen/\U0001f52c.png{end}"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert listed(tmp_path / "list.txt") == [Path("Zellen/a ä.png"), Path("Zellen/\U0001f52c.png")]


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffa.png\n".encode("utf-16-le")[:-1],
        codecs.BOM_UTF16_LE + b"\x00\xd8a\x00",  # half a letter
        "a.png\n".encode("utf-32"),
    ],
)
def test_a_list_that_cannot_be_decoded(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(UsageError, match=r"list\.txt: the list cannot be decoded .* save it as UTF-8"):
        listed(tmp_path / "list.txt")


def test_what_was_written_down_may_be_gone(there: Path) -> None:
    gone = there / "gone.png"
    found = find_images([there, gone], may_be_missing=[gone])
    assert [image.path.name for image in found if image.path.name == "gone.png"] == ["gone.png"]
    with pytest.raises(UsageError, match=r"gone\.png: no such file or folder"):
        find_images([there, gone])


def test_a_name_with_a_line_end_needs_nul(there: Path) -> None:
    (there / "list").write_bytes(os.fsencode(there / "two\nlines.png") + b"\0")
    assert listed(there / "list") == [there / "two\nlines.png"]


@pytest.mark.parametrize("content", [b"", b"\n \n", None])
def test_lists_that_name_nothing(there: Path, content: bytes | None) -> None:
    if content is not None:
        (there / "list").write_bytes(content)
    with pytest.raises(UsageError, match="list"):
        listed(there / "list")


def test_names_do_not_depend_on_the_order_in_which_folders_are_given(tmp_path: Path) -> None:
    """Two folders of one name are told apart by a number, which is the same whichever comes first."""
    folders = [tmp_path / "one/smears", tmp_path / "two/smears"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "a.png").touch()
    named = {image.path: image.name for image in find_images(folders)}
    assert {image.path: image.name for image in find_images(folders[::-1])} == named
    assert len(set(named.values())) == 2
    assert {image.root for image in find_images(folders)} == set(folders)
