"""A run of one large image that is stopped, as by Ctrl-C, at a given step."""

from __future__ import annotations

from dataclasses import dataclass, field

from cellseg_deploy.slides.counting import Progress


@dataclass
class StopAfter:
    """``progress`` raises ``KeyboardInterrupt`` in its call number ``calls``. ``seen``: what each call was told."""

    calls: int
    seen: list[int] = field(default_factory=list)

    @property
    def progress(self) -> Progress:
        return Progress(advanced=self._advanced)

    def _advanced(self, n: int) -> None:
        self.seen.append(n)
        if len(self.seen) == self.calls:
            raise KeyboardInterrupt
