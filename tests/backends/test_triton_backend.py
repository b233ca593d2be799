"""A model on a server: the same results as here, and a clear end where the server fails or serves another model."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, make_spec

pytest.importorskip("tritonclient", reason="no client: pip install 'cellseg-deploy[triton]'")

from fake_v2 import FILE, IDENTITY, FakeServer, grpc_server, http_server, parameters_of
from made_jobs import our_threads

from cellseg_deploy.backends import EngineOptions, default_device, open_backend, v2_client
from cellseg_deploy.backends.address import TOKEN_VARIABLE, is_address, parse_address
from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
from cellseg_deploy.models.spec import to_json

Serve = Callable[[FakeServer], AbstractContextManager[str]]
TWO = {"grpc": grpc_server, "http": http_server}


@pytest.fixture(params=TWO, name="serve")
def serve_both_ways(request: pytest.FixtureRequest) -> Serve:
    return TWO[request.param]


def tiles(n: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 56, 56, 3), np.uint8)


# --- addresses


def test_an_address_survives_being_a_path() -> None:
    for text in ("grpc://h:8001/cells", "https://10.0.0.1:443/a.b-c_1", "grpcs://[::1]:8001/cells"):
        assert str(parse_address(Path(text))) == str(parse_address(text)) == text
    assert is_address(Path("http://h:1/x"))
    assert not is_address(None)
    assert not is_address(Path("models/my.onnx"))
    assert default_device(Path("grpc://h:1/x"), "auto") == default_device(None, "triton") == "remote"


@pytest.mark.parametrize(
    "address",
    ["grpc://host/cells", "grpc://host:0/cells", "http://h:80", "grpc://h:99999/x", "http://h:1/a/b", "h:1/x"],
)
def test_what_is_not_an_address(address: str) -> None:
    with pytest.raises(UsageError, match=r"not the address .* expected SCHEME://HOST:PORT/NAME"):
        open_backend(address, EngineOptions(backend="triton"))


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(UsageError, match="a token goes into") as raised:
        parse_address("https://me:secret@host:1/cells")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "onnxruntime"}, "opens with `backend='triton'` only"),
        ({"device": "cuda"}, "its server chooses the device"),
        ({"precision": "bf16"}, "belongs to `backend='openvino'`"),
        ({"rebuild": True}, "belongs to `backend='tensorrt'`"),
    ],
)
def test_settings_of_other_engines(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_backend("grpc://127.0.0.1:1/cells", EngineOptions(**settings))


# --- answers


def test_the_server_says_what_it_serves_and_answers_as_the_network_does(serve: Serve) -> None:
    spec = make_spec(variant="boundary", halo=4)
    fake = FakeServer(spec)
    with serve(fake) as address, open_backend(address) as backend:
        assert (backend.name, backend.device, backend.precision) == ("triton", "remote", "fp32")
        assert backend.spec == spec
        assert not backend.verified  # the gate ran on another machine
        assert np.array_equal(backend.predict(tiles()), DarknessBackend(spec).predict(tiles()))
        assert backend.describe() == {
            "model_url": address,
            "model_identity": IDENTITY,
            "model_file_sha256": FILE,
            "server": "fake 1",
        }
    assert not our_threads()


def test_a_server_without_that_extension_tells_it_in_its_answers(serve: Serve) -> None:
    fake = FakeServer(told=None)
    fake.told_in_answers = parameters_of(fake.spec)
    with serve(fake) as address, open_backend(address) as backend:
        assert fake.batches == [1]  # a black tile
        assert np.array_equal(backend.predict(tiles()), DarknessBackend().predict(tiles()))


def test_a_call_is_no_larger_than_the_server_takes(serve: Serve) -> None:
    fake = FakeServer(max_batch=2)
    with serve(fake) as address, open_backend(address) as backend:
        assert np.array_equal(backend.predict(tiles(5)), DarknessBackend().predict(tiles(5)))
    assert fake.batches == [2, 2, 1]


# --- another model


@pytest.mark.parametrize("key", ["cellseg", "cellseg_model_identity", "cellseg_file_sha256", "cellseg_precision"])
def test_a_server_that_does_not_tell_is_refused(serve: Serve, key: str) -> None:
    fake = FakeServer()
    assert fake.told is not None
    del fake.told[key]
    with serve(fake) as address, pytest.raises(ModelError, match=f"does not tell {key} of the model; export it again"):
        open_backend(address)
    assert not our_threads()


def test_tensors_that_contradict_the_description_are_refused(serve: Serve) -> None:
    fake = FakeServer()
    fake.told = parameters_of(make_spec(variant="boundary"))
    with serve(fake) as address, pytest.raises(ModelError, match=r"output of the served model is .* its description"):
        open_backend(address)
    fake = FakeServer(tile_shape=(-1, 3, 56, 56))
    with serve(fake) as address, pytest.raises(ModelError, match=r"inputs are tiles: UINT8 \(-1, 3, 56, 56\)"):
        open_backend(address)
    fake = FakeServer()
    fake.told = parameters_of(fake.spec) | {"cellseg_precision": "fp8"}
    with serve(fake) as address, pytest.raises(ModelError, match="cellseg_precision is 'fp8'"):
        open_backend(address)


@pytest.mark.reliability
@pytest.mark.parametrize("in_answers", [False, True])
def test_another_model_under_the_same_name_ends_the_run(serve: Serve, in_answers: bool) -> None:
    fake = FakeServer()
    if in_answers:
        fake.told_in_answers, fake.told = parameters_of(fake.spec), None
    with serve(fake) as address, open_backend(address) as backend:
        backend.predict(tiles())
        changed = parameters_of(fake.spec, "another identity")
        fake.told, fake.told_in_answers = (None, changed) if in_answers else (changed, {})
        with pytest.raises(ModelError, match="now serves another model"):
            backend.predict(tiles())


# --- faults


def test_faults_of_the_server_name_it_and_what_to_do(serve: Serve) -> None:
    is_grpc = serve is grpc_server
    cases = {
        ("UNAVAILABLE" if is_grpc else "503", "overloaded"): "overloaded",
        ("PERMISSION_DENIED" if is_grpc else "403", "no"): f"refused access .* set {TOKEN_VARIABLE}",
        (
            "INTERNAL" if is_grpc else "500",
            "out of memory\nstack",
        ): r"the server failed \(.*out of memory\); see its log",
    }
    fake = FakeServer()
    with serve(fake) as address, open_backend(address) as backend:
        for fake.problem, words in cases.items():
            with pytest.raises(BackendUnavailableError, match=f"^{address}: .*{words}"):
                backend.predict(tiles())
        fake.problem = None
        backend.predict(tiles())


def test_no_server_no_model_no_output(serve: Serve) -> None:
    fake = FakeServer()
    with serve(fake) as address:
        with pytest.raises(BackendUnavailableError, match=r"has no such model .*check the name"):
            open_backend(address.replace("cells", "other"))
        fake.output = "logits"
        fake.told_in_answers, fake.told = parameters_of(fake.spec), None
        with pytest.raises(BackendUnavailableError):
            open_backend(address)
    with pytest.raises(BackendUnavailableError, match=r"no connection to the server .*check that it runs"):
        open_backend(address)


@pytest.mark.reliability
def test_a_server_that_hangs_ends_the_call(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_client, "TIMEOUT_SECONDS", 1.0)
    fake = FakeServer()
    with serve(fake) as address, open_backend(address) as backend:
        fake.may_answer.clear()
        with pytest.raises(BackendUnavailableError, match=r"no answer within 1 s; .*start again"):
            backend.predict(tiles())
        fake.may_answer.set()


def test_http_without_binary_tensors_points_to_grpc() -> None:
    fake = FakeServer(extensions=(), problem=("422", "not JSON"))
    with (
        http_server(fake) as address,
        open_backend(address) as backend,
        pytest.raises(BackendUnavailableError, match=r"not JSON.* try its gRPC port"),
    ):
        backend.predict(tiles())


# --- access


def test_a_token_is_sent_and_never_shown(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeServer(tokens={"secret-token"})
    with serve(fake) as address:
        with pytest.raises(BackendUnavailableError, match=f"refused access .*set {TOKEN_VARIABLE}"):
            open_backend(address)
        monkeypatch.setenv(TOKEN_VARIABLE, "secret-token")
        with open_backend(address) as backend:
            assert "secret-token" not in json.dumps(backend.describe())
        assert caplog.messages == []  # to this machine it may travel unencrypted


def test_a_token_in_the_open_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret-token")
    with caplog.at_level(logging.WARNING):
        v2_client._headers(parse_address("grpc://models.example:1/cells"))
        v2_client._headers(parse_address("grpcs://models.example:1/cells"))
    (line,) = caplog.messages
    assert "travels unencrypted to grpc://models.example:1/cells; use grpcs://" in line
    assert "secret-token" not in line
    monkeypatch.setenv(TOKEN_VARIABLE, "a\x07b")
    with pytest.raises(UsageError, match="printable ASCII"):
        v2_client._headers(parse_address("grpcs://models.example:1/cells"))


def test_tls_trusts_the_authority_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = [openssl, "req", "-x509", *kind, *subject, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(v2_client, "TIMEOUT_SECONDS", 20.0)
    with grpc_server(FakeServer(), (key.read_bytes(), certificate.read_bytes())) as address:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with pytest.raises(BackendUnavailableError, match=r"no connection|no answer"):
            open_backend(address)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with open_backend(address) as backend:
            assert len(backend.predict(tiles())) == 3


# --- the command


def test_the_command_counts_the_same_and_can_be_repeated(
    serve: Serve, smears: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    common = [str(smears), "--scale", "1", "-q"]
    assert console.run(command, [*common, "-o", str(tmp_path / "here"), "--model", str(model)]) == 0
    there, again = tmp_path / "there", tmp_path / "again"
    with serve(FakeServer()) as address:
        assert console.run(command, [*common, "-o", str(there), "--model", address, "--backend", "triton"]) == 0
        assert console.run(command, [str(smears), "-q", "-o", str(again), "--like", str(there)]) == 0
    for out in (there, again):
        for file in ("labels", "overlays", "cells.csv", "summary.csv"):
            for path in [tmp_path / "here" / file] if file.endswith("csv") else (tmp_path / "here" / file).rglob("*.*"):
                assert (out / path.relative_to(tmp_path / "here")).read_bytes() == path.read_bytes(), path
    record = json.loads((there / "run.json").read_text())
    assert record["model"]["model_url"] == address
    assert record["backend"]["device"] == "remote"
    assert record["threads"]["engine"] is None  # it waits: all cores are the helpers'
    capsys.readouterr()


@pytest.mark.reliability
def test_a_server_that_fails_in_the_middle_ends_the_run_and_a_resumed_run_ends_the_same(
    serve: Serve, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    fake = FakeServer()
    arguments = [str(folder), "--scale", "1", "--batch-size", "1", "--backend", "triton"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    is_grpc = serve is grpc_server
    with serve(fake) as address:
        arguments += ["--model", address]
        assert console.run(command, [*arguments, "-q", "-o", str(whole)]) == 3  # one image is damaged
        answer, fake.batches = fake.answer, []

        def fails_later(tiles_nhwc: np.ndarray) -> np.ndarray:
            if len(fake.batches) == 25:
                fake.problem = ("UNAVAILABLE" if is_grpc else "503", "shutting down")
            return answer(tiles_nhwc)

        fake.answer = fails_later  # type: ignore[method-assign]
        capsys.readouterr()
        assert console.run(command, [*arguments, "-q", "-o", str(out)]) == 8
        assert f"error: {address}: " in capsys.readouterr().err
        # How many are finished depends on how their tiles were mixed: they are committed in order.
        assert (out / "journal.jsonl").read_text().count('"kind":"image"') < 5
        fake.problem, fake.answer = None, answer  # type: ignore[method-assign]
        assert console.run(command, [*arguments, "-q", "-o", str(out)]) == 3
        # A server with another model does not finish it.
        (folder / "new.png").write_bytes((folder / "a.png").read_bytes())
        fake.told = parameters_of(fake.spec, "another")
        assert console.run(command, [*arguments, "-q", "-o", str(out)]) == 6
    for path in (whole / "labels").iterdir():
        assert (out / "labels" / path.name).read_bytes() == path.read_bytes()
    assert (out / "cells.csv").read_bytes() == (whole / "cells.csv").read_bytes()


def test_descriptions_are_those_of_the_spec() -> None:
    spec = make_spec()
    assert json.loads(parameters_of(spec)["cellseg"]) == json.loads(to_json(spec))
