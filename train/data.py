"""From image and mask pairs on disk to batches of tiles with targets.

A tile depends on (seed, epoch, image, patch) only: not on the number of workers, not on what was drawn before. So a
resumed training sees the same tiles as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.errors import DataError, UsageError, plural
from cellseg_deploy.evaluate.image_statistics import ImageFacts, look_at
from cellseg_deploy.evaluate.training_match import summary
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import Pair, check_same_size, pair_by_stem, read_image, read_numbered_labels
from cellseg_deploy.models.spec import DataSummary
from cellseg_deploy.segmenter import resize
from cellseg_train import augment, overlaps, targets
from cellseg_train.cell_classes import LEFT_OUT, UNKNOWN, CellClasses, ClassNumbers
from cellseg_train.config import TrainConfig
from cellseg_train.overlaps import UNTAUGHT

BATCHES_AHEAD = 2
_MARGIN = 0.4  # of the tile: more than a cell, even where it is zoomed

TileIndex = tuple[int, int, int]  # epoch, image, patch


@dataclass(frozen=True)
class Example:
    """One training image in memory: RGB at the model's scale, labels at full size, uint16 where they fit.

    ``class_of``: class number by label, ``UNKNOWN`` if unknown; labels past its end are unknown too."""

    image_hwc: npt.NDArray[np.uint8]
    labels_hw: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    labels_scale: float
    class_of: ClassNumbers = field(default_factory=lambda: np.zeros(0, np.int16))


@dataclass(frozen=True)
class Split:
    """Training and validation pairs. ``remark``: note for the user on how they were divided, or empty."""

    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    remark: str = field(default="", compare=False)

    @cached_property
    def contents(self) -> dict[str, list[tuple[str, str, str]]]:
        """For each side: stem, SHA-256 of the image file and SHA-256 of the mask file, in order."""
        return {
            side: [(pair.stem, _sha256(pair.image), _sha256(pair.mask)) for pair in pairs]
            for side, pairs in (("train", self.train), ("val", self.val))
        }

    @property
    def sha256(self) -> str:
        """Fingerprint over ``contents``: it changes with the images, the masks or the division."""
        return hashlib.sha256(repr(self.contents).encode()).hexdigest()

    def check_apart(self) -> None:
        """Raise ``UsageError`` if an image file, in any folder, is on both sides: it would inflate every metric."""
        train = {image: stem for stem, image, _ in self.contents["train"]}
        common = [stem for stem, image, _ in self.contents["val"] if image in train]
        if common:
            raise UsageError(
                f"{plural(len(common), *_ALSO)} ({', '.join(common[:3])}); "
                "validation needs images that were not trained on: give other --val-images"
            )


_ALSO = "validation image is also a training image", "validation images are also training images"


def find_pairs(images: Sequence[Path], masks: Sequence[Path]) -> tuple[Pair, ...]:
    """Return pairs of the folders ``images[i]`` and ``masks[i]``, in order. Raises ``UsageError`` if none is found."""
    if len(images) != len(masks):
        raise UsageError(
            f"got {plural(len(images), 'image folder')} and {plural(len(masks), 'mask folder')}; give them in pairs"
        )
    pairs: list[Pair] = []
    for image_dir, mask_dir in zip(images, masks, strict=True):
        pairs += pair_by_stem(image_dir, mask_dir)
    if not pairs:
        raise UsageError(f"no image found in {', '.join(map(str, images))}")
    return tuple(pairs)


def split_by_image(
    pairs: Sequence[Pair], val_fraction: float, seed: int, groups: Sequence[Sequence[int]] | None = None
) -> Split:
    """Hold out ``val_fraction`` of the images, drawn by ``seed``, at least one. ``UsageError`` for a single image.

    ``groups``: indices of ``pairs`` that stay on one side (``same_content``), None for each image alone. Raises
    ``UsageError`` if there is only one group.
    """
    if len(pairs) < 2:
        raise UsageError(f"got {len(pairs)} image; two are needed to train and to validate, or give --val-images")
    groups = [[index] for index in range(len(pairs))] if groups is None else groups
    if len(groups) < 2:
        raise UsageError(
            f"all {len(pairs)} images show the same content; two different ones are needed to train and to validate, "
            "or give --val-images"
        )
    n_val = min(max(1, round(val_fraction * len(pairs))), len(pairs) - 1)
    held_out: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if len(held_out) < n_val and len(held_out) + len(groups[number]) < len(pairs):
            held_out.update(groups[number])
    return Split(
        train=tuple(pair for i, pair in enumerate(pairs) if i not in held_out),
        val=tuple(pair for i, pair in enumerate(pairs) if i in held_out),
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Truth:
    """Ground truth of one image. ``labels_hw``: int32 (H, W); ``IGNORED`` where a pixel belongs to an unknown cell,
    ``UNTAUGHT`` where nothing is known. ``class_of``: class number by label, as in ``Example``."""

    labels_hw: npt.NDArray[np.int32]
    class_of: ClassNumbers


def read_pair(
    pair: Pair, min_object_px: int, mask_foreground: MaskForeground = "auto", classes: CellClasses | None = None
) -> tuple[npt.NDArray[np.uint8], Truth]:
    """RGB (H, W, 3) uint8 and the truth (H, W) without specks. Raises ``DataError`` naming the file.

    Foreground of unknown instance keeps the value ``IGNORED``, however small the piece. ``mask_foreground``: as in
    ``DataConfig``.
    """
    image = read_image(pair.image).pixels_hwc
    labels, numbers = read_numbered_labels(pair.mask, foreground=mask_foreground, keep_ignored=True)
    check_same_size(pair, image.shape[:2], labels.shape)
    area = np.bincount(labels.ravel())
    area[0] = min_object_px  # the background stays as it is
    area[IGNORED:][:1] = min_object_px
    cells = np.where(area[labels] < min_object_px, 0, labels).astype(np.int32)
    if classes is None:
        return image, Truth(cells, np.zeros(0, np.int16))
    class_of = classes.of_labels(pair.image, numbers)
    left_out = (class_of == LEFT_OUT)[labels]  # specks among them too
    if left_out.any():
        if len(numbers) > UNTAUGHT:
            raise DataError(
                f"{pair.mask}: {len(numbers) - 1:,} cells; with cells of the class ignore expected at most "
                f"{UNTAUGHT - 1:,}"
            )
        cells[left_out] = UNTAUGHT
        class_of[class_of == LEFT_OUT] = UNKNOWN
    return image, Truth(cells, class_of)


def cell_areas(
    pairs: Sequence[Pair], mask_foreground: MaskForeground = "auto", classes: CellClasses | None = None
) -> npt.NDArray[np.int64]:
    """Areas in px of all cells in the masks of ``pairs``, specks included, int64 (n,); without the class ``ignore``.

    Raises ``DataError`` for an unreadable mask, or a class of a cell that the mask does not have.
    """
    areas = [np.zeros(0, np.int64)]
    for pair in pairs:
        labels, numbers = read_numbered_labels(pair.mask, foreground=mask_foreground)
        area = np.bincount(labels.ravel(), minlength=len(numbers))
        area[0] = 0
        if classes is not None:
            area[classes.of_labels(pair.image, numbers) == LEFT_OUT] = 0
        areas.append(area[area > 0].astype(np.int64))
    return np.concatenate(areas)


def make_example(image_hwc: npt.NDArray[np.uint8], truth: Truth, image_scale: float) -> Example:
    """Convert one pair of ``read_pair`` to the form used in training."""
    small, labels = resize(image_hwc, image_scale), truth.labels_hw
    compact = labels.astype(np.uint16) if labels.max() < 2**16 else labels
    return Example(small, compact, labels.shape[1] / small.shape[1], truth.class_of)


def only_cells(labels_hw: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """``labels_hw`` (H, W) with everything that is not a single cell as background."""
    return np.where(np.isin(labels_hw, overlaps.NO_CELLS), 0, labels_hw).astype(np.int32)


@dataclass(frozen=True)
class TrainingCells:
    """Statistics of the cells in the training images.

    ``diameter_px``: median cell diameter in *model* px (disc of equal area) over all cells. ``summary``: description
    of the cells for the model. ``class_cells``, ``class_px``: number of cells of each class, and of their pixels
    at the model's scale.
    """

    diameter_px: float
    summary: DataSummary
    class_cells: tuple[int, ...] = ()
    class_px: tuple[float, ...] = ()

    def class_weights(self) -> npt.NDArray[np.float32]:
        """Weight (C,) of a pixel of each class: square root of how much rarer the class is than in equal shares.

        The root rather than the full ratio: a class that is a hundred times rarer would drown out the others where it
        is wrong.
        """
        pixels = np.maximum(np.array(self.class_px, np.float64), 1)
        return np.asarray(np.sqrt(pixels.sum() / (max(len(pixels), 1) * pixels)), np.float32)


@dataclass(frozen=True)
class _Contents:
    """Contents of one training image. ``diameters``: of its cells in model px. ``of_classes``: (2, C), number of cells
    of each class, and of their pixels at the model's scale."""

    facts: ImageFacts
    diameters: npt.NDArray[np.float64]
    of_classes: npt.NDArray[np.float64]


