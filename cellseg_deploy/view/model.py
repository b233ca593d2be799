"""The model of the run, for relabelling one image with another task, threshold or cell size.

The network runs once per image and scale; its probabilities are kept, and ``Segmenter.segment`` labels from them, so
the cells are those that ``cellseg-infer`` finds with these settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.batching import alone
from cellseg_deploy.cells.image_tiles import ImageTiles
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.outputs.segmentation import Segmentation
from cellseg_deploy.run.repeat import RecordedRun, engine_arguments
from cellseg_deploy.segmenter import Segmenter

TASKS = ("counting", "confluence")


@dataclass(frozen=True)
class Settings:
    """``task``; ``threshold``: of the foreground, None for the task's own; ``cell_diameter_px``: None as in the run."""

    task: str = TASKS[0]
    threshold: float | None = None
    cell_diameter_px: float | None = None

    @classmethod
    def of(cls, content: dict[str, Any]) -> Settings:
        """Return the settings in ``content``, from a page. Raises ``UsageError``."""
        task = content.get("task", TASKS[0])
        if task not in TASKS:
            raise UsageError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        limits = {"threshold": (0.0, 1.0), "cell_diameter_px": (2.0, 2000.0)}
        numbers: dict[str, float | None] = {}
        for name, (low, high) in limits.items():
            value = content.get(name)
            if value is None:
                numbers[name] = None
            elif isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise UsageError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}")
            else:
                numbers[name] = float(value)
        return cls(task, numbers["threshold"], numbers["cell_diameter_px"])


class Labeller:
    """The model of the run ``recorded``; without a run the one that ships. Opened at the first use. Not thread-safe."""

    def __init__(self, recorded: RecordedRun | None, *, is_run: bool) -> None:
        self._recorded, self._is_run = recorded, is_run
        self._segmenter: Segmenter | None = None
        self._kept: tuple[tuple[str, float], npt.NDArray[np.float32]] | None = None

    def open(self) -> Segmenter:
        """Open the model. Raises ``ModelError`` if its file is not there, ``BackendUnavailableError``."""
        if self._segmenter is None:
            if self._recorded is None and self._is_run:
                raise ModelError("run.json does not tell the model of this run, so nothing can be relabelled here")
            if self._recorded is None:
                self._segmenter = Segmenter.load()
            else:
                options, identity = self._recorded.result_options(), self._recorded.identity
                path = self._recorded.model_file(None) or default_model_path()
                classes = options["classes"]
                self._segmenter = Segmenter.load(
                    path,
                    engine=EngineOptions(**engine_arguments(identity)),
                    task=options["task"],
                    scale=options["scale"] or "auto",
                    halo=options["halo"],
                    border_cells=options["border_cells"],
                    classes=None if classes is None else classes.split(","),
                )
        return self._segmenter

    def thresholds(self) -> dict[str, float]:
        """Foreground threshold of each task."""
        spec = self.open().backend.spec
        return {task: spec.operating_point(task).foreground_threshold for task in TASKS}

    def cell_px(self, scale: float) -> float:
        """Area of the model's typical cell in px of an image at ``scale``."""
        return math.pi / 4 * (self.open().backend.spec.cell_diameter_px / scale) ** 2

    def label(
        self, key: str, image_hwc: npt.NDArray[np.uint8], settings: Settings, *, scale: float | None, field: Any
    ) -> Segmentation:
        """Label the image ``key`` with ``settings``. ``scale``: of the run, None to measure. Raises as ``segment``."""
        opened = self.open()
        spec = opened.backend.spec
        if settings.cell_diameter_px is not None:
            scale = spec.cell_diameter_px / settings.cell_diameter_px
        if scale is None:
            scale = opened.find_scale([image_hwc], field=field).scale if opened.auto_scale else opened.scale
        segmenter = Segmenter(
            opened.backend,
            task=settings.task,
            scale=scale,
            batch_size=opened.batch_size,
            halo=opened.halo,
            border_cells=opened.border_cells,
            classes=opened.counting_classes or None,
        )
        if settings.threshold is not None:
            params = segmenter.params
            changes: dict[str, float] = {"foreground_threshold": settings.threshold}
            segmenter.params = msgspec.structs.replace(params, **changes)
        return segmenter.segment(image_hwc, self._network(key, scale, segmenter), field=field, scale=scale)

    def close(self) -> None:
        """Close the engine."""
        if self._segmenter is not None:
            self._segmenter.close()
            self._segmenter = None

    def _network(self, key: str, scale: float, segmenter: Segmenter) -> Any:
        """Return a network that answers from the probabilities kept for the same image and scale."""
        run = alone(segmenter.backend.predict, segmenter.batch_size)

        def network(tiles: ImageTiles) -> None:
            if self._kept is not None and self._kept[0] == (key, scale):
                tiles.out_khw[...] = self._kept[1]
                return
            run(tiles)
            self._kept = ((key, scale), tiles.out_khw.copy())

        return network
