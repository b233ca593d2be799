"""``python -m cellseg_benchmarks layers``."""

from __future__ import annotations

from pathlib import Path

import click

from cellseg_benchmarks import options as shared


@click.command("layers", context_settings=shared.SETTINGS)
@click.option("--model", type=shared.PATH, help="An .onnx file.  [default: the one that ships]")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Tiles a call.")
@click.option("--calls", type=click.IntRange(1), default=15, show_default=True, help="Calls after the first.")
@shared.measuring_options
def layers_command(
    model: Path | None, batch_size: int, calls: int, output: Path, threads: int | None, quiet: bool
) -> None:
    """Where the time of a network goes, part by part, beside the arithmetic of each.

    From ONNX Runtime's own account of its nodes on the CPU. Writes layers.json, layers.md and layers.png to DIR.
    """
    from cellseg_benchmarks.engine import layers
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_deploy.models import default_model_path

    path = model or default_model_path()
    machine, before = shared.start()
    new_folder(output)
    progress = shared.progress(output, "layers")
    shared.teller(quiet)(f"{calls + 1} batches of {batch_size} tiles")
    parts, seconds = layers.measure_layers(path, batch=batch_size, calls=calls, threads=threads, progress=progress)
    report = layers.LayersReport(
        shared.conditions(machine, before), threads, path.stem, batch_size, seconds, tuple(parts)
    )
    shared.publish(output, report, layers.png(report), progress)