class ExampleStore:
    """Decoded images up to ``cache_gb``; the rest are read again when requested."""

    def __init__(self, pairs: Sequence[Pair], config: TrainConfig, classes: CellClasses | None = None) -> None:
        self.pairs = tuple(pairs)
        self._data = config.data
        self._classes = classes
        self._kept: dict[Pair, Example] = {}
        self._free_bytes = config.data.cache_gb * 2**30

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        return self._kept.get(pair) or make_example(*self._read(pair), self._data.scale_of(pair.mask))

    def _read(self, pair: Pair) -> tuple[npt.NDArray[np.uint8], Truth]:
        return read_pair(pair, self._data.min_object_px, self._data.mask_foreground, self._classes)

    def check_and_fill(self, report: Callable[[int], None] = lambda _: None) -> TrainingCells:
        """Read every pair once, so that a bad file is named before the training starts; keep what fits.

        ``report(done)`` is called after each. Raises ``DataError`` if there are no cells at all.
        """
        seen: dict[Pair, _Contents] = {}  # a folder may be passed several times, to draw more tiles from it
        for index, pair in enumerate(self.pairs):
            if pair not in seen:
                seen[pair] = self._look(pair)
            report(index + 1)
        contents = [seen[pair] for pair in self.pairs]
        diameters, facts = [each.diameters for each in contents], [each.facts for each in contents]
        everyone = np.concatenate(diameters)
        if not len(everyone):
            raise DataError(
                f"the masks of {plural(len(self.pairs), 'image')} hold no object of "
                f"{self._data.min_object_px} px or more; "
                "are they masks (0 = background)?"
            )
        of_classes = np.sum([each.of_classes for each in contents], axis=0)
        return TrainingCells(
            float(np.median(everyone)),
            summary(facts),
            tuple(of_classes[0].astype(int).tolist()),
            tuple(of_classes[1].tolist()),
        )

    def _look(self, pair: Pair) -> _Contents:
        image, truth = self._read(pair)
        cells = only_cells(truth.labels_hw)
        scale = self._data.scale_of(pair.mask)
        example = make_example(image, truth, scale)
        size = example.image_hwc.nbytes + example.labels_hw.nbytes
        if size <= self._free_bytes:
            self._kept[pair] = example
            self._free_bytes -= size
        areas = np.bincount(cells.ravel())[1:]
        n_classes = 0 if self._classes is None else len(self._classes.names)
        of_classes = np.zeros((2, n_classes), np.float64)
        numbers = truth.class_of[1 : len(areas) + 1]
        for number in range(n_classes):
            of_class = areas[: len(numbers)][numbers == number]
            of_classes[:, number] = np.count_nonzero(of_class), of_class.sum() * scale**2
        return _Contents(
            look_at(pair.stem, image, cells, min_area_px=1),
            np.sqrt(4 / np.pi * areas[areas > 0]) * scale,
            of_classes,
        )


