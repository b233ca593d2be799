"""What makes a folder run the run it is, from an open network and the run's options; see ``outputs.identity``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.outputs.formats import NAMES
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.output_folder import PROGRAM
from cellseg_deploy.run.record import MEASURED, Inputs, RunOptions
from cellseg_deploy.segmenter import Segmenter

_LIBRARIES = ("numpy", "opencv-python-headless", "scikit-image", "scipy", "pillow", "tifffile", "imagecodecs")
# Facts of an engine that change no result: where its file lies, how much it does at a time.
_NO_MATTER = frozenset(
    (
        *("threads", "streams", "static_batch", "batch_profile", "cuda_graph"),
        *("engine_path", "nodes_by_provider"),
    )
)


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of the libraries that compute or encode."""
    return {name: version(name) for name in _LIBRARIES}


def program() -> str:
    """Name and version of what writes results."""
    return f"{PROGRAM} {version('cellseg-deploy')}"


def identity_of(segmenter: Segmenter, options: RunOptions, inputs: Inputs) -> RunIdentity:
    """The identity of a run of ``segmenter`` over ``inputs``."""
    backend, spec = segmenter.backend, segmenter.backend.spec
    facts = backend.describe()
    engine = {name: value for name, value in facts.items() if name not in _NO_MATTER and not name.startswith("model_")}
    return RunIdentity(
        program=program(),
        model={
            "name": spec.name,
            "sha256": facts.get("model_file_sha256"),
            "given_sha256": _given_sha256(backend),
            "identity": facts.get("model_identity"),
        },
        backend={
            "name": backend.name,
            "device": backend.device,
            "precision": backend.precision,
            "form": backend.path.name if backend.path else "",
            **engine,
        },
        task=segmenter.task,
        operating_point=msgspec.to_builtins(segmenter.params),
        settings=result_settings(segmenter, options),
        saved=tuple(name for name in NAMES if name in options.save),
        versions=library_versions(),
        inputs=inputs.roots,
    )


def _given_sha256(backend: Backend) -> str | None:
    """Of the file that was given, of which another may be a form."""
    if backend.given is None:
        return None
    known = backend.describe().get("model_file_sha256") if backend.given == backend.path else None
    return known if known and backend.given.suffix.lower() == ".onnx" else sha256_of(backend.given)


def result_settings(segmenter: Segmenter, options: RunOptions) -> dict[str, Any]:
    """Settings that results depend on, by the names of the options. Models without classes have no choice of them."""
    classes = {"classes": list(segmenter.counting_classes)} if segmenter.backend.spec.classes else {}
    return {
        "scale": MEASURED if segmenter.auto_scale else segmenter.scale,
        "halo": segmenter.halo,
        "bit_depth": options.bit_depth,
        "pixel_size_um": options.pixel_size_um,
        "count_rule": options.count_rule,
        "border_cells": segmenter.border_cells,
        "field_of_view": options.field_of_view,
        **classes,
    }
