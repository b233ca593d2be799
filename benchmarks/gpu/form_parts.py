"""Parts of ``gpu-check`` about forms: making them, opening them, and whether they find the CPU's cells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_benchmarks.gpu.bench import EXPORT, Bench, Done
from cellseg_benchmarks.gpu.findings import Findings, Verdict
from cellseg_benchmarks.gpu.plan import (
    COUNTS,
    ENGINES,
    HALF_MADE,
    LARGE_MADE,
    ORT_ANSWERS,
    ORT_OPENS,
    ORT_SAME,
)
from cellseg_benchmarks.harness.forms import sample_tiles
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.errors import BackendUnavailableError, CellsegError

_BOUNDS = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest difference of probabilities from the CPU's fp32 that is no fault."""


def forms(at: Bench, found: Findings) -> None:
    """Copy the fp32 model and make its fp16 form, without the gate: ``counts`` is one on this card."""
    at.shipped.mkdir(parents=True)
    shutil.copyfile(at.model, at.shipped / "fp32.onnx")
    make_half(at.shipped)
    found.claim(HALF_MADE, "shown", f"{(at.shipped / 'fp16.onnx').stat().st_size / 1e6:.1f} MB")


def make_half(folder: Path) -> None:
    """Make fp16.onnx of fp32.onnx in ``folder``, as ``cellseg-export onnx --precision fp16`` does before the gate."""
    import msgspec
    import onnx

    from cellseg_deploy.files.atomic import write_bytes
    from cellseg_deploy.models import onnx_file
    from cellseg_export.forms.fp16_graph import check_types, to_half

    source = onnx_file.read_model_file(folder / "fp32.onnx")
    half = to_half(onnx.load_model_from_string(source.data))
    check_types(half)
    onnx_file.set_spec(half, msgspec.structs.replace(source.spec, parity="unverified"))
    write_bytes(folder / "fp16.onnx", half.SerializeToString(deterministic=True))


def ort(at: Bench, found: Findings) -> None:
    """Open both forms in ONNX Runtime on the device; compare with the CPU, and each with itself."""
    from cellseg_deploy.backends import EngineOptions, open_backend

    if reason := at.missing("onnxruntime"):
        raise BackendUnavailableError(reason)
    on_cpu = EngineOptions(backend="onnxruntime", device="cpu")
    with open_backend(at.shipped / "fp32.onnx", on_cpu) as cpu:
        tiles = sample_tiles(cpu.spec, 3 if at.dry else 11)
        expected = cpu.predict(tiles)
    opened: list[str] = []
    failed: list[str] = []
    for name in ("fp32", "fp16"):
        passed = stopwatch()
        try:
            backend = open_backend(at.shipped / f"{name}.onnx", EngineOptions(backend="onnxruntime", device=at.device))
        except CellsegError as error:
            failed.append(f"{name}: {error}")
            for sentence in (ORT_ANSWERS, ORT_SAME):
                found.claim(sentence.format(name), "refuted", str(error))
            continue
        with backend:
            seconds = passed()
            opened.append(f"{name} in {seconds:.1f} s, nodes {backend.describe()['nodes_by_provider']}")
            passed = stopwatch()
            whole = backend.predict(tiles)
            first = passed()
            again = backend.predict(tiles)
            single = np.concatenate([backend.predict(tiles[i : i + 1]) for i in range(len(tiles))])
        apart = float(np.abs(whole - expected).max())
        found.row(
            form=name,
            **{
                "s to open": round(seconds, 2),
                "s of the first call": round(first, 2),
                "apart from the CPU": apart,
                "one tile apart from the batch": float(np.abs(single - whole).max()),
                "same bits twice": bool(np.array_equal(whole, again)),
            },
        )
        good: Verdict = "shown" if apart <= _BOUNDS[name] else "refuted"
        found.claim(ORT_ANSWERS.format(name), good, f"largest difference {apart:.1e} over {len(tiles)} tiles")
        same = np.array_equal(whole, again)
        found.claim(ORT_SAME.format(name), "shown" if same else "refuted", f"in one process, {len(tiles)} tiles")
    found.claim(ORT_OPENS, "refuted" if failed else "shown", "; ".join(failed or opened))


def engines(at: Bench, found: Findings) -> None:
    """Build TensorRT engines, each compared with the CPU by the gate before it is kept."""
    if reason := at.missing("tensorrt"):
        raise BackendUnavailableError(reason)
    for name in ("fp16", "fp32"):
        made = at.shipped / f"{name}.engine"
        done = at.python(*EXPORT, "tensorrt", at.shipped / "fp32.onnx", "-o", made, "--precision", name)
        found.claim(ENGINES.format(name), _verdict(done), done.words)


