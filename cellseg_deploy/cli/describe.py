"""``cellseg-evaluate describe``: what the images are like, and whether the model was trained on similar ones.

OUT/data.json   all images together, next to the training images, and warnings     OUT/data.csv   one row per image
OUT/data.png    distributions, with those of the training images if the model holds them

If OUT is a model file, the images are its training images: their description is written into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np

from cellseg_deploy.batching import Job
from cellseg_deploy.cells.ignored import without_ignored
from cellseg_deploy.cli import console, model_files
from cellseg_deploy.cli.evaluate_options import Shared, is_model_file, with_progress
from cellseg_deploy.cli.masks import label_pairs
from cellseg_deploy.errors import plural
from cellseg_deploy.evaluate import image_statistics, plots, score, training_match
from cellseg_deploy.evaluate.image_statistics import DataFacts, ImageFacts
from cellseg_deploy.evaluate.plots import Histogram
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.evaluate.training_match import Comparison
from cellseg_deploy.files import atomic
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.find import require_images
from cellseg_deploy.images.read import (
    FoundImage,
    check_same_size,
    declared_pixels,
    read_image,
)
from cellseg_deploy.models.spec import MIN_OBJECT_REL
from cellseg_deploy.outputs import tables

if TYPE_CHECKING:
    from cellseg_deploy.batching import Network
    from cellseg_deploy.evaluate.truths import Truths
    from cellseg_deploy.images.find import Pair
    from cellseg_deploy.models.spec import ModelSpec, Spread
    from cellseg_deploy.segmenter import Segmenter

DATA_JSON, DATA_CSV, DATA_PNG = "data.json", "data.csv", "data.png"
FILES = (DATA_JSON, DATA_CSV, DATA_PNG)
_COLOURS = tuple(q.name for q in training_match.QUANTITIES if q.group in ("light", "stain"))
COLUMNS = (
    *("image", "width_px", "height_px", "cells", "median_diameter_px", "covered", "crowded_share", "scale_bar"),
    *("resolution", *_COLOURS),
)
_SHOWN = (
    *("crowded_share", "covered", "field_lightness", "field_a", "field_b", "field_od_spread"),
    *("stain_red", "stain_green", "stain_blue", "cell_od_spread"),
)


def run(shared: Shared, folder: Path, masks: Path | None) -> int:
    """Describe the images in ``folder``, cells by ``masks`` or as found by the model; return the exit code."""
    if is_model_file(shared.output):
        return _record(shared, folder, masks)
    check_apart([folder] if masks is None else [folder, masks], shared.output)
    with ExitStack() as stack:
        facts_of: Iterator[ImageFacts]
        if masks is None:
            found = require_images([folder], follow_links=True)
            segmenter = stack.enter_context(shared.open_segmenter(folder))
            spec, total = segmenter.backend.spec, len(found)
            facts_of = stack.enter_context(closing(_of_model(found, segmenter, shared)))
        else:
            spec = model_files.read(shared.engine["model"]).spec
            pairs = stack.enter_context(label_pairs(folder, masks, quiet=shared.quiet)).pairs
            total = len(pairs)
            limit, truths = shared.truths(pairs, spec)
            facts_of = _of_masks(pairs, shared, truths, limit.px)
        place = stack.enter_context(report_folder(shared.output, score.PROGRAM, FILES))
        images = list(with_progress(facts_of, total, shared.quiet))
        facts = image_statistics.summarise(images)
        compared = training_match.compare(images, spec)
        warned = training_match.warnings(images, facts, compared, spec)
        _, unknown = training_match.training_summary(spec)
        _write(place, images, facts, compared, [*warned, *([unknown] if unknown else [])], spec, masks)
    for sentence in warned:
        console.say(f"warning: {console.printable(console.in_options(sentence))}")
    if unknown:
        console.say(f"note: {unknown}")
    if not shared.quiet:
        if masks is not None:
            click.echo(limit.words)
        _print(facts, compared, spec, shared.output)
    return console.EXIT_OK


def _record(shared: Shared, folder: Path, masks: Path | None) -> int:
    """Write the description of the training images in ``folder`` into a copy of their model."""
    out = shared.output
    if masks is None:
        raise click.UsageError("with a model file as OUT, images are its training images: give their --masks DIR too")
    model = model_files.read(shared.engine["model"])
    model_files.check_target(out, model, (folder, masks))
    with label_pairs(folder, masks, quiet=shared.quiet) as paired:
        limit, truths = shared.truths(paired.pairs, model.spec)
    pairs, known = paired.pairs, model.spec.training.n_train_images
    if known and len(pairs) > known:
        raise click.UsageError(
            f"{plural(len(pairs), 'image')}, but {model.spec.name} was trained on {known}: "
            f"these cannot all be training images"
        )
    atomic.make_folder(out.parent)
    images = list(with_progress(_of_masks(pairs, shared, truths, limit.px), len(pairs), shared.quiet))
    summary = training_match.summary(images)
    training = msgspec.structs.replace(model.spec.training, data_summary=summary)
    atomic.write_bytes(out, model.rewritten(msgspec.structs.replace(model.spec, training=training)))
    if not shared.quiet:
        of_how_many = f" of the {known} it was trained on" if known else ""
        click.echo(f"images   {summary.n_images}{of_how_many}, {plural(summary.n_cells, 'cell')}; median (5 to 95 %):")
        for name, spread in sorted(summary.values.items()):
            click.echo(f"  {name:<16} {_words(spread)}")
        click.echo(f"results  {console.printable(out)}")
    return console.EXIT_OK


def _of_model(images: list[FoundImage], segmenter: Segmenter, shared: Shared) -> Generator[ImageFacts, None, None]:
    def work(image: FoundImage, network: Network) -> ImageFacts:
        loaded = read_image(image.path, shared.reading)
        found = segmenter.segment(loaded.pixels_hwc, network, field=shared.field)
        return image_statistics.look_at(
            image.name,
            loaded.pixels_hwc,
            found.labels,
            min_area_px=_speck_px(segmenter.backend.spec, found.scale, shared.min_area),
            resolution=loaded.resolution,
        )

    def nbytes(image: FoundImage) -> int:
        return segmenter.bytes_in_flight(declared_pixels(image.path))

    jobs = [Job(partial(work, image), partial(nbytes, image)) for image in images]
    return segmenter.results(jobs, shared.thread_plan)


def _speck_px(spec: ModelSpec, scale: float, given_px: int | None) -> int:
    """Return the speck limit in px of an image without masks: ``given_px``, or the usual share of a model-sized cell.

    ``scale``: model px per image px.
    """
    if given_px is not None:
        return given_px
    share = MIN_OBJECT_REL if spec.min_object_rel is None else spec.min_object_rel
    return round(share * math.pi / 4 * (spec.cell_diameter_px / scale) ** 2)


def _of_masks(pairs: Sequence[Pair], shared: Shared, truths: Truths, min_area_px: int) -> Iterator[ImageFacts]:
    for pair in pairs:
        labels = without_ignored(truths.labels_of(pair))
        loaded = read_image(pair.image, shared.reading)
        check_same_size(pair, loaded.pixels_hwc.shape[:2], (labels.shape[0], labels.shape[1]))
        yield image_statistics.look_at(
            pair.stem, loaded.pixels_hwc, labels, min_area_px=min_area_px, resolution=loaded.resolution
        )


def _write(
    out: Path,
    images: list[ImageFacts],
    facts: DataFacts,
    compared: list[Comparison],
    said: list[str],
    spec: ModelSpec,
    masks: Path | None,
) -> None:
    source = f"{spec.name}" if masks is None else "masks"
    record = {
        "program": score.PROGRAM,
        "cells_from": "the model" if masks is None else "masks",
        **msgspec.to_builtins(facts),
        "neighbour_px": image_statistics.NEIGHBOUR_PX,
        "training": {
            "model": spec.name,
            "data": spec.training.data,
            "n_train_images": spec.training.n_train_images,
            "median_diameter_px": training_match.training_diameter_px(spec),
            "data_summary": msgspec.to_builtins(spec.training.data_summary),
        },
        "alignment": {
            one.quantity.name: {name: value for name, value in msgspec.to_builtins(one).items() if name != "quantity"}
            for one in compared
        },
        "warnings": said,
    }
    known = training_match.training_summary(spec)[0] is not None
    title = f"{plural(facts.n_images, 'image')}, {plural(facts.n_cells, 'cell')} (from {source})" + known * (
        "; shaded: 90 % of the training images (first two panels: of their cells)"
    )
    atomic.write_bytes(out / DATA_CSV, tables.csv_rows(_rows(images)))
    atomic.write_bytes(out / DATA_PNG, plots.histograms_png(_panels(images, compared, spec), title=title, columns=4))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(out / DATA_JSON, text.encode("utf-8", "backslashreplace"))


def _rows(images: Sequence[ImageFacts]) -> list[list[Any]]:
    rows: list[list[Any]] = [list(COLUMNS)]
    for image in images:
        bar = None if image.scale_bar is None else " ".join(map(str, image.scale_bar))
        rows.append(
            [
                *(image.name, image.width_px, image.height_px, image.n_cells, image.median_diameter_px, image.covered),
                *(image.crowded_share, bar, "; ".join(map(str, image.resolution)) or None),
                *(image.colours.get(name) for name in _COLOURS),
            ]
        )
    return rows


def _panels(images: Sequence[ImageFacts], compared: Sequence[Comparison], spec: ModelSpec) -> list[Histogram]:
    summary, _ = training_match.training_summary(spec)
    size = None if summary is None else summary.values.get(training_match.DIAMETER)
    expected = training_match.training_diameter_px(spec)
    band = None if size is None else (size.p05, size.p95)
    panels = [
        Histogram("cell diameter, px", np.concatenate([i.diameters_px for i in images]), expected, band),
        Histogram(
            "cell area, px",
            np.concatenate([i.areas_px for i in images]),
            math.pi / 4 * expected**2,
            None if band is None else (math.pi / 4 * band[0] ** 2, math.pi / 4 * band[1] ** 2),
        ),
    ]
    by_name = {one.quantity.name: one for one in compared}
    for name in _SHOWN:
        there = by_name[name].training
        values = [training_match.values_of(image).get(name) for image in images]
        panels.append(
            Histogram(
                by_name[name].quantity.label,
                np.array([value for value in values if value is not None]),
                None if there is None else there.median,
                None if there is None else (there.p05, there.p95),
            )
        )
    return panels


def _print(facts: DataFacts, compared: Sequence[Comparison], spec: ModelSpec, out: Path) -> None:
    sizes = ", ".join(f"{n} of {size.replace('x', ' x ')}" for size, n in sorted(facts.sizes.items()))
    tags = ", ".join(f"{tag} in {n}" for tag, n in facts.resolutions.items()) or "none"
    rows = [
        ("images", f"{facts.n_images}: {sizes} px"),
        ("cells", f"{facts.n_cells}, {facts.cells_per_image:.1f} an image, {facts.covered:.1%} of the area"),
    ]
    if facts.median_diameter_px is not None and facts.diameter_iqr_px is not None:
        low, high = facts.diameter_iqr_px
        um = "" if facts.um_per_px is None else f"; {facts.median_diameter_px * facts.um_per_px:.1f} µm from file tags"
        rows.append(("diameter", f"median {facts.median_diameter_px:.1f} px, middle half {low:.1f} to {high:.1f}{um}"))
    rows.append(("training", f"median {training_match.training_diameter_px(spec):.1f} px ({spec.name})"))
    if facts.crowded_share is not None:
        near = image_statistics.NEIGHBOUR_PX
        rows.append(("crowding", f"{facts.crowded_share:.1%} of cells within {near} px of another"))
    rows += [
        ("bars", f"scale bar seen in {plural(facts.scale_bars, 'image')}"),
        ("tags", f"resolution in the files: {tags}"),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {console.printable(value)}")
    click.echo(f"\n{'by image: median (5 to 95 %)':<34}{'here':<30}training images")
    for one in compared:
        mark = "" if not one.outside else "   outside"
        mark = f"   {len(one.odd_images)} outside" if one.odd_images and not one.outside else mark
        click.echo(f"{one.quantity.label:<34}{_words(one.here):<29} {_words(one.training)}{mark}")
    click.echo(f"\nresults  {console.printable(out)}")


def _words(spread: Spread | None) -> str:
    return "unknown" if spread is None else f"{spread.median:.3g} ({spread.p05:.3g} to {spread.p95:.3g})"
