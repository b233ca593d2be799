"""``cellseg-export onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import console
from cellseg_export import cli_options as shared

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground
    from cellseg_export.forms.onnx import Precision
    from cellseg_train.checkpoint import LoadedNetwork


@click.command("onnx", context_settings=shared.SETTINGS, epilog=shared.EPILOG)
@click.argument("source", metavar="RUN|MODEL.onnx", type=shared.PATH)
@click.option("-o", "--output", required=True, metavar="OUT.onnx", type=shared.PATH, help="File to write.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "mixed"]),
    default="fp32",
    show_default=True,
    help="fp16: half weights and arithmetic. mixed: the same, with those blocks in FP32 that need it.",
)
@shared.images_option
@shared.masks_option
@shared.unverified_option
@click.option("--tile-size", type=click.IntRange(8), metavar="PX", help="Side of the input.  [default: as trained]")
@click.option(
    "--halo",
    type=click.IntRange(0),
    metavar="PX",
    help="Context on each side of a tile that is discarded.  [default: as trained; with another "
    "--tile-size, a seventh of it]",
)
@click.option("--opset", type=click.IntRange(20, 22), help="ONNX operator set of the graph.  [default: 20]")
@shared.batch_option
@shared.threads_option
@console.log_options
def onnx_command(
    source: Path,
    output: Path,
    precision: Precision,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    unverified: bool,
    tile_size: int | None,
    halo: int | None,
    opset: int | None,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Write the network of RUN (a run folder of cellseg-train, or its model.safetensors) as one ONNX file, or the
    half-precision form of the fp32 file MODEL.onnx.

    Before it gets its name, the file is run with ONNX Runtime against what it was made from, on images. fp32: counts
    must be equal, matched F1 at IoU 0.9 at least 0.999, and at most 1e-5 of the pixels may differ. fp16, mixed: F1 at
    IoU 0.9 at least 0.99 and the total count within 0.5 %, also in PyTorch's half arithmetic, where an overflow shows.
    The comparison is kept beside the model as OUT.parity.json. That of a refused model is OUT.refused.json, with the
    worst image as OUT.refused.jpg; an older model of that name stays as it is.
    """
    console.set_up_logging(verbose)
    console.require_packages("export", "torch", "timm", "safetensors", "onnxscript")
    shared.require_runtime()

    from cellseg_export.forms.onnx import OPSET, export_onnx

    shared.set_threads(threads)
    exported = export_onnx(
        _source(source, tile_size, halo, opset),
        output,
        precision=precision,
        images=shared.gate_images(images, masks, mask_foreground),
        unverified=unverified,
        opset=OPSET if opset is None else opset,
        tile_batch=tile_batch,
        threads=threads,
        on_image=lambda name: None if quiet else click.echo(f"compared {console.printable(name)}", err=True),
        on_try=lambda text: None if quiet else click.echo(text, err=True),
    )
    if not quiet:
        click.echo(exported.report.to_text())
        click.echo("")
        click.echo(f"model      {console.printable(exported.path)}, {exported.path.stat().st_size / 1e6:.1f} MB")
        click.echo(f"report     {console.printable(exported.report_path)}")


def _source(path: Path, tile_size: int | None, halo: int | None, opset: int | None) -> LoadedNetwork | Path:
    """The network in ``path`` for the requested tiles, or ``path`` itself if it is a model file."""
    if path.suffix.lower() == ".onnx":
        if any(setting is not None for setting in (tile_size, halo, opset)):
            raise click.UsageError(
                "--tile-size, --halo and --opset are chosen when RUN is exported; a model file has its own"
            )
        return path
    from cellseg_export.forms.onnx import with_tiles
    from cellseg_train.checkpoint import load_network

    trained = load_network(path)
    network = with_tiles(trained, tile_size=tile_size, halo=halo)
    if network is not trained:
        click.echo(
            f"tiles of {network.spec.tile_size} px with a halo of {network.spec.halo}: the metrics in the run were "
            "measured with other tiles and are left out; measure the model with cellseg-evaluate",
            err=True,
        )
    return network
