"""OpenVINO on the CPU: an unchanged ONNX model file, or an .xml and .bin written by ``cellseg-export openvino``.

Tiles go through one compiled network of a fixed batch size, because a dynamic one takes half as long again (a ViT-S
took 37 ms per tile in bf16, with a fixed batch 25). The last batch is padded with black tiles whose results are
discarded: tiles of a batch are independent. So a result depends neither on the number of tiles in a call nor on the
number of streams, each of which runs a batch of its own.
"""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends import openvino_ir, telemetry
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.openvino_cache import CompiledCache
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, UsageError, plural
from cellseg_deploy.models.onnx_file import ModelFile, read_model_file

PRECISIONS = ("fp32", "bf16")
"""Arithmetic that can be requested; an int8 form computes its remaining operations in it."""

STATIC_BATCH = 4
"""Tiles per call of the compiled network: at most three per image are padding."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoBackend(Backend):
    """A model in OpenVINO, compiled for this CPU in exactly the requested precision."""

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: str | None = None,
        streams: int = 1,
        static_batch: int = STATIC_BATCH,
        cache: Path | None = None,
        use_cache: bool = True,
    ) -> None:
        """Check ``path`` and compile it; raises as ``open_backend`` does.

        ``precision``: ``fp32`` (also for None) or ``bf16``, which needs a CPU with bf16 instructions. ``streams``:
        batches computed at the same time, which share the ``threads``. ``cache``: folder of compiled networks, in the
        user's cache folder by default; with ``use_cache`` off, an .xml of int8 operations is compiled again each time.
        """
        _check_settings(device, precision, streams, static_batch)
        ov = import_openvino()
        core = shared_core()
        self.inference_precision = precision or "fp32"
        _check_native(core, ov.__version__, self.inference_precision)
        self._source, model = _read(ov, core, path)
        self.spec = self._source.spec
        quantised = isinstance(self._source, openvino_ir.IrFile) and self._source.facts.precision == "int8"
        self.precision = "int8" if quantised else self.inference_precision
        self._threads, self._streams, self._batch = threads, streams, static_batch
        self.batch_step = static_batch * streams  # a stream without a batch would leave its cores idle
        self._version = str(ov.__version__)
        self._compiled = self._compile(core, model, cache, use_cache)
        self._requests = [self._compiled.create_infer_request() for _ in range(streams)]

    def _compile(self, core: Any, model: Any, folder: Path | None, use_cache: bool) -> Any:
        size = self.spec.tile_size
        shape = [self._batch, size, size, 3]
        model.reshape(shape)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[self.inference_precision],
            "NUM_STREAMS": self._streams,
            "INFERENCE_NUM_THREADS": self._threads or 0,
            # Would round activations to 8 bits if weights are stored in 8 bits: a form that was never compared.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # With pinned threads, two runs on one machine would share the first cores and leave the others idle.
            "ENABLE_CPU_PINNING": False,
        }
        kept: CompiledCache | None = None
        if use_cache:
            machine = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
            kept = CompiledCache.of(folder, self._version, *machine, self._source.file_sha256, shape, settings)
        compiled = None
        if kept is not None:
            compiled = kept.open(lambda data: core.import_model(io.BytesIO(data), "CPU", settings))
        if compiled is None:
            try:
                compiled = core.compile_model(model, "CPU", settings)
            except Exception as error:  # OpenVINO raises plain RuntimeError
                raise ModelError(
                    f"{self._source.path}: OpenVINO {self._version} refuses the model: {_reason(error)}; "
                    "update OpenVINO or export the model again"
                ) from error
            if kept is not None:
                kept.keep(compiled.export_model().getvalue())
        in_use = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if in_use != _HINTS[self.inference_precision]:
            raise BackendUnavailableError(
                f"precision {self.inference_precision} was requested, but OpenVINO {self._version} computes in "
                f"{in_use} on this CPU; use `precision='fp32'`, or another `backend`"
            )
        return compiled

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        n, size = len(tiles_nhwc), self.spec.tile_size
        answers = np.empty((n, len(self.spec.channels), size, size), np.float32)
        starts = range(0, n, self._batch)
        try:
            for first in range(0, len(starts), self._streams):
                running = list(zip(starts[first : first + self._streams], self._requests, strict=False))
                for start, request in running:
                    request.start_async({0: _filled(tiles_nhwc[start : start + self._batch], self._batch)})
                for start, request in running:
                    request.wait()
                    answer = request.get_output_tensor(0).data
                    answers[start : start + self._batch] = answer[: n - start]
        except Exception as error:
            if re.search(r"bad.?alloc|allocate|out of memory", str(error), re.IGNORECASE):
                raise MemoryError(f"OpenVINO ran out of memory on {plural(n, 'tile')}") from error
            raise DataError(f"OpenVINO could not run {plural(n, 'tile')}: {_reason(error)}") from error
        return answers

    def _close(self) -> None:
        """Release the compiled network and its memory."""
        self._requests = []
        self._compiled = None

    def describe(self) -> dict[str, Any]:
        """Return model hashes, engine version and settings."""
        source = self._source
        facts = (
            {"model_identity": source.identity, "model_opset": source.opset}
            if isinstance(source, ModelFile)
            else {
                "model_identity": source.facts.model_identity,
                "weights": source.facts.weights,
                "floating_point": list(source.facts.floating),
            }
        )
        return {
            "model_path": str(source.path),
            "model_file_sha256": source.file_sha256,
            **facts,
            "openvino": self._version,
            "inference_precision": self.inference_precision,
            "static_batch": self._batch,
            "threads": self._threads,
            "streams": self._streams,
        }


def read_ir(path: Path) -> openvino_ir.IrFile:
    """Read and check the .xml ``path`` with its .bin, without compiling it. Raises as ``OpenVinoBackend``."""
    ov = import_openvino()
    xml, weights = openvino_ir.read_pair(path)
    return openvino_ir.check_ir(path, _parse(ov, shared_core(), path, xml, weights), xml, weights)


def _check_settings(device: str, precision: str | None, streams: int, static_batch: int) -> None:
    if device != "cpu":
        raise BackendUnavailableError(
            f"device {device!r} was requested, but backend openvino runs on the CPU only here; use `device='cpu'`, "
            "or another `backend` for a GPU"
        )
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r} for OpenVINO; expected one of {', '.join(PRECISIONS)}")
    for name, value in (("streams", streams), ("static batch", static_batch)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")


def import_openvino() -> Any:
    """Import openvino; raises ``BackendUnavailableError`` naming the command that installs it."""
    try:
        openvino = telemetry.import_openvino()
    except ImportError as error:
        raise BackendUnavailableError(
            f"OpenVINO is not installed or broken ({error}); run: pip install 'cellseg-deploy[openvino]'"
        ) from error
    return openvino


@functools.cache
def shared_core() -> Any:
    """Return the one ``openvino.Core`` of this process, kept until exit. Raises as ``import_openvino``.

    Each Core's CPU plugin replaces the signal-handler stack of the thread that creates it, and restores the previous
    one when it is destroyed. If two Cores overlap, that previous stack may already be freed: the next signal (such as
    Ctrl-C) then ends the process with a segmentation fault (seen with OpenVINO 2026.4.1 on Linux).
    """
    return import_openvino().Core()


def _check_native(core: Any, version: str, precision: str) -> None:
    """Refuse bf16 on a CPU without native instructions, where it is emulated: slower than fp32, without any benefit."""
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in able:
        raise BackendUnavailableError(
            f"precision bf16 was requested, but {core.get_property('CPU', 'FULL_DEVICE_NAME').strip()} has no bf16 "
            f"instructions (OpenVINO {version} lists {', '.join(able)}); use `precision='fp32'`"
        )


def _read(ov: Any, core: Any, path: Path) -> tuple[ModelFile | openvino_ir.IrFile, Any]:
    """Return the checked file and the network read from exactly the same bytes."""
    if path.suffix.lower() != openvino_ir.SUFFIX:
        source = read_model_file(path)
        return source, _parse(ov, core, path, source.data)
    xml, weights = openvino_ir.read_pair(path)
    model = _parse(ov, core, path, xml, weights)
    return openvino_ir.check_ir(path, model, xml, weights), model


def _parse(ov: Any, core: Any, path: Path, *contents: bytes) -> Any:
    try:
        return core.read_model(*contents)
    except Exception as error:
        files = "it and its .bin" if len(contents) > 1 else "it"
        raise ModelError(
            f"{path}: OpenVINO {ov.__version__} cannot read the model: {_reason(error)}; copy {files} again, update "
            "OpenVINO, or export it again"
        ) from error


def _filled(tiles_nhwc: npt.NDArray[np.uint8], batch: int) -> npt.NDArray[np.uint8]:
    """Return ``tiles_nhwc`` (n <= batch, H, W, 3) padded with black tiles: (batch, H, W, 3)."""
    if len(tiles_nhwc) == batch:
        return tiles_nhwc
    filled = np.zeros((batch, *tiles_nhwc.shape[1:]), np.uint8)
    filled[: len(tiles_nhwc)] = tiles_nhwc
    return filled


def _reason(error: BaseException) -> str:
    """Return the message of an OpenVINO exception, which follows lines that name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [type(error).__name__])[0]
