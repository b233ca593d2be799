"""A model on an inference server (KServe's v2 protocol): tiles go over the network, everything else stays here.

The server tells what it serves, so that results never rest on a file that may be another one's: the ModelSpec, the
model's identity, the file's SHA-256 and the precision, as ``cellseg-export triton`` writes them. It tells them in the
parameters of the model's configuration (Triton), or, if it has no such extension, in those of each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.address import parse_address
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.options import PRECISIONS
from cellseg_deploy.backends.v2_client import V2Client
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models.spec import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, from_json

DEVICE = "remote"
"""Device of every served model: the server chooses the real one."""
IDENTITY_KEY = "cellseg_model_identity"
FILE_KEY = "cellseg_file_sha256"
PRECISION_KEY = "cellseg_precision"


class TritonBackend(Backend):
    """A model on a server.

    After each call the identity is read again: a server restarted with another model under the same name, between two
    calls, must not go unnoticed. An answer that tells the identity saves that question.
    """

    name = "triton"
    device = DEVICE
    is_remote = True

    def __init__(self, path: str | Path, *, device: str = DEVICE) -> None:
        """Connect to the model at ``path``, such as ``grpc://localhost:8001/cells``, and check it.

        Raises ``UsageError`` for an invalid address or a ``device`` of this machine, ``BackendUnavailableError`` if
        server or model cannot be reached, ``ModelError`` if it is not a model of ours.
        """
        if device != DEVICE:
            raise UsageError(f"`device={device!r}` does not apply to a served model: its server chooses the device")
        self._client = V2Client(parse_address(path))
        try:
            self._check_model()
        except BaseException:
            self._client.close()
            raise

    def _check_model(self) -> None:
        address = self._client.address
        served = self._client.describe()
        size = _tile_size(served.inputs)
        if size is None:
            raise ModelError(
                f"{address}: the model's inputs are {_listed(served.inputs)}; expected {INPUT_NAME}: UINT8 (N, S, S, "
                "3); serve the entry that `cellseg-export triton` wrote"
            )
        told = served.parameters
        if told is None:  # no such extension: every answer tells it, also that for a black tile
            _, told = self._client.infer(np.zeros((1, size, size, 3), np.uint8))
        missing = [key for key in (METADATA_KEY, IDENTITY_KEY, FILE_KEY, PRECISION_KEY) if not told.get(key)]
        if missing:
            raise ModelError(
                f"{address}: {served.server} does not tell {', '.join(missing)} of the model; export it again with "
                "`cellseg-export triton`, or return the parameters of its config.pbtxt with each answer"
            )
        self.spec = from_json(told[METADATA_KEY], source=str(address))
        self.precision = told[PRECISION_KEY]
        if self.precision not in PRECISIONS:
            raise ModelError(f"{address}: {PRECISION_KEY} is {self.precision!r}; expected {', '.join(PRECISIONS)}")
        sizes = (self.spec.tile_size, self.spec.tile_size)
        expected_in = [(INPUT_NAME, "UINT8", (-1, *sizes, 3))]
        expected_out = [(OUTPUT_NAME, "FP32", (-1, len(self.spec.channels), *sizes))]
        for what, got, expected in (
            ("input", served.inputs, expected_in),
            ("output", served.outputs, expected_out),
        ):
            if got != expected:
                raise ModelError(
                    f"{address}: {what} of the served model is {_listed(got)}, its description says "
                    f"{_listed(expected)}; export it again with `cellseg-export triton`"
                )
        self._server, self._max_batch = served.server, served.max_batch
        self._identity, self._file_sha256 = told[IDENTITY_KEY], told[FILE_KEY]
        self.choice = f"served by {self._server} at {address}; parity where it was exported: {self.spec.parity}"

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        step = self._max_batch or len(tiles_nhwc)
        parts = []
        for start in range(0, len(tiles_nhwc), step):
            probabilities, told = self._client.infer(tiles_nhwc[start : start + step])
            self._check_identity(told if told.get(IDENTITY_KEY) else self._client.configuration()[0] or {})
            parts.append(probabilities)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_identity(self, told: Mapping[str, str]) -> None:
        for key, opened in ((IDENTITY_KEY, self._identity), (FILE_KEY, self._file_sha256)):
            if told.get(key) != opened:
                raise ModelError(
                    f"{self._client.address}: the server now serves another model ({key} {told.get(key) or 'unknown'}, "
                    f"{opened} when it was opened); serve the former one and start again, or start a new run"
                )

    def _close(self) -> None:
        """Close the connection."""
        self._client.close()

    def describe(self) -> dict[str, Any]:
        """Return hashes of the model, its address, and the server with its version."""
        return {
            "model_url": str(self._client.address),
            "model_identity": self._identity,
            "model_file_sha256": self._file_sha256,
            "server": self._server,
        }


def _tile_size(inputs: list[tuple[str, str, tuple[int, ...]]]) -> int | None:
    if len(inputs) != 1:
        return None
    name, kind, shape = inputs[0]
    fits = (name, kind) == (INPUT_NAME, "UINT8") and len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    return shape[1] if fits and shape[1] > 0 else None


def _listed(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}: {kind} {shape}" for name, kind, shape in tensors) or "none"
