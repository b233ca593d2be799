"""Probabilities and truth of many images, kept in temporary files while settings are tried on them.

The network runs once per image. Half precision (error below 0.0005) and labels in the smallest sufficient type:
6 MB for a smear of 1600 x 1200 px, so a hundred images are never in memory at once; reading one back takes
milliseconds, usually from the operating system's cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.probability_calibration import Reliability, reliability
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.workspace import workspace


@dataclass(frozen=True)
class KeptImage:
    """``probabilities_khw``: float16 (K, h, w). ``true_labels``: integers (H, W). Both are read on access."""

    name: str
    _base: Path

    @property
    def probabilities_khw(self) -> npt.NDArray[np.floating]:
        """Network output, float16 (K, h, w)."""
        return np.asarray(np.load(self._base.with_suffix(".p.npy")))

    @property
    def true_labels(self) -> npt.NDArray[np.integer]:
        """True labels, uint16 or int32 (H, W)."""
        return np.asarray(np.load(self._base.with_suffix(".t.npy")))


class KeptImages(Sequence[KeptImage]):
    """A growing sequence of kept images; see ``kept_images``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: list[KeptImage] = []

    def add(self, name: str, probabilities_khw: npt.NDArray[np.floating], true_labels: npt.NDArray[np.integer]) -> None:
        """Keep one more image. Raises ``OutputError`` if the temporary folder is full."""
        base = self._folder / str(len(self._kept))
        fits = int(true_labels.max(initial=0)) < 2**16
        try:
            np.save(base.with_suffix(".p.npy"), probabilities_khw.astype(np.float16))
            np.save(base.with_suffix(".t.npy"), true_labels.astype(np.uint16) if fits else true_labels)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: probabilities cannot be stored there ({error.strerror or error}); "
                "free space, or set TMPDIR to a larger disk"
            ) from error
        self._kept.append(KeptImage(name, base))

    def reliability(self) -> Reliability:
        """Return the reliability of the foreground over all kept images. Raises ``ValueError`` if there are none."""
        total: Reliability | None = None
        for item in self._kept:
            one = reliability(item.probabilities_khw[0], item.true_labels)
            total = one if total is None else total + one
        if total is None:
            raise ValueError("no image was kept")
        return total

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> KeptImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[KeptImage]: ...
    def __getitem__(self, index: int | slice) -> KeptImage | list[KeptImage]:
        return self._kept[index]


@contextmanager
def kept_images() -> Iterator[KeptImages]:
    """Yield an empty ``KeptImages`` in a temporary folder, removed afterwards, with leftovers of killed processes.

    Raises ``OutputError`` if the folder cannot be created.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(workspace(Path(tempfile.gettempdir())))
        except (OSError, OutputError) as error:
            raise OutputError(f"no temporary folder can be made ({error}); set TMPDIR to one") from error
        yield KeptImages(folder)


def reliability_record(found: Reliability) -> dict[str, Any]:
    """Convert ``found`` for JSON: ECE, and per bin its pixels, mean probability and share of cell (null if empty)."""

    def mean(values: Any) -> list[float | None]:
        return [float(v / n) if n else None for v, n in zip(values.tolist(), found.pixels.tolist(), strict=True)]

    return {
        "channel": "foreground",
        "ece": found.ece,
        "bins": len(found.pixels),
        "pixels": [int(n) for n in found.pixels],
        "mean_probability": mean(found.probability),
        "share_cell": mean(found.cell),
    }
