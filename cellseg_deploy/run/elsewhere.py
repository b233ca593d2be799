"""Where the images of a run are done: in helper threads of this process, or elsewhere, such as on a cluster.

Whatever does the images hands back outcomes in order; only the run itself writes results and journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cellseg_deploy.batching import Outcome
from cellseg_deploy.images.find import FoundImage

if TYPE_CHECKING:
    from cellseg_deploy.run.image_work import Finished
    from cellseg_deploy.run.record import RunSetup
    from cellseg_deploy.slides.counting import SlideElsewhere


@dataclass(frozen=True)
class ImageTask:
    """One image to do: see ``ImageWork.__call__``. ``nbytes``: estimates its memory from the image's header.
    ``by_region``: does an image that is read by region in this process, with its bands computed elsewhere."""

    image: FoundImage
    output_name: str
    scale: float | None
    with_thresholds: bool
    nbytes: Callable[[], int]
    by_region: Callable[[SlideElsewhere], Finished]


class Outcomes(Protocol):
    """Yields one outcome per task, in order; leaving the block ends all work. See ``batching.Overlapped``."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all work."""

    def __iter__(self) -> Iterator[Outcome[Finished]]:
        """Do the tasks."""

    def stop(self) -> None:
        """Begin no new tasks; does not wait for running ones."""

    @property
    def engine_seconds(self) -> float:
        """Total time during which a network call was running."""


class Elsewhere(Protocol):
    """Does images outside this process."""

    def outcomes(self, setup: RunSetup, tasks: Sequence[ImageTask]) -> Outcomes:
        """Return the outcomes of ``tasks``, which begin when they are iterated over."""
