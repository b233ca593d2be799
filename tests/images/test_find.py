"""Finding and pairing image files: names, order, links, partners."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.images.find import input_roots, paths_in_list
from cellseg_deploy.images.read import check_same_size, find_images, pair_by_stem, read_image, read_labels


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def names(*paths: Path, **settings: Any) -> list[str]:
    return [image.name for image in find_images(paths, **settings)]


def test_folder_is_searched_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "a.png", "sub/c.tiff", "sub/d.txt", ".hidden.png", ".git/x.png", "e.png/f.tif"):
        touch(tmp_path / "in" / name)
    assert names(tmp_path / "in") == ["a.jpg", "a.png", "b.PNG", "e.png/f.tif", "sub/c.tiff"]


def test_files_that_are_not_read_are_counted_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.bmp", "sub/c.BMP", "sub/d.heic", "notes.txt", "README", ".hidden.bmp"):
        touch(tmp_path / "in" / name)
    assert names(tmp_path / "in", tmp_path / "in" / "sub") == ["a.png"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("not read: 2 .bmp, 1 without ending, 1 .heic, 1 .txt; expected files ending in .png, .jpg")
    assert "pass slides" not in said
    caplog.clear()
    touch(tmp_path / "in" / "e.CZI")
    names(tmp_path / "in")
    assert caplog.records[0].getMessage().endswith("; pass slides by name; convert other images to PNG or TIFF")
    caplog.clear()
    named = tmp_path / "in" / "b.bmp"
    assert [image.path for image in find_images([named])] == [named]
    assert not caplog.records


def test_many_endings_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        touch(tmp_path / f"a.x{number:02}")
    assert names(tmp_path) == []
    (said,) = (record.getMessage() for record in caplog.records)
    assert "1 .x00, 1 .x01" in said
    assert "1 .x07 and 4 more endings" in said


def test_every_ending_of_a_jpeg_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jfif", "b.JPE", "c.jif", "d.JFIF"):
        touch(tmp_path / name)
    assert names(tmp_path) == ["a.jfif", "b.JPE", "c.jif", "d.JFIF"]
    assert not caplog.records


def test_a_named_file_needs_no_suffix_but_must_exist(tmp_path: Path) -> None:
    assert names(touch(tmp_path / "image.dat")) == ["image.dat"]
    with pytest.raises(UsageError, match=r"missing\.png"):
        find_images([tmp_path / "missing.png"])
    assert find_images([tmp_path]) == []


def test_a_link_to_where_nobody_may_look_is_reported_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = touch(tmp_path / "secret" / "o.png")
    touch(tmp_path / "in" / "i.png")
    (tmp_path / "in" / "out.png").symlink_to(secret)
    real: Any = os.stat

    def stat(path: Any, *arguments: Any, **settings: Any) -> Any:
        if str(path).endswith("out.png") and settings.get("follow_symlinks", True):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **settings)

    monkeypatch.setattr(os, "stat", stat)
    assert names(tmp_path / "in") == ["i.png", "out.png"]


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert names(Path()) == ["a.png"]


def test_links_out_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = touch(tmp_path / "outside" / "o.png")
    inside = touch(tmp_path / "in" / "i.png")
    (tmp_path / "in" / "out.png").symlink_to(outside)
    (tmp_path / "in" / "same.png").symlink_to(inside)
    (tmp_path / "in" / "folder").symlink_to(outside.parent)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    problems = {image.name: bool(image.problem) for image in find_images([tmp_path / "in"])}
    assert problems == {"i.png": False, "out.png": True, "same.png": False}
    assert "folder: linked folder not followed" in caplog.text
    followed = find_images([tmp_path / "in"], follow_links=True)
    assert [image.name for image in followed] == ["folder/o.png", "i.png", "out.png", "same.png"]
    assert not any(image.problem for image in followed)


def test_pairs(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/sub/b.jpg", "masks/a.tif", "masks/sub/b.jpg.tif"):
        touch(tmp_path / name)
    pairs = pair_by_stem(tmp_path / "images", tmp_path / "masks")
    assert [(pair.stem, pair.image.name, pair.mask.name) for pair in pairs] == [
        ("a", "a.png", "a.tif"),
        ("sub/b", "b.jpg", "b.jpg.tif"),
    ]
    check_same_size(pairs[0], (3, 4), (3, 4))
    with pytest.raises(DataError, match=r"a\.tif is 3 x 4.*a\.png is 4 x 3"):
        check_same_size(pairs[0], (3, 4), (4, 3))


def test_pairs_that_are_none(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(UsageError, match="not a folder"):
        pair_by_stem(images, masks)
    images.mkdir()
    masks.mkdir()
    with pytest.raises(NothingToDoError):
        pair_by_stem(images, masks)
    touch(images / "a.png")
    with pytest.raises(DataError, match=r"a\.png: no mask"):
        pair_by_stem(images, masks)
    touch(masks / "a.png")
    lonely = touch(masks / "b.png")
    with pytest.raises(DataError, match=r"b\.png: no image"):
        pair_by_stem(images, masks)
    lonely.unlink()
    touch(images / "a.jpg")
    with pytest.raises(DataError, match="share the stem a"):
        pair_by_stem(images, masks)


@pytest.mark.real
def test_photographs(real_data: Path) -> None:
    pairs = pair_by_stem(real_data / "bbbc041seg/val/images", real_data / "bbbc041seg/val/masks")
    assert len(pairs) == 10
    image, labels = read_image(pairs[0].image), read_labels(pairs[0].mask)
    check_same_size(pairs[0], image.pixels_hwc.shape[:2], labels.shape)  # type: ignore[arg-type]
    assert image.notes == ()
    assert 0 < labels.max() < 400


# --- several folders


def test_names_of_several_folders_begin_with_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one/a.png", "one/sub/b.png", "two/c.png", "two/d.png"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    paths = [Path("two/c.png"), Path("one")]
    assert names(*paths) == names(*paths[::-1]) == ["one/a.png", "one/sub/b.png", "two/c.png"]
    assert input_roots(paths) == [tmp_path / "one", tmp_path / "two"]
    assert {image.root for image in find_images(paths)} == set(input_roots(paths))
    assert names(Path("two/c.png")) == ["c.png"]
    files = [Path("one/a.png"), Path("one/sub/b.png"), Path("two/d.png")]
    assert names(*files) == names(*files[::-1]) == ["one/a.png", "sub/b.png", "two/d.png"]


def test_names_do_not_depend_on_whether_a_folder_has_images_yet(tmp_path: Path) -> None:
    touch(tmp_path / "one/a.png")
    (tmp_path / "two").mkdir()
    folders = [tmp_path / "one", tmp_path / "two"]
    assert names(*folders) == ["one/a.png"]
    touch(tmp_path / "two/b.png")
    assert names(*folders) == ["one/a.png", "two/b.png"]


@pytest.mark.parametrize("second", ["two/smears", "two/SMEARS", "two/smears/a.png"])
def test_folders_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    for name in ("one/smears/a.png", "two/smears/a.png", "two/SMEARS/a.png"):
        touch(tmp_path / name)
    with pytest.raises(UsageError, match=r"one.smears and .* have the same name; pass their common parent"):
        find_images([tmp_path / second, tmp_path / "one/smears"])
    assert names(tmp_path / "one", tmp_path / "two/SMEARS") == ["SMEARS/a.png", "one/smears/a.png"]


def test_what_lies_in_a_passed_folder_is_part_of_it(tmp_path: Path) -> None:
    """However it was passed, and in whatever order: no image twice."""
    for name in ("F/a.png", "F/s/b.png", "F/s/t/c.png"):
        touch(tmp_path / name)
    (tmp_path / "link").symlink_to("F/s")
    paths = [tmp_path / name for name in ("F/s/t/c.png", "F/s", "F", "link", "F/./s/..", "F/a.png")]
    assert names(*paths) == names(*paths[::-1]) == ["a.png", "s/b.png", "s/t/c.png"]
    assert input_roots(paths) == [tmp_path / "F"]


def test_an_image_is_named_by_where_it_lies_whatever_links_lead_there(tmp_path: Path) -> None:
    touch(tmp_path / "F/z/p.png")
    before = names(tmp_path / "F", follow_links=True)
    (tmp_path / "F/a").symlink_to("z")
    (tmp_path / "F/up").symlink_to("..")
    touch(tmp_path / "G/q.png")
    (tmp_path / "G/f").symlink_to(tmp_path / "F")
    assert names(tmp_path / "F", follow_links=True) == ["up/G/q.png", *before] == ["up/G/q.png", "z/p.png"]
    (tmp_path / "F/up").unlink()
    assert names(tmp_path / "F", follow_links=True) == before
    assert names(tmp_path / "F", tmp_path / "G", follow_links=True) == ["F/z/p.png", "G/q.png"]
    assert names(tmp_path / "G", follow_links=True) == ["f/z/p.png", "q.png"]


@pytest.mark.parametrize("path", ["x" * 300 + ".png", "x" * 300 + "/b.png", "loop/c.png", "*.png"])
def test_a_path_that_does_not_lead_to_a_file_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    touch(tmp_path / "a.png")
    words = "leave out the quotes" if "*" in path else "check the path$"
    with pytest.raises(UsageError, match=f"no such file or folder.*{words}"):
        find_images([tmp_path / "a.png", tmp_path / path])


# --- lists


@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
def test_lists(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "b.png", tmp_path / "sub", tmp_path / os.fsdecode(b"\xff.png")]
    data = b"".join(os.fsencode(path) + end.encode() for path in paths)
    (tmp_path / "list.txt").write_bytes(data + (b"" if end == "\0" else end.encode()))
    assert paths_in_list(tmp_path / "list.txt") == paths
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert paths_in_list(Path("-")) == paths


def test_a_list_of_an_editor_that_marks_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    assert paths_in_list(tmp_path / "list.txt") == [Path("a.png"), Path("b.png")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_list_in_utf16_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa.png\r\n".encode(encoding))
    with pytest.raises(UsageError, match=r"list\.txt: the list is in UTF-16; save it as UTF-8"):
        paths_in_list(tmp_path / "list.txt")


def test_a_name_with_a_line_end_needs_nul(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(os.fsencode(tmp_path / "two\nlines.png") + b"\0")
    assert paths_in_list(tmp_path / "list") == [tmp_path / "two\nlines.png"]


@pytest.mark.parametrize("content", [b"", b"\n \n", None])
def test_lists_that_name_nothing(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(UsageError, match="list"):
        paths_in_list(tmp_path / "list")
