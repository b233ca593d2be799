"""``cellseg-export openvino`` and ``cellseg-export int8``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import console
from cellseg_export import cli_options as shared

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground
    from cellseg_export.forms.openvino import ExportedIr, Precision, Weights

_output_option = click.option(
    "-o", "--output", required=True, metavar="OUT.xml", type=shared.PATH, help="File to write, with OUT.bin beside it."
)


@click.command("openvino", context_settings=shared.SETTINGS, epilog=shared.EPILOG)
@click.argument("source", metavar="MODEL.onnx|RUN", type=shared.PATH)
@_output_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Arithmetic to compare and record; bf16 needs a CPU that has it. The file itself runs in either.",
)
@click.option(
    "--weights",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="How weights are stored: fp16 halves the file and rounds them; no faster.",
)
@shared.images_option
@shared.masks_option
@shared.unverified_option
@shared.batch_option
@shared.threads_option
@console.log_options
def openvino_command(
    source: Path,
    output: Path,
    precision: Precision,
    weights: Weights,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    unverified: bool,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Write a model for OpenVINO on CPUs: OUT.xml and OUT.bin, which belong together.

    Before they get their names they are run against MODEL.onnx in ONNX Runtime (RUN: in PyTorch) on images; the
    comparison is kept as OUT.xml.parity.json, that of a refused model as OUT.xml.refused.json. OpenVINO runs MODEL.onnx
    itself just as well: cellseg-infer --backend openvino.
    """
    console.set_up_logging(verbose)
    console.require_packages("openvino", "openvino")
    _require_origin(source)

    from cellseg_export.forms.openvino import export_openvino

    given = shared.gate_images(images, masks, mask_foreground)
    shared.set_threads(threads)
    exported = export_openvino(
        source,
        output,
        weights=weights,
        precision=precision,
        images=given,
        unverified=unverified,
        tile_batch=tile_batch,
        threads=threads,
        on_image=lambda name: None if quiet else click.echo(f"compared {console.printable(name)}", err=True),
    )
    if not quiet:
        _print(exported, source)


@click.command("int8", context_settings=shared.SETTINGS, epilog=shared.EPILOG)
@click.argument("source", metavar="MODEL.onnx", type=shared.PATH)
@_output_option
@shared.images_option
@shared.masks_option
@click.option(
    "--calibration",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images to take the ranges of activations from.  [default: those it is judged by]",
)
@click.option("--tiles", type=click.IntRange(8), default=128, show_default=True, help="Tiles to calibrate with.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="How much F1 against the masks may fall, at every operating point.",
)
@click.option("--no-back-off", is_flag=True, help="Refuse at once if the drop is too large.")
@shared.batch_option
@shared.threads_option
@console.log_options
def int8_command(
    source: Path,
    output: Path,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    calibration: Path | None,
    tiles: int,
    max_drop: float,
    no_back_off: bool,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Quantise a model to 8 bits for OpenVINO on CPUs, and keep it only if it still finds the cells.

    Judged by F1 against true masks: --images with --masks, by default sample smears, whose truth is known. Where F1
    falls by more than --max-drop, operations go back to floating point one after the other until it does not; the
    report and the file name them.
    """
    console.set_up_logging(verbose)
    if images is not None and masks is None:
        raise click.UsageError("int8 is judged by true cells: give --masks for --images, or neither")
    console.require_packages("int8", "openvino", "nncf")
    _require_origin(source)

    from cellseg_export.forms.int8 import Int8Options, export_int8
    from cellseg_export.gate.verify import folder_images

    given = shared.gate_images(images, masks, mask_foreground)
    exported = export_int8(
        source,
        output,
        options=Int8Options(n_tiles=tiles, max_f1_drop=max_drop, back_off=not no_back_off),
        images=given,
        calibration=None if calibration is None else folder_images(calibration),
        tile_batch=tile_batch,
        threads=threads,
        on_image=lambda name: None if quiet else click.echo(f"compared {console.printable(name)}", err=True),
        on_step=lambda text: None if quiet else click.echo(text, err=True),
    )
    if not quiet:
        _print(exported, source)
        kept = exported.facts.floating
        click.echo(f"floating   {', '.join(kept) if kept else 'nothing had to go back to floating point'}")


def _require_origin(source: Path) -> None:
    if source.suffix.lower() == ".onnx":
        shared.require_runtime()
    else:
        console.require_packages("export", "torch", "timm", "safetensors", "onnxscript")


def _print(exported: ExportedIr, source: Path) -> None:
    click.echo(exported.report.to_text())
    size = sum(part.stat().st_size for part in (exported.path, exported.path.with_suffix(".bin")))
    click.echo("")
    click.echo(f"model      {console.printable(exported.path)} and .bin, {size / 1e6:.1f} MB")
    click.echo(f"report     {console.printable(exported.report_path)}")
    if exported.record is not None and exported.record.timing is not None:
        click.echo(f"time       {exported.record.timing.ms_per_tile:.3g} ms per tile")
    if source.suffix.lower() == ".onnx" and source.parent.resolve() != exported.path.parent.resolve():
        click.echo(f"note       --backend auto looks for forms of {source.name} in its own folder only, not here")
