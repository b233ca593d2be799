"""Client of a server that speaks KServe's v2 protocol (NVIDIA Triton, MLServer, KServe), over gRPC or HTTP.

The only module that imports tritonclient. A client belongs to one thread (gevent's sockets, under HTTP, work in no
other), so every call runs in a thread of the client's own, one after the other.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.address import TOKEN_VARIABLE, Address
from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME

T = TypeVar("T")
CA_VARIABLE = "SSL_CERT_FILE"
TIMEOUT_SECONDS = 120.0
"""Time for one answer. A server that hangs would otherwise hold the run for ever."""

_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[::1\]")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """What a server says of a model. ``server``: the server's name and version. ``inputs``, ``outputs``: name, type
    and shape of each tensor, the batch first. ``parameters``: of its configuration, None if the server tells none.
    ``max_batch``: most tiles per call, None if unknown."""

    server: str
    inputs: list[tuple[str, str, tuple[int, ...]]]
    outputs: list[tuple[str, str, tuple[int, ...]]]
    parameters: Mapping[str, str] | None
    max_batch: int | None


class V2Client:
    """An open connection to the model at ``address``.

    Every failure of server or connection raises ``BackendUnavailableError``; nothing is retried here.
    """

    def __init__(self, address: Address) -> None:
        """Load tritonclient and connect. Raises ``BackendUnavailableError``."""
        self.address = address
        headers = _headers(address)
        self._each: dict[str, Any] = {"headers": headers}
        if address.is_grpc:
            self._each["client_timeout"] = TIMEOUT_SECONDS
        self._api = _import_client(address)
        self._has_binary = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cellseg-v2-client")
        try:
            self._client = self._do(self._open)
        except BaseException:
            self._thread.shutdown()
            raise

    def describe(self) -> ServedModel:
        """Ask server and model for what they are. Raises ``BackendUnavailableError``."""
        name = self.address.name
        server = self._do(lambda: self._as_dict(self._client.get_server_metadata, **self._as_json))
        self._has_binary = self.address.is_grpc or "binary_tensor_data" in server.get("extensions", ())
        model = self._do(lambda: self._as_dict(self._client.get_model_metadata, name, **self._as_json))
        parameters, max_batch = self.configuration()
        inputs, outputs = ([_tensor(item) for item in model.get(kind) or ()] for kind in ("inputs", "outputs"))
        name_and_version = f"{server.get('name', '')} {server.get('version', '')}".strip()
        return ServedModel(name_and_version, inputs, outputs, parameters, max_batch)

    def configuration(self) -> tuple[dict[str, str] | None, int | None]:
        """Return parameters and largest batch of the model's configuration (an extension of Triton's), None for each
        where the server has no such extension. Raises ``BackendUnavailableError``."""
        try:
            answer = self._do(
                lambda: self._as_dict(self._client.get_model_config, self.address.name, **self._as_json),
                absent=("UNIMPLEMENTED", "404", "405", "501"),
            )
        except _AbsentError:
            return None, None
        config = answer.get("config", answer)
        parameters = {key: str(value.get("string_value", "")) for key, value in config.get("parameters", {}).items()}
        return parameters, int(config.get("max_batch_size", 0)) or None

    def infer(self, tiles_nhwc: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], dict[str, str]]:
        """Return probabilities (N, K, S, S) of ``tiles_nhwc`` (N, S, S, 3), and the text parameters of the answer.
        Raises ``BackendUnavailableError``."""
        return self._do(lambda: self._infer(tiles_nhwc))

    def close(self) -> None:
        """Close the connection, once a running call has ended."""
        self._thread.submit(self._shut)
        self._thread.shutdown()

    # ---------------------------------------------------------------------------------------------- in the own thread

    def _open(self) -> Any:
        address = self.address
        to = f"{address.host}:{address.port}"
        if address.is_grpc:
            authorities = os.environ.get(CA_VARIABLE) or None
            return self._api.InferenceServerClient(to, ssl=address.is_encrypted, root_certificates=authorities)
        extra: dict[str, Any] = {}
        if address.is_encrypted:
            from ssl import create_default_context

            extra = {"ssl": True, "ssl_context_factory": create_default_context}  # it reads SSL_CERT_FILE itself
        return self._api.InferenceServerClient(
            to, connection_timeout=TIMEOUT_SECONDS, network_timeout=TIMEOUT_SECONDS, **extra
        )

    def _shut(self) -> None:
        self._client.close()
        self._client = None  # its finaliser needs this thread too

    def _infer(self, tiles_nhwc: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], dict[str, str]]:
        given = self._api.InferInput(INPUT_NAME, list(tiles_nhwc.shape), "UINT8")
        given.set_data_from_numpy(tiles_nhwc)
        wanted = self._api.InferRequestedOutput(OUTPUT_NAME)
        result = self._client.infer(self.address.name, [given], outputs=[wanted], **self._each)
        probabilities = result.as_numpy(OUTPUT_NAME)
        if probabilities is None or probabilities.dtype != np.float32:
            got = "no such output" if probabilities is None else str(probabilities.dtype)
            raise BackendUnavailableError(
                f"{self.address}: the answer has {got} instead of {OUTPUT_NAME} as float32; serve the model that "
                "`cellseg-export triton` wrote"
            )
        answer = result.get_response()
        if self.address.is_grpc:
            return probabilities, {key: value.string_param for key, value in answer.parameters.items()}
        said = answer.get("parameters", {})
        return probabilities, {key: value for key, value in said.items() if isinstance(value, str)}

    @property
    def _as_json(self) -> dict[str, bool]:
        return {"as_json": True} if self.address.is_grpc else {}

    def _as_dict(self, call: Callable[..., Any], *arguments: str, **options: Any) -> dict[str, Any]:
        answer = call(*arguments, **options, **self._each)
        if not isinstance(answer, dict):
            raise ValueError(f"the server answered {answer!r}")
        return answer

    def _do(self, call: Callable[[], T], absent: tuple[str, ...] = ()) -> T:
        """Run ``call`` in the client's thread. Raises ``_AbsentError`` for a status of ``absent``."""
        try:
            return self._thread.submit(call).result()
        except BackendUnavailableError:
            raise
        except Exception as error:  # tritonclient's, gevent's, the sockets': they have no common root
            status = _status(error)
            if status in absent:
                raise _AbsentError from error
            raise BackendUnavailableError(f"{self.address}: {self._said(status, error)}") from error

    def _said(self, status: str, error: Exception) -> str:
        words = next((line.strip() for line in _message(error).splitlines() if line.strip()), type(error).__name__)
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED", "401", "403"):
            return f"the server refused access ({status}: {words}); set {TOKEN_VARIABLE} to a token that it accepts"
        if status == "DEADLINE_EXCEEDED" or isinstance(error, TimeoutError):
            return (
                f"no answer within {TIMEOUT_SECONDS:g} s; check the server and its load, use a smaller `batch_size`, "
                "and start again: what is finished is kept"
            )
        if status == "NOT_FOUND" or (status in ("400", "404") and "not found" in words.lower()):
            return f"the server has no such model ({words}); check the name, and the server's model repository"
        if status == "UNAVAILABLE" or (not status and isinstance(error, OSError)):
            return (
                f"no connection to the server ({words}); check that it runs, and start again: what is finished is kept"
            )
        hint = (
            "" if self._has_binary else "; binary tensors are not among its HTTP extensions: try its gRPC port, grpc://"
        )
        return f"the server failed ({status or type(error).__name__}: {words}); see its log{hint}"


