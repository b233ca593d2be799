"""scripts/gpu-check: its report is whole after each part, says what was shown, refuted or left open, and never more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cellseg_benchmarks import gpu_check
from cellseg_benchmarks.gpu import plan
from cellseg_benchmarks.gpu.bench import Bench
from cellseg_benchmarks.gpu.findings import Claim, Content, Findings, read_content
from cellseg_benchmarks.gpu.part import CUT_OFF, UNAVAILABLE, run_part
from cellseg_benchmarks.gpu.plan import PARTS, Part, chosen_parts, findings_path
from cellseg_benchmarks.gpu.report import Report, part_report
from cellseg_benchmarks.harness import machine
from cellseg_deploy import backends
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.models import default_model_path

OnnxFile = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="process groups and shell scripts")


# --- the plan


def test_parts_exist_and_claim_different_things() -> None:
    for part in PARTS:
        assert callable(getattr(import_module(f"cellseg_benchmarks.gpu.{part.module}"), part.name))
        assert all(PARTS.index(known) < PARTS.index(part) for known in PARTS if known.name in part.needs)
    sentences = [sentence for part in PARTS for sentence in part.claims]
    assert len(set(sentences)) == len(sentences)


def test_a_choice_brings_what_it_needs() -> None:
    assert [part.name for part in chosen_parts(["counts", "facts"])] == ["facts", "forms", "counts"]
    assert chosen_parts(None) == PARTS
    for names in (["ort", "speed"], []):
        with pytest.raises(UsageError, match="there are facts, limits"):
            chosen_parts(names)


def test_tests_that_need_a_gpu_are_where_the_check_looks() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark." + "gpu\n" in path.read_text()]
    assert {path.parent.name for path in marked} == {"backends"}


# --- the report


ONE = Part("one", "machine_parts", "about one", 60, ("a is so", "b is so"))
TWO = Part("two", "machine_parts", "about two", 60, ("c is so",))


def content(*claims: Claim, **more: Any) -> Content:
    return Content(list(claims), **more)


@pytest.mark.parametrize(
    ("status", "verdict", "why"),
    [
        ("done", "open", "not tried"),
        ("waiting", "open", "not reached yet"),
        ("cannot run", "open", "not installed"),
        ("cut off", "open", "not installed"),
        ("failed", "refuted", "not installed"),
    ],
)
def test_claims_that_were_not_reached(status: Any, verdict: str, why: str) -> None:
    detail = "not installed" if why == "not installed" else ""
    report = part_report(ONE, status, 1, detail, content(Claim("b is so", "shown", "3 of 3")))
    assert report.claims == (Claim("a is so", verdict, why), Claim("b is so", "shown", "3 of 3"))  # type: ignore[arg-type]


def report_of(*verdicts: Any, status: Any = "done") -> Report:
    claims = [Claim(f"claim {i}", verdict, "e") for i, verdict in enumerate(verdicts)]
    part = part_report(Part("one", "machine_parts", "", 1), status, 1, "", content(*claims))
    return Report({"device": "RTX A"}, False, (part,))


def test_only_a_whole_check_ends_well() -> None:
    assert report_of("shown").exit_code == 0
    assert report_of("shown", "open").exit_code == 8
    assert report_of("shown", "open", "refuted").exit_code == 5
    assert report_of("shown", status="cut off").exit_code == 8
    assert report_of("shown", status="failed").exit_code == 5


def test_the_page() -> None:
    found = content(
        Claim("a | is so", "refuted", "1\n2"), rows=[{"form": "fp16", "ms a tile": 1.23456, "GPU MB": None}]
    )
    found.facts["driver"] = "580"
    found.tables["limits"] = "# What it can do\n\n| x |\n\n![limits](limits.png)\n"
    page = Report({"device": "RTX | A"}, True, (part_report(ONE, "done", 61.2, "", found),)).to_markdown()
    for line in (
        "| device | RTX \\| A |",
        "| a \\| is so | **refuted** | 1 2 |",
        "| b is so | **open** | not tried |",
        "| one | done | 61 | about one |  |",
        "| fp16 | 1.235 |  |",
        "- driver: 580",
        "## one: limits",
    ):
        assert f"{line}\n" in page
    assert "nothing here is about a GPU" in page
    assert ".png" not in page
    assert "Not complete" not in page
    assert page.index("| claim |") < page.index("| part |") < page.index("## one")
    assert "Not complete" in report_of("shown", status="running").to_markdown()


# --- the loop


def finding(*verdicts: Any) -> gpu_check.RunPart:
    """A part that has something to say on each of its claims, and is done."""

    def run(part: Part, out: Path, *_: Any) -> tuple[Any, str]:
        found = Findings(findings_path(out, part.name))
        for sentence, verdict in zip(part.claims, verdicts, strict=False):
            found.claim(sentence, verdict, "as seen")
        return "done", ""

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in ("parts", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu-check.json").read_bytes())
    return found


def test_the_report_is_rewritten_after_each_part(out: Path) -> None:
    seen: list[list[str]] = []

    def run(part: Part, *arguments: Any) -> Any:
        seen.append([one["status"] for one in read(out)["parts"]])
        assert not read(out)["complete"]
        assert "Not complete" in (out / "gpu-check.md").read_text()
        return finding("shown", "shown")(part, *arguments)

    report = gpu_check.check((ONE, TWO), out, Path("m.onnx"), {}, run=run)
    assert seen == [["running", "waiting"], ["done", "running"]]
    assert (report.exit_code, read(out)["complete"], read(out)["report_version"]) == (0, True, 3)
    assert (out / "gpu-check.md").read_text() == report.to_markdown()


def test_what_there_is_no_time_for_is_open(out: Path) -> None:
    report = gpu_check.check((ONE, TWO), out, Path("m.onnx"), {}, seconds=1, run=finding("shown"))
    assert [part.status for part in report.parts] == ["cut off", "cut off"]
    assert {(claim.verdict, claim.evidence) for claim in report.claims} == {("open", "no time was left for it")}
    assert report.exit_code == 8


def test_a_part_has_its_own_limit_and_no_more_than_is_left(out: Path) -> None:
    given: list[float] = []

    def run(part: Part, out: Path, model: Path, seconds: float, dry: bool) -> Any:
        given.append(seconds)
        return "done", ""

    gpu_check.check((ONE,), out, Path("m.onnx"), {}, run=run)
    gpu_check.check((ONE,), out, Path("m.onnx"), {}, seconds=30, run=run)
    assert given[0] == 60
    assert 20 < given[1] <= 30


def test_a_signal_leaves_what_was_found(out: Path) -> None:
    def run(part: Part, *arguments: Any) -> Any:
        finding("shown")(part, *arguments)
        if part is TWO:
            raise KeyboardInterrupt
        return "done", ""

    with pytest.raises(KeyboardInterrupt):
        gpu_check.check((ONE, TWO), out, Path("m.onnx"), {}, run=run)
    first, second = read(out)["parts"]
    assert (first["status"], second["status"], second["detail"]) == ("done", "stopped", "stopped by a signal")
    assert second["claims"][0]["verdict"] == "shown"


# --- the process of a part


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the parts' Python a shell script."""

    def become(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(gpu_check.sys, "executable", str(program))

    return become


@posix
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo words; exit 0", ("done", "")),
        ("echo words; echo; exit 1", ("failed", "exit code 1: words")),
        ("kill -SEGV $$", ("failed", "exit code -11: no message")),
        (f"exit {UNAVAILABLE}", ("cannot run", "")),
        (f"exit {CUT_OFF}", ("cut off", "")),
    ],
)
def test_how_a_process_ends(out: Path, python: Callable[[str], None], script: str, expected: tuple[str, str]) -> None:
    python(script)
    assert gpu_check.run_process(ONE, out, Path("m.onnx"), 60, False) == expected


