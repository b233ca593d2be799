"""What lies beside an engine decides whether it may be opened; and the folder where engines are kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import make_spec

from cellseg_deploy.backends.engine_cache import cache_folder, engine_name, prepare_folder
from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.backends.tensorrt_sidecar import (
    EngineSidecar,
    Machine,
    check_engine,
    misfits,
    read_sidecar,
    sidecar_path,
    version_tuple,
    write_sidecar,
)
from cellseg_deploy.errors import ModelError, OutputError

ENGINE = b"an engine"
HERE = Machine(gpu="RTX A", compute_capability="8.6", tensorrt="10.13.0.35", cuda="13.0", driver="580.1")


def make_sidecar(**changes: Any) -> EngineSidecar:
    values: dict[str, Any] = {
        "engine_sha256": hashlib.sha256(ENGINE).hexdigest(),
        "engine_bytes": len(ENGINE),
        "onnx_name": "model.onnx",
        "onnx_sha256": "0" * 64,
        "model_identity": "1" * 64,
        "precision": "fp16",
        "built_on": HERE,
        "profile": BatchProfile(1, 4, 8),
        "workspace_mib": 512,
        "spec": make_spec(variant="boundary", parity="verified: in a test"),
        "parity_report": {"verdict": "passed"},
    }
    return EngineSidecar(**(values | changes))


def on(**changes: str) -> Machine:
    return msgspec.structs.replace(HERE, **changes)


def test_a_sidecar_survives_its_file(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    sidecar = make_sidecar()
    write_sidecar(engine, sidecar)
    assert sidecar_path(engine) == tmp_path / "model.engine.json"
    assert read_sidecar(engine) == sidecar
    facts = json.loads(sidecar_path(engine).read_text())
    assert facts["profile"] == {"min": 1, "opt": 4, "max": 8}
    assert facts["built_on"]["driver"] == "580.1"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sidecar_version": 2}, "version 2, this program reads 1"),
        ({"profile": {"min": 3, "opt": 1, "max": 1}}, "min <= opt"),
        ({"profile": "big"}, "not the description"),
        ({"spec": {}}, "not the description"),
        ({"engine_sha256": 5}, "engine_sha256"),
    ],
)
def test_sidecars_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    engine = tmp_path / "model.engine"
    write_sidecar(engine, make_sidecar())
    change(sidecar_path(engine), **changes)
    with pytest.raises(ModelError, match=words) as caught:
        read_sidecar(engine)
    assert "cellseg-export tensorrt" in str(caught.value)


def test_a_spec_that_cannot_be_meant(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    write_sidecar(engine, make_sidecar(spec=make_spec(halo=40)))
    with pytest.raises(ModelError, match="halo 40"):
        read_sidecar(engine)


def test_no_sidecar_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.engine\.json: the description of the engine is missing"):
        read_sidecar(tmp_path / "model.engine")
    (tmp_path / "model.engine.json").write_text("{")
    with pytest.raises(ModelError, match="not the description"):
        read_sidecar(tmp_path / "model.engine")


FITS = [HERE, on(driver="590.0", cuda="13.9")]  # driver and CUDA runtime: recorded, not required
MISFITS = [
    (on(gpu="RTX B"), "RTX A, this machine has RTX B"),
    (on(gpu="RTX B", compute_capability="8.9"), r"8\.6, this machine has RTX B of 8\.9"),
    (on(tensorrt="10.13.0.36"), r"10\.13\.0\.35, this machine has 10\.13\.0\.36"),
]


@pytest.mark.parametrize("here", FITS)
def test_engines_that_fit(here: Machine) -> None:
    assert misfits(make_sidecar(), here) == []
    check_engine(Path("model.engine"), ENGINE, make_sidecar(), here)


@pytest.mark.reliability
@pytest.mark.parametrize(("here", "words"), MISFITS)
def test_engines_of_another_machine(here: Machine, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        check_engine(Path("model.engine"), ENGINE, make_sidecar(), here, how_to_rebuild="use --rebuild")
    assert str(caught.value).startswith("model.engine: this engine is not for this machine")
    assert str(caught.value).endswith("use --rebuild")


@pytest.mark.reliability
def test_a_damaged_engine() -> None:
    with pytest.raises(ModelError, match="SHA-256"):
        check_engine(Path("model.engine"), ENGINE + b"!", make_sidecar(), HERE)


def test_versions() -> None:
    assert version_tuple("10.13.0.35") == (10, 13, 0, 35)
    assert version_tuple("11.0.0rc1") == (11, 0, 0)
    assert version_tuple("") == ()
    assert version_tuple("10.9") < version_tuple("10.13")


# --- cache


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"HOME": "/home/a"}, "/home/a/.cache/cellseg-deploy/engines"),
        ("linux", {"HOME": "/home/a", "XDG_CACHE_HOME": "/big"}, "/big/cellseg-deploy/engines"),
        ("linux", {"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, "/home/a/.cache/cellseg-deploy/engines"),
        ("darwin", {"HOME": "/Users/a"}, "/Users/a/Library/Caches/cellseg-deploy/engines"),
        ("win32", {"USERPROFILE": "/c", "LOCALAPPDATA": "/c/L"}, "/c/L/cellseg-deploy/engines"),
        ("win32", {"USERPROFILE": "/c"}, "/c/AppData/Local/cellseg-deploy/engines"),
    ],
)
def test_cache_folder(platform: str, environment: dict[str, str], expected: str) -> None:
    assert cache_folder(environment, platform) == Path(expected)


def test_names_in_the_cache() -> None:
    name = engine_name("smear tiny/../x", "a" * 64, "RTX A", {"level": 3})
    assert name == engine_name("smear tiny/../x", "a" * 64, "RTX A", {"level": 3})
    assert "/" not in name
    assert name.startswith("smear-tiny-..-x-")
    assert name.endswith(".engine")
    others = [
        engine_name("smear tiny/../x", "b" * 64, "RTX A", {"level": 3}),
        engine_name("smear tiny/../x", "a" * 64, "RTX B", {"level": 3}),
        engine_name("smear tiny/../x", "a" * 64, "RTX A", {"level": 4}),
    ]
    assert len({name, *others}) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_cache_is_the_users_alone(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "a" / "engines")
    assert folder.stat().st_mode & 0o077 == 0
    prepare_folder(folder)
    for mode in (0o770, 0o702):
        folder.chmod(mode)
        with pytest.raises(OutputError, match=r"chmod go-w"):
            prepare_folder(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"):
        prepare_folder(tmp_path / "file" / "engines")