class _AbsentError(Exception):
    """The server does not have the extension."""


def _tensor(item: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    return str(item["name"]), str(item["datatype"]), tuple(int(size) for size in item.get("shape", ()))


def _status(error: Exception) -> str:
    """Status of tritonclient's error, ``NOT_FOUND`` or ``404``; "" for any other error."""
    status = getattr(error, "status", None)
    return str(status() if callable(status) else status or "").removeprefix("StatusCode.")


def _message(error: Exception) -> str:
    message = getattr(error, "message", None)
    return str(message() if callable(message) else error)


def _headers(address: Address) -> dict[str, str] | None:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        return None
    if not (token.isascii() and token.isprintable()):
        raise UsageError(f"{TOKEN_VARIABLE} has characters that no header can carry; expected printable ASCII")
    if not address.is_encrypted and not _LOOPBACK.fullmatch(address.host):
        _log.warning("the token of %s travels unencrypted to %s; use %ss://", TOKEN_VARIABLE, address, address.scheme)
    return {"authorization": f"Bearer {token}"}


def _import_client(address: Address) -> Any:
    try:
        if address.is_grpc:
            import tritonclient.grpc as api
        else:
            import tritonclient.http as api
    except ImportError as error:
        raise BackendUnavailableError(
            f"tritonclient is not installed or broken ({error}); run: pip install 'cellseg-deploy[triton]'"
        ) from error
    return api
