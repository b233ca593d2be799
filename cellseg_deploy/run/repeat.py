"""Doing a run again from its run.json: the same model, engine and settings, and so the same labels."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.scale import check_scale
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.images.inputs import GivenPaths
from cellseg_deploy.models import DEFAULT_SHA256
from cellseg_deploy.run.earlier_engine import engine_arguments
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.output_folder import PROGRAM
from cellseg_deploy.run.record import MEASURED, Inputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """What a run.json says. ``model``: the file that was given; ``form``: the one that was opened."""

    file: Path
    identity: RunIdentity
    model: Path
    form: Path
    inputs: Inputs
    max_pixels: int
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def given(self) -> GivenPaths:
        """Its input again: images are called as they were, and one of them may be gone, but no folder."""
        paths, folders = (tuple(map(Path, named)) for named in (self.inputs.paths, self.inputs.folders))
        return GivenPaths(paths, tuple(map(Path, self.inputs.roots)), frozenset(paths).difference(folders))

    def result_options(self) -> dict[str, Any]:
        """Options of ``cellseg-infer`` that results depend on, by their parameters' names."""
        settings, engine = self.identity.settings, engine_arguments(self.identity)
        is_auto = settings["scale"] in (MEASURED, "auto")
        return {
            "task": self.identity.task,
            "scale": None if is_auto else settings["scale"],
            "cell_diameter": "auto" if is_auto else None,
            **{name: engine[name] for name in ("backend", "device", "precision")},
            "halo": settings["halo"],
            "bit_depth": settings["bit_depth"],
            "pixel_size": settings["pixel_size_um"],
            "count_rule": settings["count_rule"],
            "border_cells": settings["border_cells"],
            "field": settings["field_of_view"],
            "classes": ",".join(settings["classes"]) if "classes" in settings else None,
        }

    def other_options(self) -> dict[str, Any]:
        """Options that may be given besides: what is written, and how large images may be."""
        return {
            "save": ",".join(self.identity.saved) or "none",
            "max_pixels": self.max_pixels,
            "follow_links": self.inputs.follow_links,
        }

    def model_file(self, given: Path | None) -> Path | None:
        """The model to open, None for the one that ships; ``given``: where the user says it lies.

        Raises ``ModelError`` if it is not where it was.
        """
        if given is not None or self.identity.model.get("sha256") == DEFAULT_SHA256:
            return given
        there = next((path for path in (self.model, self.form) if os.path.isfile(path)), None)  # noqa: PTH113
        if there is None:
            raise ModelError(f"{self.model}: the model of {self.file} is not there any more; give it with --model")
        return there

    def check(self, now: RunIdentity) -> None:
        """Raise ``ModelError`` if ``now`` runs another model; warn of what else differs, as versions may."""
        before = self.identity
        # Labels depend on the content of the file that was opened, not on what --model gave.
        model = {**now.model, "given_sha256": before.model.get("given_sha256")}
        alike = replace(now, inputs=before.inputs, saved=before.saved, model=model)
        others = differences(self.identity, alike)
        if self.identity.model.get("sha256") != now.model.get("sha256"):
            raise ModelError(
                f"the model is not the one of {self.file} (SHA-256 {self.identity.model.get('sha256')} expected, "
                f"{now.model.get('sha256')} found); give that one with --model"
            )
        if others:
            _log.warning("labels may differ from those of %s: %s", self.file, "; ".join(others))


def read_run(file: Path) -> RecordedRun:
    """The run that ``file``, a run.json, records. Raises ``UsageError`` if it is none, or of an older program."""
    try:
        content: Any = json.loads(file.read_bytes())
        if content["program"] != PROGRAM:
            raise ValueError(f"it was written by {content['program']}")
        identity, model = RunIdentity.from_json(content["identity"]), content["model"]
        recorded = RecordedRun(
            file=file,
            identity=identity,
            model=Path(model["given" if "given" in model else "path"]),
            form=Path(model["path"]),
            inputs=Inputs.from_json(content["inputs"], identity.inputs),
            max_pixels=int(content["settings"]["max_pixels"]),
            scales={str(k): check_scale(float(v)) for k, v in content["settings"].get("scales", {}).items()},
        )
        recorded.result_options()  # raises where something is missing in it
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file}: no run.json of this version of {PROGRAM} ({said})") from error
    return recorded
