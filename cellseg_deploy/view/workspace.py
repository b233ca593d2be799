"""Everything a viewer knows: images, pixels, corrections, model. Knows no web framework; called by any thread."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.field_of_view import Mask, find_field
from cellseg_deploy.errors import CellsegError, DataError, OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder, remove, write_bytes
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.images.read import LoadedImage, read_image
from cellseg_deploy.outputs.names import output_names
from cellseg_deploy.outputs.palette import COUNTED_RGB, class_rgb
from cellseg_deploy.outputs.segmentation import Segmentation
from cellseg_deploy.view import export, source
from cellseg_deploy.view.cell_rows import Row, counts, rows_of
from cellseg_deploy.view.corrections import FOLDER, Corrections
from cellseg_deploy.view.edited import Classes, Edit, EditedImage, Step
from cellseg_deploy.view.model import Labeller, Settings
from cellseg_deploy.view.pyramid import TILE_SIZE, Pixels, PyramidCache
from cellseg_deploy.view.source import Source, ViewedImage

CLASSES_BY_HAND = ("red", "white", "platelet")
"""Names for the classes of cells where the model distinguishes none."""
_UPLOAD_PREFIX = f"{source.UPLOADS}/"


@dataclass
class _Shown:
    """An image that is open in the page: its cells' rows, and its field of view, None if that is the whole image."""

    rows: dict[int, Row]
    field: Mask | None