@posix
def test_a_part_that_is_cut_off_ends_with_all_it_started(out: Path, python: Callable[[str], None]) -> None:
    """A worker left behind would hold the card's memory, and its pipes would never close."""
    if not Path(f"/proc/{os.getpid()}/fd").is_dir():
        pytest.skip("no /proc here")
    reading, writing = os.pipe()
    python(f"sleep 600 >/proc/{os.getpid()}/fd/{writing} & sleep 600")
    status, detail = gpu_check.run_process(ONE, out, Path("m.onnx"), 1, False)
    assert (status, detail) == ("cut off", "ended after 1 s")
    os.close(writing)
    assert os.read(reading, 1) == b""  # blocks as long as anyone has it open
    os.close(reading)


@posix
def test_a_part_ends_with_all_it_started_when_the_check_dies() -> None:
    program = "import subprocess, threading\nfrom cellseg_benchmarks.gpu.part import end_with_parent\n"
    program += "threading.Thread(target=end_with_parent).start()\nsubprocess.run(['sleep', '600'])"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # as the kernel does when its other end dies
        assert process.stdout.read() == b""  # blocks as long as the command that it started has it open
        assert process.wait(60) == -9


def test_a_package_that_is_missing_leaves_its_claims_open(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cellseg_benchmarks.gpu.bench.engine_problem", lambda engine, device: f"{engine} is not installed"
    )
    assert run_part("engines", out, default_model_path(), 60, dry=True) == UNAVAILABLE
    assert read_content(findings_path(out, "engines")).facts["problem"] == "tensorrt is not installed"


