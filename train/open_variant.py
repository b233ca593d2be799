"""``python -m cellseg_train.open_variant DATA OUT``: training data of a model without a non-commercial clause.

From ``DATA`` it takes ``chula_rbc12`` (MIT), ``txl_bccd`` (MIT) and, of ``txl_white``, the fields of PBC (CC BY 4.0,
told by their size; those of Raabin-WBC have no stated terms), and adds synthetic smears:

    OUT/bccd/images, boxes.csv      classes red, white, platelet
    OUT/pbc/images, boxes.csv       likewise
    OUT/chula/images, masks         label images made from points and a threshold, by no network
    OUT/chula/classes.csv           red; ignore for what may be a platelet; no class for other unmarked objects
    OUT/synthetic/images, masks

and says how to train on it. No weights are read.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import numpy as np

from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError, OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder
from cellseg_deploy.images.decode import declared_size
from cellseg_deploy.samples import write_samples

PBC_HW = (363, 360)
CLASSES = {"RBC": "red", "WBC": "white", "platelet": "platelet"}
SMALL = 0.5
"""Unmarked objects of Chula below this share of the median red cell may be platelets."""
COMMANDS = """\
cellseg-train --images {out}/bccd/images --images {out}/pbc/images --boxes {out}/bccd/boxes.csv \\
    --boxes {out}/pbc/boxes.csv --teacher none --truth-only -o {out}/made
cellseg-train --images {out}/bccd/images --masks {out}/made/truth/labels --classes {out}/made/truth/classes.csv \\
    --images {out}/pbc/images --masks {out}/made/truth/labels-2 --classes {out}/made/truth/classes-2.csv \\
    --images {out}/chula/images --masks {out}/chula/masks --classes {out}/chula/classes.csv \\
    --images {out}/synthetic/images --masks {out}/synthetic/masks \\
    --weights none --cell-diameter 32 --scale-jitter 0.6,1.7 --overlap-share 0.25 --name smear-open -o {out}/run \\
    --data-note "Chula RBC-12 (MIT), BCCD as annotated by TXL-PBC (MIT), PBC (CC BY 4.0), synthetic smears"
cellseg-export onnx {out}/run -o smear-open.onnx
"""


def prepare(data: Path, out: Path, *, n_smears: int, size_hw: tuple[int, int] = (1200, 1600)) -> list[tuple[str, int]]:
    """Write the training data to ``out`` (new or empty) and return the number of images of each source.

    ``size_hw``: of the synthetic smears, in px. Raises ``UsageError`` if a source is not in ``data``, ``OutputError``
    if ``out`` holds files, ``DataError`` for a source without a usable image.
    """
    chula, bccd, txl_white = (data / name for name in ("chula_rbc12", "txl_bccd", "txl_white"))
    for needed in (chula / "instances.csv", bccd / "boxes.csv", txl_white / "boxes.csv"):
        if not needed.is_file():
            raise UsageError(f"{needed}: no such file; expected chula_rbc12, txl_bccd and txl_white in {data}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; name a new one")
    made = [
        ("bccd", _boxes(bccd, out / "bccd", lambda _: True)),
        ("pbc", _boxes(txl_white, out / "pbc", lambda image: declared_size(image)[0] == PBC_HW)),
        ("chula", _chula(chula, out / "chula")),
    ]
    return [*made, ("synthetic", len(write_samples(out / "synthetic", n_smears, 0, size_hw, vary=True)))]


def _boxes(source: Path, out: Path, is_wanted: Callable[[Path], bool]) -> int:
    """Copy the wanted images and their boxes, with our names of the classes."""
    rows = _rows(source / "boxes.csv")
    kept = {name for name in {row["image"] for row in rows} if is_wanted(source / "images" / name)}
    columns = ("image", "class", "x0", "y0", "x1", "y1")
    boxes = [[row["image"], CLASSES[row["class"]], *(row[name] for name in columns[2:])] for row in rows]
    _copy([source / "images" / name for name in sorted(kept)], out / "images", source)
    _write(out / "boxes.csv", [columns, *(box for box in boxes if box[0] in kept)])
    return len(kept)


def _chula(source: Path, out: Path) -> int:
    """Copy images and label images. Points mark red cells only; other objects may be anything."""
    rows = _rows(source / "instances.csv")
    least = SMALL * float(np.median([int(row["area_px"]) for row in rows if row["has_point"] == "1"]))
    table: list[Iterable[object]] = [("image", "label", "class")]
    for row in rows:
        is_small = int(row["area_px"]) < least and row["touches_edge"] == "0"
        name = "red" if row["has_point"] == "1" else "ignore" if is_small else ""
        table.append((row["image"], row["label"], name))
    stems = sorted({Path(row["image"]).stem for row in rows})
    _copy([source / "images" / name for name in sorted({row["image"] for row in rows})], out / "images", source)
    _copy([source / "labels" / f"{stem}.png" for stem in stems], out / "masks", source)
    _write(out / "classes.csv", table)
    return len(stems)


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _copy(files: list[Path], folder: Path, source: Path) -> None:
    if not files:
        raise DataError(f"{source}: no image to train on")
    make_folder(folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _write(file: Path, rows: Iterable[Iterable[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerows(rows)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--smears", default=24, type=click.IntRange(1), help="How many synthetic smears.")
def main(data: Path, out: Path, smears: int) -> None:
    """Write to OUT what a model without a non-commercial clause is trained on, and say how."""
    for name, n_images in prepare(data, out, n_smears=smears):
        click.echo(f"{name}: {n_images} images")
    click.echo(COMMANDS.format(out=out))


if __name__ == "__main__":
    sys.exit(run(main))
