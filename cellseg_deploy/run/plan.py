"""The plan of a run: for ``--dry-run``, and as the first step of a run."""

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
from cellseg_deploy.run.shard import Shard
from cellseg_deploy.run.state import RunState

Action = Literal["work", "skip", "fail"]


@dataclass(frozen=True)
class Planned:
    """One image. ``work``: to be done, for ``reason``; ``skip``: already done; ``fail``: must not be read.

    ``output_name``: name of its files without extension; ``files``: all its files, relative to the output folder.
    ``edited``: files that somebody edited; ``is_changed``: see ``resume.Decision``.
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
        """Return ``reason``, or else a remark on a finished image; empty if there is none."""
        return self.reason or (f"{some(self.edited)} edited since the run, kept" if self.edited else "")


@dataclass(frozen=True)
class RunPlan:
    """``folder``: what the output folder holds. ``items``: the images in the order of the run."""

    folder: FolderKind
    items: tuple[Planned, ...]

    @property
    def counts(self) -> dict[Action, int]:
        """Number of images per action."""
        counter = Counter(item.action for item in self.items)
        return {action: counter[action] for action in get_args(Action)}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
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
    images: Sequence[FoundImage],
    out: Path,
    folder: FolderKind,
    state: RunState,
    formats: Sequence[Format],
    shard: Shard | None = None,
) -> RunPlan:
    """Plan a run of ``images`` into ``out``, a folder of kind ``folder`` with the run ``state``.

    ``shard``: plan only its images, with the names of files that a run of all ``images`` would give them.
    Reads finished images and their outputs to compare them (see ``resume.decide``); writes nothing.
    """
    names = output_names([image.name for image in images], state.output_names)
    items = []
    for image in images:
        if shard is not None and not shard.has(image.name):
            continue
        decision = decide(image, state.entries.get(image.name), out)
        action: Action = "fail" if image.problem and decision.action == "work" else decision.action
        name = names[image.name]
        files = tuple(format.place(name) for format in formats if format.folder)
        reason = (image.problem if action == "fail" else "") or decision.reason
        items.append(Planned(image, action, reason, name, files, decision.edited, decision.is_changed))
    return RunPlan(folder, tuple(items))
