"""Time of each part of a network: ONNX Runtime's profile of its nodes next to the arithmetic of each.

Parts are the modules of the network, by the names that the export gave the graph: the encoder, the image branch, each
step of the decoder. The runtime fuses and renames nodes; each is identified by the value it produces. Nodes that the
runtime adds itself, to reorder values, are a separate part.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png
from cellseg_benchmarks.harness.flops import count_nodes
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, percent, table
from cellseg_deploy.errors import ModelError
from cellseg_deploy.models import default_model_path

OTHER, ADDED = "input and output", "added by the runtime"
_PART = re.compile(r"(encoder|branch|decoder(?:\.(?:project|steps\.\d+|head))?)\b")
_OF_TRANSFORMERS = ("BiasGelu", "SkipLayerNormalization")
_NAMES = {"encoder": "encoder", "branch": "image branch", "decoder": "decoder, between its convolutions"}


@dataclass(frozen=True)
class Part:
    """``seconds``: per tile. ``gflop``: per tile."""

    name: str
    seconds: float
    gflop: float


@dataclass(frozen=True)
class LayersReport:
    """Parts, slowest first. ``seconds``: per tile, all nodes together."""

    conditions: Conditions
    threads: int | None
    model: str
    batch: int
    seconds: float
    parts: tuple[Part, ...]
    benchmark: str = "layers"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return a table with one row per part."""
        gflop = sum(part.gflop for part in self.parts)
        rows = [
            [
                part.name,
                number(1000 * part.seconds),
                percent(part.seconds / self.seconds),
                number(part.gflop),
                percent(part.gflop / gflop),
                number(part.gflop / part.seconds) if part.gflop else "",
            ]
            for part in self.parts
        ]
        head = ("part", "ms per tile", "of the time", "GFLOP per tile", "of the arithmetic", "GFLOP/s")
        return "\n".join(
            [
                "# Where the time of the network goes",
                "",
                *machine_lines(self.conditions, self.threads),
                f"Model {self.model}, ONNX Runtime on the CPU, batches of {self.batch}; medians over calls of the "
                "runtime's own account of its nodes.",
                "",
                *table(head, rows),
                "",
            ]
        )


def measure_layers(
    path: Path, *, batch: int, calls: int, threads: int | None, progress: Progress | None = None
) -> tuple[list[Part], float]:
    """Parts of the .onnx file ``path`` and total seconds per tile, from ``calls`` batches of noise after a first.

    Raises ``ModelError`` if it is not an ONNX file, or its parts cannot be identified.
    """
    import onnx

    from cellseg_deploy.models.onnx_file import read_model_file

    file = read_model_file(path)
    model = onnx.load_model_from_string(file.data)
    part_of = parts_by_name(model)
    arithmetic: dict[str, float] = {}
    for node, flops in count_nodes(model, source=str(path)):
        name = part_of[node.name]
        arithmetic[name] = arithmetic.get(name, 0) + flops / 1e9
    taken = _profiled(
        file.data, (batch, file.spec.tile_size, file.spec.tile_size, 3), calls, threads, progress or Progress()
    )
    by_part: dict[str, float] = {}
    for node_name, seconds in taken.items():
        name = part_of.get(node_name) or _part_of_new(node_name)
        by_part[name] = by_part.get(name, 0) + seconds / batch
    if by_part.get(ADDED, 0) > 0.5 * sum(by_part.values()):
        raise ModelError(f"{path}: most of its nodes are not found again in what the runtime made of it")
    parts = [Part(name, seconds, arithmetic.get(name, 0)) for name, seconds in by_part.items()]
    return sorted(parts, key=lambda part: -part.seconds), sum(by_part.values())


def parts_by_name(model: Any) -> dict[str, str]:
    """The part of each node of an ``onnx.ModelProto``, by its name and by the names of the values it produces."""
    found: dict[str, str] = {}
    for node in model.graph.node:
        found |= dict.fromkeys((node.name, *node.output), _part(node.name) or OTHER)
    return found


def _part(name: str) -> str:
    match = _PART.match(name)
    return "" if match is None else _NAMES.get(match[1], match[1].replace(".", " "))


def _part_of_new(name: str) -> str:
    """The part of a node that the runtime fused from others: the encoder, if only transformers have such nodes."""
    return _part(name) or (_NAMES["encoder"] if name.startswith(_OF_TRANSFORMERS) else ADDED)


def _profiled(
    data: bytes, shape: tuple[int, ...], calls: int, threads: int | None, progress: Progress
) -> dict[str, float]:
    """Median seconds per call by node; names without the suffixes that the runtime adds."""
    from cellseg_deploy.backends.telemetry import import_onnxruntime

    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    if threads is not None:
        options.intra_op_num_threads = threads
    tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        done = 0
        with progress.stoppable(lambda: f"{calls + 1 - done} of {calls + 1} batches"):
            while done < calls + 1:
                session.run(None, {session.get_inputs()[0].name: tiles})
                done += 1
                if done > 1:  # the first call is excluded
                    progress.keep("batches", done)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return medians_by_node(events)


def medians_by_node(events: list[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each node in a profile of ONNX Runtime, the first call excluded."""
    seconds: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time").removesuffix("_nchwc")
            seconds.setdefault(name, []).append(event["dur"] / 1e6)
    return {name: float(np.median(values[1:])) for name, values in seconds.items() if len(values) > 1}


def png(report: LayersReport) -> bytes:
    """Bar chart with one bar per part."""
    bars = [
        Bar(part.name, 1000 * part.seconds, note=percent(part.seconds / report.seconds), group=part.name)
        for part in report.parts
    ]
    return panels_png([Bars("time of a tile by part of the network", "ms", tuple(bars))], title=report.model)


@click.command("layers", context_settings=shared.SETTINGS)
@click.option("--model", type=shared.PATH, help="An .onnx file.  [default: the one that ships]")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Tiles per call.")
@click.option("--calls", type=click.IntRange(1), default=15, show_default=True, help="Calls after the first.")
@shared.measuring_options
def layers_command(model: Path | None, batch_size: int, calls: int, **given: Any) -> None:
    """Where the time of a network goes, part by part, beside the arithmetic of each.

    From ONNX Runtime's own account of its nodes on the CPU. Writes layers.json, layers.md and layers.png to DIR.
    """
    path = model or default_model_path()
    bench = shared.Bench("layers", given)
    progress = bench.begin()
    bench.say(f"{calls + 1} batches of {batch_size} tiles")
    parts, seconds = measure_layers(path, batch=batch_size, calls=calls, threads=bench.threads, progress=progress)
    report = LayersReport(bench.conditions(), bench.threads, path.stem, batch_size, seconds, tuple(parts))
    bench.publish(report, png(report))