def counts(at: Bench, found: Findings) -> None:
    """Compare the counts of every form on the device with those of the fp32 model on the CPU, on sample smears."""
    candidates: list[tuple[str, Path, str]] = []
    try:
        candidates.append(("PyTorch fp32", at.weights, at.missing("pytorch")))
    except BackendUnavailableError as error:
        found.claim(COUNTS.format("PyTorch fp32"), "open", str(error))
    reason = at.missing("onnxruntime")
    candidates += [(f"ONNX Runtime {name}", at.shipped / f"{name}.onnx", reason) for name in ("fp32", "fp16")]
    for name, file, missing in candidates:
        if missing:
            found.claim(COUNTS.format(name), "open", missing)
            continue
        backend = () if file.suffix != ".onnx" else ("--backend", "onnxruntime")
        where = ("--device", at.device, "--reference-device", "cpu")
        done = at.python(*EXPORT, "verify", at.shipped / "fp32.onnx", file, *where, *backend)
        said = [line.strip() for line in done.out.splitlines() if line.startswith(("counting ", "verdict", "  - "))]
        found.claim(COUNTS.format(name), _verdict(done), "; ".join(said) or done.words)
        if at.dry:  # each takes a minute on a CPU
            break


def large(at: Bench, found: Findings) -> None:
    """Make a ViT-L/14 with random weights and its ONNX forms: to be timed, not to count with."""
    import msgspec
    import torch

    from cellseg_deploy.models import default_weights_path
    from cellseg_deploy.models.spec import WeightsInfo
    from cellseg_export.forms.onnx import write_graph
    from cellseg_train.checkpoint import LoadedNetwork, load_network, save_network
    from cellseg_train.config import ModelConfig
    from cellseg_train.loop import halo_of
    from cellseg_train.model import CellSegNet, enliven_layer_scale

    shape: dict[str, Any] = {"tile_size": 56, "tiny_depth": 1, "tiny_width": 48} if at.dry else {"encoder": "large"}
    config = ModelConfig(image_skip=(), **shape)
    torch.manual_seed(0)
    net = CellSegNet(config).eval()
    enliven_layer_scale(net, 0.2)  # as in ``network``: otherwise the blocks of a random ViT add nothing
    spec = msgspec.structs.replace(
        load_network(default_weights_path()).spec,
        name=f"random-{config.encoder}",
        variant=config.variant,
        channels=config.channels,
        tile_size=config.tile_size,
        halo=halo_of(config.tile_size),
        patch_size=net.patch_size,
        encoder=config.encoder_name,
        weights=WeightsInfo(origin="random initialisation", licence="MIT"),
        parity="unverified",
        classes=(),
    )
    at.large.mkdir(parents=True)
    network = LoadedNetwork(net, config, spec)
    save_network(at.large / "network.safetensors", net.state_dict(), config, spec)
    write_graph(network, at.large / "fp32.onnx")
    make_half(at.large)
    size = (at.large / "fp32.onnx").stat().st_size
    if not at.missing("tensorrt"):
        engine = ("-o", at.large / "fp16.engine", "--unverified")  # it finds no cells to compare
        found.fact("TensorRT engine", at.python(*EXPORT, "tensorrt", at.large / "fp32.onnx", *engine).words)
    found.claim(LARGE_MADE, "shown", f"{config.encoder_name}, {size / 1e6:.0f} MB in fp32")


def cudnn(at: Bench, found: Findings) -> None:
    """Time ways in which ONNX Runtime chooses cuDNN's algorithms; on the CPU, which has none, the session alone."""
    from cellseg_deploy.backends.onnxruntime import import_runtime
    from cellseg_deploy.backends.onnxruntime_binding import BoundSession
    from cellseg_deploy.models.onnx_file import read_model_file

    if reason := at.missing("onnxruntime"):
        raise BackendUnavailableError(reason)
    runtime = import_runtime(at.device)
    for name in ("fp16", "fp32"):
        model = read_model_file(at.shipped / f"{name}.onnx")
        for search in ("HEURISTIC", "DEFAULT", "EXHAUSTIVE")[: 1 if at.dry else None]:
            settings = {"device_id": 0, "use_tf32": 0, "cudnn_conv_algo_search": search}
            provider = "CPUExecutionProvider" if at.dry else ("CUDAExecutionProvider", settings)
            session = runtime.InferenceSession(model.data, providers=[provider], enable_fallback=0)
            bound = BoundSession(runtime, session, model.spec, device_type=at.device)
            for batch in (1,) if at.dry else (8, 3):
                tiles = sample_tiles(model.spec, batch)
                passed = stopwatch()
                answer = bound.run(tiles)
                first = passed()
                passed = stopwatch()
                calls = 2 if at.dry else 20
                for _ in range(calls):
                    again = bound.run(tiles)
                found.row(
                    form=name,
                    search=search,
                    batch=batch,
                    **{
                        "ms of the first call": round(1e3 * first, 2),
                        "ms a tile": round(1e3 * passed() / calls / batch, 3),
                        "same bits": bool(np.array_equal(answer, again)),
                    },
                )


def _verdict(done: Done) -> Verdict:
    return "shown" if done.code == 0 else "open" if done.cut_off else "refuted"
