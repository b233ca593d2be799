"""``cellseg-evaluate --describe``: what the images are like, and whether the model has seen their like.

OUT/data.json   all images together, and warnings      OUT/data.csv   a row an image
OUT/data.png    distributions of size and crowding
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np

from cellseg_deploy import data_report, evaluation
from cellseg_deploy.cli import _common
from cellseg_deploy.data_report import DataFacts, ImageFacts
from cellseg_deploy.errors import NothingToDoError
from cellseg_deploy.images import FoundImage, check_same_size, find_images, pair_by_stem, read_image, read_labels
from cellseg_deploy.outputs import atomic, plots, tables
from cellseg_deploy.outputs.folder import check_apart

if TYPE_CHECKING:
    from cellseg_deploy.cli.evaluate import Options
    from cellseg_deploy.model_spec import ModelSpec

DATA_JSON, DATA_CSV, DATA_PNG = "data.json", "data.csv", "data.png"
COLUMNS = (
    *("image", "width_px", "height_px", "cells", "median_diameter_px", "covered", "crowded_share", "scale_bar"),
    *("brightness", "contrast"),
)


def run(options: Options, folder: Path) -> int:
    """Describe the images in ``folder`` as ``options`` say; gives the exit code."""
    from cellseg_deploy.cli.evaluate import with_progress

    inputs = [folder] if options.masks is None else [folder, options.masks]
    check_apart(inputs, options.output)
    facts_of: Iterator[ImageFacts]
    with ExitStack() as stack:
        if options.masks is None:
            found = find_images([folder])
            if not found:
                raise NothingToDoError(f"{folder}: no image found; expected PNG, JPEG or TIFF files")
            segmenter = stack.enter_context(options.open_segmenter())
            spec, total = segmenter.backend.spec, len(found)
            facts_of = (_of_model(image, segmenter, options) for image in found)
        else:
            spec = _spec(options)
            pairs = pair_by_stem(folder, options.masks)
            total = len(pairs)
            facts_of = _of_masks(pairs, options)
        stack.enter_context(evaluation.report_folder(options.output, (DATA_JSON, DATA_CSV, DATA_PNG)))
        images = list(with_progress(facts_of, total, options.quiet))
        facts = data_report.summarise(images)
        warned = data_report.warnings(images, facts, spec)
        _write(options.output, images, facts, warned, spec, from_masks=options.masks is not None)
    for sentence in warned:
        _common.say(f"warning: {sentence}")
    if not options.quiet:
        _print(facts, spec, options.output)
    return _common.EXIT_OK


def _reading(options: Options) -> dict[str, Any]:
    limit = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
    return {"bit_depth": options.bit_depth, **limit}


def _of_model(image: FoundImage, segmenter: Any, options: Options) -> ImageFacts:
    image_hwc = read_image(image.path, **_reading(options)).pixels_hwc
    return data_report.look_at(image.name, image_hwc, segmenter(image_hwc).labels, min_area_px=options.min_area_px)


def _of_masks(pairs: list[Any], options: Options) -> Iterator[ImageFacts]:
    for pair in pairs:
        labels = read_labels(pair.mask)
        image_hwc = read_image(pair.image, **_reading(options)).pixels_hwc
        check_same_size(pair, (image_hwc.shape[0], image_hwc.shape[1]), (labels.shape[0], labels.shape[1]))
        yield data_report.look_at(pair.stem, image_hwc, labels, min_area_px=options.min_area_px)


def _spec(options: Options) -> ModelSpec:
    """The model's self-description; it is not run."""
    from cellseg_deploy.model_file import read_model_file
    from cellseg_deploy.models import default_model_path

    return read_model_file(options.model or default_model_path()).spec


def _write(
    out: Path,
    images: list[ImageFacts],
    facts: DataFacts,
    warned: list[str],
    spec: ModelSpec,
    *,
    from_masks: bool,
) -> None:
    rows: list[list[Any]] = [list(COLUMNS)]
    for image in images:
        bar = None if image.scale_bar is None else " ".join(map(str, image.scale_bar))
        rows.append(
            [
                *(image.name, image.width_px, image.height_px, image.n_cells, image.median_diameter_px, image.covered),
                image.crowded / image.n_cells if image.n_cells else None,
                bar,
                *(None if math.isnan(value) else value for value in (image.brightness, image.contrast)),
            ]
        )
    record = {
        "program": evaluation.PROGRAM,
        "cells_from": "masks" if from_masks else "the model",
        **msgspec.to_builtins(facts),
        "neighbour_px": data_report.NEIGHBOUR_PX,
        "training": {
            "model": spec.name,
            "data": spec.training.data,
            "n_train_images": spec.training.n_train_images,
            "median_diameter_px": data_report.training_diameter_px(spec),
        },
        "warnings": warned,
    }
    expected = data_report.training_diameter_px(spec)
    panels: list[tuple[str, Any, float | None, str]] = [
        ("cell diameter, px", np.concatenate([i.diameters_px for i in images]), expected, "training images"),
        ("cell area, px", np.concatenate([i.areas_px for i in images]), math.pi / 4 * expected**2, "training images"),
        ("cells an image", np.array([float(i.n_cells) for i in images]), None, ""),
        (
            f"share of cells within {data_report.NEIGHBOUR_PX} px of another",
            np.array([i.crowded / i.n_cells for i in images if i.n_cells]),
            None,
            "",
        ),
        ("share of the image covered", np.array([i.covered for i in images]), None, ""),
        ("grey of the background", np.array([i.brightness for i in images if not math.isnan(i.brightness)]), None, ""),
    ]
    source = "masks" if from_masks else f"{spec.name}"
    title = f"{facts.n_images} images, {facts.n_cells} cells (from {source})"
    atomic.write_bytes(out / DATA_CSV, tables.csv_rows(rows))
    atomic.write_bytes(out / DATA_PNG, plots.histograms_png(panels, title=title))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(out / DATA_JSON, text.encode("utf-8", "backslashreplace"))


def _print(facts: DataFacts, spec: ModelSpec, out: Path) -> None:
    sizes = ", ".join(f"{n} of {size.replace('x', ' x ')}" for size, n in sorted(facts.sizes.items()))
    rows = [
        ("images", f"{facts.n_images}: {sizes} px"),
        ("cells", f"{facts.n_cells}, {facts.cells_per_image:.1f} an image, {facts.covered:.1%} of the area"),
    ]
    if facts.median_diameter_px is not None and facts.diameter_iqr_px is not None:
        low, high = facts.diameter_iqr_px
        rows.append(("diameter", f"median {facts.median_diameter_px:.1f} px, middle half {low:.1f} to {high:.1f}"))
    rows.append(("training", f"median {data_report.training_diameter_px(spec):.1f} px ({spec.name})"))
    if facts.crowded_share is not None:
        rows.append(("crowding", f"{facts.crowded_share:.1%} of cells within {data_report.NEIGHBOUR_PX} px of another"))
    rows += [("bars", f"scale bar seen in {facts.scale_bars}"), ("results", _common.printable(out))]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
