"""The journal of a run: which images are done, their results, and the files that belong to them.

``journal.jsonl`` in the output folder has one JSON line for the run and one per image, appended and fsynced after the
image's files. The journal alone decides which images are done, and holds their table rows: cells.csv and images.csv
are written from it, in the order of the input, so they do not depend on when or how often the run was interrupted.

    {"kind":"run","version":1,"started":"...","identity":{...},"check":"6b86b273ff34fce1"}
    {"kind":"scale","group":". : 1600 x 1200 px","scale":0.58,"check":...
    {"kind":"image","image":"a.png","status":"done","input":{...},"outputs":[...],"result":{...},"cells":"1,812,...
    {"kind":"image","image":"b.png","status":"failed",...
    {"kind":"file","path":"cells.csv","sha256":"..."}

A ``file`` line precedes each run-level file (one that covers all images), so that an edited one is recognised.

Crash safe at every instant: the first line appears together with the file or not at all. A line without a line end was
still being written and counts as never written. ``check`` (a hash of the bytes before it in the line) reveals a damaged
line, whose image is done again. If an image has several lines, the last one holds.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from cellseg_deploy.cells.scale import check_scale
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import write_bytes, writing
from cellseg_deploy.files.checked_lines import AppendedFile, content_of, line_of
from cellseg_deploy.files.fingerprint import Fingerprint
from cellseg_deploy.run.identity import RunIdentity

JOURNAL = "journal.jsonl"
VERSION = 1


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of an image: ``path`` relative to the output folder (posix), ``size`` in bytes, ``sha256``."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: bytes) -> OutputFile:
        """Return the entry for the file ``path`` with the content ``data``."""
        return cls(path, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class ImageRecord:
    """Outcome of one image.

    ``result``: its values in images.csv by column, as JSON values. ``cells``: its lines in cells.csv without the
    image's name, each with its line end. ``cells_um``: the micrometre columns of the same lines, None if the pixel
    size is unknown. ``input``: the file that was read, None if it could not be read. ``output_name``: name of its
    files in their folders, without extension (see ``names``). ``seconds``: by stage. ``thresholds``: see
    ``report.thresholds``, for the images that have it.
    """

    image: str
    status: Literal["done", "failed"]
    result: dict[str, Any]
    input: Fingerprint | None = None
    output_name: str = ""
    outputs: tuple[OutputFile, ...] = ()
    cells: str = ""
    cells_um: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    thresholds: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image's last line: ``size`` bytes, starting at byte ``at`` of the file.

    ``record`` lacks ``cells``, ``seconds`` and ``thresholds``, which stay in the file, so that thousands of images
    fit in memory.
    """

    record: ImageRecord
    at: int
    size: int

    @classmethod
    def of(cls, record: ImageRecord, at: int, size: int) -> Entry:
        """Return the entry of a complete ``record``."""
        return cls(replace(record, cells="", cells_um=None, seconds={}, thresholds=""), at, size)


@dataclass(frozen=True)
class JournalContent:
    """``entries``: by image name, in the order of their last lines. ``whole_bytes``: length up to the last whole line.

    ``damaged``: numbers of the lines that cannot be trusted and are ignored. ``scales``: measured model px per image
    px, by group of images. ``files``: SHA-256 of every content written to each run-level file, by file name.
    """

    path: Path
    identity: RunIdentity
    started: str
    entries: dict[str, Entry]
    damaged: tuple[int, ...]
    whole_bytes: int
    scales: dict[str, float] = field(default_factory=dict)
    files: dict[str, set[str]] = field(default_factory=dict)


class UnreadableJournalError(OutputError):
    """A journal whose first line does not identify its run."""


class Journal:
    """A journal open for appending, by one process and one thread.

    >>> with Journal.create(out, identity) as journal:  # doctest: +SKIP
    ...     journal.append(record)
    """

    def __init__(self, path: Path) -> None:
        """Append to the existing file ``path``, which ends with a whole line; see ``create`` and ``resume``."""
        self.path = path
        self._file = AppendedFile(path)

    @classmethod
    def create(cls, out: Path, identity: RunIdentity) -> Journal:
        """Create a journal in ``out``; it appears with its first line, or not at all. Raises ``OutputError``."""
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        first = {"kind": "run", "version": VERSION, "started": started, "identity": identity.to_json()}
        write_bytes(out / JOURNAL, line_of(first))
        return cls(out / JOURNAL)

    @classmethod
    def resume(cls, content: JournalContent) -> Journal:
        """Resume a journal that was read; an unfinished last line is cut off. Raises ``OutputError``."""
        with writing(content.path):
            os.truncate(content.path, content.whole_bytes)
        return cls(content.path)

    def append(self, record: ImageRecord) -> Entry:
        """Append an image; on return the line survives a crash and, if the disk honours fsync, a power cut.

        The files of the image must be written and fsynced first. On ``OutputError`` the journal is as before.
        """
        at, line = self._file.size, line_of_image(record)
        self._file.append(line)
        return Entry.of(record, at, len(line))

    def append_scale(self, group: str, scale: float) -> None:
        """Append the ``scale`` measured for a ``group`` of images, like ``append``."""
        self._file.append(line_of({"kind": "scale", "group": group, "scale": scale}))

    def append_file(self, path: str, sha256: str) -> None:
        """Record that the file ``path`` (relative to the output folder) is about to get the content ``sha256``."""
        self._file.append(line_of({"kind": "file", "path": path, "sha256": sha256}))

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line_of_image(record: ImageRecord) -> bytes:
    """Return the journal line of an image."""
    return line_of({"kind": "image", **asdict(record)})


