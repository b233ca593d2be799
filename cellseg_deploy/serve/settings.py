"""Parameters of a request: those of ``cellseg-infer``, by the same names and with the same checks.

``PARAMETERS`` is the only list of them; the description of the service (``openapi``) is made from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells.count_rules import COUNT_RULES, DEFAULT_RULE, CountRule
from cellseg_deploy.cells.field_of_view import FIELDS, Field
from cellseg_deploy.cells.instances import BorderCells
from cellseg_deploy.cells.scale import MAX_SCALE, CellDiameter
from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.options import MAX_PIXELS, ReadOptions
from cellseg_deploy.models.spec import TASKS
from cellseg_deploy.segmenter import BATCH_SIZE, Segmenter

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)
SMALLEST_PIXEL_UM = 1e-4
"""A tenth of a nanometre; densities of much smaller pixels are no finite numbers."""
_BORDER_CELLS = ("visible", "model")


@dataclass(frozen=True)
class Settings:
    """Settings for one image; see ``Segmenter``, ``Segmenter.__call__`` and ``ReadOptions``.

    ``threshold``: of the foreground, None for that of the ``task``. ``halo``, ``batch_size``, ``max_pixels``: set by
    the service, not by requests.
    """

    task: str = "counting"
    threshold: float | None = None
    scale: float | None = None
    cell_diameter: CellDiameter = "auto"
    count_rule: CountRule = DEFAULT_RULE
    border_cells: BorderCells = "visible"
    field: Field = "auto"
    pixel_size: float | None = None
    bit_depth: int | None = None
    classes: tuple[str, ...] | None = None
    halo: int | None = None
    batch_size: int = BATCH_SIZE
    max_pixels: int = MAX_PIXELS

    @property
    def reading(self) -> ReadOptions:
        """Settings for the reader. Raises ``UsageError``."""
        return ReadOptions(self.max_pixels, self.bit_depth, self.pixel_size)

    def segmenter(self, backend: Backend) -> Segmenter:
        """Return a segmenter with these settings on the open ``backend``. Raises ``UsageError``."""
        made = Segmenter(
            backend,
            task=self.task,
            scale=self.scale,
            cell_diameter_px=self.cell_diameter,
            batch_size=self.batch_size,
            halo=self.halo,
            border_cells=self.border_cells,
            classes=self.classes,
        )
        if self.threshold is not None:
            if not 0 < self.threshold < 1:
                raise UsageError(f"threshold must be a number between 0 and 1, got {self.threshold:g}")
            changes: dict[str, float] = {"foreground_threshold": self.threshold}
            made.params = msgspec.structs.replace(made.params, **changes)
        return made


@dataclass(frozen=True)
class Parameter:
    """``name``: in requests. ``what``: description. ``schema``: JSON Schema of its value. ``parse``: text to value,
    raises ``UsageError``."""

    name: str
    what: str
    schema: dict[str, Any]
    parse: Callable[[str, str], Any]


def _one_of(*names: str) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text not in names:
            raise UsageError(f"{name} must be one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _number(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise UsageError(f"{name} must be a number, got {text!r}")
    return float(text)


def _whole(name: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise UsageError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _pixel_size(name: str, text: str) -> float:
    value = _number(name, text)
    if 0 < value < SMALLEST_PIXEL_UM:
        raise UsageError(f"{name} must be at least {SMALLEST_PIXEL_UM:g} micrometres, got {text}")
    return value


def _diameter(name: str, text: str) -> float | str:
    if text != "auto" and not _NUMBER.fullmatch(text):
        raise UsageError(f"{name} must be a number of pixels or auto, got {text!r}")
    return text if text == "auto" else _number(name, text)


def _names(_: str, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "task",
        "What the result is for: numbers of cells, or the covered area. Chooses the operating point.",
        {"type": "string", "enum": list(TASKS)},
        _one_of(*TASKS),
    ),
    Parameter(
        "threshold",
        "Foreground probability from which a pixel is cell, in place of the operating point's.",
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        _number,
    ),
    Parameter(
        "cell_diameter",
        "Typical cell diameter in the image in px, from which the scale follows, or auto: measured in the image. Not "
        "with scale.",
        {"anyOf": [{"type": "number", "minimum": 0.1, "maximum": 100_000}, {"type": "string", "const": "auto"}]},
        _diameter,
    ),
    Parameter(
        "scale",
        "Model px per image px. Not with cell_diameter.",
        {"type": "number", "minimum": 1 / MAX_SCALE, "maximum": MAX_SCALE},
        _number,
    ),
    Parameter(
        "count_rule",
        "Which cells cut by the image border count.",
        {"type": "string", "enum": list(COUNT_RULES)},
        _one_of(*COUNT_RULES),
    ),
    Parameter(
        "border_cells",
        "Which cells cut by the image border are labelled.",
        {"type": "string", "enum": list(_BORDER_CELLS)},
        _one_of(*_BORDER_CELLS),
    ),
    Parameter(
        "field",
        "Leave out what is outside the field of view, or use the full picture.",
        {"type": "string", "enum": list(FIELDS)},
        _one_of(*FIELDS),
    ),
    Parameter(
        "pixel_size",
        "Side of a pixel in micrometres, for densities and columns in micrometres.",
        {"type": "number", "minimum": SMALLEST_PIXEL_UM, "maximum": 1000},
        _pixel_size,
    ),
    Parameter(
        "bit_depth",
        "Bits that the camera really used in a 16-bit file.",
        {"type": "integer", "minimum": 9, "maximum": 16},
        _whole,
    ),
    Parameter(
        "classes",
        "Classes of the model that count as cells, with commas between; the others are labelled too.",
        {"type": "string"},
        _names,
    ),
)
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def parse(given: Iterable[tuple[str, str]], defaults: Settings, *, others: Sequence[str] = ()) -> Settings:
    """Return ``defaults`` with the parameters ``given`` (name, text). ``others``: names that mean something else here.

    ``scale`` and ``cell_diameter`` replace each other's default. Raises ``UsageError`` for an unknown or repeated name,
    or a value out of range.
    """
    changes: dict[str, Any] = {}
    for name, text in given:
        if name in others:
            continue
        parameter = _BY_NAME.get(name)
        if parameter is None:
            raise UsageError(f"unknown parameter {name!r}; expected some of {', '.join((*others, *_BY_NAME))}")
        if name in changes:
            raise UsageError(f"{name} is given twice; give it once")
        changes[name] = parameter.parse(name, text)
    if "scale" in changes and "cell_diameter" not in changes:
        changes["cell_diameter"] = None
    if "cell_diameter" in changes and "scale" not in changes:
        changes["scale"] = None
    settings = replace(defaults, **changes)
    _ = settings.reading  # raises
    return settings
