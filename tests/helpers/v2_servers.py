"""Real servers of the v2 protocol, in environments of their own, that serve an entry of ``cellseg-export triton``.

CELLSEG_MLSERVER_PYTHON, CELLSEG_KSERVE_PYTHON: python of an environment with that server and onnxruntime, of the
version that the tests use: results must be the same bytes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HELPERS = Path(__file__).parent
VARIABLES = {"mlserver": "CELLSEG_MLSERVER_PYTHON", "kserve": "CELLSEG_KSERVE_PYTHON"}
START_SECONDS = 90
GRPC_BYTES = 2**27


def python_of(kind: str) -> Path:
    """Python of the environment with the server ``kind``; skips the test where there is none."""
    python = os.environ.get(VARIABLES[kind])
    if not python:
        pytest.skip(f"no {kind}: set {VARIABLES[kind]} to the python of an environment with {kind} and onnxruntime")
    code = "import onnxruntime; print(onnxruntime.__version__)"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    ours = pytest.importorskip("onnxruntime").__version__
    if version != ours:
        pytest.skip(f"onnxruntime {version} in the environment of {kind}, {ours} here: bytes may differ")
    return Path(python)


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Served:
    """A server that can be killed and started again, on the same ports. ``grpc``, ``http``: addresses of the model."""

    def __init__(self, kind: str, entry: Path, folder: Path) -> None:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        self.kind, self.folder, self.python = kind, folder, python_of(kind)
        config = text_format.Parse((entry / "config.pbtxt").read_text(), ModelConfig())
        told = {key: value.string_value for key, value in config.parameters.items()}
        (folder / "parameters.json").write_text(json.dumps(told))
        self.model = entry / "1" / "model.onnx"
        self.ports = free_ports(3)
        self.http, self.grpc = (
            f"{scheme}://127.0.0.1:{port}/cells" for scheme, port in zip(("http", "grpc"), self.ports, strict=False)
        )
        if kind == "mlserver":
            self._write_settings(config)
        self.process: subprocess.Popen[bytes] | None = None

    def _write_settings(self, config: Any) -> None:
        http, grpc, metrics = self.ports
        settings = {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "parallel_workers": 0,
            "grpc_max_message_length": GRPC_BYTES,
        }
        (self.folder / "settings.json").write_text(json.dumps(settings))
        (given,), (answer,) = config.input, config.output
        model = {
            "name": "cells",
            "implementation": "runtime_mlserver.Cells",
            "inputs": [{"name": "tiles", "datatype": "UINT8", "shape": [-1, *given.dims]}],
            "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, *answer.dims]}],
        }
        (self.folder / "model-settings.json").write_text(json.dumps(model))

    def start(self) -> None:
        """Start it, and wait until it serves the model."""
        if self.kind == "mlserver":
            code = "from mlserver.cli.main import main; main()"
            command = [self.python, "-c", code, "start", self.folder]
        else:
            http, grpc, _ = self.ports
            limits = [f"--grpc_max_{way}_message_length={GRPC_BYTES}" for way in ("send", "receive")]
            program = HELPERS / "runtime_kserve.py"
            command = [self.python, program, f"--http_port={http}", f"--grpc_port={grpc}", *limits]
        parameters = {"MODEL": str(self.model), "PARAMETERS": str(self.folder / "parameters.json")}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLSERVER"))}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=kept | parameters | {"PYTHONPATH": str(HELPERS)},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        import tritonclient.grpc

        end = time.monotonic() + START_SECONDS
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self.ports[1]}") as client:
            while time.monotonic() < end:
                assert self.process is not None
                if self.process.poll() is not None:
                    break
                try:
                    if client.is_model_ready("cells", client_timeout=5):
                        return
                except Exception:  # not yet listening
                    time.sleep(0.1)
        raise AssertionError(f"{self.kind} did not start:\n{(self.folder / 'log').read_text()[-3000:]}")

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def served(kind: str, entry: Path, folder: Path) -> Iterator[Served]:
    """The server ``kind`` with the model of ``entry``, until the block ends. ``folder``: an empty one for its files."""
    server = Served(kind, entry, folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