def image_of_line(line: bytes) -> ImageRecord | None:
    """Return the image of ``line_of_image``; None if the line is damaged."""
    return _record(content_of(line))


def rewrite(content: JournalContent, identity: RunIdentity, records: Sequence[ImageRecord]) -> None:
    """Replace the journal that ``content`` was read from by one of ``identity`` with ``records``, as a whole.

    Scales, and what is known of run-level files, stay. Raises ``OutputError``; the old journal is then as it was.
    """
    first = {"kind": "run", "version": VERSION, "started": content.started, "identity": identity.to_json()}
    lines = [line_of(first)]
    lines += [line_of({"kind": "scale", "group": group, "scale": scale}) for group, scale in content.scales.items()]
    lines += [
        line_of({"kind": "file", "path": path, "sha256": sha256})
        for path, known in content.files.items()
        for sha256 in sorted(known)
    ]
    lines += [line_of_image(record) for record in records]
    write_bytes(content.path, b"".join(lines))


def read(path: Path) -> JournalContent:
    """Read the journal ``path``, holding one line at a time in memory.

    Raises ``UnreadableJournalError`` if the first line is missing, damaged, or of another version, and ``OutputError``
    if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return parse(path, file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error}); check permissions") from error


def parse(path: Path, lines: Iterable[bytes]) -> JournalContent:
    """Parse the ``lines``, with their line ends, of the journal ``path``. Raises ``UnreadableJournalError``."""
    entries: dict[str, Entry] = {}
    damaged: list[int] = []
    scales: dict[str, float] = {}
    files: dict[str, set[str]] = {}
    head: tuple[RunIdentity, str] | None = None
    at = 0
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        content = content_of(line)
        if head is None:
            head = _head(path, content)
        elif (measured := _scale(content)) is not None:
            scales |= measured
        elif content is not None and content.get("kind") == "file":
            files.setdefault(str(content.get("path")), set()).add(str(content.get("sha256")))
        elif (record := _record(content)) is None:
            damaged.append(number)
        else:
            entries.pop(record.image, None)  # the last line decides the order too
            entries[record.image] = Entry.of(record, at, len(line))
        at += len(line)
    if head is None:
        raise UnreadableJournalError(f"{path}: has no complete line")
    return JournalContent(path, *head, entries, tuple(damaged), at, scales, files)


def whole_records(journal: Path, entries: Iterable[Entry]) -> Iterator[ImageRecord]:
    """Yield the records of ``entries`` with their cells. Raises ``OutputError`` if the file was changed."""
    with writing(journal), journal.open("rb") as file:
        for entry in entries:
            file.seek(entry.at)
            record = _record(content_of(file.read(entry.size)))
            if record is None or record.image != entry.record.image:
                raise OutputError(f"{journal}: was changed by another program during the run; run again")
            yield record


def is_inside(relative: str) -> bool:
    """Whether the path ``relative`` stays inside the folder it is relative to; links are not checked."""
    path = PurePath(relative)
    return not path.anchor and ".." not in path.parts and "\0" not in relative


def _head(path: Path, content: dict[str, Any] | None) -> tuple[RunIdentity, str]:
    if content is None or content.get("kind") != "run":
        raise UnreadableJournalError(f"{path}: its first line is damaged")
    if content["version"] != VERSION:
        raise UnreadableJournalError(f"{path}: of version {content['version']}; this program reads version {VERSION}")
    try:
        return RunIdentity.from_json(content["identity"]), str(content["started"])
    except ValueError as error:
        raise UnreadableJournalError(f"{path}: its first line is invalid ({error})") from error


def _scale(content: dict[str, Any] | None) -> dict[str, float] | None:
    if content is None or content.get("kind") != "scale":
        return None
    try:
        return {str(content["group"]): check_scale(float(content["scale"]))}
    except (KeyError, TypeError, ValueError, UsageError):
        return None


def _record(content: dict[str, Any] | None) -> ImageRecord | None:
    if content is None or content.pop("kind", None) != "image":
        return None
    try:
        source, outputs = content["input"], tuple(OutputFile(**file) for file in content["outputs"])
        if not all(is_inside(path) for path in (content["output_name"], *(file.path for file in outputs))):
            return None  # anybody can forge a check: nothing is read, written or removed outside the folder
        return ImageRecord(
            **{**content, "input": None if source is None else Fingerprint(**source), "outputs": outputs}
        )
    except (KeyError, TypeError):  # not one of our lines, despite its valid check
        return None
