"""Self-description of a model file: ``ModelSpec``, as JSON in the ONNX metadata or next to an engine.

Everything downstream of the network (scale, tiling, labelling) is read from here, so that a model file needs no
companion file and a user needs no magic numbers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from cellseg_deploy.errors import ModelError, UsageError, check_types

SPEC_VERSION = 1
DATA_SUMMARY_VERSION = 1
MIN_OBJECT_REL = 0.0245
"""Ground-truth objects below this share of the median object are specks, unless a model specifies otherwise: 200 px in
the full-size photographs that the shipped model was trained on."""
METADATA_KEY = "cellseg"
MAP_CHANNELS = ("foreground", "boundary", "distance")
"""Names of the channels that say where cells are; all others are classes of cells."""
INPUT_NAME = "tiles"
OUTPUT_NAME = "probabilities"

Variant = Literal["plain", "boundary", "distance"]
Task = Literal["counting", "confluence"]
TASKS: tuple[Task, ...] = ("counting", "confluence")


class ThresholdParams(msgspec.Struct, frozen=True, kw_only=True, tag_field="method", tag="threshold"):
    """Foreground threshold and 4-connected components: the method of the study this project grew from.

    ``foreground_threshold``: a pixel is cell where the foreground probability is at least this, in (0, 1).
    ``min_area_rel``, ``max_hole_rel``: components and holes below this share of the area of a disc of the model's
    median cell diameter are dropped and filled, respectively. ``min_border_area_rel``: the same for components that
    touch the image border, for masks that leave out slivers; it applies when labels are compared with such masks
    (calibration, ``border_cells="model"``), while runs label every visible cell (``instances.VISIBLE_AREA_REL``).
    """

    foreground_threshold: float = 0.5
    min_area_rel: float = 0.1
    min_border_area_rel: float = 0.2
    max_hole_rel: float = 0.1


class BoundaryParams(msgspec.Struct, frozen=True, kw_only=True, tag_field="method", tag="boundary"):
    """Seeds where ``foreground - boundary_weight * boundary >= seed_threshold``, grown back by watershed to
    ``foreground >= foreground_threshold``.

    So a strict threshold splits touching cells without eroding their rims. ``min_seed_area_rel``: seeds below this
    share of the median cell's area are dropped (a seed is smaller than its cell). Others as in ``ThresholdParams``.
    """

    foreground_threshold: float = 0.5
    seed_threshold: float = 0.7
    boundary_weight: float = 0.5
    min_seed_area_rel: float = 0.03
    min_area_rel: float = 0.1
    min_border_area_rel: float = 0.2
    max_hole_rel: float = 0.1


class DistanceParams(msgspec.Struct, frozen=True, kw_only=True, tag_field="method", tag="distance"):
    """Seeds where ``distance >= seed_threshold``, grown back by watershed to ``foreground >= foreground_threshold``.

    The ``distance`` channel rises from 0 at a cell's edge to 1 in its middle, so ``seed_threshold`` in (0, 1) is how
    deep inside a cell its seed begins, as a share of the way. Others as in ``BoundaryParams``.
    """

    foreground_threshold: float = 0.5
    seed_threshold: float = 0.5
    min_seed_area_rel: float = 0.01
    min_area_rel: float = 0.1
    min_border_area_rel: float = 0.2
    max_hole_rel: float = 0.1


InstanceParams = ThresholdParams | BoundaryParams | DistanceParams


class WeightsInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Origin of the network's weights and their permitted use."""

    origin: str
    licence: str


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Median of some values, and their 5th and 95th percentiles, between which nine in ten lie."""

    median: float
    p05: float
    p95: float

    def limits(self, tolerance: float) -> tuple[float, float]:
        """Return between what a value is similar: a quarter of the distance of the percentiles beyond them, at least
        ``tolerance``."""
        margin = max(tolerance, (self.p95 - self.p05) / 4)
        return self.p05 - margin, self.p95 + margin


class DataSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of the training images, with which ``cellseg-evaluate describe`` compares other images.

    ``values``: quantity -> spread over images (``diameter_px``: over cells), as measured by ``training_match``.
    ``version``: version of those measurements; figures of another version are not compared. The layout is fixed, so
    that a model with a newer summary still loads.
    """

    version: int
    n_images: int
    n_cells: int
    values: dict[str, Spread]


class TrainingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Training data in words, SHA-256 fingerprint of the split, and validation results.

    ``data_summary``: statistics of the training images; None in models from before it existed.
    """

    data: str = ""
    split_sha256: str = ""
    n_train_images: int = 0
    n_val_images: int = 0
    epochs: int = 0
    seed: int = 0
    val_metrics: dict[str, float] = {}
    data_summary: DataSummary | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Self-description of a deployable network.

    ``channels``: names of the K probability channels in order, the first is ``foreground``.
    ``tile_size``: height = width of the square input tile in model px. ``halo``: context px on each side of a tile
    that stitching discards. ``image_scale``: model px per px of a training image. ``cell_diameter_px``: median cell
    diameter of the training data in *model* px (diameter of the disc of equal area). ``patch_size``: the ViT's.
    ``operating_points``: task name -> parameters of the instance step. ``parity``: how the file was checked against
    the PyTorch network; ``"unverified"`` if too few cells were found to judge. ``min_object_rel``: objects of the
    training masks below this share of their median area were specks, not cells; None in models from before it existed,
    for which ``MIN_OBJECT_REL`` is used. ``classes``: names of the cell classes that the network distinguishes, the
    last of ``channels`` in the same order; their probabilities sum to 1 at each pixel and are meaningful only inside
    the foreground. Empty if the network distinguishes none.

    >>> model.backend.spec.channels[0], model.backend.spec.operating_point("counting").foreground_threshold > 0
    ('foreground', True)
    """

    spec_version: int = SPEC_VERSION
    name: str
    variant: Variant
    channels: tuple[str, ...]
    tile_size: int
    halo: int
    image_scale: float
    cell_diameter_px: float
    patch_size: int
    encoder: str
    weights: WeightsInfo
    training: TrainingInfo
    operating_points: dict[str, InstanceParams]
    parity: str = "unverified"
    min_object_rel: float | None = None
    classes: tuple[str, ...] = ()

    def operating_point(self, task: str) -> InstanceParams:
        """Return the parameters for ``task``; raises ``UsageError`` naming the model's tasks if it is unknown."""
        check_types("a name", task=task)
        try:
            return self.operating_points[task]
        except KeyError:
            known = ", ".join(sorted(self.operating_points))
            raise UsageError(f"task {task!r} has no operating point in model {self.name!r}; it has: {known}") from None


def to_json(spec: ModelSpec) -> str:
    """Return ``spec`` as JSON text, with stable key order."""
    return msgspec.json.encode(spec).decode()


def from_json(text: str | bytes, *, source: str) -> ModelSpec:
    """Parse and check a ModelSpec; ``source`` names the file in errors. Raises ``ModelError``."""
    version = _version_of(text, source)
    if version != SPEC_VERSION:
        raise ModelError(
            f"{source}: model metadata has spec version {version}, this program reads {SPEC_VERSION}; "
            + ("update cellseg-deploy" if version > SPEC_VERSION else "export the model again")
        )
    try:
        spec = msgspec.json.decode(text, type=ModelSpec)
    except msgspec.ValidationError as error:
        raise ModelError(f"{source}: invalid model metadata: {error}; export the model again") from error
    check(spec, source=source)
    return spec


