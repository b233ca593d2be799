"""Images corrected with ``cellseg-view`` as training data.

``take`` copies photographs and corrected label images into the run folder, so that later corrections do not change a
training that is resumed:

    RUN/corrected/train/images, masks        what is trained on
    RUN/corrected/held-out/images, masks     every second image, for ``cellseg-evaluate``
    RUN/corrected/classes.csv                classes of their cells (image,label,class)

Images with an edit that holds, and confirmed images, are taken. The split is deterministic: in the order in which the
corrections of the images began, the second, fourth, ... is held out. So an image stays on its side when more follow.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes, writing
from cellseg_deploy.outputs import label_tiff, tables
from cellseg_deploy.view.corrections import JOURNAL, Corrections, numbered
from cellseg_deploy.view.source import open_source, original_of

FOLDER = "corrected"
_FEWEST = 2  # one trains, one validates


@dataclass(frozen=True)
class Taken:
    """``images``, ``masks``: folders to train on. ``classes``: CSV file. ``held_out``: folder, None if nothing is.

    ``n_train``, ``n_held_out``: images. ``notices``: lines of the journal that were left out.
    """

    images: Path
    masks: Path
    classes: Path
    held_out: Path | None
    n_train: int
    n_held_out: int
    notices: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Lines for the user: how many images, and how to compare networks on those held out."""
        warnings = [f"warning: {notice}" for notice in self.notices]
        if self.held_out is None:
            return [*warnings, f"{self.n_train} corrected images, all to train on"]
        pairs = f"--images {self.held_out / 'images'} --masks {self.held_out / 'masks'}"
        return [
            *warnings,
            f"{self.n_train} corrected images to train on, {self.n_held_out} held out",
            f"compare networks on those: cellseg-evaluate {pairs} -o OUT",
        ]


def take(out: Path, run: Path, *, hold_out: bool) -> Taken:
    """Copy the corrected images of ``out`` into the folder ``run``.

    Raises ``UsageError`` for a folder without corrections, or too few; ``DataError`` for a photograph that is lost or
    corrections that no longer fit their labels.
    """
    if not (out / JOURNAL).is_file():
        raise UsageError(f"{out}: has no {JOURNAL}; correct some of its images with cellseg-view first")
    source = open_source(out)
    corrections = Corrections(out, source.classes)
    notices = tuple(corrections.notices)
    order = {name: number for number, name in enumerate(corrections.recorded, start=1)}
    by_name = {image.name: image for image in source.images.values()}
    sides: dict[str, list[str]] = {"train": [], "held-out": []}
    for name, said in corrections.recorded.items():
        if said.edits or said.confirmed:
            sides["held-out" if hold_out and order[name] % 2 == 0 else "train"].append(name)
    if len(sides["train"]) < _FEWEST or (hold_out and not sides["held-out"]):
        raise UsageError(
            f"{out}: {len(sides['train'])} images to train on and {len(sides['held-out'])} held out; expected "
            f"{_FEWEST} and 1 at least: correct or confirm more images"
            + (", or give --no-hold-out to train on all" if hold_out else "")
        )
    rows: list[tuple[object, ...]] = [("image", "label", "class")]
    for side, names in sides.items():
        for name in names:
            photograph = original_of(source, name, corrections.recorded[name].photograph)
            if photograph is None or name not in by_name:
                raise DataError(f"{name}: the photograph is not at {corrections.recorded[name].photograph} any more")
            image = by_name[name]
            edited = corrections.image(image, lambda image=image: source.classes_of(image))  # type: ignore[misc]
            labels, classes = numbered(edited)
            stem = f"{order[name]:04d}-{photograph.stem}"  # alone, a.png and a.jpg would be one image
            places = {kind: run / FOLDER / side / kind for kind in ("images", "masks")}
            for place in places.values():
                make_folder(place)
            copy = places["images"] / f"{stem}{photograph.suffix}"
            with writing(copy):
                shutil.copyfile(photograph, copy)
            write_bytes(places["masks"] / f"{stem}.tif", label_tiff.encode(labels))
            rows += [
                (f"{side}/images/{copy.name}", label, said) for label, (said, _) in sorted(classes.items()) if said
            ]
    if wrong := corrections.notices[len(notices) :]:
        raise DataError(f"{out / JOURNAL}: {'; '.join(wrong)}")
    table = run / FOLDER / "classes.csv"
    write_bytes(table, tables.csv_rows(rows))
    folder = run / FOLDER / "train"
    held_out = run / FOLDER / "held-out" if sides["held-out"] else None
    counts = (len(sides["train"]), len(sides["held-out"]))
    return Taken(folder / "images", folder / "masks", table, held_out, *counts, notices)