@posix
def test_what_was_cut_off_refutes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    hangs = Bench(out, default_model_path(), 0, dry=True).python("-c", "import signal; signal.pause()")
    monkeypatch.setattr(Bench, "python", lambda *_, **__: hangs)
    assert run_part("infer", out, default_model_path(), 60, dry=True) == CUT_OFF
    content = read_content(findings_path(out, "infer"))
    assert content.facts["problem"] == "sample smears: exit code -9: ended after 1 s"
    assert content.claims == []


def test_a_part_without_pytorch_is_open(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("training", "latency"):
        assert run_part(name, out, default_model_path(), 60, dry=True) == UNAVAILABLE
        assert "not installed: torch" in read_content(findings_path(out, name)).facts["problem"]


def test_a_model_of_ones_own_is_not_compared_with_the_shipped_network(out: Path, onnx_file: OnnxFile) -> None:
    for name in ("latency", "memory"):
        assert run_part(name, out, onnx_file(), 60, dry=True) == UNAVAILABLE
        assert "no PyTorch network of stub.onnx" in read_content(findings_path(out, name)).facts["problem"]


def test_a_part_that_breaks_says_how(out: Path) -> None:
    assert run_part("forms", out, out / "none.onnx", 60, dry=True) == 1
    assert "none.onnx" in read_content(findings_path(out, "forms")).facts["problem"]


def test_a_provider_that_is_there_and_does_not_open_is_refuted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    assert run_part("forms", out, default_model_path(), 60, dry=True) == 0
    real, opened = backends.open_backend, list[Any]()

    def only_the_reference(*arguments: Any) -> Any:
        opened.append(arguments)
        if len(opened) > 1:
            raise BackendUnavailableError("ONNX Runtime could not open the GPU: CUDA failure 100")
        return real(*arguments)

    monkeypatch.setattr(backends, "open_backend", only_the_reference)
    assert run_part("ort", out, default_model_path(), 60, dry=True) == 0
    claims = read_content(findings_path(out, "ort")).claims
    assert {claim.verdict for claim in claims} == {"refuted"}
    assert {claim.sentence for claim in claims} == set(plan.PARTS[3].claims)
    assert all("CUDA failure 100" in claim.evidence for claim in claims)


# --- the command


def test_without_a_gpu_it_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "look_for_gpu", lambda: (None, "no NVIDIA GPU can be used here (no driver)"))
    assert console.run(gpu_check.command, ["-o", str(tmp_path / "out")]) == 8
    message = capsys.readouterr().err
    assert message.startswith("error: no NVIDIA GPU can be used here (no driver)")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_the_command_refuses(onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "look_for_gpu", lambda: ({"name": "RTX A"}, ""))
    given = ["-o", str(tmp_path / "out")]
    assert console.run(gpu_check.command, ["--only", "ort,none", *given]) == 2
    assert console.run(gpu_check.command, ["--minutes", "0", *given]) == 2
    assert console.run(gpu_check.command, ["--model", str(tmp_path / "none.onnx"), *given]) == 5
    assert not (tmp_path / "out").exists()
    assert console.run(gpu_check.command, ["-o", str(onnx_file().parent)]) == 6  # files of others are left alone
    assert onnx_file().is_file()


