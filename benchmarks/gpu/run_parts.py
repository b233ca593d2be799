"""Parts of ``gpu-check`` that use the product as a user does: ``cellseg-infer``, ``cellseg-train``, the tests."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

from cellseg_benchmarks.gpu.bench import INFER, TRAIN, Bench, Done, OutOfTimeError
from cellseg_benchmarks.gpu.findings import Findings
from cellseg_benchmarks.gpu.plan import GPU_TESTS, ONE_OBJECT, SAME_BYTES, SAME_COUNTS, SAME_LOSSES, TRAINS
from cellseg_deploy.errors import BackendUnavailableError, DataError

_TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
_CLOSE = 0.01


def infer(at: Bench, found: Findings) -> None:
    """Run the command over sample smears on the CPU and twice on the device; compare stdout, counts and labels."""
    if reason := at.missing("onnxruntime"):
        raise BackendUnavailableError(reason)
    smears = _smears(at, "infer", 1 if at.dry else 6)
    for name, device in (("cpu", "cpu"), ("first", at.device), ("second", at.device)):
        out = at.work / "infer" / name
        where = ("--device", device, "--backend", "onnxruntime", "--model", at.shipped / "fp32.onnx")
        done = at.python(*INFER, smears / "images", "-o", out, "--json", "--quiet", *where)
        _need(done, f"cellseg-infer, {name}")
        if name == "first":
            _judge_stdout(done, found)
    cpu, first, second = (_counts(at.work / "infer" / name) for name in ("cpu", "first", "second"))
    found.fact("cells by image", {"cpu": cpu, at.device: first})
    words = f"{sum(map(int, first.values()))} cells in {len(first)} images, {sum(map(int, cpu.values()))} on the CPU"
    found.claim(SAME_COUNTS, "shown" if cpu == first else "refuted", words)
    labels = [_labels(at.work / "infer" / name) for name in ("first", "second")]
    alike = sum(labels[1].get(file) == digest for file, digest in labels[0].items())
    same = first == second and labels[0] == labels[1]
    found.claim(SAME_BYTES, "shown" if same else "refuted", f"{alike} of {len(labels[0])} files are equal")


def _judge_stdout(done: Done, found: Findings) -> None:
    try:
        json.loads(done.out)
    except ValueError:
        found.claim(ONE_OBJECT, "refuted", f"stdout begins {done.out[:200]!r}")
    else:
        found.claim(ONE_OBJECT, "shown", f"{len(done.out)} characters")


def _counts(run: Path) -> dict[str, str]:
    with (run / "images.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["cells"] for row in csv.DictReader(file)}


def _labels(run: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((run / "labels").iterdir())}


def training(at: Bench, found: Findings) -> None:
    """Train the small network for three epochs from random weights, twice with one seed."""
    at.require("torch", "torchvision", "timm", "safetensors")
    smears = _smears(at, "training", 4)
    given = (
        "--images",
        smears / "images",
        "--masks",
        smears / "masks",
        "--no-calibrate",
        "--quiet",
        "--weights",
        "none",
    )
    size = ("--epochs", 1, "--patches-per-image", 1) if at.dry else ("--epochs", 3, "--patches-per-image", 8)
    losses: list[list[float]] = []
    for name in ("first", "second"):
        out = at.work / "training" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        done = at.python(*TRAIN, *given, *size, "-o", out, "--device", at.device)
        if name == "first":
            found.claim(TRAINS, "shown" if done.code == 0 else "open" if done.cut_off else "refuted", done.words)
        _need(done, f"cellseg-train, {name}")
        with (out / "log.csv").open(newline="", encoding="utf-8") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
        found.fact(f"{name}: seconds", round(done.seconds, 1))
        found.fact(f"{name}: losses", losses[-1])
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    words = "equal bit for bit" if losses[0] == losses[1] else f"up to {apart:.1e} apart"
    found.claim(SAME_LOSSES, "shown" if apart <= _CLOSE else "refuted", f"{words}: {losses[0]}, {losses[1]}")


def tests(at: Bench, found: Findings) -> None:
    """Run the tests marked gpu."""
    done = at.python(
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        _TESTS / "backends",
        cwd=_TESTS.parent,
    )
    lines = [line.strip() for line in done.out.splitlines() if line.strip()]
    words = lines[-1] if lines else done.words
    found.fact("skipped", [line for line in lines if line.startswith("SKIPPED")])
    none_ran = done.code == 5 or (done.code == 0 and "passed" not in words)
    missing = "No module named pytest" in done.err or not _TESTS.is_dir()
    verdict = "open" if none_ran or missing or done.cut_off else "shown" if done.code == 0 else "refuted"
    found.claim(GPU_TESTS, verdict, words if done.out else done.words)  # type: ignore[arg-type]


def _smears(at: Bench, part: str, n: int) -> Path:
    smears = at.work / part / "smears"
    size = "400x300" if at.dry else "1600x1200"
    _need(at.python("-m", "cellseg_deploy.samples", smears, "--n", n, "--size", size, "--vary"), "sample smears")
    return smears


def _need(done: Done, what: str) -> None:
    """Raise unless the command succeeded: ``OutOfTimeError`` if it was cut off, else ``DataError``."""
    if done.cut_off:
        raise OutOfTimeError(f"{what}: {done.words}")
    if done.code:
        raise DataError(f"{what}: {done.words}")