def check(spec: ModelSpec, *, source: str) -> None:
    """Raise ``ModelError`` if a value of ``spec`` is invalid."""
    problems = [
        (spec.tile_size > 0 and spec.patch_size > 0, f"tile_size {spec.tile_size}, patch_size {spec.patch_size}"),
        (
            spec.patch_size > 0 and spec.tile_size % spec.patch_size == 0,
            f"tile_size {spec.tile_size} is not a multiple of {spec.patch_size}",
        ),
        (0 <= 2 * spec.halo < spec.tile_size, f"halo {spec.halo} does not fit a tile of {spec.tile_size}"),
        (spec.image_scale > 0, f"image_scale {spec.image_scale} is not positive"),
        (spec.cell_diameter_px > 0, f"cell_diameter_px {spec.cell_diameter_px} is not positive"),
        (spec.channels[:1] == ("foreground",), f"first channel must be foreground, got {spec.channels}"),
        (
            spec.variant == "plain" or spec.variant in spec.channels,
            f"variant {spec.variant} without a {spec.variant} channel: {spec.channels}",
        ),
        (
            spec.min_object_rel is None or (math.isfinite(spec.min_object_rel) and spec.min_object_rel >= 0),
            f"min_object_rel {spec.min_object_rel} is negative or not finite",
        ),
        (
            not spec.classes or spec.channels[-len(spec.classes) :] == spec.classes,
            f"the classes {spec.classes} are not the last of the channels {spec.channels}",
        ),
        (not misfit_of_classes(spec.classes), misfit_of_classes(spec.classes)),
        (bool(spec.operating_points), "no operating point"),
        *((not misfit(params), f"{task}: {misfit(params)}") for task, params in spec.operating_points.items()),
        *(
            (
                math.isfinite(v.p95 - v.p05) and v.p05 <= v.median <= v.p95,
                f"data_summary {name} is not a valid spread: {v}",
            )
            for name, v in (spec.training.data_summary.values.items() if spec.training.data_summary else ())
        ),
    ]
    wrong = [message for fine, message in problems if not fine]
    if wrong:
        raise ModelError(f"{source}: invalid model metadata: {'; '.join(wrong)}; export the model again")


def misfit(params: InstanceParams) -> str:
    """Return what is wrong with ``params``, or "": a threshold outside (0, 1), another value negative or not finite."""
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name.endswith("threshold"):
            if not 0 < value < 1:
                return f"{name} must lie between 0 and 1 (both excluded), got {value}"
        elif not (math.isfinite(value) and value >= 0):
            return f"{name} must be 0 or more, got {value}"
    return ""


def misfit_of_classes(classes: tuple[str, ...]) -> str:
    """Return what is wrong with ``classes`` as names of cell classes, or "" (also if there are none)."""
    if len(classes) == 1:
        return f"expected two or more classes, got only {classes[0]!r}"
    if len(set(classes)) < len(classes):
        return f"expected each class once, got {', '.join(classes)}"
    for name in classes:
        if name in MAP_CHANNELS:
            return f"{name!r} is the name of another channel, expected another name for the class"
        if not name or name != name.strip() or "," in name or not name.isprintable():
            return f"a class name must be printable, without commas or leading or trailing spaces, got {name!r}"
    return ""


def default_operating_points(variant: Variant) -> dict[str, InstanceParams]:
    """Operating points of a network that is not calibrated yet."""
    if variant == "plain":
        return {
            "counting": ThresholdParams(foreground_threshold=0.8),
            "confluence": ThresholdParams(foreground_threshold=0.5),
        }
    if variant == "distance":
        return {"counting": DistanceParams(), "confluence": DistanceParams()}
    return {"counting": BoundaryParams(), "confluence": BoundaryParams()}


def _version_of(text: str | bytes, source: str) -> int:
    try:
        loose: Any = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ModelError(f"{source}: model metadata is not JSON ({error}); export the model again") from error
    version = loose.get("spec_version") if isinstance(loose, dict) else None
    if not isinstance(version, int):
        raise ModelError(f"{source}: model metadata has no spec_version; is this a model written by cellseg-export?")
    return version