@dataclass
class TileDataset(Dataset[dict[str, Tensor]]):
    """Tiles by (epoch, image, patch): ``image`` uint8 (3, S, S), and the result of ``make_targets``."""

    store: ExampleStore
    config: TrainConfig
    augmented: bool = field(default=True)

    def __len__(self) -> int:
        return len(self.store.pairs) * self.config.data.patches_per_image

    def __getitem__(self, index: TileIndex) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.config.seed, *index))
        example = self.store[index[1]]
        size, hw = self.config.model.tile_size, example.image_hwc.shape[:2]
        if self.augmented:
            matrix = augment.random_affine(rng, hw, size, self.config.augment.scale)
        else:
            matrix = augment.plain_crop(rng, hw, size)
        margin = round(size * _MARGIN) if "distance" in self.config.model.channels else 0
        tile, labels = augment.cut(example.image_hwc, example.labels_hw, example.labels_scale, matrix, size, margin)
        class_of = example.class_of
        if self.augmented:
            inner = labels[margin : margin + size, margin : margin + size]
            tile, inner[...], copy_of = overlaps.add_piles(rng, tile, inner, self.config.overlap)
            class_of = with_copies(class_of, copy_of)
            tile = augment.recolour(rng, tile, self.config.augment)
        made = make_targets(labels, self.config, margin=margin, class_of=class_of)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1))),
            **{name: torch.from_numpy(plane) for name, plane in made.items()},
        }


def with_copies(class_of: ClassNumbers, copy_of: dict[int, int]) -> ClassNumbers:
    """``class_of`` extended by the labels in ``copy_of``, each with the class of the cell that it copies."""
    if not len(class_of) or not copy_of:
        return class_of
    longer = np.full(max(len(class_of), max(copy_of) + 1), UNKNOWN, np.int16)
    longer[: len(class_of)] = class_of
    for label, original in copy_of.items():
        longer[label] = class_of[original]
    return longer


