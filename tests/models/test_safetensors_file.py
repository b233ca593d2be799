"""The description in a safetensors file, read and replaced without PyTorch; PyTorch's own library is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from conftest import make_spec
from safetensors import safe_open

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.safetensors_file import read_weights_file, rewritten
from cellseg_deploy.models.spec import METADATA_KEY, from_json, to_json

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b.bias": torch.tensor([7], dtype=torch.int64)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path, {METADATA_KEY: to_json(make_spec()), "other": "kept"})
    return path


@pytest.mark.parametrize("length", range(1, 10))
def test_another_description_around_the_same_weights(file: Path, length: int) -> None:
    found = read_weights_file(file)
    assert found.spec == make_spec()
    other = msgspec.structs.replace(found.spec, name="n" * length)
    file.write_bytes(rewritten(found, other))
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # weights lie where a reader may map them
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    assert from_json(metadata[METADATA_KEY], source="") == other
    assert metadata["other"] == "kept"
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    again = read_weights_file(file)
    assert (again.identity, again.spec) == (found.identity, other)


def test_other_weights_are_another_network(file: Path) -> None:
    before = read_weights_file(file).identity
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert read_weights_file(file).identity != before


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of 0 bytes"),
        (b"no safetensors file", "header of"),
        (b"\x04\0\0\0\0\0\0\0nono", "not a whole safetensors file"),
        (header([1]), "not a whole safetensors file"),
        (header({"__metadata__": None}), "no 'cellseg' metadata"),
        (header({"a": {"data_offsets": [0, 4]}}) + b"1234", "no 'cellseg' metadata"),
        (header({"__metadata__": {METADATA_KEY: "{}"}, "a": {"data_offsets": [0, 4]}}) + b"123", "cut short"),
        (header({"__metadata__": {METADATA_KEY: "{}"}, "a": 3}), "cut short or damaged"),
        (header({"__metadata__": {METADATA_KEY: "{}"}}), "no spec_version"),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_weights_file(path)


def test_no_file() -> None:
    with pytest.raises(ModelError, match=r"nowhere\.safetensors: cannot be read"):
        read_weights_file(Path("nowhere.safetensors"))
