"""The engine of an earlier run once more: from its record to the arguments that open it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cellseg_deploy.backends import BACKENDS
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.run.identity import RunIdentity


def engine_to_go_on_with(recorded: RunIdentity, model: Path) -> dict[str, Any] | None:
    """``path``, ``given`` and settings of ``EngineOptions`` that open ``model`` as the ``recorded`` run did, None if
    that cannot be.

    So that a run goes on with its engine although ``--backend auto`` might choose another one by now. What is opened
    is the form beside ``model`` that was chosen then, and ``model`` stays the file that was given.
    """
    engine = engine_arguments(recorded)
    form = model.with_name(str(recorded.backend.get("form") or model.name))
    if form.suffix == model.suffix and recorded.model["sha256"] == recorded.model["given_sha256"]:
        form = model  # it was opened itself, and may be called otherwise by now
    if engine["backend"] not in BACKENDS or not os.path.isfile(form):  # noqa: PTH113
        return None
    try:
        is_given = sha256_of(model) == recorded.model.get("given_sha256")
    except OSError:  # opening it will say so
        return None
    return {"path": form, "given": model, **engine} if is_given else None


def engine_arguments(recorded: RunIdentity) -> dict[str, Any]:
    """Settings of ``EngineOptions`` to have the engine of ``recorded`` again."""
    engine = recorded.backend
    return {
        "backend": engine["name"],
        "device": engine["device"],
        "precision": engine.get("inference_precision") or None,
    }
