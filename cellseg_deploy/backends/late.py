"""An engine that is opened when there is work for it: a run that finds everything done loads none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.models.spec import ModelSpec


class LateBackend(Backend):
    """Says what an earlier run recorded of its engine, until ``prepare`` opens it; whether that is still true is for
    the caller to compare then."""

    def __init__(
        self, spec: ModelSpec, recorded: Mapping[str, Any], model: Path, open_backend: Callable[[], Backend]
    ) -> None:
        """``spec``: of the file ``model``. ``recorded``: what ``describe`` said, with name, device and precision."""
        self.spec = spec
        self.name, self.device, self.precision = (str(recorded[key]) for key in ("name", "device", "precision"))
        self.given = self.path = model
        self.verified, self.choice = None, "as recorded; opened when there is work"
        self._recorded = {key: value for key, value in recorded.items() if key not in ("name", "device", "precision")}
        self._open = open_backend
        self._opened: Backend | None = None

    def prepare(self) -> None:
        """Open the engine, once. Raises what opening it raises."""
        if self._opened is None:
            opened = self._opened = self._open()
            self.spec, self.name, self.device, self.precision = (
                *(opened.spec, opened.name, opened.device, opened.precision),
            )
            self.verified, self.choice, self.batch_step = opened.verified, opened.choice, opened.batch_step

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.prepare()
        assert self._opened is not None
        return self._opened.predict(tiles_nhwc)

    def describe(self) -> dict[str, Any]:
        """Of the engine, or of the recorded one while it is not open."""
        return dict(self._recorded) if self._opened is None else self._opened.describe()

    def _close(self) -> None:
        """Close the engine if it was opened."""
        if self._opened is not None:
            self._opened.close()
