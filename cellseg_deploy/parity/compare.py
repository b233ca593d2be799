"""Do two forms of one network find the same cells? The gate that every form must pass before it is delivered.

Close tensors are not enough: a boundary that fades by a tenth merges cells while every average looks fine. So both
forms run through the production code (resize, tiles, stitching, labelling) on the same images, and are compared at
four levels: probabilities, foreground masks, matched cells, counts; for each operating point.

A *pixel differs* if the two label images do not assign it to the same cell: see ``differing_pixels``. Cells are matched
as in ``metrics``, with the reference as the truth, and no object is too small to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.records import POLICIES
from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.instances import segment
from cellseg_deploy.cells.metrics import overlap_table, score_image
from cellseg_deploy.errors import CellsegError, NothingToDoError, ParityError, UsageError, check_types
from cellseg_deploy.images.find import find_images, pair_by_stem
from cellseg_deploy.images.read import read_image, read_labels
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.parity.classes import class_changes
from cellseg_deploy.parity.policy import ParityPolicy, policy_for
from cellseg_deploy.parity.report import ImageComparison, ParityReport, Side, TaskComparison, Verdict, WorstImage
from cellseg_deploy.parity.tensors import TensorDifference, compare_tensors, cosine
from cellseg_deploy.segmenter import BATCH_SIZE, Segmenter, resize

__all__ = [
    "POLICIES",
    "ImageComparison",
    "ParityPolicy",
    "ParityReport",
    "Side",
    "TaskComparison",
    "TensorDifference",
    "Verdict",
    "WorstImage",
    "compare",
    "compare_tensors",
    "differing_mask",
    "differing_pixels",
    "middle_tile",
    "policy_for",
]

NamedImage = tuple[str, npt.NDArray[np.uint8]]
"""Name and RGB uint8 (h, w, 3)."""

Labels = npt.NDArray[np.int32]

_MATCH_IOU = 0.5


def compare(
    reference: Backend | str | Path,
    candidate: Backend | str | Path,
    images: Iterable[NamedImage] | str | Path,
    policy: ParityPolicy | None = None,
    *,
    masks: str | Path | None = None,
    truth: Callable[[str], Labels] | None = None,
    images_from: str = "given by the caller",
    batch_size: int = BATCH_SIZE,
    on_image: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run both forms on ``images`` and compare the cells they find, at every operating point of the candidate.

    ``reference``, ``candidate``: model files, or open engines. A file opens in its own engine on the CPU, an ``.onnx``
    in ONNX Runtime, whatever earlier comparisons say. ``images``: a folder, or names and pixels; ``masks``: ground
    truth of a folder's images, paired by stem.

    The candidate will be used in production, so its operating points label both sides; it may have been calibrated
    since it was made. ``policy``: by default that of the candidate's precision. ``truth(name)``: true labels (h, w) of
    an image; both forms are then also scored against them. ``images_from``: for the report. ``batch_size``: tiles per
    call. ``on_image``: called with the name of each finished image.

    Raises ``ParityError`` if the two cannot be forms of one network or the candidate's output is unusable,
    ``UsageError`` if the policy needs true labels and has none, ``NothingToDoError`` without images, ``DataError`` for
    an unreadable image of a folder, and for model files what ``open_backend`` raises.

    >>> report = compare("my.onnx", "my-other.onnx", images="val/images")
    >>> report.max_difference  # of a probability
    0.0
    >>> report.passed, report.reasons
    (False, ('the reference found ... cells in 2 images, at least 200 are needed to judge; ...',))
    """
    check_types("a path or None", masks=masks)
    check_types("a function or None", truth=truth)
    check_types("a function", on_image=on_image)
    if policy is not None:
        check_types(ParityPolicy, policy=policy)
    for name, form in (("reference", reference), ("candidate", candidate)):
        if not isinstance(form, Backend):
            check_types("a path", **{name: form})
    if masks is not None and truth is not None:
        raise UsageError("masks and truth exclude each other: both give the true labels")
    if not isinstance(images, (str, Path)):
        check_types("several images, such as a list", images=images)
    with ExitStack() as stack:
        first, second = (
            form if isinstance(form, Backend) else stack.enter_context(open_backend(form, _own_engine(Path(form))))
            for form in (reference, candidate)
        )
        if isinstance(images, (str, Path)):
            images_from = f"folder {Path(images).name}"
            images, truth = _in_folder(Path(images), None if masks is None else Path(masks))
        elif masks is not None:
            raise UsageError("masks belong to a folder of images; pass truth for images that are in memory")
        return _compare(first, second, images, policy, truth, images_from, batch_size, on_image)


