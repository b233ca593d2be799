"""The entry of a Triton model repository: its config parses, fits the model file, and carries the ModelSpec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import make_spec

from cellseg_deploy.cli import console
from cellseg_deploy.errors import ModelError, OutputError, UsageError
from cellseg_deploy.files.lock import LOCK_NAME
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.spec import from_json
from cellseg_export.cli import command
from cellseg_export.forms import triton
from cellseg_export.forms.triton import TritonOptions, export_triton, quoted
from cellseg_export.info_packages import parse_text

OnnxFile = Callable[..., Path]


def parse(path: Path) -> Any:
    """``path`` as Triton's own ModelConfig message."""
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="no schema: pip install 'tritonclient[grpc]'", exc_type=ImportError
    )
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), schema.ModelConfig())


def test_the_config_is_a_model_config_of_this_model(onnx_file: OnnxFile, tmp_path: Path) -> None:
    spec = make_spec(variant="boundary", name='a "quoted" näme\n')
    source = onnx_file(spec)
    folder = export_triton(source, tmp_path / "repo")
    assert folder == tmp_path / "repo" / "a-quoted-n-me"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
        "labels.txt",
    ]
    assert (folder / "1" / "model.onnx").read_bytes() == source.read_bytes()
    assert (folder / "labels.txt").read_text().split() == ["foreground", "boundary"]
    config = parse(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "onnxruntime", 16)
    (given,), (answer,) = config.input, config.output
    assert (given.name, list(given.dims)) == ("tiles", [56, 56, 3])
    assert (answer.name, list(answer.dims)) == ("probabilities", [2, 56, 56])
    kinds = type(given).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert given.data_type == kinds["TYPE_UINT8"].number
    assert answer.data_type == kinds["TYPE_FP32"].number
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [group.count for group in config.instance_group] == [1]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert from_json(parameters["cellseg"], source="config") == spec
    assert parameters["cellseg_model_identity"] == read_model_file(source).identity
    assert parameters["cellseg_parity"] == "unverified"
    # What the client of a served model asks for (backends/triton.py).
    assert parameters["cellseg_file_sha256"] == read_model_file(source).file_sha256
    assert parameters["cellseg_precision"] == "fp32"


def test_an_openvino_pair_goes_to_its_backend(onnx_file: OnnxFile, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from test_openvino_backend import write_pair

    pair = write_pair(onnx_file(), tmp_path / "stub.xml")
    folder = export_triton(pair, tmp_path / "repo", name="pair")
    assert (folder / "1" / "model.bin").read_bytes() == pair.with_suffix(".bin").read_bytes()
    config = parse(folder / "config.pbtxt")
    assert config.backend == "openvino"
    kinds = type(config.instance_group[0]).DESCRIPTOR.enum_types_by_name["Kind"].values_by_name
    assert config.instance_group[0].kind == kinds["KIND_CPU"].number  # left to choose, a server with a GPU refuses it
    with pytest.raises(UsageError, match="on a CPU only"):
        export_triton(pair, tmp_path / "repo", name="other", options=TritonOptions(kind="gpu"))


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "openvino"])
@pytest.mark.parametrize("kind", ["auto", "cpu", "gpu"])
def test_every_config_fits_the_schema_that_triton_publishes(backend: str, kind: triton.Kind, tmp_path: Path) -> None:
    from google.protobuf import text_format

    spec = make_spec(variant="boundary", name='a "quoted" näme\n')
    entry = triton.Entry(backend, {}, spec, "identity", "sha256", "fp16")
    options = TritonOptions(max_batch_size=8, preferred=(), queue_delay_us=0, instances=3, kind=kind)
    path = tmp_path / "config.pbtxt"
    path.write_text(triton.config_text("cells", entry, options))
    config = parse(path)
    kinds = type(config.instance_group[0]).DESCRIPTOR.enum_types_by_name["Kind"].values_by_name
    assert config.instance_group[0].kind == kinds[f"KIND_{kind.upper()}"].number
    assert (config.backend, config.max_batch_size, config.instance_group[0].count) == (backend, 8, 3)
    assert config.version_policy.latest.num_versions == 1
    assert config.parameters["cellseg_precision"].string_value == "fp16"
    assert from_json(config.parameters["cellseg"].string_value, source="config") == spec
    for word, wrong in (("dynamic_batching", "dynamic_batch"), ("TYPE_FP32", "FP32"), ("[", "(")):
        path.write_text(triton.config_text("cells", entry, options).replace(word, wrong))
        with pytest.raises(text_format.ParseError):
            parse(path)


def test_strings_survive_the_text_format() -> None:
    from google.protobuf import text_encoding

    for text in ("", "plain", 'say "x"', "back\\slash", "two\nlines\ttab", "µm 10⁻³ é", "\x007"):
        assert text_encoding.CUnescape(quoted(text)[1:-1]).decode() == text


