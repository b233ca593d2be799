"""A model file as a bioimage.io model package: description, weights, documentation and a pair of test tensors.

The description follows version 0.5 of the bioimage.io model format. It is written as JSON, which is also YAML.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models.onnx_file import ModelFile
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec
from cellseg_deploy.parity.compare import middle_tile
from cellseg_export.gate.verify import sample_images

FORMAT_VERSION = "0.5.3"
_WEIGHTS, _DOCUMENTATION, _INPUT, _OUTPUT = "model.onnx", "README.md", "test-input.npy", "test-output.npy"
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
# Known licences of weights. A ModelSpec holds free text, and one word is not yet an SPDX identifier.
_LICENCES = (
    *("0BSD", "AGPL-3.0-only", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "GPL-3.0-only", "ISC", "MIT", "MPL-2.0"),
    *("CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0"),
    *("CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "CC-BY-ND-4.0", "Unlicense"),
)
_PAPERS = {
    "dinov2": ("Oquab et al. (2024): DINOv2: Learning Robust Visual Features without Supervision",
               "10.48550/arXiv.2304.07193"),
    "": ("Dosovitskiy et al. (2021): An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
         "10.48550/arXiv.2010.11929"),
}  # fmt: skip


@dataclass(frozen=True)
class Credits:
    """``authors``: names of the model's authors. ``licence``: SPDX identifier, None for the licence of the weights,
    if the ModelSpec names one.
    ``cite``: (text, DOI) to cite in addition to the encoder's paper."""

    authors: tuple[str, ...] = ("made with cellseg-deploy",)
    licence: str | None = None
    cite: tuple[tuple[str, str], ...] = ()


def export_bioimageio(
    source: Path,
    path: Path,
    *,
    credits: Credits | None = None,
    threads: int | None = None,
    now: datetime.datetime | None = None,
) -> Path:
    """Check the .onnx file ``source`` and write it as the package ``path`` (ending in .zip), whole or not at all.

    The test tensors are a tile of a sample smear and ONNX Runtime's output for it. ``now``: time stamp of the package.
    Raises ``ModelError``, ``BackendUnavailableError`` without ONNX Runtime, ``UsageError``, ``OutputError``.
    """
    credits = credits or Credits()
    if path.suffix.lower() != ".zip":
        raise UsageError(f"{path}: the name of the package must end in .zip")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it, or choose another -o")
    if path.is_dir():
        raise OutputError(f"{path}: there is a folder of that name; choose another -o")
    # The workspace is made only as a check: a folder that is not writable is reported before any work.
    with workspace(path.parent), OnnxRuntimeBackend(source, threads=threads) as backend:
        licence_of(backend.spec, credits)  # raises before the network is run
        _, image_hwc = next(sample_images(backend.spec, 1).load())
        tile = middle_tile(backend.spec, image_hwc)
        answer = backend.predict(tile)
        model = backend.model_file
    files = {
        _WEIGHTS: model.data,
        _INPUT: as_npy(tile),
        _OUTPUT: as_npy(answer),
        _DOCUMENTATION: documentation(model).encode(),
    }
    stamp = now or datetime.datetime.now(datetime.UTC)
    files["rdf.yaml"] = msgspec.json.format(msgspec.json.encode(description(model, credits, files, stamp)), indent=2)
    write_bytes(path, _zip(files))
    return path


def description(model: ModelFile, credits: Credits, files: dict[str, bytes], now: datetime.datetime) -> dict[str, Any]:
    """Content of rdf.yaml for ``model`` and the ``files`` of the package."""
    spec = model.spec
    licence = licence_of(spec, credits)
    if not credits.authors:
        raise UsageError("a package needs an author; name one with --author")
    return {
        "type": "model",
        "format_version": FORMAT_VERSION,
        "name": _plain(spec.name),
        "description": _summary(spec),
        "authors": [{"name": name} for name in credits.authors],
        "cite": [{"text": text, "doi": doi} for text, doi in (*credits.cite, _paper(spec.encoder))],
        "license": licence,
        "documentation": _DOCUMENTATION,
        "tags": ["cells", "blood-smear", "instance-segmentation", "2d", "vision-transformer", spec.variant],
        "timestamp": now.isoformat(timespec="seconds"),
        "inputs": [_input(spec, files)],
        "outputs": [_output(spec, files)],
        "weights": {
            "onnx": {
                "source": _WEIGHTS,
                "sha256": hashlib.sha256(files[_WEIGHTS]).hexdigest(),
                "opset_version": model.opset,
            }
        },
        "config": {"cellseg": {"model_identity": model.identity, "spec": msgspec.to_builtins(spec)}},
    }


