"""Inference engines behind one contract (``base.Backend``); each is imported only when it is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_deploy.backends.address import is_address, parse_address
from cellseg_deploy.backends.options import BACKENDS, PRECISIONS, EngineOptions, check_precision
from cellseg_deploy.errors import UsageError, check_types

if TYPE_CHECKING:
    from cellseg_deploy.backends.base import Backend

__all__ = [
    "BACKENDS",
    "ENGINE_SUFFIX",
    "OPENVINO_SUFFIX",
    "PRECISIONS",
    "EngineOptions",
    "check_precision",
    "default_device",
    "open_backend",
]

ENGINE_SUFFIX = ".engine"
"""File suffix of a TensorRT engine, which no other backend can open."""
OPENVINO_SUFFIX = ".xml"
"""File suffix of OpenVINO's own format, which no other backend can open; its weights are in the matching .bin."""
_OWN_ENGINE = {ENGINE_SUFFIX: "tensorrt", OPENVINO_SUFFIX: "openvino"}
_DEFAULTS = EngineOptions()


def default_device(path: Path | None, backend: str) -> str:
    """Return the device that ``open_backend`` uses for the model ``path`` if none is named."""
    if backend == "triton" or is_address(path):
        return "remote"
    own = None if path is None else _OWN_ENGINE.get(path.suffix.lower())
    return "cuda" if "tensorrt" in (own, backend) else "cpu"


def open_backend(path: str | Path, engine: EngineOptions = _DEFAULTS, *, given: str | Path | None = None) -> Backend:
    """Open the model file ``path`` with the settings ``engine`` and check it completely.

    ``path``: an ``.onnx``, an OpenVINO ``.xml`` with its ``.bin``, or a TensorRT ``.engine`` with its ``.engine.json``;
    the last two open in their own engine. Or the address of a model on a server, ``grpc://host:port/name``.
    ``given``: the file that was requested if ``path`` is a form of it chosen earlier; None for ``path``.

    The backend's ``verified`` and ``choice`` say whether the opened file passed the gate here, and why it was chosen.

    Raises ``UsageError`` for settings that do not fit the file or each other, ``ModelError`` for a file that is not a
    valid model, ``BackendUnavailableError`` if engine or device is unavailable; there is no fallback to another device.

    >>> from cellseg_deploy.models import default_model_path
    >>> with open_backend(default_model_path(), EngineOptions(backend="onnxruntime")) as backend:
    ...     backend.name, backend.device, backend.precision
    ('onnxruntime', 'cpu', 'fp32')
    """
    check_types("a path", path=path)
    check_types(EngineOptions, engine=engine)
    check_types("a path or None", given=given)
    if is_address(path) or engine.backend == "triton":
        return _open_served(path, engine)
    path = Path(path)
    given = path if given is None else Path(given)
    own = _OWN_ENGINE.get(path.suffix.lower())
    if own is not None and engine.backend not in ("auto", own):
        raise UsageError(
            f"{path}: this form opens in {own} only, not in {engine.backend}; give the .onnx it was made from"
        )
    device = engine.device or default_device(path, engine.backend)
    from cellseg_deploy.backends import selection
    from cellseg_deploy.backends.records import records_path

    chosen = None
    free = engine.backend == "auto" and path.suffix.lower() == ".onnx" and not engine.rebuild
    # Without records or a requested precision there is no choice to make: a large model is read once, not twice.
    if free and (engine.precision is not None or records_path(path).exists()):
        chosen, _ = selection.select(path, device=device, precision=engine.precision)
        path, name = chosen.form.file, chosen.form.backend
        engine = replace(engine, precision=chosen.form.inference_precision or None)
    elif engine.backend == "auto":
        name = own or "onnxruntime"
    else:
        name = engine.backend
    opened = _open_named(path, replace(engine, backend=name, device=device))
    opened.given, opened.path = given, path
    try:
        opened.verified, opened.choice = (
            selection.verdict_on(opened, path) if chosen is None else (chosen.verified, chosen.why)
        )
    except BaseException:
        opened.close()
        raise
    return opened


def _open_served(address: str | Path, engine: EngineOptions) -> Backend:
    if engine.backend not in ("auto", "triton"):
        raise UsageError(
            f"{parse_address(address)}: a served model opens with `backend='triton'` only, not with {engine.backend}"
        )
    _check_owners(replace(engine, backend="triton"))
    from cellseg_deploy.backends.triton import DEVICE, TritonBackend

    return TritonBackend(address, device=engine.device or DEVICE)


def _open_named(path: Path, engine: EngineOptions) -> Backend:
    """Open ``path`` in ``engine``, whose backend and device are named."""
    _check_owners(engine)
    device = engine.device or "cpu"
    if engine.backend == "tensorrt":
        from cellseg_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(path, device=device, rebuild=engine.rebuild, cuda_graph=engine.cuda_graph)
    if engine.backend == "openvino":
        from cellseg_deploy.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(
            path, device=device, threads=engine.threads, precision=engine.precision, streams=engine.streams or 1
        )
    from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, device=device, threads=engine.threads)


def _check_owners(engine: EngineOptions) -> None:
    """Raise ``UsageError`` for a setting that belongs to another backend than the one named."""
    for name, value, owner in (
        ("rebuild", engine.rebuild or None, "tensorrt"),
        ("cuda_graph", engine.cuda_graph or None, "tensorrt"),
        ("precision", engine.precision, "openvino"),
        ("streams", engine.streams, "openvino"),
    ):
        if value is not None and engine.backend != owner:
            raise UsageError(f"`{name}` belongs to `backend={owner!r}`, not to {engine.backend}")