@pytest.mark.parametrize(
    "settings", [{"max_batch_size": 0}, {"instances": 0}, {"queue_delay_us": -1}, {"preferred": (32,)}]
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TritonOptions(**settings)


def test_an_entry_is_never_replaced_and_names_stay_in_the_repository(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, repository = onnx_file(), tmp_path / "repo"
    export_triton(source, repository)
    with pytest.raises(OutputError, match="already"):
        export_triton(source, repository)
    with pytest.raises(UsageError, match="cannot name"):
        export_triton(source, repository, name="../elsewhere")
    assert [p.name for p in repository.iterdir()] == ["stub"]


def test_a_broken_model_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError):
        export_triton(broken, tmp_path / "repo")
    with pytest.raises(UsageError, match=r"expected an \.onnx"):
        export_triton(tmp_path / "model.pt", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_what_a_killed_or_failed_export_made_goes(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, repository = onnx_file(), tmp_path / "repo"
    left = repository / ".cellseg-killed"
    (left / "stub").mkdir(parents=True)
    (left / LOCK_NAME).touch()
    export_triton(source, repository)
    assert [p.name for p in repository.iterdir()] == ["stub"]

    def full(*_: Any) -> str:
        raise OutputError("no space left")

    monkeypatch.setattr(triton, "config_text", full)
    for folder in (repository, tmp_path / "new"):
        with pytest.raises(OutputError, match="no space left"):
            export_triton(source, folder, name="other")
    assert [p.name for p in repository.iterdir()] == ["stub"]
    assert not (tmp_path / "new").exists()


def test_the_command(onnx_file: OnnxFile, tmp_path: Path, capsys: Any) -> None:
    arguments = ["triton", str(onnx_file()), "-o", str(tmp_path / "repo"), "--max-batch", "4", "--kind", "gpu"]
    assert console.run(command, arguments) == 0
    assert "repo" in capsys.readouterr().out
    config = parse(tmp_path / "repo" / "stub" / "config.pbtxt")
    assert config.max_batch_size == 4
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert console.run(command, arguments) == 6


def shown(path: Path, capsys: Any) -> Any:
    """What ``cellseg-export info --json`` says of ``path``."""
    assert console.run(command, ["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_says_what_an_entry_and_a_repository_say(onnx_file: OnnxFile, tmp_path: Path, capsys: Any) -> None:
    spec = make_spec(variant="boundary", name='a "quoted" näme\n\\7')
    source, repository = onnx_file(spec), tmp_path / "repo"
    options = TritonOptions(max_batch_size=8, preferred=(4, 8), queue_delay_us=70, instances=2, kind="cpu")
    folder = export_triton(source, repository, options=options)
    export_triton(onnx_file(name="other.onnx"), repository, name="second")
    facts = shown(folder, capsys)
    model = read_model_file(source)
    assert facts["spec"] == json.loads(msgspec.json.encode(spec))
    assert facts["file"] == {
        "path": str(folder),
        "form": "Triton model repository entry",
        "name": folder.name,
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "preferred_batch_size": [4, 8],
        "max_queue_delay_microseconds": 70,
        "instances": ["2 on KIND_CPU"],
        "whole": True,
        "versions": {"1": {"files": {"model.onnx": len(model.data)}, "whole": True}},
        "identity": model.identity,
        "sha256": model.file_sha256,
    }
    everything = shown(repository, capsys)
    assert everything["file"]["entries"] == [folder.name, "second"]
    assert everything[folder.name] == facts
    assert console.run(command, ["info", str(repository)]) == 0
    assert model.file_sha256 in capsys.readouterr().out
    (folder / "1" / "model.onnx").write_bytes(b"another model")
    assert shown(folder, capsys)["file"]["whole"] is False


def test_info_knows_an_openvino_pair_of_an_entry(onnx_file: OnnxFile, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from test_openvino_backend import write_pair

    folder = export_triton(write_pair(onnx_file(), tmp_path / "stub.xml"), tmp_path / "repo", name="pair")
    assert shown(folder, capsys)["file"]["whole"] is True
    (folder / "1" / "model.bin").write_bytes(b"x")
    assert shown(folder, capsys)["file"]["whole"] is False


def test_info_refuses_what_is_no_entry_of_ours(onnx_file: OnnxFile, tmp_path: Path, capsys: Any) -> None:
    config = export_triton(onnx_file(), tmp_path / "repo") / "config.pbtxt"
    for text, words in {
        'name: "other"\nbackend: "python"\n': "no 'cellseg' among its parameters",
        'name: "cut': "unexpected",
        "input [": "it ends within a field",
        "parameters { key:": "it ends within a field",
        "a { b: 1": "it ends within a message",
        "{": "expected the name of a field",
        "a: ]": "expected a value",
    }.items():
        config.write_text(text)
        assert console.run(command, ["info", str(config.parent)]) == 5
        assert words in capsys.readouterr().err


def test_the_text_form_of_protobuf_is_read() -> None:
    text = """
    # comment
    name: "a" 'b\\303\\251' ; max: -1, sizes: [1, 2]
    group [ { kind: CPU } , { kind: GPU } ] nested < {}
    """.replace("< {}", "{ empty {} }")
    assert parse_text(text) == {
        "name": ["abé"],
        "max": ["-1"],
        "sizes": ["1", "2"],
        "group": [{"kind": ["CPU"]}, {"kind": ["GPU"]}],
        "nested": [{"empty": [{}]}],
    }
