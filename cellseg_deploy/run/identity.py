"""Identity of a run: everything that its results depend on. Two runs with the same identity give the same files.

Stored in the first line of the journal. Settings that cannot change a finished image are left out on purpose, so that
a run can be resumed with other values: batch size, threads, ``max_pixels``, screen output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cellseg_deploy.outputs.tables import utf8

_ARGUMENTS = {  # arguments that restore the recorded values
    "task": "`task`",
    "backend.name": "`backend`",
    "backend.device": "`device`",
    "backend.precision": "`precision`",
    "settings.scale": "`scale` or `cell_diameter_px`",
    "settings.halo": "`halo`",
    "settings.bit_depth": "`bit_depth`",
    "settings.pixel_size_um": "`pixel_size_um`",
    "settings.count_rule": "`count_rule`",
    "settings.border_cells": "`border_cells`",
    "settings.field_of_view": "`field`",
    "settings.classes": "`classes`",
    "settings.shard": "`shard`",
    "saved": "`save`",
    "model.sha256": "`model`",
    "model.given_sha256": "`model`",
    "inputs": "input folders",
}
_BEFORE_THERE_WERE = {"border_cells": "model", "field_of_view": "full"}
"""Settings that earlier versions did not record, with the values those versions used."""


@dataclass(frozen=True)
class RunIdentity:
    """JSON values only: text, numbers, booleans, None, and lists of these or objects of these with text keys.

    ``program``: name and version. ``model``: ``name`` and ``sha256`` of the file. ``backend``: ``name``, ``device``,
    ``precision`` and the engine's version. ``task``; ``operating_point``: parameters of the instance step.
    ``settings``: everything else that changes results, by argument name. ``saved``: names of the formats.
    ``versions``: versions of the libraries that compute. ``inputs``: absolute folders that names are relative to.
    """

    program: str
    model: Mapping[str, Any]
    backend: Mapping[str, Any]
    task: str
    operating_point: Mapping[str, Any]
    settings: Mapping[str, Any]
    saved: tuple[str, ...]
    versions: Mapping[str, Any]
    inputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON data. Raises ``ValueError`` or ``TypeError`` for values that JSON cannot hold."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, content: Any) -> RunIdentity:
        """Restore an identity from the data of ``to_json``. Raises ``ValueError`` if ``content`` is not an identity."""
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"expected an object with {', '.join(sorted(names))}")
        for name in ("saved", "inputs"):
            if not isinstance(content[name], list) or not all(isinstance(part, str) for part in content[name]):
                raise ValueError(f"{name} must be a list of text")
        for name in ("model", "backend", "operating_point", "settings", "versions"):
            if not isinstance(content[name], dict):
                raise ValueError(f"{name} must be an object")
        lists = {name: tuple(content[name]) for name in ("saved", "inputs")}
        return cls(**{**content, **lists, "settings": {**_BEFORE_THERE_WERE, **content["settings"]}})


_NAME_OF_A_FILE = "backend.form"
"""Recorded only to find the file again: files are compared by content, and this one may have been renamed."""


def differences(recorded: RunIdentity, asked: RunIdentity) -> list[str]:
    """Return the differences between two runs, one readable line each; empty if there are none."""
    before, now = (dict(_flat(identity.to_json())) for identity in (recorded, asked))
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        if key == _NAME_OF_A_FILE:
            continue
        if key not in before or key not in now or before[key] != now[key]:
            argument = f" ({_ARGUMENTS[key]})" if key in _ARGUMENTS else ""
            lines.append(f"{_words(key)}{argument}: {_said(before, key)} there, {_said(now, key)} now")
    return lines


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _words(key: str) -> str:
    section, _, name = key.rpartition(".")
    words = name.replace("_", " ")
    return words if section in ("", "settings") else f"{section.replace('_', ' ')} {words}"


def _said(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    value = values[key]
    if isinstance(value, list):
        return utf8(", ".join(map(str, value))) or "none"
    if value is None:
        return "none"
    text = utf8(str(value))
    return f"{text[:12]}..." if key.endswith("sha256") else text
