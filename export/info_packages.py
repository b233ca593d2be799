"""Descriptions of the forms for other programs: bioimage.io packages and entries of a Triton model repository.

Both are checked as far as possible without the other program: hashes, and the model files within.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import METADATA_KEY, from_json

CONFIG_NAME = "config.pbtxt"
_DESCRIPTION = "rdf.yaml"
_SHOWN = ("name", "format_version", "license", "timestamp", "tags")
# Comment, string, one structural character, or a bare word: all that protobuf's text form has.
_TOKEN = re.compile(r"""\s+|\#[^\n]*|("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|([{}\[\]:,;])|([^\s{}\[\]:,;"'#]+)""")
_ESCAPE = re.compile(rb"""\\([0-7]{1,3}|[nrt\\"'])""")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b'"': b'"', b"'": b"'"}


def describe_bioimageio(path: Path) -> dict[str, Any]:
    """Describe the package ``path`` (.zip), under ``file`` and ``spec``. Raises ``ModelError``."""
    from cellseg_deploy.models.onnx_file import check_model

    files = _members(path)
    rdf = _description(path, files)
    weights = rdf["weights"]["onnx"]["source"]
    if weights not in files:
        raise ModelError(f"{path}: {_DESCRIPTION} names {weights}, which is not in the package; export it again")
    model = check_model(path / weights, files[weights])
    tensors = [side["test_tensor"] for name in ("inputs", "outputs") for side in rdf.get(name, [])]
    named = [rdf["weights"]["onnx"], *tensors]
    whole = all(_sha256(files.get(file["source"], b"")) == file["sha256"] for file in named)
    head = {
        "path": str(path),
        "form": "bioimage.io package",
        "bytes": path.stat().st_size,
        "whole": whole,
        **{key: rdf[key] for key in _SHOWN if key in rdf},
        "authors": [author["name"] for author in rdf.get("authors", [])],
        "cite": [f"{entry['text']}, doi:{entry['doi']}" for entry in rdf.get("cite", []) if "doi" in entry],
        "files": {name: len(data) for name, data in sorted(files.items())},
        "precision": model.precision,
        "opset": model.opset,
        "identity": model.identity,
        "sha256": model.file_sha256,
    }
    return {"file": head, "spec": msgspec.to_builtins(model.spec)}