def make_targets(
    labels_hw: npt.NDArray[np.int32],
    config: TrainConfig,
    *,
    margin: int = 0,
    class_of: ClassNumbers | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Targets of the loss: ``targets`` float32 (K, H, W) in [0, 1] in the order of the model's channels without
    its classes, and float32 (H, W) the ``gap`` weights, ``known``, 0 where the instance is unknown (``IGNORED``), else
    1, ``taught``, 0 where nothing is known (``UNTAUGHT``), else 1, and for a surface loss the signed distances
    ``surface`` of the boundary channel. With classes ``class_map`` int64 (H, W): class number, -1 for none or unknown.

    ``margin``: px on each side of ``labels_hw`` that lie outside the tile (H, W). The distance channel needs them: the
    depth of a pixel in a cell cut by the tile depends on the whole cell. ``class_of``: class number by label, as in
    ``Example``.
    """
    channels, loss = config.model.map_channels, config.loss
    untaught = labels_hw == UNTAUGHT
    if untaught.any():
        labels_hw = np.where(untaught, 0, labels_hw).astype(np.int32)
        # The edge of an excluded cell is no better known than its class.
        untaught = (cv2.dilate(untaught.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0) & (labels_hw == 0)
    inner = np.s_[margin : labels_hw.shape[0] - margin, margin : labels_hw.shape[1] - margin]
    wide_hw = labels_hw
    labels_hw = labels_hw[inner]
    known = labels_hw != IGNORED
    foreground = targets.foreground_target(labels_hw)
    planes: dict[str, npt.NDArray[Any]] = {"foreground": foreground}
    if "boundary" in channels:
        planes["boundary"] = targets.boundary_target(labels_hw, config.data.boundary_width_px)
    if "distance" in channels:
        cells = only_cells(wide_hw)
        wide = targets.distance_target(targets.foreground_target(cells), cells)
        planes["distance"] = wide[inner]
    made = {
        "targets": np.stack([planes[name] for name in channels]).astype(np.float32),
        "gap": targets.gap_weights(foreground, labels_hw, loss.gap_weight, loss.gap_sigma_px),
        "known": known.astype(np.float32),
        "taught": (~untaught[inner]).astype(np.float32),
    }
    if config.model.classes:
        made["class_map"] = _class_map(labels_hw, np.zeros(0, np.int16) if class_of is None else class_of)
    if loss.surface_weight:
        made["surface"] = targets.surface_distance(planes["boundary"], loss.surface_clip_px)
    return made


def _class_map(labels_hw: npt.NDArray[np.int32], class_of: ClassNumbers) -> npt.NDArray[np.int64]:
    table = np.full(int(labels_hw.max()) + 1, UNKNOWN, np.int64)
    n = min(len(table), len(class_of))
    table[:n] = class_of[:n]
    table[0] = UNKNOWN
    return table[labels_hw]


class TileLoader:
    """Batches of one epoch after another, cut by ``config.workers`` threads ahead of their use.

    Threads, not processes: the work is done by OpenCV and numpy, which release the GIL; the decoded images are shared;
    and a process forked after OpenCV has used its threads can hang forever (observed).
    """

    def __init__(self, dataset: TileDataset) -> None:
        self._dataset = dataset
        self._images = len(dataset.store.pairs)
        self._patches = dataset.config.data.patches_per_image
        self._batch = dataset.config.optim.batch_size
        self._workers = dataset.config.workers

    def __len__(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return math.ceil(self._images * self._patches / self._batch)

    def order(self, epoch: int) -> list[TileIndex]:
        """All (image, patch) of ``epoch`` in an order that depends on the seed and ``epoch`` only."""
        seed = (self._dataset.config.seed, epoch, 2**31)
        order = np.random.default_rng(seed).permutation(self._images * self._patches)
        return [(epoch, int(i) // self._patches, int(i) % self._patches) for i in order]

    def epoch(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """The batches of ``epoch``, from 0."""
        order = self.order(epoch)
        batches = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        if self._workers == 0:
            yield from (default_collate([self._dataset[index] for index in batch]) for batch in batches)
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="tiles") as pool:
            waiting: deque[list[Future[dict[str, Tensor]]]] = deque()
            for batch in batches:
                waiting.append([pool.submit(self._dataset.__getitem__, index) for index in batch])
                if len(waiting) > BATCHES_AHEAD:
                    yield default_collate([future.result() for future in waiting.popleft()])
            while waiting:
                yield default_collate([future.result() for future in waiting.popleft()])
