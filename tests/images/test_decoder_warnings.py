"""What decoders log and warn reaches the image it is about, whichever threads decode at the same time."""

from __future__ import annotations

import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_images import encoded, picture
from PIL import Image

from cellseg_deploy.images.decoder_warnings import collected
from cellseg_deploy.images.read import declared_pixels, read_image

TIFFFILE = logging.getLogger("tifffile")


def warn_as_pillow(text: str) -> None:
    """A warning whose place is in Pillow, whoever called."""
    warnings.warn_explicit(text, UserWarning, "PIL/Image.py", 1, module="PIL.Image")


def test_each_thread_gets_its_own() -> None:
    together = threading.Barrier(4)

    def decode(number: int) -> list[str]:
        with collected() as messages:
            together.wait(30)
            for i in range(50):
                warn_as_pillow(f"{number} warns {i}")
                TIFFFILE.warning("%d logs %d", number, i)
                TIFFFILE.info("%d chats", number)
            TIFFFILE.error("%d fails", number)
            together.wait(30)
        assert messages.errors == [f"{number} fails"]
        return messages.notes

    with ThreadPoolExecutor(4) as pool:
        for number, notes in enumerate(pool.map(decode, range(4))):
            assert notes == [text for i in range(50) for text in (f"{number} warns {i}", f"{number} logs {i}")]


def test_others_keep_their_warnings_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Another thread that decodes takes nothing of this one's."""
    inside, done = threading.Event(), threading.Event()

    def decode() -> list[str]:
        with collected() as messages:
            inside.set()
            done.wait(30)
        return [*messages.errors, *messages.notes]

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(decode)
        inside.wait(30)
        with pytest.raises(UserWarning, match="of this module"):  # the tests' own filter: warnings are errors
            warnings.warn("of this module", UserWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="here"):
            warn_as_pillow("from Pillow, but here")
        TIFFFILE.warning("logged here")
        done.set()
        assert other.result(30) == []
    assert "logged here" in caplog.text


def test_settings_of_the_process_are_as_before() -> None:
    def settings() -> tuple[object, ...]:
        logger = (TIFFFILE.level, list(TIFFFILE.filters), TIFFFILE.propagate)
        return (list(warnings.filters), warnings.showwarning, *logger)

    def fail() -> None:
        with collected():
            raise ZeroDivisionError

    before = settings()
    with collected(), ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(fail).exception(30), ZeroDivisionError)
        assert settings() != before
    assert settings() == before


def test_a_quiet_logger_is_heard_while_decoding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "tifffile")
    with collected() as messages:
        TIFFFILE.error("tiles are missing")
    assert messages.errors == ["tiles are missing"]
    assert TIFFFILE.level == logging.CRITICAL
    assert not caplog.text


def test_a_filter_that_somebody_took_away_is_no_error() -> None:
    with warnings.catch_warnings():
        with collected():
            warnings.resetwarnings()
        assert warnings.filters == []


def test_images_are_decoded_side_by_side_with_their_own_notes(tmp_path: Path) -> None:
    paths = []
    for index in range(12):
        dark = np.full((50, 60), 3000 + index, np.uint16)
        paths.append(tmp_path / f"{index}.tif")
        tifffile.imwrite(paths[-1], dark)
    alone = [read_image(path).notes for path in paths]
    with ThreadPoolExecutor(4) as pool:
        assert [loaded.notes for loaded in pool.map(read_image, paths)] == alone
    assert all(str(3000 + index) in " ".join(notes) for index, notes in enumerate(alone))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_pixels_are_known_before_decoding(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(picture()), kind))
    assert declared_pixels(path) == 40 * 60
    path.write_bytes(path.read_bytes()[:1500])  # cut short behind the header
    assert declared_pixels(path) in (0, 40 * 60)


def test_pixels_that_cannot_be_told_are_none_and_never_an_error(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for name, content in {
        "empty": b"",
        "text": b"<html>",
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tiff").write_bytes(b"II*\0\xff\xff\xff\xff")
    for name in ("fifo", "empty", "text", "png", "jpeg", "tiff", "missing", "."):
        assert declared_pixels(tmp_path / name) == 0, name
