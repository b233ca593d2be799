"""What a run would do, without doing it: for ``--dry-run``, and for a run to begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import Format
from cellseg_deploy.outputs.names import output_names
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.run.resume import FolderKind, decide, some
from cellseg_deploy.run.state import RunState

Action = Literal["work", "skip", "fail"]


@dataclass(frozen=True)
class Planned:
    """One image. ``work``: it is to be done, for ``reason``; ``skip``: it is done; ``fail``: it may not be read.

    ``output_name``: name of its files without ending; ``files``: all of them, relative to the output folder.
    ``edited``: those of them that somebody edited; ``is_changed``: see ``resume.Decision``.
    """

    image: FoundImage
    action: Action
    reason: str
    output_name: str
    files: tuple[str, ...]
    edited: tuple[str, ...] = ()
    is_changed: bool = False

    @property
    def explanation(self) -> str:
        """``reason``, or else what there is to say of a finished image."""
        return self.reason or (f"{some(self.edited)} edited since the run, kept" if self.edited else "")


@dataclass(frozen=True)
class RunPlan:
    """``folder``: what lies in the output folder. ``items``: the images in the order of the run."""

    folder: FolderKind
    items: tuple[Planned, ...]

    @property
    def counts(self) -> dict[Action, int]:
        """How many images for each action."""
        counter = Counter(item.action for item in self.items)
        return {action: counter[action] for action in get_args(Action)}

    def to_json(self) -> dict[str, Any]:
        """For machines: the same as data."""
        return {
            "folder": self.folder,
            "found": len(self.items),
            **{str(action): number for action, number in self.counts.items()},
            "images": [
                {
                    "image": utf8(item.image.name),
                    "action": item.action,
                    "reason": utf8(item.explanation),
                    "files": [utf8(file) for file in item.files],
                }
                for item in self.items
            ],
        }


def plan(
    images: Sequence[FoundImage], out: Path, folder: FolderKind, state: RunState, formats: Sequence[Format]
) -> RunPlan:
    """What a run of ``images`` into ``out``, a ``folder`` of that kind with the run ``state``, would do with each.

    Reads images and outputs that are recorded as done, to compare them (see ``resume.decide``), and writes nothing.
    """
    names = output_names([image.name for image in images], state.output_names)
    items = []
    for image in images:
        decision = decide(image, state.entries.get(image.name), out)
        action: Action = "fail" if image.problem and decision.action == "work" else decision.action
        name = names[image.name]
        files = tuple(format.place(name) for format in formats if format.folder)
        reason = (image.problem if action == "fail" else "") or decision.reason
        items.append(Planned(image, action, reason, name, files, decision.edited, decision.is_changed))
    return RunPlan(folder, tuple(items))
