"""Corrections of a folder's images: a journal of every edit, and the corrected label images made from it.

``OUT/corrections/corrections.jsonl`` has one checked line (see ``files.checked_lines``) for each edit, undo, redo and
confirmation, fsynced before the page is told, so that a kill loses nothing. Before the first edit of an image a line
names the labels it starts from and the photograph. ``OUT/labels`` is never changed. ``OUT/corrections/NAME.tif`` is the
corrected label image, cells numbered 1..n in raster order; it is made from the journal and may be deleted.

    {"kind":"image","image":"a.png","photograph":"/smears/a.png","labels":"labels/a.png.tif","sha256":"...",...}
    {"kind":"edit","image":"a.png","edit":{"op":"delete","cells":[3]}}
    {"kind":"undo","image":"a.png"}
    {"kind":"confirm","image":"a.png","value":true}
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.cells.label_runs import Labels, renumber
from cellseg_deploy.errors import DataError, OutputError
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.files.checked_lines import AppendedFile, content_of, line_of
from cellseg_deploy.images.decode import decode_bytes
from cellseg_deploy.images.options import MAX_PIXELS
from cellseg_deploy.outputs import label_tiff
from cellseg_deploy.outputs.names import LABEL_SUFFIX
from cellseg_deploy.run.journal import is_inside
from cellseg_deploy.run.output_folder import make_place
from cellseg_deploy.view.edited import Classes, Edit, EditedImage, Step
from cellseg_deploy.view.source import ViewedImage, label_path

FOLDER = "corrections"
JOURNAL = f"{FOLDER}/corrections.jsonl"
BASE = f"{FOLDER}/.base"
"""Labels that edits start from where a run has none; hidden, so that no reader takes them for corrected ones."""
VERSION = 1

_log = logging.getLogger(__name__)


@dataclass
class Recorded:
    """What the journal says of one image. ``photograph``: absolute path. ``lines``: edits, undos, ..., in order.

    ``output_name``: name of its corrected label image. ``labels``, ``sha256``: label image that the edits begin with.
    ``classes``: of its cells, None for those of the run.
    """

    image: str
    photograph: str
    labels: str
    sha256: str
    output_name: str
    classes: dict[str, Any] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def edits(self) -> int:
        """Number of edits that hold."""
        steps = {"edit": 1, "redo": 1, "undo": -1}
        return sum(steps.get(line["kind"], 0) for line in self.lines)

    @property
    def confirmed(self) -> bool:
        """Whether a person said that the labels are right."""
        said = [line["value"] for line in self.lines if line["kind"] == "confirm"]
        return bool(said and said[-1])


def read_corrections(out: Path) -> tuple[dict[str, Recorded], int, list[str]]:
    """Read the journal of ``out``: what it says by image name, its length up to the last whole line, and notices.

    Lines after a damaged one still hold: an edit that then cannot be made is left out with a notice when its image is
    opened. Raises ``OutputError`` if it cannot be read, or is of a newer version.
    """
    path = out / JOURNAL
    found: dict[str, Recorded] = {}
    notices: list[str] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return found, 0, notices
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error}); check permissions") from error
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        notices.append(f"{path.name}: the last line was not finished when the viewer died; that one edit is dropped")
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        content = content_of(line)
        if content is None:
            notices.append(f"{path.name}, line {number}: damaged and left out")
        elif content.get("kind") == "corrections":
            if content.get("version") != VERSION:
                raise OutputError(f"{path}: of version {content.get('version')}; this program knows {VERSION}")
        elif content.get("kind") == "image" and all(
            is_inside(str(content.get(name))) for name in ("labels", "output_name")
        ):
            image = str(content["image"])
            texts = {name: str(content[name]) for name in ("photograph", "labels", "sha256", "output_name")}
            found[image] = Recorded(image, **texts, classes=content.get("classes"))  # type: ignore[arg-type]
        elif content.get("image") in found:
            found[content["image"]].lines.append(content)
    return found, whole, notices


class Corrections:
    """The corrections of one folder, open for editing by one process; not thread-safe."""

    def __init__(self, out: Path, class_names: Sequence[str]) -> None:
        """Read what ``out`` has; nothing is written before the first edit. Raises ``OutputError``."""
        self.out = out
        self.recorded, self._whole, self.notices = read_corrections(out)
        used = [
            str(line["edit"]["class"])
            for said in self.recorded.values()
            for line in said.lines
            if line["kind"] == "edit" and line["edit"].get("class")
        ]
        self.class_names = tuple(dict.fromkeys([*class_names, *used]))
        self._read_bytes = (out / JOURNAL).stat().st_size if (out / JOURNAL).exists() else 0
        self._file: AppendedFile | None = None
        self._open: dict[str, EditedImage] = {}
        self._stale: set[str] = {name for name in self.recorded if not self._is_newer(name)}

    @property
    def behind(self) -> set[str]:
        """Names of the images with edits that their corrected label images do not have yet."""
        return {name for name in self._stale if self.recorded[name].lines}

    @property
    def opened(self) -> set[str]:
        """Names of the images whose state is in memory."""
        return set(self._open)

    def image(self, image: ViewedImage, classes: Callable[[], Classes]) -> EditedImage:
        """Return the state of ``image``, replayed from the journal the first time. ``classes``: of its first labels.

        Raises ``DataError`` if it has no labels, or they are not those that the edits were made on.
        """
        if image.name in self._open:
            return self._open[image.name]
        said = self.recorded.get(image.name)
        relative = image.labels if said is None else said.labels
        if not relative:
            raise DataError(f"{image.name}: not counted yet")
        labels, sha256 = self._labels(relative)
        first = classes() if said is None or said.classes is None else _classes_in(said.classes)
        if said is not None and said.sha256 != sha256:
            raise DataError(
                f"{self.out / relative}: is not the label image that the corrections of {image.name} were made on; "
                f"bring that one back, or move {self.out / JOURNAL} away to start again"
            )
        edited = EditedImage(labels, first, self.class_names, self._relabelled)
        for line in () if said is None else said.lines:
            try:
                self._replay(edited, line)
            except (DataError, ValueError, KeyError) as error:
                self.notices.append(f"{image.name}: an edit cannot be replayed and is left out ({error})")
        while len(self._open) >= 8:  # label images are large; an image that was left is replayed
            self._open.pop(next(iter(self._open)))
        self._open[image.name] = edited
        return edited

    def add_labels(self, image: ViewedImage, labels: Labels, classes: Classes, *, as_edit: bool) -> dict[str, Any]:
        """Store ``labels`` (1..n) with ``classes`` in ``BASE`` and return the ``relabel`` edit that names them.

        Without ``as_edit`` they are where edits of ``image`` begin. Raises ``OutputError``.
        """
        data = label_tiff.encode(labels)
        sha256 = hashlib.sha256(data).hexdigest()
        relative = f"{BASE}/{image.id}-{sha256[:16]}.tif"
        write_bytes(make_place(self.out, relative), data)
        said = {str(number): list(each) for number, each in classes.items()}
        if not as_edit:
            self._begin(image, relative, sha256, said)
        return {"op": "relabel", "labels": relative, "sha256": sha256, "classes": said}

    def edit(self, image: ViewedImage, edited: EditedImage, edit: Edit) -> Step:
        """Make ``edit`` and record it. Raises ``UsageError``, or ``OutputError`` with nothing changed."""
        if edit.get("op") == "draw" and not edit.get("class") and self.class_names:
            edit = {**edit, "class": self.class_names[0]}
        step = edited.plan(edit)
        self._record(image, {"kind": "edit", "edit": dict(edit)})
        return edited.apply(step)

    def undo(self, image: ViewedImage, edited: EditedImage) -> Step:
        """Undo the last edit and record that."""
        step = edited.undo()
        edited.redo()  # it can be undone: record first
        self._record(image, {"kind": "undo"})
        edited.undo()
        return step

    def redo(self, image: ViewedImage, edited: EditedImage) -> Step:
        """Make the edit again that was undone last, and record that."""
        step = edited.redo()
        edited.undo()
        self._record(image, {"kind": "redo"})
        edited.redo()
        return step

    def confirm(self, image: ViewedImage, edited: EditedImage, *, value: bool) -> None:
        """Record whether a person found the labels of ``image`` right."""
        self._record(image, {"kind": "confirm", "value": value})
        edited.confirmed = value

    def save_labels(self, images: Sequence[ViewedImage], classes: Callable[[ViewedImage], Classes]) -> list[str]:
        """Write the corrected label images that are not up to date; return their paths relative to OUT."""
        written = []
        for image in images:
            if image.name not in self._stale:
                continue
            edited = self.image(image, lambda image=image: classes(image))  # type: ignore[misc]
            relative = f"{FOLDER}/{label_path(image)}"
            write_bytes(make_place(self.out, relative), label_tiff.encode(numbered(edited)[0]))
            self._stale.discard(image.name)
            written.append(relative)
        return written

    @property
    def is_current(self) -> bool:
        """Whether the journal on the disk is still as it was read; checked when the folder is locked for editing."""
        path = self.out / JOURNAL
        return self._file is not None or (path.stat().st_size if path.exists() else 0) == self._read_bytes

    def close(self) -> None:
        """Close the journal; label images that are up to date become newer than it."""
        if self._file is not None:
            self._file.close()
            self._file = None
            for name in self.recorded.keys() - self._stale:
                with contextlib.suppress(OSError):  # then it is written again next time
                    os.utime(self._label_place(name))

    def _label_place(self, name: str) -> Path:
        return self.out / FOLDER / f"{self.recorded[name].output_name}{LABEL_SUFFIX}"

    def _is_newer(self, name: str) -> bool:
        """Whether the corrected label image of ``name`` was written after the last line of the journal."""
        if not self.recorded[name].lines:
            return True
        try:
            return self._label_place(name).stat().st_mtime_ns >= (self.out / JOURNAL).stat().st_mtime_ns
        except OSError:
            return False

    def _replay(self, edited: EditedImage, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "edit":
                edited.apply(edited.plan(line["edit"]))
            case "undo":
                edited.undo()
            case "redo":
                edited.redo()
            case "confirm":
                edited.confirmed = bool(line["value"])

    def _labels(self, relative: str) -> tuple[Labels, str]:
        path = self.out / relative
        if not is_inside(relative):
            raise DataError(f"{relative}: lies outside of {self.out}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the label image cannot be read ({error.strerror or error})") from error
        samples = decode_bytes(path, data, MAX_PIXELS).samples
        if samples.ndim != 2 or samples.dtype.kind != "u":
            raise DataError(f"{path}: no label image of cellseg-infer ({samples.dtype} {samples.shape})")
        return np.ascontiguousarray(samples, np.int32), hashlib.sha256(data).hexdigest()

    def _relabelled(self, edit: Edit) -> tuple[Labels, Classes]:
        labels, sha256 = self._labels(str(edit["labels"]))
        if sha256 != edit["sha256"]:
            raise DataError(f"{self.out / str(edit['labels'])}: was changed since it was made")
        return labels, _classes_in(edit.get("classes") or {})

    def _begin(self, image: ViewedImage, labels: str, sha256: str, classes: dict[str, Any] | None = None) -> None:
        line = {
            "kind": "image",
            "image": image.name,
            "photograph": "" if image.path is None else os.path.abspath(image.path),  # noqa: PTH100
            "labels": labels,
            "sha256": sha256,
            "output_name": image.output_name,
            "classes": classes,
        }
        self._append(line)
        photograph = str(line["photograph"])
        self.recorded[image.name] = Recorded(image.name, photograph, labels, sha256, image.output_name, classes)

    def _record(self, image: ViewedImage, line: dict[str, Any]) -> None:
        if image.name not in self.recorded:
            self._begin(image, image.labels, self._labels(image.labels)[1])
        line = {"kind": line.pop("kind"), "image": image.name, **line}
        self._append(line)
        self.recorded[image.name].lines.append(line)
        self._stale.add(image.name)

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            path = self.out / JOURNAL
            make_folder(path.parent)
            if not self._whole:
                write_bytes(path, line_of({"kind": "corrections", "version": VERSION}))
            elif path.stat().st_size > self._whole:
                os.truncate(path, self._whole)
            self._file = AppendedFile(path)
        self._file.append(line_of(line))


def _classes_in(content: dict[str, Any]) -> Classes:
    return {int(number): (str(name), float(probability)) for number, (name, probability) in content.items()}


def numbered(edited: EditedImage) -> tuple[Labels, Classes]:
    """Return labels 1..n in raster order, and the classes by these numbers."""
    labels = renumber(edited.labels)
    old_of = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    old_of[labels] = edited.labels
    numbers = enumerate(old_of.tolist())
    return labels, {new: edited.classes[old] for new, old in numbers if new and old in edited.classes}