@pytest.mark.parametrize("smi", [True, False])
def test_a_gpu_is_found_without_its_bindings(smi: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch includes its own CUDA, and a container may lack nvidia-smi."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from cellseg_deploy.backends import cuda_runtime

    def missing() -> Any:
        raise BackendUnavailableError("NVIDIA's CUDA bindings cannot be loaded; run: pip install cuda-bindings")

    monkeypatch.setattr(cuda_runtime, "import_bindings", missing)
    card = SimpleNamespace(name="RTX A", major=9, minor=0, total_memory=2**36)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}" if smi else None)
    monkeypatch.setattr(machine, "DRIVER_SIGNS", () if smi else (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    gpu, reason = machine.look_for_gpu()
    assert gpu is not None
    assert (gpu["name"], gpu["compute_capability"], reason) == ("RTX A", "9.0", "")


def dry_run(out: Path, *only: str) -> list[str]:
    words = [sys.executable, "-m", "cellseg_benchmarks.gpu_check", "--dry-run", "-o", str(out)]
    return [*words, *(("--only", ",".join(only)) if only else ())]


def rehearsed(out: Path, *only: str) -> dict[str, Any]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    done = subprocess.run(dry_run(out, *only), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 8), done.stdout + done.stderr
    report = read(out)
    assert (report["complete"], report["dry"]) == (True, True)
    assert "nothing here is about a GPU" in (out / "gpu-check.md").read_text()
    broken = {part["name"]: part["detail"] for part in report["parts"] if part["status"] not in ("done", "cannot run")}
    assert broken == {}
    assert "refuted" not in {claim["verdict"] for part in report["parts"] for claim in part["claims"]}
    return report


def test_the_rehearsal(tmp_path: Path) -> None:
    report = rehearsed(tmp_path / "out", "facts", "ort", "large")
    assert [part["name"] for part in report["parts"]] == ["facts", "forms", "ort", "large"]
    assert {claim["verdict"] for part in report["parts"] for claim in part["claims"]} == {"shown"}
    facts = report["parts"][0]["found"]["facts"]
    assert facts["torch"]["tf32 here"] is False


@pytest.mark.night
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    report = rehearsed(tmp_path / "out")
    assert [part["name"] for part in report["parts"]] == [part.name for part in PARTS]


@posix
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_killed_at_any_moment_it_leaves_a_report_and_no_process(tmp_path: Path, lines: int) -> None:
    """Killed when the first part has begun, when it is done, when the second has begun."""
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "out"
    process = subprocess.Popen(
        dry_run(out, "facts", "forms"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(lines)]
    parts = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert said[0] == "facts: card, driver, versions ...\n"
    report = read(out)
    assert not report["complete"]
    first = report["parts"][0]
    assert first["status"] == ("running" if lines == 1 else "done")
    assert "| facts | " in (out / "gpu-check.md").read_text()
    if lines > 1:
        assert "**shown**" in (out / "gpu-check.md").read_text()
    _, alive = psutil.wait_procs(parts, timeout=60)
    assert alive == []


# --- the script


@posix
def test_the_script_installs_nothing_without_a_gpu(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\nexit 9\n")
    smi.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CELLSEG_PYTHON"}
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check"],
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (BackendUnavailableError.exit_code, "")
    assert done.stderr.startswith("error: no NVIDIA GPU can be used here")
    assert not (ROOT / ".venv-gpu").exists()


@posix
def test_the_script_uses_the_environment_it_is_given(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check", "--model", "x.onnx"],
        env=os.environ | {"CELLSEG_PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-m cellseg_benchmarks.gpu_check --model x.onnx\n"
