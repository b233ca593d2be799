"""Inference engines behind one contract (``base.Backend``); each is imported only when it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_deploy.errors import UsageError

if TYPE_CHECKING:
    from cellseg_deploy.backends.base import Backend

BACKENDS = ("auto", "onnxruntime", "openvino", "tensorrt")
PRECISIONS = ("fp32", "mixed", "fp16", "bf16", "int8")
"""Arithmetic that a form computes in; ``mixed`` is fp16 with some blocks in fp32."""
ENGINE_SUFFIX = ".engine"
"""Ending of a TensorRT engine, which no other backend can open."""
OPENVINO_SUFFIX = ".xml"
"""Ending of OpenVINO's own form, which no other backend can open; its weights lie in the .bin of that name."""
_OWN_ENGINE = {ENGINE_SUFFIX: "tensorrt", OPENVINO_SUFFIX: "openvino"}


def check_precision(precision: str | None) -> None:
    """Raise ``UsageError`` unless ``precision`` is one of ``PRECISIONS``, or None: nobody asked for one."""
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")


def default_device(path: Path | None, backend: str) -> str:
    """The device that ``open_backend`` takes for the model ``path`` where none is named."""
    own = None if path is None else _OWN_ENGINE.get(path.suffix.lower())
    return "cuda" if "tensorrt" in (own, backend) else "cpu"


def open_backend(
    path: str | Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    rebuild: bool = False,
    cuda_graph: bool = False,
    ort_provider: str | None = None,
    precision: str | None = None,
    streams: int | None = None,
    given: str | Path | None = None,
) -> Backend:
    """Open the model file ``path`` on ``device`` and check everything about it.

    ``path``: an ``.onnx``, an OpenVINO ``.xml`` with its ``.bin``, or a TensorRT ``.engine`` with its ``.engine.json``;
    the last two open in their own engine. ``device``: ``cpu``, ``cuda``,
    ``cuda:1``; None for the GPU with TensorRT and the CPU otherwise. ``rebuild``: build a cached TensorRT engine anew.
    ``cuda_graph``: let TensorRT record a full batch as a CUDA graph and replay it. ``ort_provider``: ``cuda`` or
    ``tensorrt``, what ONNX Runtime runs a GPU with; None for ``cuda``.

    ``backend``: an engine of ``BACKENDS``; ``auto`` takes the fastest form that passed the gate for this model on this
    kind of device (see ``selection``). ``precision``: with ``auto`` only forms that compute in it,
    None for the model's own or fp32; with OpenVINO ``fp32`` or ``bf16``. ``threads``: CPU threads of
    the engine, None for one a core. ``streams``: batches that OpenVINO computes at a time, None for 1.
    ``given``: the file that was asked for where ``path`` is a form of it that was chosen before; None for ``path``.

    The backend's ``verified`` and ``choice`` say whether what was opened passed the gate here, and why it was taken.

    Raises ``UsageError`` for a setting that cannot be meant, ``ModelError`` for a file that is not a sound model,
    ``BackendUnavailableError`` if engine or device are not here; another device is never taken instead.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    check_precision(precision)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    path = Path(path)
    given = path if given is None else Path(given)
    own = _OWN_ENGINE.get(path.suffix.lower())
    if own is not None and backend not in ("auto", own):
        raise UsageError(f"{path}: this form opens in {own} only, not in {backend}; give the .onnx it was made from")
    device = device or default_device(path, backend)
    from cellseg_deploy.backends import auto
    from cellseg_deploy.backends.records import records_path

    chosen = None
    free = backend == "auto" and path.suffix.lower() == ".onnx" and ort_provider is None and not rebuild
    # With neither records nor a wish there is nothing to choose: a large model is then read once and not twice.
    if free and (precision is not None or records_path(path).exists()):
        chosen, _ = auto.select(path, device=device, precision=precision)
        path, backend, precision = chosen.form.file, chosen.form.backend, chosen.form.inference_precision or None
    opened = _open_named(
        path,
        backend if own is None and backend != "auto" else own or "onnxruntime",
        device=device,
        threads=threads,
        rebuild=rebuild,
        cuda_graph=cuda_graph,
        ort_provider=ort_provider,
        precision=precision,
        streams=streams,
    )
    opened.given, opened.path = given, path
    try:
        opened.verified, opened.choice = (
            auto.verdict_on(opened, path) if chosen is None else (chosen.verified, chosen.why)
        )
    except BaseException:
        opened.close()
        raise
    return opened


def _open_named(
    path: Path,
    engine: str,
    *,
    device: str,
    threads: int | None,
    rebuild: bool,
    cuda_graph: bool,
    ort_provider: str | None,
    precision: str | None,
    streams: int | None,
) -> Backend:
    """Open ``path`` in ``engine``; a setting that is not this engine's is a ``UsageError``."""
    for setting, value, owner in (
        ("an execution provider", ort_provider, "onnxruntime"),
        ("--rebuild", rebuild or None, "tensorrt"),
        ("--cuda-graph", cuda_graph or None, "tensorrt"),
        ("--precision", precision, "openvino"),
        ("--streams", streams, "openvino"),
    ):
        if value is not None and engine != owner:
            raise UsageError(f"{setting} belongs to --backend {owner}, not to {engine}")
    if engine == "tensorrt":
        from cellseg_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(path, device=device, rebuild=rebuild, cuda_graph=cuda_graph)
    if engine == "openvino":
        from cellseg_deploy.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(path, device=device, threads=threads, precision=precision, streams=streams or 1)
    from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, device=device, threads=threads, provider=ort_provider)
