"""The parts of ``gpu-check`` in their order: what needs the GPU first, and of that the shortest answers first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import UsageError


@dataclass(frozen=True)
class Part:
    """One part: the function ``name`` in ``module`` of this room. ``seconds``: its own limit. ``needs``: parts whose
    files it reads, which run before it. ``claims``: the sentences it can show; those it did not reach are open."""

    name: str
    module: str
    about: str
    seconds: float
    claims: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


TORCH_RUNS = "PyTorch runs on the device"
PEAKS = "the peaks of the card are measured: matrix products by precision, bandwidth of its memory"
HALF_MADE = "the fp16 ONNX form of the shipped model is made"
ORT_OPENS = "ONNX Runtime opens the device, and all heavy operators run there"
ORT_ANSWERS = "ONNX Runtime answers as the CPU's fp32 does: {}"
ORT_SAME = "ONNX Runtime gives the same bits for the same tiles twice: {}"
COUNTS = "cells are those of the CPU in fp32, by the gate: {}"
ONE_OBJECT = "cellseg-infer --json writes one JSON object to stdout and nothing else"
SAME_COUNTS = "cellseg-infer counts as on the CPU, image by image"
SAME_BYTES = "the same folder twice gives the same label images, byte for byte"
TRAINS = "cellseg-train trains three epochs, validates and saves"
SAME_LOSSES = "two trainings with one seed agree within 1 % of the loss"
GPU_TESTS = "the tests marked gpu pass"
ENGINES = "cellseg-export tensorrt builds an engine that counts as the CPU does: {}"
TIMED = "every form of the {} is timed beside PyTorch and the peak of the card"
LARGE_MADE = "a ViT-L/14 with random weights is made, and its ONNX forms"
FOLDER = "a folder of photographs runs from files to results"
MEMORY = "memory of each form is measured by batch size"
RTX_BUILDS = "TensorRT-RTX parses the fp16 graph and builds it ahead of time"
RTX_OPENS = "TensorRT-RTX builds for this card and opens the engine"
_FORMS = ("fp32", "fp16")
SHIPPED, LARGE = "shipped model", "ViT-L/14"

PARTS = (
    Part("facts", "machine_parts", "card, driver, versions", 90, (TORCH_RUNS,)),
    Part("limits", "machine_parts", "what the card does at most", 150, (PEAKS,)),
    Part("forms", "form_parts", "forms of the shipped model", 120, (HALF_MADE,)),
    Part(
        "ort",
        "form_parts",
        "ONNX Runtime's CUDA provider",
        180,
        (ORT_OPENS, *(ORT_ANSWERS.format(f) for f in _FORMS), *(ORT_SAME.format(f) for f in _FORMS)),
        ("forms",),
    ),
    Part(
        "engines", "form_parts", "TensorRT engines", 420, tuple(ENGINES.format(f) for f in ("fp16", "fp32")), ("forms",)
    ),
    Part(
        "counts",
        "form_parts",
        "counts of every form beside the CPU's",
        300,
        tuple(COUNTS.format(f) for f in ("PyTorch fp32", "ONNX Runtime fp32", "ONNX Runtime fp16")),
        ("forms",),
    ),
    Part("infer", "run_parts", "cellseg-infer beside the CPU", 180, (ONE_OBJECT, SAME_COUNTS, SAME_BYTES), ("forms",)),
    Part("training", "run_parts", "three epochs, twice", 240, (TRAINS, SAME_LOSSES)),
    Part("tests", "run_parts", "pytest -m gpu", 180, (GPU_TESTS,)),
    Part("latency", "speed_parts", "time a tile, shipped model", 360, (TIMED.format(SHIPPED),), ("forms",)),
    Part("large", "form_parts", "a ViT-L/14 and its forms", 480, (LARGE_MADE,)),
    Part("latency_large", "speed_parts", "time a tile, ViT-L/14", 480, (TIMED.format(LARGE),), ("large",)),
    Part("pipeline", "speed_parts", "a folder, and where the time goes", 240, (FOLDER,), ("forms",)),
    Part("memory", "speed_parts", "memory by form and batch size", 240, (MEMORY,), ("forms",)),
    Part("cudnn", "form_parts", "choice of cuDNN's algorithms, timed", 150, (), ("forms",)),
    Part("rtx", "machine_parts", "TensorRT-RTX on this card", 240, (RTX_BUILDS, RTX_OPENS), ("forms",)),
)


def chosen_parts(names: Sequence[str] | None) -> tuple[Part, ...]:
    """Return the parts ``names``, all by default, in their order, with those they need. Raises ``UsageError``."""
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names or () if name not in known]
    if unknown or names == []:
        raise UsageError(f"no part named {', '.join(unknown) or '(none)'}; there are {', '.join(known)}")
    wanted = set(known if names is None else names)
    wanted |= {need for name in wanted for need in known[name].needs}
    return tuple(part for part in PARTS if part.name in wanted)


def findings_path(out: Path, name: str) -> Path:
    """Return the file that the part ``name`` keeps its findings in."""
    return out / "parts" / f"{name}.json"
