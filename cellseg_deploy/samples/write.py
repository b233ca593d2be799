"""Write a folder of synthetic smears with their truth, and compare a run's counts with it."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from cellseg_deploy.errors import DataError, OutputError, UsageError
from cellseg_deploy.outputs.tables import csv_rows
from cellseg_deploy.samples.params import SmearParams, random_params
from cellseg_deploy.samples.smear import make_smear

TRUTH_FILE, CLASSES_FILE = "truth.csv", "classes.csv"
_CELLS_PER_PX = SmearParams().n_cells / float(np.prod(SmearParams().size_hw))


@dataclass(frozen=True)
class Count:
    """One image's true and found number of cells; ``counted`` is None if the run failed on the image."""

    image: str
    true: int
    counted: int | None


def write_samples(
    folder: Path, n: int, seed: int, size_hw: tuple[int, int] = (1200, 1600), *, vary: bool = False
) -> list[tuple[str, int]]:
    """Write ``n`` smears; return each image's name and number of cells.

    ``folder`` (new or empty) gets ``images/NAME.png``, ``masks/NAME.png`` (uint16 label images), ``truth.csv``
    (image, n_cells) and ``classes.csv`` (image, label, class), which ``cellseg-train --classes`` reads. With ``vary``
    each image comes from another laboratory. Image i depends only on ``seed`` and i,
    so a longer series begins with the shorter one. Raises ``UsageError`` and ``OutputError``.
    """
    if n < 1:
        raise UsageError(f"the number of smears must be at least 1, got {n}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; name a new one, or empty it yourself")
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rows: list[tuple[str, int]] = []
    classes: list[tuple[str, int, str]] = []
    for i in range(n):
        params, image_seed = sample_params(seed, i, size_hw, vary=vary)
        smear = make_smear(params, image_seed)
        name = f"smear-{i:03d}.png"
        _write_png(folder / "images" / name, smear.image_hwc[..., ::-1])
        _write_png(folder / "masks" / name, smear.labels_hw.astype(np.uint16))
        rows.append((name, smear.n_cells))
        classes += [(name, label, kind) for label, kind in enumerate(smear.classes, 1)]
    (folder / TRUTH_FILE).write_bytes(csv_rows([("image", "n_cells"), *rows]))
    (folder / CLASSES_FILE).write_bytes(csv_rows([("image", "label", "class"), *classes]))
    return rows


def sample_params(seed: int, index: int, size_hw: tuple[int, int], *, vary: bool) -> tuple[SmearParams, int]:
    """Return parameters and seed of image ``index`` in the series ``seed``."""
    if seed < 0:
        raise UsageError(f"the seed must be at least 0, got {seed}")
    draw_seed, image_seed = (int(word) for word in np.random.SeedSequence([seed, index]).generate_state(2))
    if vary:
        return random_params(np.random.default_rng(draw_seed), size_hw=size_hw), image_seed
    n_cells = max(1, round(_CELLS_PER_PX * size_hw[0] * size_hw[1]))
    return replace(SmearParams(), size_hw=size_hw, n_cells=n_cells), image_seed


def compare_counts(truth_csv: Path, images_csv: Path) -> list[Count]:
    """Pair the counts in ``images_csv`` (columns image, status, cells; written by cellseg-infer) with the truth.

    Every image of the truth must be in the run; raises ``DataError`` naming the first missing one.
    """
    run = {row["image"]: row for row in _read_rows(images_csv, ("image", "status", "cells"))}
    counts = []
    for row in _read_rows(truth_csv, ("image", "n_cells")):
        result = run.get(row["image"])
        if result is None:
            raise DataError(
                f"{images_csv} has no row for {row['image']}, which {truth_csv} lists; does it belong to another run?"
            )
        counted = _integer(result["cells"], images_csv) if result["status"] == "done" else None
        counts.append(Count(row["image"], _integer(row["n_cells"], truth_csv), counted))
    return counts


def count_table(counts: list[Count]) -> str:
    """Format ``counts`` with their sum as plain text; a failed image shows ``failed`` and is not in the sum."""
    width = max(len("image"), *(len(count.image) for count in counts))
    lines = [f"{'image':<{width}}  {'true':>6}  {'counted':>7}  {'difference':>10}"]
    lines += [_line(count.image, count.true, count.counted, width) for count in counts]
    done = [count for count in counts if count.counted is not None]
    if done:
        total = sum(count.true for count in done)
        lines.append(_line("together", total, sum(count.counted or 0 for count in done), width))
    return "\n".join(lines)


def _line(name: str, true: int, counted: int | None, width: int) -> str:
    if counted is None:
        return f"{name:<{width}}  {true:>6}  {'failed':>7}  {'':>10}"
    return f"{name:<{width}}  {true:>6}  {counted:>7}  {counted - true:>+10}"


def _read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}; it has: {', '.join(reader.fieldnames or ())}"
                )
            return list(reader)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _integer(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}: {text!r} is not a number of cells") from None


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Encode first, then write: cv2.imwrite fails silently on non-ASCII paths on Windows."""
    written, data = cv2.imencode(".png", pixels)
    if not written:
        raise OutputError(f"{path}: OpenCV could not encode {pixels.dtype} {pixels.shape} as PNG")
    path.write_bytes(data.tobytes())
