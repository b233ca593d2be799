"""A model as an entry of an NVIDIA Triton Inference Server model repository.

REPO/NAME/config.pbtxt    inputs, outputs, batching, instances; the ModelSpec among the parameters
REPO/NAME/labels.txt      names of the probability channels, in order
REPO/NAME/1/model.onnx    the model file itself (or model.plan, or model.xml with model.bin)
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes, writing
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models.spec import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, ModelSpec, to_json

Kind = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class TritonOptions:
    """``max_batch_size``: tiles per call. ``preferred``: batch sizes the server waits for. ``queue_delay_us``: how long
    it waits for them, in microseconds. ``instances``: copies of the model on each device. ``kind``: device kind."""

    max_batch_size: int = 16
    preferred: tuple[int, ...] = (8, 16)
    queue_delay_us: int = 2000
    instances: int = 1
    kind: Kind = "auto"

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for an invalid setting."""
        if self.max_batch_size < 1 or self.instances < 1 or self.queue_delay_us < 0:
            raise UsageError(f"batch size and instances must be at least 1, the queue delay 0 or more; got {self}")
        wrong = [size for size in self.preferred if not 1 <= size <= self.max_batch_size]
        if wrong:
            raise UsageError(f"preferred batch sizes {wrong} are outside 1 to the largest batch {self.max_batch_size}")


# Ending of a form -> (backend of the server, name of the file in it, what it runs on).
_FORMS: dict[str, tuple[str, str, Kind]] = {
    ".onnx": ("onnxruntime", "model.onnx", "auto"),
    ".engine": ("tensorrt", "model.plan", "gpu"),
    ".xml": ("openvino", "model.xml", "cpu"),
}


@dataclass(frozen=True)
class Entry:
    """Content of a repository entry: the checked bytes by file name, and their description. ``precision``: of their
    arithmetic, as in ``Backend``."""

    backend: str
    files: dict[str, bytes]
    spec: ModelSpec
    identity: str
    sha256: str
    precision: str


def export_triton(
    source: Path, repository: Path, *, name: str | None = None, options: TritonOptions | None = None
) -> Path:
    """Add ``source`` (.onnx, .xml or .engine, checked first) to ``repository``; returns the folder of the entry.

    ``name``: of the entry, by default the model's. The entry appears whole or not at all, and never replaces another.
    Raises ``ModelError``, ``OutputError``, ``UsageError``.
    """
    entry = read_entry(source)
    options = _for_form(options or TritonOptions(), source)
    name = name or _as_name(entry.spec.name)
    if name != _as_name(name):
        raise UsageError(f"{name!r} cannot name a Triton model; expected letters, digits, ., _ and -")
    folder = repository / name
    if folder.exists():
        raise OutputError(f"{folder}: there is an entry of that name already; remove it, or choose another --name")
    new = not repository.exists()
    make_folder(repository)
    try:
        with workspace(repository) as place:
            _write_entry(place / name, name, entry, options)
            with writing(folder):
                (place / name).rename(folder)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # not empty: someone else has added files
                repository.rmdir()
        raise
    return folder


def _write_entry(folder: Path, name: str, entry: Entry, options: TritonOptions) -> None:
    make_folder(folder / "1")
    for file, data in entry.files.items():
        write_bytes(folder / "1" / file, data)
    write_bytes(folder / "labels.txt", "".join(f"{channel}\n" for channel in entry.spec.channels).encode())
    write_bytes(folder / "config.pbtxt", config_text(name, entry, options).encode())


def read_entry(source: Path) -> Entry:
    """The checked content of ``source``; raises ``ModelError``, ``UsageError`` for another kind of file."""
    suffix = source.suffix.lower()
    if suffix not in _FORMS:
        raise UsageError(f"{source}: expected an .onnx, an .xml or an .engine, got {suffix or 'no ending'}")
    backend, file, _ = _FORMS[suffix]
    if suffix == ".onnx":
        from cellseg_deploy.models.onnx_file import read_model_file

        model = read_model_file(source)
        return Entry(backend, {file: model.data}, model.spec, model.identity, model.file_sha256, model.precision)
    if suffix == ".xml":
        from cellseg_deploy.backends.openvino import read_ir

        pair = read_ir(source)
        files = {file: pair.xml, "model.bin": pair.bin}
        return Entry(backend, files, pair.spec, pair.facts.model_identity, pair.file_sha256, pair.facts.precision)
    import hashlib

    from cellseg_deploy.backends.tensorrt_sidecar import read_sidecar
    from cellseg_deploy.errors import ModelError

    sidecar, data = read_sidecar(source), source.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sidecar.engine_sha256:
        raise ModelError(f"{source}: not the engine its sidecar describes (SHA-256 differs); build it again")
    return Entry(backend, {file: data}, sidecar.spec, sidecar.model_identity, digest, sidecar.precision)


def config_text(name: str, entry: Entry, options: TritonOptions) -> str:
    """``config.pbtxt``: the text form of Triton's ModelConfig message."""
    spec, size = entry.spec, entry.spec.tile_size
    parameters = {
        METADATA_KEY: to_json(spec),
        "cellseg_model_identity": entry.identity,
        "cellseg_file_sha256": entry.sha256,
        "cellseg_precision": entry.precision,
        "cellseg_parity": spec.parity,
        "cellseg_operating_points": msgspec.json.encode(spec.operating_points).decode(),
    }
    preferred = ", ".join(map(str, options.preferred))
    lines = [
        f"name: {quoted(name)}",
        f"backend: {quoted(entry.backend)}",
        f"max_batch_size: {options.max_batch_size}",
        "# The first axis is the batch, which the server adds. RGB in; normalisation and sigmoid are in the graph.",
        "input [",
        f"  {{ name: {quoted(INPUT_NAME)} data_type: TYPE_UINT8 format: FORMAT_NONE dims: [ {size}, {size}, 3 ] }}",
        "]",
        "# Channels as in labels.txt. It is not a label_filename, which names classes of single values.",
        "output [",
        f"  {{ name: {quoted(OUTPUT_NAME)} data_type: TYPE_FP32 dims: [ {len(spec.channels)}, {size}, {size} ] }}",
        "]",
        "dynamic_batching {",
        *([f"  preferred_batch_size: [ {preferred} ]"] if preferred else []),
        f"  max_queue_delay_microseconds: {options.queue_delay_us}",
        "}",
        f"instance_group [ {{ count: {options.instances} kind: KIND_{options.kind.upper()} }} ]",
        "version_policy { latest { num_versions: 1 } }",
    ]
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """``text`` as a string of protobuf's text format: quotes and backslashes escaped, non-ASCII as octal bytes."""
    signs = {ord('"'): '\\"', ord("\\"): "\\\\", ord("\n"): "\\n"}
    body = "".join(signs.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in text.encode())
    return f'"{body}"'


def _for_form(options: TritonOptions, source: Path) -> TritonOptions:
    """``options`` with the only device kind that the form supports: otherwise the server would put an OpenVINO
    model on any GPU it finds, and then refuse it. Raises ``UsageError`` if another kind was requested."""
    backend, _, only = _FORMS[source.suffix.lower()]
    if only == "auto":
        return options
    if options.kind not in ("auto", only):
        raise UsageError(
            f"{source}: {backend} runs it on a {only.upper()} only; --kind {options.kind} is not available"
        )
    return replace(options, kind=only)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "cellseg"
