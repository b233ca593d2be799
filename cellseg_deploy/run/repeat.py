"""The model, engine and settings of an earlier run, from its run.json or its journal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cellseg_deploy.backends import BACKENDS
from cellseg_deploy.backends.address import is_address
from cellseg_deploy.cells.scale import check_scale
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.models import DEFAULT_SHA256, default_model_path
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.output_folder import PROGRAM, RUN_JSON
from cellseg_deploy.run.record import MEASURED, SHARD

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """Content of a run.json. ``model``: the file that was passed; ``form``: the file that was opened; both the address
    of a served model."""

    file: Path
    identity: RunIdentity
    model: Path
    form: Path
    max_pixels: int
    scales: Mapping[str, float] = field(default_factory=dict)

    def result_options(self) -> dict[str, Any]:
        """Options of ``cellseg-infer`` that results depend on, by parameter name."""
        settings = self.identity.settings
        is_auto = settings["scale"] in (MEASURED, "auto")
        return {
            "task": self.identity.task,
            "scale": None if is_auto else settings["scale"],
            "cell_diameter": "auto" if is_auto else None,
            **engine_arguments(self.identity),
            "halo": settings["halo"],
            "bit_depth": settings["bit_depth"],
            "pixel_size": settings["pixel_size_um"],
            "count_rule": settings["count_rule"],
            "border_cells": settings["border_cells"],
            "field": settings["field_of_view"],
            "classes": ",".join(settings["classes"]) if "classes" in settings else None,
        }

    def model_file(self, given: Path | None) -> Path | None:
        """Return the model to open, None for the one that ships; ``given``: location passed by the user, if any.

        Raises ``ModelError`` if the recorded model file is missing.
        """
        if given is not None:
            return given
        if is_address(self.model):
            return self.model
        if self.identity.model.get("sha256") == DEFAULT_SHA256:
            return None
        there = next((path for path in (self.model, self.form) if os.path.isfile(path)), None)  # noqa: PTH113
        if there is None:
            raise ModelError(f"{self.model}: the model of {self.file} no longer exists; pass it as `model`")
        return there

    def check(self, now: RunIdentity) -> None:
        """Raise ``ModelError`` if ``now`` uses another model; warn about other differences, such as versions."""
        before = self.identity
        # Labels depend on the content of the file that was opened, not on the file passed as --model.
        model = {**now.model, "given_sha256": before.model.get("given_sha256")}
        settings = {name: value for name, value in now.settings.items() if name != SHARD}
        settings |= {SHARD: before.settings[SHARD]} if SHARD in before.settings else {}
        alike = replace(now, inputs=before.inputs, saved=before.saved, model=model, settings=settings)
        others = differences(self.identity, alike)
        if self.identity.model.get("sha256") != now.model.get("sha256"):
            raise ModelError(
                f"the model is not the one of {self.file} (SHA-256 {self.identity.model.get('sha256')} expected, "
                f"{now.model.get('sha256')} found); pass that one as `model`"
            )
        if others:
            _log.warning("labels may differ from those of %s: %s", self.file, "; ".join(others))


def read_run(file: Path) -> RecordedRun:
    """Read the run recorded in ``file``, or in the run.json of the folder ``file``.

    Raises ``UsageError`` if it is not a run.json, or of an older version.
    """
    if os.path.isdir(file):  # noqa: PTH112  (never raises)
        file /= RUN_JSON
    try:
        content: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read ({error.strerror or error}); expected the run.json of an earlier run, or the "
            "output folder that holds it"
        ) from error
    except ValueError:
        content = None
    by = content.get("program") if isinstance(content, dict) else None
    if not isinstance(content, dict) or by != PROGRAM:
        what = f"written by {by}" if isinstance(by, str) else f"not a run.json of {PROGRAM}"
        raise UsageError(f"{file}: {what}; expected the run.json of an earlier run, or the output folder that holds it")
    try:
        identity, model = RunIdentity.from_json(content["identity"]), content["model"]
        recorded = RecordedRun(
            file=file,
            identity=identity,
            model=Path(model.get("model_url") or model["given" if "given" in model else "path"]),
            form=Path(model.get("model_url") or model["path"]),
            max_pixels=int(content["settings"]["max_pixels"]),
            scales={str(k): check_scale(float(v)) for k, v in content["settings"].get("scales", {}).items()},
        )
        recorded.result_options()  # raises if a setting is missing
    except (KeyError, TypeError, ValueError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file}: not a run.json of this version of {PROGRAM} ({said})") from error
    return recorded


def engine_to_resume(recorded: RunIdentity, model: Path | None) -> dict[str, Any] | None:
    """Return the arguments that open ``model`` (None: the one that ships) as the ``recorded`` run did, None if
    impossible: ``path``, ``given``, and settings of ``EngineOptions``.

    A run is thus resumed with its engine, although ``backend="auto"`` might choose another engine now. The file to
    open is the form next to ``model`` that was chosen then; ``model`` stays the file that was passed.
    """
    engine = engine_arguments(recorded)
    model = model or default_model_path()
    form = model.with_name(str(recorded.backend.get("form") or model.name))
    if form.suffix == model.suffix and recorded.model["sha256"] == recorded.model["given_sha256"]:
        form = model  # the model itself was opened, and may have been renamed since
    if engine["backend"] not in BACKENDS or not os.path.isfile(form):  # noqa: PTH113
        return None
    try:
        is_given = sha256_of(model) == recorded.model.get("given_sha256")
    except OSError:  # opening the model will report the error
        return None
    return {"path": form, "given": model, **engine} if is_given else None


def engine_arguments(recorded: RunIdentity) -> dict[str, Any]:
    """Return the settings of ``EngineOptions`` for the engine of ``recorded``."""
    engine = recorded.backend
    return {
        "backend": engine["name"],
        "device": engine["device"],
        "precision": engine.get("inference_precision") or None,
    }
