"""PyTorch at its fastest without leaving PyTorch: the baseline for the other forms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellseg_deploy.errors import BackendUnavailableError
from cellseg_export.gate.torch_backend import TorchBackend
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.model import Normalise, probabilities

_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class TorchForm(TorchBackend):
    """A trained network in ``inference_mode`` and channels_last, in the requested precision."""

    def __init__(
        self,
        network: LoadedNetwork,
        device: str = "cpu",
        *,
        dtype: str = "float32",
        autocast: str | None = None,
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        """``dtype``: of weights and activations. ``autocast``: let PyTorch choose operator by operator between it and
        fp32. ``compiled``: through ``torch.compile``, weights frozen into the program. ``graph``: captured once as a
        CUDA graph for the batch size of the first call, and replayed; other batch sizes run without it.

        Raises ``BackendUnavailableError`` for an unavailable device, or if the network cannot be compiled here.
        """
        super().__init__(network, device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._autocast: torch.dtype | None = None if autocast is None else getattr(torch, autocast)
        self.precision = _NAMES[autocast or dtype]
        self.compiled = compiled
        self._normalise = Normalise(network.config).to(self._torch_device)
        network.net.to(dtype=self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run: Any = network.net
        if compiled:
            # Frozen weights are constants, which the CPU kernels pack once and not at each call.
            self._run = torch.compile(network.net, dynamic=False, options={"freezing": True})
        if graph:
            if self._torch_device.type != "cuda":
                raise BackendUnavailableError(f"a CUDA graph was asked for on {device}; it needs an NVIDIA GPU")
            self._run = CapturedNetwork(network.net)
        self._graph = graph

    @torch.inference_mode()
    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        # (N, H, W, 3) viewed as (N, 3, H, W) is already channels_last: nothing is copied.
        tiles = torch.from_numpy(tiles_nhwc).to(self._torch_device).permute(0, 3, 1, 2)
        images = self._normalise(tiles.float()).to(self._dtype)
        with self._context():
            try:
                logits = self._run(images)
            except Exception as error:  # from the compiler: no C++ compiler, an unsupported operator
                if not self.compiled:
                    raise
                reason = " ".join(str(error).split())[:300]
                raise BackendUnavailableError(f"torch.compile does not work here: {reason}") from error
        return np.asarray(probabilities(logits.float(), self.network.config).contiguous().cpu().numpy(), np.float32)

    def _context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._torch_device.type, dtype=self._autocast)

    def describe(self) -> dict[str, Any]:
        """As ``TorchBackend``, with the options set for PyTorch."""
        asked = {
            "dtype": str(self._dtype),
            "autocast": str(self._autocast or ""),
            "compiled": self.compiled,
            "graph": self._graph,
        }
        return super().describe() | asked


class CapturedNetwork:
    """A network captured as a CUDA graph, as in PyTorch's manual: warm-up on another stream, capture, replay."""

    def __init__(self, net: torch.nn.Module) -> None:
        self._net = net
        self._graph: Any = None
        self._given: Any = None
        self._answer: Any = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the network's output for ``images``; the next call overwrites it."""
        if self._graph is None:
            self._capture(images)
        if images.shape != self._given.shape:
            result: torch.Tensor = self._net(images)
            return result
        self._given.copy_(images)
        self._graph.replay()
        answer: torch.Tensor = self._answer
        return answer

    def _capture(self, images: torch.Tensor) -> None:
        self._given = images.clone()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._net(self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._answer = self._net(self._given)