def licence_of(spec: ModelSpec, credits: Credits) -> str:
    """SPDX identifier of the package's licence. Raises ``UsageError`` if none is named."""
    if credits.licence is not None:
        if not _SPDX.fullmatch(credits.licence):
            raise UsageError(f"--licence {credits.licence!r} is not an SPDX identifier such as MIT or CC-BY-4.0")
        return credits.licence
    text = spec.weights.licence.strip()
    known = {name.lower(): name for name in _LICENCES}
    if text.lower() not in known:
        raise UsageError(
            f"the model states its licence as {text!r}, which is not an SPDX identifier such as MIT or CC-BY-4.0; "
            "name the package's licence with --licence"
        )
    return known[text.lower()]


def documentation(model: ModelFile) -> str:
    """README.md of the package: input, output, how cells are made of the output, and accuracy."""
    spec = model.spec
    metrics = "".join(f"| {name} | {value:.4f} |\n" for name, value in sorted(spec.training.val_metrics.items()))
    points = "".join(f"- `{task}`: `{msgspec.json.encode(p).decode()}`\n" for task, p in spec.operating_points.items())
    return f"""# {spec.name}

{_summary(spec)}

## Input and output

`{INPUT_NAME}`: RGB tiles, uint8, {spec.tile_size} x {spec.tile_size} px, cells about {spec.cell_diameter_px:.0f} px
wide ({spec.image_scale:g} px per px of a training image). Do not normalise the input: the graph does.
`{OUTPUT_NAME}`: {", ".join(spec.channels)}, in [0, 1].
The outer {spec.halo} px of a tile lack context and are discarded.

## From probabilities to cells

Operating points of the instance step, as in `cellseg_deploy.cells.instances`:

{points}
## Validation

{f"| metric | value |{chr(10)}|---|---|{chr(10)}{metrics}" if metrics else "No metric was stored with this model."}
Comparison with the network it was exported from: {spec.parity}

## Training data

{spec.training.data or "not stated"}. Weights: {spec.weights.origin} ({spec.weights.licence}).
Model identity: `{model.identity}`
"""


def as_npy(array: npt.NDArray[Any]) -> bytes:
    """``array`` in NumPy's file format."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _input(spec: ModelSpec, files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "id": INPUT_NAME,
        "description": "RGB tile of a photograph",
        "axes": [
            {"type": "batch"},
            *({"type": "space", "id": axis, "size": spec.tile_size} for axis in ("y", "x")),
            {"type": "channel", "id": "channel", "channel_names": ["red", "green", "blue"]},
        ],
        "data": {"type": "uint8"},
        "test_tensor": _file(_INPUT, files),
    }


def _output(spec: ModelSpec, files: dict[str, bytes]) -> dict[str, Any]:
    sides = [
        {"type": "space", "id": axis, "size": {"tensor_id": INPUT_NAME, "axis_id": axis}, "halo": spec.halo}
        for axis in ("y", "x")
    ]
    return {
        "id": OUTPUT_NAME,
        "description": "probabilities",
        "axes": [
            {"type": "batch"},
            {"type": "channel", "id": "channel", "channel_names": list(spec.channels)},
            *sides,
        ],
        "data": {"type": "float32", "range": [0.0, 1.0]},
        "test_tensor": _file(_OUTPUT, files),
    }


def _file(name: str, files: dict[str, bytes]) -> dict[str, str]:
    return {"source": name, "sha256": hashlib.sha256(files[name]).hexdigest()}


def _summary(spec: ModelSpec) -> str:
    maps = spec.channels[: len(spec.channels) - len(spec.classes)]
    classes = f", and tells their classes apart ({', '.join(spec.classes)})" if spec.classes else ""
    return (
        f"Finds the {' and '.join(maps)} of cells in photographs of blood smears, from which cells are "
        f"counted and outlined{classes}. Vision transformer ({spec.encoder}) with a stepwise decoder."
    )


def _paper(encoder: str) -> tuple[str, str]:
    return _PAPERS["dinov2" if "dinov2" in encoder.lower() else ""]


def _plain(name: str) -> str:
    """``name`` reduced to the characters that the format allows: ASCII letters, digits, space, _ - ( )."""
    return re.sub(r"[^A-Za-z0-9_ ()-]+", "-", name).strip(" -") or "cellseg"


def _zip(files: dict[str, bytes]) -> bytes:
    """Return a ZIP archive that is the same for the same content; uncompressed, because weights do not compress."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return stream.getvalue()
