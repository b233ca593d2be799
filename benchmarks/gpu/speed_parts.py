"""Parts of ``gpu-check`` that take time and memory, by the measuring commands of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellseg_benchmarks.gpu.bench import MEASURE, Bench
from cellseg_benchmarks.gpu.findings import Findings
from cellseg_benchmarks.gpu.plan import FOLDER, LARGE, MEMORY, SHIPPED, TIMED
from cellseg_benchmarks.harness.form_files import Network
from cellseg_benchmarks.harness.forms import forms_for
from cellseg_benchmarks.harness.worker import Worker, WorkerError
from cellseg_deploy.errors import BackendUnavailableError

_QUICK = ("--rounds", 1, "--min-seconds", 0, "--settle", 0, "--matrix-size", 64, "--budget", 1)


def latency(at: Bench, found: Findings) -> None:
    """Time every form of the shipped model, host to host."""
    at.require("torch", "timm", "safetensors")
    _latency(at, found, SHIPPED, at.weights, at.shipped, "8,1")


def latency_large(at: Bench, found: Findings) -> None:
    """Time every form of the ViT-L/14."""
    _latency(at, found, LARGE, at.large / "network.safetensors", at.large, "8,32")


def _latency(at: Bench, found: Findings, name: str, weights: Path, folder: Path, batches: str) -> None:
    lost: list[str] = []
    for batch in ("1",) if at.dry else batches.split(","):  # a command each: what is cut off loses one batch size
        out = at.work / f"latency-{folder.name}-{batch}"
        size: tuple[Any, ...] = ("--rounds", 10, "--settle", 0.05, "--budget", 20)
        if at.dry:
            size = (*_QUICK, "--forms", "pytorch-fp32,onnxruntime-fp32")
        given = ("--made", folder, "--device", at.device, "--batch-sizes", batch)
        done = at.python(*MEASURE, "latency", weights, *given, *size, "-q", "-o", out)
        if done.code:
            lost.append(f"batches of {batch}: {done.words}")
        if (out / "latency.md").is_file():
            found.table(f"{name}, batches of {batch}", (out / "latency.md").read_text(encoding="utf-8"))
    cut_off = bool(lost) and all("ended after" in words for words in lost)
    found.claim(
        TIMED.format(name), "open" if cut_off else "refuted" if lost else "shown", "; ".join(lost) or "tables below"
    )


def pipeline(at: Bench, found: Findings) -> None:
    """Run a folder from files to results; the table says how long the engine, decoding, labelling and writing take."""
    if reason := at.missing("onnxruntime"):
        raise BackendUnavailableError(reason)
    images = (
        ("--images", 1, "--megapixels", 0.1, "--warm", 0, "--matrix-size", 64)
        if at.dry
        else ("--images", 64, "--warm", 2)
    )
    given = ("--model", at.shipped / "fp16.onnx", "--backend", "onnxruntime", "--device", at.device)
    out = at.work / "pipeline"
    done = at.python(*MEASURE, "pipeline", *given, *images, "--formats", "png", "--rounds", 1, "-q", "-o", out)
    found.claim(FOLDER, "shown" if done.code == 0 else "open" if done.cut_off else "refuted", done.words)
    if (out / "pipeline.md").is_file():
        found.table("a folder from files to results", (out / "pipeline.md").read_text(encoding="utf-8"))


def memory(at: Bench, found: Findings) -> None:
    """Open each form in a process of its own and note the memory it takes, by batch size."""
    network = Network(SHIPPED, at.weights, at.shipped, {}, None)
    names = ["onnxruntime-fp32"] if at.dry else None
    lost: list[str] = []
    for form in forms_for([at.device], names):
        if network.missing(form) or at.missing(form.engine):
            continue
        for batch in (1,) if at.dry else (1, 8, 64):
            arguments: dict[str, Any] = {
                "engine": form.engine,
                "network": str(network.weights),
                "file": str(network.file(form)),
            }
            arguments |= {"device": form.device, "batch": batch, "threads": None, "settings": form.settings}
            try:
                with Worker("form", arguments) as worker:
                    peak = worker.peak()
            except WorkerError as error:
                lost.append(f"{form.name}, {batch} tiles: {error}")
                continue
            megabytes = None if peak.gpu_bytes is None else round(peak.gpu_bytes / 1e6)
            found.row(form=form.name, batch=batch, **{"GPU MB": megabytes, "host MB": round(peak.rss_bytes / 1e6)})
    n = len(found.content.rows)
    found.claim(MEMORY, "refuted" if lost or not n else "shown", "; ".join(lost) or f"{n} rows below")
