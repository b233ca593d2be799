"""The engine that runs a model, and its settings: those of ``open_backend``, and the defaults of every command."""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_deploy.errors import UsageError, check_types

BACKENDS = ("auto", "onnxruntime", "openvino", "tensorrt", "triton")
PRECISIONS = ("fp32", "mixed", "fp16", "bf16", "int8")
"""Arithmetic that a form computes in; ``mixed`` is fp16 with some blocks in fp32."""


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an inference engine.

    ``backend``: one of ``BACKENDS``; ``auto`` takes the fastest form that passed the parity gate for this model on this
    kind of device; ``triton`` runs a model on a server. ``device``: ``cpu``, ``cuda`` or ``cuda:N``; None: the GPU with
    TensorRT, the server's choice with Triton, otherwise the CPU.
    ``precision``: with ``auto`` only forms that compute in it, None for the model's own or fp32; with OpenVINO ``fp32``
    or ``bf16``. ``threads``: CPU threads of the engine, None for one per core. ``streams``: concurrent batches in
    OpenVINO, None for 1. ``cuda_graph``: let TensorRT record a full batch as a CUDA graph and replay it.
    ``rebuild``: build a cached TensorRT engine again.

    Raises ``UsageError`` for a wrong type, an unknown backend or precision, and for threads or streams below 1.

    >>> EngineOptions(backend="openvino", threads=4).precision is None
    True
    """

    backend: str = "auto"
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    streams: int | None = None
    cuda_graph: bool = False
    rebuild: bool = False

    def __post_init__(self) -> None:
        check_types("a name or None", device=self.device)
        check_types("a whole number or None", threads=self.threads, streams=self.streams)
        check_types("True or False", cuda_graph=self.cuda_graph, rebuild=self.rebuild)
        if self.backend not in BACKENDS:
            raise UsageError(f"unknown backend {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        check_precision(self.precision)
        for name, value in (("threads", self.threads), ("streams", self.streams)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")


def check_precision(precision: str | None) -> None:
    """Raise ``UsageError`` unless ``precision`` is one of ``PRECISIONS``, or None."""
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