def _own_engine(file: Path) -> EngineOptions:
    """Return options that open ``file`` itself, not ``auto``'s choice: comparisons must not depend on earlier ones."""
    return EngineOptions("onnxruntime" if file.suffix.lower() == ".onnx" else "auto")


def _in_folder(folder: Path, masks: Path | None) -> tuple[Iterable[NamedImage], Callable[[str], Labels] | None]:
    """Yield the images of ``folder`` and, with ``masks``, provide their truth; each is read when needed."""
    if masks is None:
        found = find_images([folder], follow_links=True)
        return ((image.name, read_image(image.path).pixels_hwc) for image in found), None
    pairs = {pair.stem: pair for pair in pair_by_stem(folder, masks)}

    def truth(stem: str) -> Labels:
        return read_labels(pairs[stem].mask)

    return ((stem, read_image(pair.image).pixels_hwc) for stem, pair in pairs.items()), truth


def _compare(
    reference: Backend,
    candidate: Backend,
    images: Iterable[NamedImage],
    policy: ParityPolicy | None,
    truth: Callable[[str], Labels] | None,
    images_from: str,
    batch_size: int,
    on_image: Callable[[str], None],
) -> ParityReport:
    policy = policy or policy_for(candidate.precision)
    if policy.needs_truth and truth is None:
        raise UsageError(
            f"policy {policy.name} judges by F1 against the truth, and there are no true labels; give the masks of the "
            "images (`masks`), or compare on sample smears, whose truth is known"
        )
    _check_kinship(reference, candidate)
    compared: list[ImageComparison] = []
    probe: npt.NDArray[np.uint8] | None = None
    crossed: npt.NDArray[np.float64] | float = 0.0
    worst: WorstImage | None = None
    worst_badness = 0, 0
    for named in images:
        if not (isinstance(named, tuple) and len(named) == 2):
            raise UsageError(f"images must be a folder, or pairs (name, pixels), got {type(named).__name__} among them")
        name, image_hwc = named
        expected = Segmenter(reference, batch_size=batch_size).probabilities(image_hwc)
        got = _answer_of(candidate, name, image_hwc, batch_size)
        true = None if truth is None else truth(name)
        tasks = {}
        for task in candidate.spec.operating_points:
            one, other = (_labels(candidate.spec, side, task, image_hwc) for side in (expected, got))
            part = _compare_labels(one, other, true, policy)
            if n_classes := len(reference.spec.classes):
                matched, changed = class_changes(one, other, expected[-n_classes:], got[-n_classes:])
                part = replace(part, n_matched=matched, class_changes=changed)
            tasks[task] = part
            badness = abs(part.count_difference), part.differing_px
            if worst is None or badness > worst_badness:
                worst_badness = badness
                worst = WorstImage(name, task, image_hwc, one, other, differing_mask(one, other))
        tensors = {
            channel: compare_tensors(expected[k], got[k], tolerance=policy.tensor_tolerance)
            for k, channel in enumerate(reference.spec.channels)
        }
        compared.append(ImageComparison(name, tensors, tasks))
        crossed = crossed + _cross_products(expected, got)
        if probe is None:
            probe = middle_tile(reference.spec, image_hwc)
        on_image(name)
    if probe is None:
        raise NothingToDoError(f"no image to compare the two forms on ({images_from})")
    report = ParityReport(_side(reference), _side(candidate), policy, images_from, tuple(compared), worst=worst)
    if report.verdict == "passed" or report.tensors_agree:
        return report
    hints = (*_swapped_channels(reference, np.asarray(crossed)), *_flipped_colours(reference, candidate, probe, policy))
    return replace(report, hints=hints)


def differing_pixels(reference: npt.NDArray[np.int32], candidate: npt.NDArray[np.int32]) -> int:
    """Return the number of pixels in which two label images (h, w) differ, whatever the cells' numbers.

    A pixel agrees if both sides have background there, or cells that are each other's match: IoU > 0.5, where a cell
    has at most one partner. So rims, moved borders between two cells and whole lost cells all count.
    """
    overlap = overlap_table(reference, candidate)
    union = overlap.true_area[overlap.true_index] + overlap.predicted_area[overlap.predicted_index] - overlap.common_px
    in_matching_cells = int(overlap.common_px[2 * overlap.common_px > union].sum())
    in_a_cell = int(np.count_nonzero((reference > 0) | (candidate > 0)))
    return in_a_cell - in_matching_cells


