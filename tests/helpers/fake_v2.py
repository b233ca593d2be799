"""A v2 server in this process, over gRPC or HTTP, with Triton's model configuration extension: for what goes wrong.

``FakeServer`` holds what it serves; tests change it while it runs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from conftest import make_spec

from cellseg_deploy.models.spec import ModelSpec, to_json

IDENTITY, FILE = "i" * 64, "f" * 64


@dataclass
class FakeServer:
    """``told``: parameters of the model's configuration, None without that extension. ``told_in_answers``: parameters
    of each answer. ``problem``: status and words of every answer to tiles. ``hangs``: set to let a hanging answer go.
    """

    spec: ModelSpec = field(default_factory=make_spec)
    told: dict[str, str] | None = field(default_factory=dict)
    told_in_answers: dict[str, str] = field(default_factory=dict)
    max_batch: int = 0
    problem: tuple[str, str] | None = None
    may_answer: threading.Event = field(default_factory=threading.Event)
    tokens: set[str] | None = None
    extensions: tuple[str, ...] = ("model_configuration", "binary_tensor_data")
    tile_shape: tuple[int, ...] | None = None
    output: str = "probabilities"
    batches: list[int] = field(default_factory=list)
    asked_config: int = 0

    def __post_init__(self) -> None:
        self.may_answer.set()
        if self.told == {}:
            self.told = parameters_of(self.spec)

    @property
    def inputs(self) -> tuple[str, str, tuple[int, ...]]:
        size = self.spec.tile_size
        return "tiles", "UINT8", self.tile_shape or (-1, size, size, 3)

    @property
    def outputs(self) -> tuple[str, str, tuple[int, ...]]:
        size = self.spec.tile_size
        return self.output, "FP32", (-1, len(self.spec.channels), size, size)

    def answer(self, tiles_nhwc: np.ndarray) -> np.ndarray:
        """As ``conftest.DarknessBackend``."""
        self.batches.append(len(tiles_nhwc))
        mean = tiles_nhwc.astype(np.float32).mean(axis=3)
        out = np.zeros((len(tiles_nhwc), len(self.spec.channels), *mean.shape[1:]), np.float32)
        out[:, 0] = 1 / (1 + np.exp((mean - 128) / 8))
        return out


def parameters_of(spec: ModelSpec, identity: str = IDENTITY, sha256: str = FILE) -> dict[str, str]:
    """The parameters that ``cellseg-export triton`` writes."""
    return {
        "cellseg": to_json(spec),
        "cellseg_model_identity": identity,
        "cellseg_file_sha256": sha256,
        "cellseg_precision": "fp32",
    }


@contextmanager
def grpc_server(fake: FakeServer, tls: tuple[bytes, bytes] | None = None) -> Iterator[str]:
    """Serve ``fake`` over gRPC; gives the model's address. ``tls``: key and certificate."""
    import grpc
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc,name-defined]
        def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            check(context)
            return pb.ServerMetadataResponse(name="fake", version="1", extensions=fake.extensions)

        def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            if request.name != "cells":
                context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.name}")
            answer = pb.ModelMetadataResponse(name="cells", versions=["1"])
            for tensor, target in ((fake.inputs, answer.inputs), (fake.outputs, answer.outputs)):
                target.add(name=tensor[0], datatype=tensor[1], shape=tensor[2])
            return answer

        def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
            if fake.told is None:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
            fake.asked_config += 1
            answer = pb.ModelConfigResponse()
            answer.config.max_batch_size = fake.max_batch
            for key, value in (fake.told or {}).items():
                answer.config.parameters[key].string_value = value
            return answer

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            fake.may_answer.wait(60)
            if fake.problem is not None:
                context.abort(getattr(grpc.StatusCode, fake.problem[0]), fake.problem[1])
            shape = tuple(request.inputs[0].shape)
            found = fake.answer(np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape))
            answer = pb.ModelInferResponse(model_name="cells", model_version="1")
            answer.outputs.add(name=fake.output, datatype="FP32", shape=found.shape)
            answer.raw_output_contents.append(found.tobytes())
            for key, value in fake.told_in_answers.items():
                answer.parameters[key].string_param = value
            return answer

    def check(context: Any) -> None:
        sent = dict(context.invocation_metadata()).get("authorization", "")
        if fake.tokens is not None and sent.removeprefix("Bearer ") not in fake.tokens:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")

    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([tls]))
    server.start()
    try:
        yield f"grpc{'s' if tls else ''}://localhost:{port}/cells" if tls else f"grpc://127.0.0.1:{port}/cells"
    finally:
        fake.may_answer.set()
        server.stop(0).wait()


@contextmanager
def http_server(fake: FakeServer) -> Iterator[str]:
    """Serve ``fake`` over HTTP with binary tensors; gives the model's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, head: Any, tail: bytes = b"") -> None:
            text = json.dumps(head).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) + len(tail)))
            if tail:
                self.send_header("Inference-Header-Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text + tail)

        def do_GET(self) -> None:
            if fake.tokens is not None and self.headers.get("authorization", "")[7:] not in fake.tokens:
                self.send(401, {"error": "no valid token"})
            elif self.path == "/v2":
                self.send(200, {"name": "fake", "version": "1", "extensions": fake.extensions})
            elif not self.path.startswith("/v2/models/cells"):
                self.send(404, {"error": "unknown model: not found"})
            elif self.path.endswith("/config"):
                if fake.told is None:
                    self.send(404, {"error": "no such path"})
                else:
                    told = {key: {"string_value": value} for key, value in fake.told.items()}
                    self.send(200, {"max_batch_size": fake.max_batch, "parameters": told})
            else:
                tensors = [dict(zip(("name", "datatype", "shape"), one, strict=True)) for one in self.tensors()]
                self.send(200, {"name": "cells", "inputs": tensors[:1], "outputs": tensors[1:]})

        def tensors(self) -> tuple[Any, Any]:
            return fake.inputs, fake.outputs

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fake.may_answer.wait(60)
            if fake.problem is not None:
                self.send(int(fake.problem[0]), {"error": fake.problem[1]})
                return
            size = int(self.headers["Inference-Header-Content-Length"])
            given = json.loads(body[:size])["inputs"][0]
            found = fake.answer(np.frombuffer(body[size:], np.uint8).reshape(given["shape"]))
            output = {
                "name": fake.output,
                "datatype": "FP32",
                "shape": found.shape,
                "parameters": {"binary_data_size": found.nbytes},
            }
            head = {"model_name": "cells", "outputs": [output], "parameters": fake.told_in_answers}
            self.send(200, head, found.tobytes())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/cells"
        finally:
            fake.may_answer.set()
            server.shutdown()
            thread.join()
