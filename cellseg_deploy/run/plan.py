"""What a run would do, without doing it: for ``--dry-run``, and for a run to begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import Format
from cellseg_deploy.outputs.names import output_names
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.run.resume import FolderState, decide, kept_names

Action = Literal["work", "skip", "keep", "fail"]


@dataclass(frozen=True)
class Planned:
    """One image. ``work``: it is to be done, for ``reason``; ``skip``: it is done; ``fail``: it may not be read;

    ``keep``: it was done before and cannot be read now, for ``reason``, so its results stay as they are.
    ``output_name``: name of its files without ending; ``files``: all of them, relative to the output folder.
    ``edited``, ``outdated``: those of them that somebody edited, see ``resume.Decision``.
    """

    image: FoundImage
    action: Action
    reason: str
    output_name: str
    files: tuple[str, ...]
    edited: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunPlan:
    """``folder``: what lies in the output folder. ``items``: the images in the order of the run."""

    folder: FolderState
    items: tuple[Planned, ...]

    @property
    def counts(self) -> dict[Action, int]:
        """How many images for each action."""
        counter = Counter(item.action for item in self.items)
        return {action: counter[action] for action in get_args(Action)}

    def to_json(self) -> dict[str, Any]:
        """For machines: the same as data."""
        return {
            "folder": self.folder.kind,
            "found": len(self.items),
            **{str(action): number for action, number in self.counts.items()},
            "images": [
                {
                    "image": utf8(item.image.name),
                    "action": item.action,
                    "reason": utf8(item.reason),
                    "files": [utf8(file) for file in item.files],
                }
                for item in self.items
            ],
        }


def plan(
    images: Sequence[FoundImage],
    out: Path,
    state: FolderState,
    formats: Sequence[Format],
    kept: Mapping[str, str] | None = None,
) -> RunPlan:
    """What a run of ``images`` into ``out``, which is in ``state``, would do with each.

    ``kept``: names that outputs of images have already, besides those that the journal says. Of a folder that is not
    resumed every image is work. Reads images and outputs that are recorded as done, to compare them (see
    ``resume.decide``), and writes nothing.
    """
    entries = state.journal.entries if state.kind == "resume" and state.journal is not None else {}
    names = output_names([image.name for image in images], {**kept_names(entries), **(kept or {})})
    items = []
    for image in images:
        decision = decide(image, entries.get(image.name), out)
        action: Action = "fail" if image.problem and decision.action == "work" else decision.action
        name = names[image.name]
        files = tuple(format.place(name) for format in formats if format.folder)
        reason = image.problem or decision.reason
        items.append(Planned(image, action, reason, name, files, decision.edited, decision.outdated))
    return RunPlan(state, tuple(items))
