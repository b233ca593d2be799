"""PyTorch as a Backend: the reference that every other form is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellseg_deploy.backends.base import Backend
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.fp32 import full_fp32, uses_tf32
from cellseg_train.model import probabilities
from cellseg_train.optim import choose_device


class TorchBackend(Backend):
    """A trained network as run in training, in fp32: on a GPU without TF32.

    It does not use ``DeployModule``, so a fault in that module shows up as a difference.
    """

    name = "pytorch"
    precision = "fp32"

    def __init__(self, network: LoadedNetwork, device: str = "cpu") -> None:
        """``device`` as PyTorch names it (``cpu``, ``cuda``, ``cuda:1``); raises ``BackendUnavailableError``."""
        self._torch_device = choose_device(device)
        full_fp32()
        network.net.eval().to(self._torch_device)
        self.network = network
        self.spec = network.spec
        self.device = str(self._torch_device)

    @torch.inference_mode()
    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        tiles = torch.tensor(tiles_nhwc, device=self._torch_device)
        net = self.network.net
        logits = net(net.normalise(tiles.permute(0, 3, 1, 2).float()))
        return np.asarray(probabilities(logits.float(), self.network.config).cpu().numpy(), np.float32)

    def describe(self) -> dict[str, Any]:
        """Version of PyTorch, number of CPU threads, and whether TF32 may round fp32 on a GPU."""
        return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "tf32": uses_tf32()}