class Workspace:
    """Use as a context: it locks the folder for corrections if there is one, and at the end writes what is stale."""

    def __init__(self, opened: Source, *, class_names: tuple[str, ...] = ()) -> None:
        self.source = opened
        self.class_names = class_names or opened.classes or CLASSES_BY_HAND
        if missing := [name for name in opened.classes if name not in self.class_names]:
            raise UsageError(f"`classes` must hold those of the model; {', '.join(missing)} is missing")
        self.corrections = Corrections(opened.out, self.class_names)
        self.labeller = Labeller(opened.recorded, is_run=opened.is_run)
        self.pyramids = PyramidCache(lambda key: self._read(self.image(key)).pixels_hwc)
        self._shown: dict[str, _Shown] = {}
        self._locked: Any = None
        self._lock = threading.RLock()

    def __enter__(self) -> Workspace:
        if (self.source.out / FOLDER).is_dir():
            self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            try:
                self.save()
            finally:
                self.corrections.close()
                self.labeller.close()
                if self._locked is not None:
                    self._locked.__exit__(None, None, None)

    # ------------------------------------------------------------------------------------------------------- reading

    def image(self, key: str) -> ViewedImage:
        """Return the image with the id ``key``. Raises ``UsageError`` for an unknown one."""
        try:
            return self.source.images[key]
        except KeyError:
            raise UsageError("there is no such image here; reload the page") from None

    def overview(self) -> dict[str, Any]:
        """Return what the list of images shows, the classes and their colours."""
        with self._lock:
            images = [self._listed(image) for image in self.source.images.values()]
            return {
                "title": self.source.out.name,
                "is_run": self.source.is_run,
                "classes": [
                    {"name": name, "rgb": class_rgb(index), "counts": self._class_counts(name)}
                    for index, name in enumerate(self.class_names)
                ],
                "has_model_classes": bool(self.source.classes),
                "counted_rgb": COUNTED_RGB,
                "count_rule": self.source.count_rule,
                "tile_size": TILE_SIZE,
                "notices": self.corrections.notices,
                "images": images,
            }

    def cells(self, key: str) -> dict[str, Any]:
        """Return everything about one image: its size, cells with outlines, and the state of its corrections.

        Images are shown although label images cannot be written, as on a full disk: that is a warning.
        """
        unsaved = []
        with self._lock:
            image = self.image(key)
            try:
                self.save(self.corrections.opened)
            except OutputError as error:
                unsaved.append(f"{error}. The journal has every edit; the label image is written when there is room")
            pyramid = self.pyramids[key]
            edited = self._edited(image)
            shown = self._show(image, edited)
            return {
                "id": key,
                "name": image.name,
                "width": pyramid.width,
                "height": pyramid.height,
                "warnings": [*image.warnings.values(), *unsaved],
                "cells": list(shown.rows.values()),
                **self._state(image, edited, shown),
            }

    def thumbnail(self, key: str) -> bytes:
        """Return a small JPEG of the image."""
        self._check_readable(self.image(key))
        return self.pyramids[key].thumbnail(160)

    def tile(self, key: str, level: int, column: int, row: int) -> bytes:
        """Return a JPEG tile of the image."""
        self._check_readable(self.image(key))
        return self.pyramids[key].tile(level, column, row)

    # ------------------------------------------------------------------------------------------------------- editing

    def edit(self, key: str, edit: Edit) -> dict[str, Any]:
        """Make ``edit``; return the cells that changed. ``relabel`` edits are made by ``label`` only."""
        if edit.get("op") == "relabel":
            raise UsageError("labels are replaced by the labelling itself, not by an edit")
        with self._lock:
            image, edited = self._to_edit(key)
            return self._changed(image, edited, self.corrections.edit(image, edited, edit))

    def undo(self, key: str) -> dict[str, Any]:
        """Undo the last edit."""
        with self._lock:
            image, edited = self._to_edit(key)
            return self._changed(image, edited, self.corrections.undo(image, edited))

    def redo(self, key: str) -> dict[str, Any]:
        """Make the edit again that was undone last."""
        with self._lock:
            image, edited = self._to_edit(key)
            return self._changed(image, edited, self.corrections.redo(image, edited))

    def confirm(self, key: str, *, value: bool) -> dict[str, Any]:
        """Set or remove the flag that a person found the labels right."""
        with self._lock:
            image, edited = self._to_edit(key)
            self.corrections.confirm(image, edited, value=value)
            return {"cells": [], "removed": [], **self._state(image, edited, self._show(image, edited))}

    def label(self, key: str, content: dict[str, Any]) -> dict[str, Any]:
        """Label the image with the settings in ``content``; only with ``keep`` do these labels become an edit."""
        settings = Settings.of(content)
        with self._lock:
            image, edited = self.image(key), None
            if content.get("keep"):
                image, edited = self._to_edit(key)
            found = self._labelled(image, settings)
            classes = _classes_by_number(found)
            if edited is not None:
                relabel = self.corrections.add_labels(image, found.labels, classes, as_edit=True)
                return self._changed(image, edited, self.corrections.edit(image, edited, relabel))
            rows = rows_of(found.labels)
            for row, is_counted in zip(rows, found.counted(self.source.count_rule).tolist(), strict=True):
                row["counted"], row["class"] = is_counted, classes.get(row["n"], ("", 0.0))[0]
            return {
                "cells": rows,
                "found": len(rows),
                "counted": sum(row["counted"] for row in rows),
                "scale": found.scale,
                "notes": list(found.notes),
            }

    def model(self) -> dict[str, Any]:
        """Return the name of the model, and the thresholds of its tasks. Raises what opening it raises."""
        with self._lock:
            spec = self.labeller.open().backend.spec
            return {
                "name": spec.name,
                "thresholds": self.labeller.thresholds(),
                "cell_diameter_px": spec.cell_diameter_px,
                "image_scale": spec.image_scale,
            }

    # ------------------------------------------------------------------------------------------------ adding, writing

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Add the image file ``data`` and count its cells; ``name``: as the browser calls it.

        It goes to ``OUT/uploads``. Raises ``DataError`` with the reader's sentence, and leaves nothing, if it cannot be
        read.
        """
        plain = name.replace("\\", "/").rpartition("/")[2].lstrip(".").replace("\0", "") or "image"
        plain = "".join(sign if sign.isprintable() else "_" for sign in plain)
        with self._lock:
            self._hold()
            taken = {image.name: image.output_name for image in self.source.images.values()}
            path = self.source.out / source.UPLOADS
            if path.is_symlink():
                raise UsageError(f"{path}: a link out of the folder; remove it")
            make_folder(path)
            wanted, number = f"{_UPLOAD_PREFIX}{plain}", 1
            while wanted in taken or any(wanted.casefold() == each.casefold() for each in taken):
                number += 1
                stem, dot, ending = plain.rpartition(".")
                wanted = f"{_UPLOAD_PREFIX}{stem or ending}~{number}{dot if stem else ''}{ending if stem else ''}"
            wanted = output_names([wanted], taken)[wanted]  # shortened if too long
            image = source.uploaded(self.source.out, wanted.removeprefix(_UPLOAD_PREFIX))
            assert image.path is not None
            write_bytes(image.path, data)
            try:
                self._read(image)
                self.source.images[image.id] = image
                self._to_edit(image.id)
            except CellsegError as error:
                self.source.images.pop(image.id, None)
                remove(image.path)
                if isinstance(error, DataError):
                    raise DataError(str(error).replace(str(image.path), plain)) from error
                raise
            return self._listed(image)

    def save(self, names: set[str] | None = None) -> list[str]:
        """Write the corrected label images that are not up to date; return their paths relative to OUT.

        ``names``: of these images only.
        """
        with self._lock:
            known = {image.name: image for image in self.source.images.values()}
            images = [
                known[name] for name in self.corrections.recorded if name in known and (names is None or name in names)
            ]
            return self.corrections.save_labels(images, self._first_classes)

    def export(self, kinds: list[str], *, everything: bool) -> dict[str, Any]:
        """Write tables and the files ``kinds`` from the corrected labels to ``OUT/corrected``.

        ``everything``: also images without a correction, with the labels of the run.
        """
        with self._lock:
            recorded = self.corrections.recorded
            chosen = [
                image
                for image in self.source.images.values()
                if image.name in recorded or (everything and image.labels)
            ]
            if not chosen:
                raise UsageError("no image is corrected or confirmed yet; nothing to export")
            self.save()
            done = export.write(self.source.out, kinds, [(image.name, image.output_name) for image in chosen],
                                lambda index: self._segmentation(chosen[index]))  # fmt: skip
            return {"folder": export.FOLDER, "images": len(chosen), "files": done}

    # ----------------------------------------------------------------------------------------------------- own business

    def _hold(self) -> None:
        """Lock the folder for corrections; made if missing. Raises ``OutputInUseError``."""
        if self._locked is None:
            folder = self.source.out / FOLDER
            make_folder(folder)
            if not self.source.is_run:
                inputs = {"program": "cellseg-view", "inputs": list(self.source.inputs)}
                write_bytes(self.source.out / "view.json", json.dumps(inputs).encode("ascii") + b"\n")
            locked = exclusive(folder)
            locked.__enter__()
            self._locked = locked
            if not self.corrections.is_current:  # another viewer edited before this one did
                self.corrections = Corrections(self.source.out, self.class_names)
                self._shown.clear()

    def _check_readable(self, image: ViewedImage) -> None:
        if image.path is None:
            raise DataError(f"{image.name}: the photograph is not where it was when the run was made; bring it back")

    def _read(self, image: ViewedImage) -> LoadedImage:
        self._check_readable(image)
        assert image.path is not None
        return read_image(image.path, self.source.reading)

    def _edited(self, image: ViewedImage) -> EditedImage:
        """Return the state of ``image``; an image without labels is counted now."""
        if not image.labels and image.name not in self.corrections.recorded:
            self._hold()
            found = self._labelled(image, Settings())
            self.corrections.add_labels(image, found.labels, _classes_by_number(found), as_edit=False)
        return self.corrections.image(image, lambda: self._first_classes(image))

    def _to_edit(self, key: str) -> tuple[ViewedImage, EditedImage]:
        self._hold()
        image = self.image(key)
        return image, self._edited(image)

    def _first_classes(self, image: ViewedImage) -> Classes:
        return self.source.classes_of(image)

    def _labelled(self, image: ViewedImage, settings: Settings) -> Segmentation:
        pixels = self.pyramids[image.id].level(self.pyramids[image.id].top)
        scale = image.result.get("scale")
        return self.labeller.label(image.id, pixels, settings, scale=scale, field=self.source.field_of_view)

    def _show(self, image: ViewedImage, edited: EditedImage) -> _Shown:
        if image.id not in self._shown:
            self._shown.clear()  # one image is open in the page
            pixels: Pixels = self.pyramids[image.id].level(self.pyramids[image.id].top)
            field = find_field(pixels) if self.source.field_of_view == "auto" else None
            self._shown[image.id] = _Shown({row["n"]: row for row in rows_of(edited.labels)}, field)
        shown = self._shown[image.id]
        self._set_counted(image, edited, shown)
        return shown

    def _set_counted(self, image: ViewedImage, edited: EditedImage, shown: _Shown) -> None:
        rows = list(shown.rows.values())
        for row in rows:
            row["class"] = edited.classes.get(row["n"], ("", 0.0))[0]
        has_classes = bool(self.source.classes)
        which = counts(
            rows,
            edited.labels,
            self.source.count_rule,
            field=shown.field,
            model_cell_px=self._model_cell_px(image),
            class_of=[self._class_index(row["class"]) for row in rows] if has_classes else None,
            class_counts=[self._class_counts(row["class"]) for row in rows],
        )
        for row, is_counted in zip(rows, which.tolist(), strict=True):
            row["counted"] = is_counted

    def _changed(self, image: ViewedImage, edited: EditedImage, step: Step) -> dict[str, Any]:
        """Return the rows that ``step`` changed, the numbers that are gone, and the new state."""
        is_open = image.id in self._shown
        shown = self._show(image, edited)
        numbers = set(step.numbers)
        if is_open:
            fresh = {row["n"]: row for row in rows_of(edited.labels, numbers=numbers, patch=step.patch)}
            for number in numbers:
                shown.rows.pop(number, None)
            shown.rows |= fresh
            self._set_counted(image, edited, shown)
        state = self._state(image, edited, shown)
        gone = sorted(number for number in numbers if number not in shown.rows)
        others = {number for number in step.classes_before.keys() | step.classes_after.keys()
                  if step.classes_before.get(number) != step.classes_after.get(number)}  # fmt: skip
        rows = [shown.rows[number] for number in sorted(numbers | others) if number in shown.rows]
        return {"cells": rows, "removed": gone, **state}

    def _state(self, image: ViewedImage, edited: EditedImage, shown: _Shown) -> dict[str, Any]:
        by_class: dict[str, int] = {}
        for row in shown.rows.values():
            by_class[row["class"]] = by_class.get(row["class"], 0) + 1
        return {
            "found": len(shown.rows),
            "counted": sum(row["counted"] for row in shown.rows.values()),
            "not_counted": [row["n"] for row in shown.rows.values() if not row["counted"]],
            "by_class": by_class,
            "edits": len(edited.done),
            "can_undo": bool(edited.done),
            "can_redo": bool(edited.undone),
            "confirmed": edited.confirmed,
            "before": image.result.get("cells"),
        }

    def _listed(self, image: ViewedImage) -> dict[str, Any]:
        said = self.corrections.recorded.get(image.name)
        shown = self._shown.get(image.id)
        found = image.result.get("cells") if shown is None else len(shown.rows)
        problem = image.error
        if not problem and image.path is None:
            problem = "the photograph is not where it was when the run was made"
        return {
            "id": image.id,
            "name": image.name,
            "cells": found,
            "counted": image.result.get("counted") if shown is None else sum(r["counted"] for r in shown.rows.values()),
            "warnings": image.warnings,
            "error": problem,
            "has_picture": image.path is not None,
            "edits": 0 if said is None else said.edits,
            "confirmed": said is not None and said.confirmed,
        }

    def _model_cell_px(self, image: ViewedImage) -> float | None:
        """Area of the model's cell in the image, None where the model is not at hand: then the image's own decide."""
        scale = image.result.get("scale")
        if scale is None:
            return None
        try:
            return self.labeller.cell_px(float(scale))
        except CellsegError:
            return None

    def _class_index(self, name: str) -> int:
        return self.class_names.index(name) if name in self.class_names else -1

    def _class_counts(self, name: str) -> bool:
        """Whether cells of the class ``name`` count; without classes in the model all but platelets do."""
        if self.source.classes:
            return name in self.source.counting or name not in self.source.classes
        return name != CLASSES_BY_HAND[2]

    def _segmentation(self, image: ViewedImage) -> tuple[Segmentation, LoadedImage]:
        """Return the corrected cells of ``image`` in the form that outputs are made from."""
        loaded = self._read(image)
        edited = self._edited(image)
        field = find_field(loaded.pixels_hwc) if self.source.field_of_view == "auto" else None
        with_classes = self.source.classes or any(edited.classes.values())
        found = export.segmentation(
            edited,
            loaded,
            names=tuple(self.class_names) if with_classes else (),
            counting=tuple(name for name in self.class_names if self._class_counts(name)),
            field=field,
            scale=float(image.result.get("scale") or 1.0),
            model_cell_px=self._model_cell_px(image),
            name=image.name,
            count_rule=self.source.count_rule,
        )
        return found, loaded


def _classes_by_number(found: Segmentation) -> Classes:
    classes: CellClasses | None = found.classes
    if classes is None:
        return {}
    names = np.array(classes.names)[classes.index].tolist()
    return {
        number: (name, round(probability, 4))
        for number, (name, probability) in enumerate(zip(names, classes.probability.tolist(), strict=True), start=1)
    }