def describe_triton(folder: Path) -> dict[str, Any]:
    """Describe ``folder``: an entry under ``file`` and ``spec``, a repository each of its entries by name.

    Raises ``ModelError``.
    """
    if (folder / CONFIG_NAME).is_file():
        return _entry(folder)
    entries = [config.parent for config in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    head = {"path": str(folder), "form": "Triton model repository", "entries": [entry.name for entry in entries]}
    return {"file": head} | {entry.name: _entry(entry) for entry in entries}


def is_triton(folder: Path) -> bool:
    """Whether ``folder`` is an entry of a Triton model repository, or a repository with at least one."""
    return (folder / CONFIG_NAME).is_file() or any(folder.glob(f"*/{CONFIG_NAME}"))


def parse_text(text: str) -> dict[str, list[Any]]:
    """Parse a message in protobuf's text form: values of each field in order; strings, bare words as text, or messages.

    Raises ``ValueError`` if the text is not in that form.
    """
    tokens = list(_tokens(text))
    message, end = _message(tokens, 0, closed=False)
    assert end == len(tokens)
    return message


def _entry(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = parse_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a Triton model configuration ({error}); export it again") from error
    parameters = _parameters(config)
    if METADATA_KEY not in parameters:
        raise ModelError(
            f"{path}: no {METADATA_KEY!r} among its parameters; expected an entry written by `cellseg-export triton`"
        )
    spec = from_json(parameters[METADATA_KEY], source=str(path))
    expected = parameters.get("cellseg_file_sha256", "")
    versions = {p.name: _version(p, expected) for p in sorted(folder.iterdir()) if p.is_dir() and p.name.isdigit()}
    batching: dict[str, list[Any]] = next(iter(config.get("dynamic_batching", [])), {})
    groups = [
        f"{_only(group, 'count', '1')} on {_only(group, 'kind', 'KIND_AUTO')}"
        for group in config.get("instance_group", [])
    ]
    head = {
        "path": str(folder),
        "form": "Triton model repository entry",
        "name": _only(config, "name", folder.name),
        "backend": _only(config, "backend", ""),
        "max_batch_size": int(_only(config, "max_batch_size", "0")),
        "preferred_batch_size": [int(size) for size in batching.get("preferred_batch_size", [])],
        "max_queue_delay_microseconds": int(_only(batching, "max_queue_delay_microseconds", "0")),
        "instances": groups,
        "whole": bool(versions) and all(version["whole"] for version in versions.values()),
        "versions": versions,
        "identity": parameters.get("cellseg_model_identity", ""),
        "sha256": expected,
    }
    return {"file": head, "spec": msgspec.to_builtins(spec)}


def _version(folder: Path, expected: str) -> dict[str, Any]:
    """Files of one version; ``whole``: whether one of them is the model file the configuration was written for."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    digests = set()
    for file in files.values():
        with file.open("rb") as stream:
            digests.add(hashlib.file_digest(stream, "sha256").hexdigest())
    if {"model.xml", "model.bin"} <= files.keys():
        digests.add(_sha256(files["model.xml"].read_bytes() + files["model.bin"].read_bytes()))
    return {"files": {name: file.stat().st_size for name, file in files.items()}, "whole": expected in digests}


def _parameters(config: dict[str, list[Any]]) -> dict[str, str]:
    found = {}
    for entry in config.get("parameters", []):
        value: Any = next(iter(entry.get("value", [])), {})
        if isinstance(value, dict) and "string_value" in value:
            found[_only(entry, "key", "")] = str(value["string_value"][-1])
    return found


def _only(message: dict[str, list[Any]], name: str, default: str) -> str:
    values = message.get(name, [default])
    return str(values[-1])


def _members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{path}: not a whole ZIP archive ({error}); export or copy it again") from error
    except RuntimeError as error:  # what zipfile raises for an encrypted member or an unknown compression
        raise ModelError(f"{path}: cannot be unpacked ({error}); export or copy it again") from error


def _description(path: Path, files: dict[str, bytes]) -> dict[str, Any]:
    """Content of rdf.yaml. This package writes JSON; a file in YAML comes from elsewhere."""
    try:
        rdf: Any = json.loads(files[_DESCRIPTION])
        ours = "spec" in rdf["config"]["cellseg"] and isinstance(rdf["weights"]["onnx"]["source"], str)
    except (KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        raise ModelError(
            f"{path}: expected a package written by `cellseg-export bioimageio`, whose {_DESCRIPTION} names an ONNX "
            "model and its ModelSpec"
        )
    found: dict[str, Any] = rdf
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"unexpected {text[place : place + 20]!r} in line {text.count(chr(10), 0, place) + 1}")
        place = match.end()
        string, sign, word = match.groups()
        if string is not None:
            yield "string", _unquoted(string)
        elif sign is not None:
            yield sign, sign
        elif word is not None:
            yield "word", word


def _unquoted(text: str) -> str:
    def escaped(match: re.Match[bytes]) -> bytes:
        sign = match[1]
        return _ESCAPED.get(sign) or bytes([int(sign, 8) & 255])

    return _ESCAPE.sub(escaped, text[1:-1].encode()).decode()


def _message(tokens: list[tuple[str, str]], at: int, *, closed: bool) -> tuple[dict[str, list[Any]], int]:
    """Parse fields from token ``at`` on; returns them and the next token index; ``closed``: they end with ``}``."""
    fields: dict[str, list[Any]] = {}
    while at < len(tokens):
        kind, name = tokens[at]
        at += 1
        if kind in (",", ";"):
            continue
        if kind == "}" and closed:
            return fields, at
        if kind != "word":
            raise ValueError(f"expected the name of a field, got {name!r}")
        values, at = _values(tokens, at)
        fields.setdefault(name, []).extend(values)
    if closed:
        raise ValueError("it ends within a message")
    return fields, at


def _values(tokens: list[tuple[str, str]], at: int) -> tuple[list[Any], int]:
    """Parse the values of a field whose name is before token ``at``: one, or a list in brackets."""
    kind, _ = _token(tokens, at)
    if kind == ":":
        at += 1
        kind, _ = _token(tokens, at)
    if kind != "[":
        value, at = _value(tokens, at)
        return [value], at
    at, values = at + 1, []
    while _token(tokens, at)[0] != "]":
        if tokens[at][0] == ",":
            at += 1
            continue
        value, at = _value(tokens, at)
        values.append(value)
    return values, at + 1


def _value(tokens: list[tuple[str, str]], at: int) -> tuple[Any, int]:
    kind, text = _token(tokens, at)
    if kind == "{":
        return _message(tokens, at + 1, closed=True)
    if kind not in ("word", "string"):
        raise ValueError(f"expected a value, got {text!r}")
    at += 1
    while kind == "string" and at < len(tokens) and tokens[at][0] == "string":  # consecutive strings are one
        text, at = text + tokens[at][1], at + 1
    return text, at


def _token(tokens: list[tuple[str, str]], at: int) -> tuple[str, str]:
    if at >= len(tokens):
        raise ValueError("it ends within a field")
    return tokens[at]
