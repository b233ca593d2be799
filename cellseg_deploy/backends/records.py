"""``MODEL.parity-records.json``: the gate's verdict on each form of a model, per device kind and engine version.

The file is next to the model and is extended by ``cellseg-export``; ``backend="auto"`` chooses by it. A record applies
to one network (by its identity, which calibration does not change), one file, one engine version and one device kind.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.errors import ModelError, OutputInUseError
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.lock import exclusive

RECORDS_VERSION = 1
POLICIES = ("fp32", "fp16", "bf16", "int8")
"""Names of the gate's policies (``parity.policy``), strictest first."""
_SUFFIX = ".parity-records.json"
_WAIT_SECONDS = 30.0
# Parts of an .xml that may change while the network stays the same: its metadata (see ``openvino_ir``), and layer
# names, which OpenVINO renumbers each time it reads the model.
_METADATA = re.compile(rb'<cellseg>.*</cellseg>|(?<=") name="[^"]*"(?= type=)', re.DOTALL)


_POLICY_OF = {"mixed": "fp16"}
"""Precision -> policy, if the names differ."""


def is_looser(policy: str, precision: str) -> bool:
    """Return whether the named ``policy`` is less strict than the one for a form that computes in ``precision``."""
    return POLICIES.index(policy) > POLICIES.index(_POLICY_OF.get(precision, precision)) if policy in POLICIES else True


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """``ms_per_tile``: median over ``calls`` of ``batch_size`` tiles each, network only, host to host."""

    ms_per_tile: float
    batch_size: int
    calls: int
    threads: int | None = None


class ParityRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's verdict on one form, and how fast the form was.

    ``file``: name of its file, next to the records. ``file_sha256``: see ``form_sha256``. ``model_identity``: of the
    network (see ``model_file``). ``backend``, ``precision``: as in ``Backend``; ``inference_precision``: what was
    requested of an engine that offers a choice, otherwise empty. ``engine_version``: of the installed distribution.
    ``device_class``: see ``device_class``. ``reference``: name of the engine it was compared with. ``figures``: the
    report's summary of each task. ``timing``, ``reference_timing``: None if it was not timed.
    """

    file: str
    file_sha256: str
    model_identity: str
    backend: str
    precision: str
    inference_precision: str = ""
    engine_version: str
    device_class: str
    verdict: str
    policy: str
    reference: str
    images_from: str
    figures: dict[str, dict[str, Any]] = {}
    timing: Timing | None = None
    reference_timing: Timing | None = None
    program: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Fields that a later record must share to replace this one."""
        form = (self.file, self.backend, self.precision, self.inference_precision)
        return (*form, self.model_identity, self.engine_version, self.device_class)

    @property
    def passed(self) -> bool:
        """Whether this form passed the gate."""
        return self.verdict == "passed"


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    records_version: int
    records: tuple[ParityRecord, ...]


def records_path(model: Path) -> Path:
    """Return the path of the records of ``model`` (.onnx, .xml or .engine)."""
    return model.with_suffix(_SUFFIX)


def read_records(path: Path) -> tuple[ParityRecord, ...]:
    """Read the records in the file ``path``; empty if it does not exist. Raises ``ModelError`` for a damaged file: to
    ignore it could silently choose another engine than before."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ModelError(f"{path}: the parity records cannot be read ({error.strerror}); check permissions") from error
    try:
        content = msgspec.json.decode(data, type=_Content)
    except msgspec.DecodeError as error:
        raise ModelError(
            f"{path}: damaged parity records ({error}); copy the file again, or delete it and compare the forms again "
            "with `cellseg-export verify --record`"
        ) from error
    if content.records_version != RECORDS_VERSION:
        raise ModelError(
            f"{path}: parity records of version {content.records_version}, this program reads {RECORDS_VERSION}; "
            "update cellseg-deploy, or delete the file and compare the forms again"
        )
    return content.records


def add_record(path: Path, record: ParityRecord) -> None:
    """Write ``record`` to the file ``path``, replacing one with the same key. Raises ``ModelError``, ``OutputError``,
    and ``OutputInUseError`` if other programs write to that folder for half a minute."""
    with _alone_in(path.parent):
        kept = [other for other in read_records(path) if other.key != record.key]
        records = tuple(sorted((*kept, record), key=lambda item: item.key))
        content = _Content(records_version=RECORDS_VERSION, records=records)
        write_bytes(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def form_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of the file ``path``, of the network in an .xml followed by its .bin; "" if missing."""
    digest = hashlib.sha256()
    weights = path
    try:
        if path.suffix.lower() == ".xml":
            digest.update(_METADATA.sub(b"", path.read_bytes()))
            weights = path.with_suffix(".bin")
        with weights.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder``, waiting for another export that may be adding its own record."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        lock = exclusive(folder)
        try:
            lock.__enter__()
            break
        except OutputInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
