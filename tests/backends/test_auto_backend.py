"""``--backend auto``: only a form that passed the gate for this model, engine and kind of device; then speed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import draw_discs, make_spec

from cellseg_deploy.backends import EngineOptions, open_backend, selection
from cellseg_deploy.backends import device_class as device_module
from cellseg_deploy.backends.device_class import device_class, engine_problem, engine_version
from cellseg_deploy.backends.records import ParityRecord, Timing, add_record, form_sha256, read_records, records_path
from cellseg_deploy.backends.selection import Form, Here, candidates_of, choose, table
from cellseg_deploy.cli import console, infer
from cellseg_deploy.errors import BackendUnavailableError, ModelError, ParityError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file

OnnxFile = Callable[..., Path]
MODEL = Path("folder/m.onnx")
HERE = Here("cpu", "cpu-x86_64-avx512f", {"onnxruntime": "1.22", "openvino": "2026.1", "tensorrt": None})
VERIFIED = "verified: counts as pytorch does"


def record(**changes: Any) -> ParityRecord:
    """OpenVINO fp32 on the model file itself passed here, 10 ms per tile."""
    values: dict[str, Any] = {
        "file": "m.onnx",
        "file_sha256": "f" * 64,
        "model_identity": "net",
        "backend": "openvino",
        "precision": "fp32",
        "inference_precision": "fp32",
        "engine_version": "2026.1",
        "device_class": HERE.device_class,
        "verdict": "passed",
        "policy": "fp32",
        "reference": "onnxruntime",
        "images_from": "sample smears",
        "timing": Timing(ms_per_tile=10, batch_size=8, calls=3),
    }
    return ParityRecord(**(values | changes))


def timed(ms: float) -> Timing:
    return Timing(ms_per_tile=ms, batch_size=8, calls=3)


BF16 = {"precision": "bf16", "inference_precision": "bf16", "policy": "bf16"}
ORT = {"backend": "onnxruntime", "inference_precision": "", "engine_version": "1.22"}


def chosen(*records: ParityRecord, parity: str = VERIFIED, here: Here = HERE) -> selection.Selection:
    return choose(candidates_of(MODEL, "net", "fp32", parity, records, here), here)


def reason(result: selection.Selection, backend: str, precision: str = "fp32") -> str:
    return next(c.reason for c in result.candidates if (c.form.backend, c.form.precision) == (backend, precision))


# --- choosing


def test_without_a_record_it_is_onnx_runtime() -> None:
    result = chosen()
    assert (result.form.backend, result.verified) == ("onnxruntime", True)
    assert "when the model was exported" in result.why
    assert reason(result, "openvino").startswith("never compared")


def test_an_unverified_model_runs_and_is_marked() -> None:
    result = chosen(parity="unverified")
    assert (result.form.backend, result.verified) == ("onnxruntime", False)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record()], ("openvino", "fp32")),
        ([record(), record(**BF16, timing=timed(3))], ("openvino", "bf16")),
        ([record(), record(**BF16, timing=timed(30))], ("openvino", "fp32")),
        ([record(), record(**BF16, timing=timed(3), verdict="failed")], ("openvino", "fp32")),
        ([record(), record(**BF16, timing=timed(3), verdict="inconclusive")], ("openvino", "fp32")),
        ([record(), record(**ORT, timing=timed(5))], ("onnxruntime", "fp32")),
        ([record(reference_timing=timed(5))], ("onnxruntime", "fp32")),
        ([record(reference_timing=timed(50))], ("openvino", "fp32")),
        ([record(timing=None)], ("onnxruntime", "fp32")),
    ],
    ids=["timed", "faster", "slower", "failed", "inconclusive", "ort", "reference faster", "slower ref", "untimed"],
)
def test_the_fastest_that_passed(records: list[ParityRecord], expected: tuple[str, str]) -> None:
    result = chosen(*records)
    assert (result.form.backend, result.form.precision) == expected
    assert result.verified


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_identity": "another"}, "another network"),
        ({"engine_version": "2025.4"}, "compared with version 2025.4, 2026.1 is installed"),
        ({"device_class": "cpu-x86_64-amx_bf16"}, "compared on cpu-x86_64-amx_bf16 only"),
        ({"verdict": "failed"}, "parity failed"),
    ],
)
def test_a_record_speaks_of_nothing_else(changes: dict[str, Any], words: str) -> None:
    result = chosen(record(**changes))
    assert result.form.backend == "onnxruntime"
    assert words in reason(result, "openvino")


def test_an_engine_that_is_not_installed_is_not_taken() -> None:
    here = Here("cpu", HERE.device_class, {"onnxruntime": "1.22", "openvino": None, "tensorrt": None})
    result = chosen(record(), here=here)
    assert result.form.backend == "onnxruntime"
    assert "pip install 'cellseg-deploy[openvino]'" in reason(result, "openvino")


def test_with_nothing_verified_nor_onnx_runtime_the_ways_out_are_named() -> None:
    here = Here("cpu", HERE.device_class, {"onnxruntime": None, "openvino": "2026.1", "tensorrt": None})
    with pytest.raises(BackendUnavailableError, match=r"(?s)name one as `backend`.*cellseg-deploy\[cpu\]"):
        chosen(here=here)
    assert chosen(record(), here=here).form.backend == "openvino"


def test_a_form_that_failed_is_not_taken_for_want_of_another() -> None:
    with pytest.raises(ParityError, match=r"no form of m.onnx passed"):
        chosen(record(**ORT, verdict="failed"))


def test_too_few_cells_are_no_failure() -> None:
    result = chosen(record(**ORT, verdict="inconclusive"))
    assert (result.form.backend, result.verified) == ("onnxruntime", True)  # the export could tell


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"reference": "openvino"}, "compared with openvino only"), ({"policy": "int8"}, "judged by policy int8 only")],
)
def test_a_record_must_have_been_judged_as_its_form_is(changes: dict[str, Any], words: str) -> None:
    result = chosen(record(**changes))
    assert result.form.backend == "onnxruntime"
    assert words in reason(result, "openvino")


def test_times_of_other_thread_counts_are_not_ranked() -> None:
    def with_threads(ms: float, threads: int | None) -> Timing:
        return Timing(ms_per_tile=ms, batch_size=8, calls=3, threads=threads)

    slow = record(timing=with_threads(10, None), reference_timing=with_threads(20, None))
    fast = record(**BF16, timing=with_threads(4, 16), reference_timing=with_threads(5, 16))
    result = chosen(slow, fast)
    assert (result.form.backend, result.form.precision) == ("openvino", "fp32")
    assert "4 ms per tile with 16 threads" in reason(result, "openvino", "bf16")
    assert "20 ms per tile" in reason(result, "onnxruntime")


def test_another_file_is_taken_only_if_it_is_the_one_compared(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    pair = tmp_path / "m.int8.xml"
    pair.write_bytes(b"xml")
    pair.with_suffix(".bin").write_bytes(b"weights")
    int8 = record(file=pair.name, file_sha256=form_sha256(pair), precision="int8", policy="int8", timing=timed(1))

    def choice() -> selection.Selection:
        return choose(candidates_of(model, "net", "fp32", VERIFIED, [record(), int8], HERE), HERE)

    assert choice().form == Form(pair, "openvino", "int8", "fp32")
    pair.with_suffix(".bin").write_bytes(b"other weights")
    assert choice().form.precision == "fp32"
    assert "has changed" in reason(choice(), "openvino", "int8")
    pair.unlink()
    assert "is missing" in reason(choice(), "openvino", "int8")


def test_a_record_cannot_lead_out_of_the_folder() -> None:
    result = chosen(record(file="../other/evil.xml", timing=timed(1)))
    assert all(candidate.form.file.parent == MODEL.parent for candidate in result.candidates)
    assert result.form.backend == "onnxruntime"


def test_a_gpu_has_its_own_candidates() -> None:
    here = Here("cuda:0", "cuda-8.6", HERE.versions)
    result = choose(candidates_of(MODEL, "net", "fp32", VERIFIED, [record()], here), here)
    assert {candidate.form.backend for candidate in result.candidates} == {"onnxruntime", "tensorrt"}
    assert (result.form.backend, result.verified) == ("onnxruntime", False)  # exported against a CPU


def test_the_table_names_everything() -> None:
    text = table(chosen(record(), record(**BF16, verdict="failed")), HERE)
    for words in ("openvino bf16 (m.onnx)", "parity failed", "10 ms per tile", "chosen     openvino fp32", "verified"):
        assert words in text
    assert text.splitlines()[-1].count("UNVERIFIED") == 0
    assert [line[0] for line in text.splitlines() if line.startswith(">")] == [">"]


# --- records


def test_records_are_kept_by_form_version_and_device(tmp_path: Path) -> None:
    path = records_path(tmp_path / "m.onnx")
    assert path.name == "m.parity-records.json"
    assert read_records(path) == ()
    for item in (record(), record(**BF16), record(timing=timed(7)), record(device_class="cpu-arm64")):
        add_record(path, item)
    kept = read_records(path)
    assert len(kept) == 3
    assert record(timing=timed(7)) in kept


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "damaged"), ('{"records_version": 1}', "damaged"), ('{"records_version": 2, "records": []}', "version 2")],
)
def test_damaged_records_are_not_skipped(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "m.parity-records.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=words):
        read_records(path)


def network(said: str, number: int, kind: str = "Relu") -> str:
    """An .xml in which OpenVINO gave a layer that number."""
    return f'<net><layer id="0" name="op_{number}" type="{kind}"/><cellseg>{said}</cellseg></net>'


def test_what_a_form_says_of_itself_is_not_the_form(tmp_path: Path) -> None:
    pair = tmp_path / "m.xml"
    pair.with_suffix(".bin").write_bytes(b"weights")
    hashes = set()
    for text in (network("fp32", 1), network("bf16", 2), network("bf16", 2, "Tanh")):
        pair.write_text(text)
        hashes.add(form_sha256(pair))
    assert len(hashes) == 2


def test_two_exports_at_once_lose_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellseg_deploy.backends import records as module

    path = records_path(tmp_path / "m.onnx")
    read = module.read_records

    def slowly(place: Path) -> tuple[ParityRecord, ...]:
        found = read(place)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(module, "read_records", slowly)
    threads = [threading.Thread(target=add_record, args=(path, record(file=f"{i}.xml"))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path)) == 3


def test_an_engine_that_cannot_run_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "engine_version", lambda name: "1.22")
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: object())
    for builds, device, words in (
        (["onnxruntime"], "cpu", ""),
        (["onnxruntime-gpu"], "cpu", ""),
        (["onnxruntime-gpu"], "cuda", ""),
        (["onnxruntime"], "cuda", "onnxruntime runs no NVIDIA GPU"),
        (["onnxruntime", "onnxruntime-gpu"], "cpu", "overwrite each other's files; keep one"),
    ):
        monkeypatch.setattr(device_module, "installed_builds", lambda found=builds: found)
        assert words in engine_problem("onnxruntime", device)
        assert bool(engine_problem("onnxruntime", device)) == bool(words)


def test_an_engine_of_which_only_the_metadata_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "engine_version", lambda name: "2026.1")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "pip install 'cellseg-deploy[openvino]'" in engine_problem("openvino", "cpu")


def test_kinds_of_device() -> None:
    spr = device_class("cpu", cpuinfo="flags : fpu avx2 avx512f avx512_bf16 amx_bf16")
    icx = device_class("cpu", cpuinfo="flags : fpu avx2 avx512f")
    old = device_class("cpu", cpuinfo="")
    assert len({spr, icx, old}) == 3
    assert spr.endswith("amx_bf16")
    assert device_class("cuda:0").startswith("cuda-")
    assert engine_version("tensorrt") is None or engine_version("tensorrt")


# --- with the engines


def write_record(path: Path, **changes: Any) -> None:
    """A record that fits ``path`` in OpenVINO on this machine, whatever the gate would have said."""
    values = {
        "file": path.name,
        "model_identity": read_model_file(path).identity,
        "engine_version": engine_version("openvino"),
        "device_class": device_class("cpu"),
    }
    add_record(records_path(path), record(**(values | changes)))


def verified_model(onnx_file: OnnxFile, **changes: Any) -> Path:
    return onnx_file(make_spec(parity=VERIFIED, **changes))


def test_open_takes_what_the_records_say(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = verified_model(onnx_file)
    with open_backend(path, EngineOptions(threads=1)) as backend:
        assert (backend.name, backend.verified) == ("onnxruntime", True)
    with open_backend(path, EngineOptions(backend="openvino", threads=1)) as backend:
        assert (backend.name, backend.verified) == ("openvino", False)
        assert "never compared" in backend.choice
    write_record(path)
    with open_backend(path, EngineOptions(threads=1)) as backend:
        assert (backend.name, backend.precision, backend.verified) == ("openvino", "fp32", True)
        assert "10 ms per tile" in backend.choice
    with open_backend(path, EngineOptions(backend="openvino", threads=1)) as backend:
        assert backend.verified
    with open_backend(path, EngineOptions(precision="fp32", threads=1)) as backend:
        assert backend.name == "openvino"
    write_record(path, model_identity="another net")
    msgspec.json.decode(records_path(path).read_bytes())
    # Calibrating changes the file but not the network: the record still speaks of it.
    from cellseg_deploy.models.onnx_file import write_spec

    write_spec(path, make_spec(parity=VERIFIED, name="calibrated"))
    with open_backend(path, EngineOptions(threads=1)) as backend:
        assert (backend.name, backend.spec.name) == ("openvino", "calibrated")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "onnxruntime", "precision": "bf16"}, "`precision` belongs to `backend='openvino'`"),
        ({"backend": "onnxruntime", "streams": 2}, "`streams` belongs to `backend='openvino'`"),
        ({"backend": "openvino", "rebuild": True}, "`rebuild` belongs to `backend='tensorrt'`"),
    ],
)
def test_a_setting_of_another_engine(onnx_file: OnnxFile, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_backend(onnx_file(), EngineOptions(**settings))


def test_forms_open_in_their_own_engine_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opens in openvino only"):
        open_backend(tmp_path / "m.xml", EngineOptions(backend="onnxruntime"))
    with pytest.raises(UsageError, match="opens in tensorrt only"):
        open_backend(tmp_path / "m.engine", EngineOptions(backend="openvino"))


def call(*arguments: object) -> int:
    return console.run(infer.command, [str(argument) for argument in arguments])


def test_explain_shows_the_choice_and_ends(onnx_file: OnnxFile, capsys: Any) -> None:
    path = verified_model(onnx_file)
    assert call("--explain", "--model", path) == 0
    text = capsys.readouterr().out
    assert "chosen     onnxruntime fp32 (stub.onnx), verified" in text
    assert "openvino bf16" in text
    assert call("--explain", "--model", path, "--backend", "onnxruntime") == 2
    assert call("--explain", "--model", path, "--device", "gpu") == 2
    assert call("--explain", "--model", path, "--device", "openvino") == 2
    assert call("--model", path) == 2
    assert "PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--rebuild"], ["--streams", "2"], ["--cuda-graph"], ["--like", "run.json"]],
)
def test_explain_takes_no_option_that_it_would_not_show(option: list[str], onnx_file: OnnxFile, capsys: Any) -> None:
    assert call("--explain", "--model", onnx_file(), *option) == 2
    assert f"{option[0]} and --explain exclude each other" in capsys.readouterr().err


def test_explain_shows_no_choice_that_the_run_would_refuse(
    onnx_file: OnnxFile, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = verified_model(onnx_file)
    monkeypatch.setattr(device_module, "installed_builds", lambda: ["onnxruntime"])
    assert call("--explain", "--model", path, "--device", "cuda") == 8
    assert "runs no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(device_module, "installed_builds", lambda: ["onnxruntime", "onnxruntime-gpu"])
    assert call("--explain", "--model", path) == 8
    assert "overwrite each other's files" in capsys.readouterr().err


def test_a_broken_engine_gives_way_to_the_next_and_says_so(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cellseg_deploy.backends import openvino as engine

    def broken() -> Any:
        raise BackendUnavailableError("OpenVINO is not installed or broken (libtbb.so)")

    if engine_version("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    path = verified_model(onnx_file)
    write_record(path)
    monkeypatch.setattr(engine, "import_openvino", broken)
    with caplog.at_level(logging.WARNING), open_backend(path, EngineOptions(threads=1)) as backend:
        assert (backend.name, backend.verified) == ("onnxruntime", True)
        assert "openvino fp32 (stub.onnx) was chosen before it, but cannot be loaded" in backend.choice
    assert "libtbb.so" in caplog.text


def test_run_json_says_whether_the_form_was_verified(onnx_file: OnnxFile, tmp_path: Path) -> None:
    import cv2

    smears = tmp_path / "smears"
    smears.mkdir()
    cv2.imwrite(str(smears / "a.png"), draw_discs((80, 80), [(30, 30)]))
    for parity, verified in ((VERIFIED, True), ("unverified", False)):
        path = onnx_file(make_spec(parity=parity), name=f"{verified}.onnx")
        out = tmp_path / f"out-{verified}"
        assert call(smears, "-o", out, "--model", path, "-q") == 0
        record_of_run = json.loads((out / "run.json").read_bytes())
        assert record_of_run["backend"]["verified"] is verified
        assert record_of_run["backend"]["choice"]


def test_without_records_no_engine_but_onnx_runtime_is_touched(onnx_file: OnnxFile) -> None:
    path = verified_model(onnx_file)
    program = (
        "import sys; from cellseg_deploy.backends import EngineOptions, open_backend, selection;"
        f"from pathlib import Path; selection.select(Path({str(path)!r}));"
        f"b = open_backend({str(path)!r}, EngineOptions(threads=1));"
        "assert b.name == 'onnxruntime' and b.verified, b.choice;"
        "sys.exit('openvino' in sys.modules or 'nncf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_precision_asked_for_is_that_of_the_whole_form(tmp_path: Path, onnx_file: OnnxFile) -> None:
    path = verified_model(onnx_file)
    pair = tmp_path / "stub.int8.xml"
    pair.write_bytes(b"<xml/>")
    pair.with_suffix(".bin").write_bytes(b"weights")
    write_record(path)
    int8 = {"file": pair.name, "file_sha256": form_sha256(pair), "precision": "int8", "timing": timed(1)}
    write_record(path, **int8)  # faster; computes what is not in 8 bits in fp32
    if engine_version("openvino") is not None:
        assert selection.select(path, precision="int8")[0].form.precision == "int8"
    assert selection.select(path, precision="fp32")[0].form.precision == "fp32"


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_form_in_fewer_bits_is_taken_only_if_asked_for(tmp_path: Path, onnx_file: OnnxFile, precision: str) -> None:
    """It lies beside the model that was named, passed the gate and is faster; that nobody asked for it decides."""
    path = verified_model(onnx_file)
    pair = tmp_path / "stub.small.xml"
    pair.write_bytes(b"<xml/>")
    pair.with_suffix(".bin").write_bytes(b"weights")
    write_record(path)
    small = {"file": pair.name, "file_sha256": form_sha256(pair), "precision": precision, "timing": timed(1)}
    write_record(path, **small)
    found, _ = selection.select(path)
    assert found.form.precision == "fp32"
    if engine_version("openvino") is not None:
        reasons = [c.reason for c in found.candidates if c.form.precision == precision and c.form.file == pair]
        assert reasons == [f"{precision}, the model is fp32: used only with `precision={precision!r}`"]


def test_streams_are_not_dropped_unsaid(onnx_file: OnnxFile) -> None:
    with pytest.raises(UsageError, match="`streams` belongs to `backend='openvino'`"):
        open_backend(verified_model(onnx_file), EngineOptions(streams=2))


def test_only_an_onnx_file_leaves_a_choice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"only an .onnx file"):
        selection.select(tmp_path / "m.xml")