def differing_mask(reference: Labels, candidate: Labels) -> npt.NDArray[np.bool_]:
    """Mask (h, w) of the pixels that ``differing_pixels`` counts. Labels are numbered 1..n, as in ``segment``."""
    overlap = overlap_table(reference, candidate)
    union = overlap.true_area[overlap.true_index] + overlap.predicted_area[overlap.predicted_index] - overlap.common_px
    matching = 2 * overlap.common_px > union
    partner = np.zeros(int(reference.max(initial=0)) + 1, np.int32)
    partner[overlap.true_index[matching] + 1] = overlap.predicted_index[matching] + 1
    agree = (partner[reference] == candidate) & (candidate > 0)
    differing: npt.NDArray[np.bool_] = ((reference > 0) | (candidate > 0)) & ~agree
    return differing


def _check_kinship(reference: Backend, candidate: Backend) -> None:
    for name in ("channels", "tile_size", "halo", "image_scale", "cell_diameter_px"):
        a, b = getattr(reference.spec, name), getattr(candidate.spec, name)
        if a != b:
            raise ParityError(
                f"these are not two forms of one network: {name} of the reference {reference.spec.name!r} is {a}, of "
                f"the candidate {candidate.spec.name!r} {b}; export the candidate from the reference again"
            )


def _answer_of(
    candidate: Backend, name: str, image_hwc: npt.NDArray[np.uint8], batch_size: int
) -> npt.NDArray[np.float32]:
    try:
        return Segmenter(candidate, batch_size=batch_size).probabilities(image_hwc)
    except CellsegError as error:  # NaN, or invalid probabilities: a fault of the form, not of the image
        raise ParityError(f"the candidate ({candidate.name}) cannot run {name}: {error}") from error


def _labels(
    spec: ModelSpec, probabilities_khw: npt.NDArray[np.float32], task: str, image_hwc: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int32]:
    return segment(
        probabilities_khw,
        spec.channels,
        spec.operating_point(task),
        cell_diameter_px=spec.cell_diameter_px,
        out_hw=(image_hwc.shape[0], image_hwc.shape[1]),
    )


def _compare_labels(reference: Labels, candidate: Labels, true: Labels | None, policy: ParityPolicy) -> TaskComparison:
    levels = sorted({_MATCH_IOU, policy.f1_iou})
    score = score_image(reference, candidate, min_area_px=0, thresholds=levels)
    differing_px = differing_pixels(reference, candidate)
    if true is None:
        return TaskComparison(score, differing_px, reference.size)
    return TaskComparison(
        score, differing_px, reference.size, score_image(true, reference), score_image(true, candidate)
    )


def _side(backend: Backend) -> Side:
    return Side(backend.spec.name, backend.name, backend.device, backend.precision, backend.describe())


# ------------------------------------------------------------------------------------- possible faults


def _cross_products(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Sums of products of all pairs of channels, reference then candidate: (2 K, 2 K)."""
    planes = np.concatenate([expected, got]).reshape(2 * len(expected), -1).astype(np.float64)
    products: npt.NDArray[np.float64] = planes @ planes.T
    return products


def _swapped_channels(reference: Backend, products: npt.NDArray[np.float64]) -> list[str]:
    """Describe channels of the candidate that resemble a different channel of the reference."""
    channels = reference.spec.channels
    k, hints = len(channels), []
    square = products.diagonal()
    for i, name in enumerate(channels):
        likeness = [cosine(products[j, k + i], square[j], square[k + i]) for j in range(k)]
        best = int(np.argmax(likeness))
        if best != i and likeness[best] > 0.999:
            hints.append(
                f"the candidate's channel {name} is the reference's {channels[best]} (cosine {likeness[best]:.6f}): "
                "are the output channels in another order?"
            )
    return hints


def _flipped_colours(
    reference: Backend, candidate: Backend, probe_nhwc: npt.NDArray[np.uint8], policy: ParityPolicy
) -> list[str]:
    expected, flipped = reference.predict(probe_nhwc), candidate.predict(probe_nhwc[..., ::-1])
    if compare_tensors(expected, flipped, tolerance=policy.tensor_tolerance).share_over > 0:
        return []
    return [
        "given BGR instead of RGB the candidate agrees with the reference: its colour channels are in reverse order"
    ]


def middle_tile(spec: ModelSpec, image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the tile in the middle of ``image_hwc``, as the network gets it: (1, tile_size, tile_size, 3)."""
    scaled = resize(image_hwc, spec.image_scale)
    plan = tiling.plan((scaled.shape[0], scaled.shape[1]), spec.tile_size, spec.halo)
    middle = len(plan) // 2
    return tiling.cut(tiling.pad(scaled, plan), plan, middle, middle + 1)
