"""Finding and pairing image files: names, order, links, partners."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.images.find import input_roots, path_of
from cellseg_deploy.images.read import check_same_size, find_images, pair_by_stem, read_image, read_labels
from cellseg_deploy.run.output_folder import check_apart


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
    assert names(tmp_path / "in", tmp_path / "in" / "sub") == ["in/a.png"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("not read: 2 .bmp, 1 without ending, 1 .heic, 1 .txt; expected files ending in .png, .jpg")
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


def test_names_never_collide(tmp_path: Path) -> None:
    for name in ("one/images/a.png", "two/images/a.png", "three/a.png"):
        touch(tmp_path / name)
    assert names(tmp_path / "one/images", tmp_path / "two/images", tmp_path / "three/a.png") == [
        "images-2/a.png",
        "images/a.png",
        "three/a.png",
    ]
    same = [tmp_path / "one/images", tmp_path / "one/images/a.png", tmp_path / "one" / "." / "images"]
    assert names(*same) == ["a.png"]


def test_a_named_file_needs_no_suffix_but_must_exist(tmp_path: Path) -> None:
    assert names(touch(tmp_path / "image.dat")) == ["image.dat"]
    with pytest.raises(UsageError, match=r"missing\.png"):
        find_images([tmp_path / "missing.png"])
    assert find_images([tmp_path]) == []


def test_roots_are_what_names_are_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one/a.png", "one/b.png", "two/c.png"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert input_roots([Path("two/c.png"), Path("one"), tmp_path / "one" / "b.png"]) == [
        tmp_path / "one",
        tmp_path / "two",
    ]


@pytest.mark.parametrize("given", [["one"], ["one", "two/one"], ["one/sub/a.png"], ["two", "one", "one/sub"]])
def test_a_name_leads_back_to_its_file(tmp_path: Path, given: list[str]) -> None:
    for name in ("one/b.png", "one/sub/a.png", "two/one/b.png", "two/x.png"):
        touch(tmp_path / name)
    paths = [tmp_path / path for path in given]
    for image in find_images(paths):
        assert path_of(image.name, input_roots(paths)) == image.path
    if len(input_roots(paths)) > 1:
        assert path_of("three/b.png", input_roots(paths)) is None


def test_names_do_not_depend_on_whether_a_folder_is_there(tmp_path: Path) -> None:
    """One that may be missing, and is, fails alone."""
    for name in ("mon/a.png", "tue/b.png"):
        touch(tmp_path / name)
    given = [tmp_path / "mon", tmp_path / "tue"]
    (tmp_path / "tue").rename(tmp_path / "away")
    assert names(*given, may_be_missing=given) == ["mon/a.png", "tue"]
    assert input_roots(given) == given
    assert names(given[1], may_be_missing=given) == ["tue"]
    (tmp_path / "away").rename(tmp_path / "tue")
    assert names(*given) == ["mon/a.png", "tue/b.png"]
    assert input_roots(given) == given
    gone = given[0] / "gone.PNG"  # by its ending an image
    assert names(gone, touch(tmp_path / "mon/file"), may_be_missing=[gone]) == ["file", "gone.PNG"]


def long_path(folder: Path) -> Path:
    return folder / ("x" * 300 + ".png")


def test_a_path_that_cannot_be_looked_at_is_one_image(tmp_path: Path) -> None:
    """Of a name that no file can have."""
    touch(tmp_path / "a.png")
    given = [tmp_path / "a.png", long_path(tmp_path), long_path(tmp_path).with_suffix("") / "b.png"]
    assert {image.path for image in find_images(given, may_be_missing=given)} == set(given)
    check_apart(given, tmp_path / "out")
    with pytest.raises(UsageError, match="no such file or folder"):
        find_images(given)


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


def test_an_image_is_called_by_where_it_lies_whatever_links_lead_there(tmp_path: Path) -> None:
    touch(tmp_path / "F/z/p.png")
    before = names(tmp_path / "F", follow_links=True)
    (tmp_path / "F/a").symlink_to("z")
    (tmp_path / "link").symlink_to("F")
    assert names(tmp_path / "F", follow_links=True) == before == ["z/p.png"]
    assert names(tmp_path / "F", tmp_path / "F/z", follow_links=True) == ["z/p.png"]
    assert [image.path for image in find_images([tmp_path / "link", tmp_path / "F"])] == [tmp_path / "F/z/p.png"]
    touch(tmp_path / "other/q.png")
    (tmp_path / "F/b").symlink_to(tmp_path / "other")
    assert names(tmp_path / "F", follow_links=True) == ["b/q.png", "z/p.png"]
