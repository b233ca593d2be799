"""From an image to its cells in bounded memory: network, then labels block by block.

    region --network, band by band--> probabilities on disk --blocks, twice--> cells

The labels are those of ``Segmenter(image, field="full")``, pixel for pixel, whatever the memory. Statistics of the
whole image come from one definition each: the scale from the same crop in the image's middle, the typical cell area
from all cells before small ones are dropped (``cells.blocks``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Network
from cellseg_deploy.cells import blocks
from cellseg_deploy.cells import scale as scales
from cellseg_deploy.cells.blocks import BlockSettings
from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.count_rules import CountRule, counted
from cellseg_deploy.cells.image_tiles import StageClock
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.measure import CellTable
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cells.tiling import Tile
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes, writing
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.images.resolution import PixelSize, checked_by_cells
from cellseg_deploy.models.spec import to_json
from cellseg_deploy.outputs.segmented import columns_of
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank
from cellseg_deploy.slides.blank import BlankFlags
from cellseg_deploy.slides.found_cells import STRIP_ROWS, FoundCells
from cellseg_deploy.slides.label_file import LabelFile, bytes_of_labels
from cellseg_deploy.slides.network import Band, BandNetwork, ProbabilityFile, bands_of
from cellseg_deploy.slides.region import Region
from cellseg_deploy.slides.samples import Samples
from cellseg_deploy.slides.sparse_region import sparse_region

PROGRAM = "cellseg-slide"
IDENTITY = "identity.json"
"""File in the folder of an unfinished run: ``identity_of`` it."""
_OVERLAP_DIAMETERS = 6
_LEAST_ROWS = 64
_NO_RESULT = ("threads", "model_path")  # of what a backend tells of itself: changes no result


@dataclass(frozen=True)
class Progress:
    """What a run reports: ``started(stage, steps)`` and ``advanced(steps)`` within it."""

    started: Callable[[str, int], None] = lambda *_: None
    advanced: Callable[[int], None] = lambda _: None


SILENT = Progress()

BandsElsewhere = Callable[[float, Sequence[Tile]], Generator[Band, None, None]]
"""Yields the results of bands, in their order, of the image at a scale."""
SlideElsewhere = Callable[[Path, Segmenter, Region, int], BandsElsewhere]
"""Takes the output folder, the model, the region and the contrast of blank tiles."""


class NoMemoryError(UsageError):
    """Not even one block of an image fits into the memory that its windows may take."""


@dataclass(frozen=True)
class CountedImage:
    """The cells of ``region``; ``found`` has their labels, strip by strip.

    ``table``: one row per cell; ``columns``: those of cells.csv but for the image's name. ``by_rule``: bool (n,),
    whether the count rule lets a cell in; ``counts``: and its class does. ``scale``: model px per image px. ``share``:
    of the image that cells cover; ``blank_share``: of the tiles that are blank. ``size``: of a pixel. ``notes``: for
    the user, but for those of ``samples``, which are complete after ``strips``.
    """

    region: Region
    found: FoundCells
    table: CellTable
    classes: CellClasses | None
    by_rule: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.bool_]
    columns: dict[str, npt.NDArray[Any]]
    scale: float
    share: float
    blank_share: float
    size: PixelSize
    notes: tuple[str, ...]
    samples: Samples
    tiles: BlankFlags
    tile_edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

    @property
    def by_class(self) -> dict[str, int]:
        """Number of cells per class that the count rule lets in; empty without classes."""
        return {} if self.classes is None else self.classes.numbers(self.by_rule)

    def strips(self, progress: Progress) -> Iterator[Labels]:
        """Yield the labels, 512 rows at a time, and add them to ``samples``."""
        progress.started("strips", -(-self.region.height // STRIP_ROWS))
        for number, labels in enumerate(self.found.strips()):
            self.samples.add(number * STRIP_ROWS, labels)
            progress.advanced(1)
            yield labels

    def blank_on_overview(self) -> npt.NDArray[np.bool_]:
        """Whether each pixel of the overview lies in a blank tile, bool (h, w); after ``strips``."""
        hw = self.samples.overview()[1].shape
        edges = self.tile_edges
        steps = (
            self.samples.step * int(edges[0][-1]) / self.region.height,
            self.samples.step * int(edges[1][-1]) / self.region.width,
        )
        return self.tiles.on_overview((hw[0], hw[1]), steps, edges)


def prepare(work: Path, segmenter: Segmenter, region: Region, contrast: int, *, overwrite: bool) -> None:
    """Prepare the folder ``work`` for ``count_cells``: as a killed run of the same settings left it, or empty.

    Raises ``OutputError`` for one of other settings, unless ``overwrite``.
    """
    record, identity = work / IDENTITY, identity_of(segmenter, region, contrast)
    earlier = content_of(record)
    if work.exists() and earlier != identity:
        if earlier and not overwrite:
            different = sorted(name for name in identity if identity[name] != earlier.get(name))
            raise OutputError(
                f"{work.parent}: holds an unfinished run with another {', '.join(different)}; use the same settings, "
                "choose another folder, or give `overwrite`"
            )
        with writing(work):
            shutil.rmtree(work)
    if not work.exists():
        make_folder(work)
        write_bytes(record, json.dumps(identity).encode())


def identity_of(segmenter: Segmenter, region: Region, contrast: int) -> dict[str, Any]:
    """What an unfinished run must have in common with this one."""
    spec = segmenter.backend.spec
    return {
        "program": PROGRAM,
        "version": version("cellseg-deploy"),
        "image": region.reader.name,
        "levels": [list(hw) for hw in region.reader.levels],
        "stamp": list(region.reader.stamp),
        "region": [region.level, region.y, region.x, region.height, region.width],
        "model": hashlib.sha256(to_json(spec).encode()).hexdigest(),
        "engine": {
            "kind": [type(segmenter.backend).__name__, segmenter.backend.device, segmenter.backend.precision],
            **{name: str(value) for name, value in segmenter.backend.describe().items() if name not in _NO_RESULT},
        },
        "settings": [repr(segmenter.params), segmenter.halo, segmenter.border_cells, segmenter.auto_scale],
        "scale": segmenter.scale,
        "blank_contrast": contrast,
    }


def count_cells(
    segmenter: Segmenter,
    region: Region,
    work: Path,
    network: Network,
    *,
    contrast: int,
    memory: int,
    count_rule: CountRule,
    with_outlines: bool,
    clock: StageClock,
    progress: Progress,
    elsewhere: BandsElsewhere | None = None,
) -> CountedImage:
    """Find, measure and count the cells of ``region``. ``work``: a folder of ``prepare`` with the same ``contrast``.

    ``memory``: bytes that windows may take. ``with_outlines``: keep them, for GeoJSON. ``elsewhere``: computes the
    bands in place of ``network``.
    """
    spec, notes = segmenter.backend.spec, list(region.reader.notes)
    scale = segmenter.scale
    if segmenter.auto_scale:
        most = round(spec.tile_size * max(scales.SEARCH_DIAMETERS_PX) / spec.cell_diameter_px)
        choice = segmenter.find_scale([region.part(*scales.crop_of(region.hw, most, 0))], network, clock, field="full")
        scale = choice.scale
        notes += [choice.note] if choice.note else []
    settings = block_settings(segmenter, region.hw, scale, memory)
    stored = ProbabilityFile(
        work / "probabilities.f32", len(spec.channels), settings.hw, spare_bytes=bytes_of_labels(settings)
    )
    with clock("blank"):
        sparse = sparse_region(segmenter, region, scale, contrast)
        if sparse is not None:
            sparse.check()
    samples = Samples(region.hw, region.rows if sparse is None else sparse.rows)
    bands, across = (bands_of((n, 1), spec.tile_size, segmenter.halo) for n in settings.hw)
    rows_done = stored.rows_done
    tiles = BlankFlags(
        work / "blank.bin",
        per_band=len(across),
        bands_done=sum(band.write[0].stop <= rows_done for band in bands),
    )
    done, todo = bands[: tiles.bands_done], bands[tiles.bands_done :]
    stored.cut_to(done[-1].write[0].stop if done else 0)
    progress.started("tiles", len(todo) * len(across))
    if elsewhere is None:
        here = BandNetwork(
            *(segmenter, region.hw, samples.rows, scale, network),
            contrast=contrast,
            judge=None if sparse is None else sparse.colours,
            clock=clock,
        )
        computed = (here(band) for band in todo)
    else:
        computed = elsewhere(scale, todo)
    with closing(computed):  # no band stays in flight if one cannot be stored
        for band in computed:
            tiles.append(band.blank)
            stored.append(band.rows)
            progress.advanced(len(across))
            for stage, seconds in band.seconds.items():
                clock.add(stage, seconds)
    n_blocks = -(-settings.hw[0] // settings.block_rows)
    progress.started("blocks", 2 * n_blocks)
    with clock("label"):
        with LabelFile(work / "first-labels.i32") as kept:
            first = blocks.first_pass(stored.read, settings, kept.keep, lambda: progress.advanced(1))
            found = FoundCells(work, settings, with_outlines=with_outlines)
            for part in blocks.cells(stored.read, settings, first, lambda: progress.advanced(1)):
                found.add(part)
        table, classes = found.finish(segmenter.counting_classes)
    whole = table.columns["area_px"][~table.columns["touches_border"]]
    if not segmenter.auto_scale and scale == spec.image_scale:
        notes.append(scales.size_of_areas_note(whole, spec.cell_diameter_px, scale))
    share = found.pixels / (region.height * region.width)
    seen = stored.share_from(spec.channels.index("foreground"), segmenter.params.foreground_threshold)
    notes.append(scales.lost_share_note(seen, share))
    size = checked_by_cells(region.pixel_size, table.columns["equivalent_diameter_px"])
    if size.note:
        notes.append(Note(size.note, "pixel size"))
    blank_share = float(tiles.blank.mean())
    if contrast > blank.EXACT and blank_share:
        judged = "" if sparse is None else f" on level {sparse.level} of the pyramid"
        said = f"{blank_share:.1%} of the tiles were taken for blank{judged} (blue in the overview); pale cells there "
        notes.append(Note(said + "are lost", "field of view"))
    rule = counted(
        *(table.boxes, region.hw, count_rule),
        areas_px=table.columns["area_px"],
        model_cell_px=segmenter.model_cell_px(scale),
        class_of=None if classes is None else classes.index,
    )
    counts = rule if classes is None else rule & classes.counts
    return CountedImage(
        *(region, found, table, classes, rule, counts, columns_of(table, counts, classes, size.um)),
        scale=scale,
        share=share,
        blank_share=blank_share,
        size=size,
        notes=tuple(note for note in notes if note),
        samples=samples,
        tiles=tiles,
        tile_edges=(edges_of(bands), edges_of(across)),
    )


def edges_of(tiles: Sequence[Tile]) -> npt.NDArray[np.int64]:
    """Last row of each of ``tiles`` of ``bands_of``, plus one."""
    return np.array([tile.write[0].stop for tile in tiles], np.int64)


def block_settings(segmenter: Segmenter, image_hw: tuple[int, int], scale: float, memory: int) -> BlockSettings:
    """Return the settings of the blocks for an image of ``image_hw`` at ``scale``, whose windows fit into ``memory``
    bytes. Raises ``NoMemoryError`` if not even the lowest block does."""
    spec = segmenter.backend.spec
    hw = scaled_size(image_hw, scale)
    overlap = round(_OVERLAP_DIAMETERS * spec.cell_diameter_px)
    # A window's probabilities, its labels and their temporaries, and the labels at the image's size.
    per_px = 8 * len(spec.channels) + blocks.BYTES_PER_PIXEL + 12 / scale**2
    most_px = int(memory / per_px)
    rows = most_px // hw[1] - overlap - 16
    if rows < _LEAST_ROWS:
        needed = per_px * hw[1] * (_LEAST_ROWS + overlap + 16)
        raise NoMemoryError(
            f"memory of {memory / 1e9:.2f} GB does not hold one block of this image; rows of {image_hw[1]} px need "
            f"{needed / 1e9:.2f} GB: give `memory`, or a part of the image"
        )
    return BlockSettings(
        *(spec.channels, segmenter.params, spec.cell_diameter_px, hw, image_hw),
        *(segmenter.border_cells, tuple(spec.classes)),
        block_rows=rows,
        overlap_rows=overlap,
        most_px=most_px,
    )
