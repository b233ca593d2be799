"""``cellseg-export``: make the forms of a network that are deployed, compare any two of them, show what one says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import _common
from cellseg_deploy.errors import BackendUnavailableError

if TYPE_CHECKING:
    from cellseg_export.verify import GateImages

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_PATH = click.Path(path_type=Path)

_EPILOG = """\b
Exit codes: 0 done, 2 usage, 3 an image cannot be read, 4 no image found, 5 model refused, or the two forms do not
count the same (or too few cells were seen to tell), 6 file cannot be written, 8 engine or device not available.
"""

_images_option = click.option(
    "--images",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images to compare on; at least 200 cells in all.  [default: sample smears made by the package]",
)
_batch_option = click.option(
    "--tile-batch", type=click.IntRange(1), default=8, show_default=True, help="Tiles a call of the network."
)
_threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one a core]")


@click.group(context_settings=_SETTINGS, epilog=_EPILOG)
@click.version_option(package_name="cellseg-deploy")
def command() -> None:
    """Turn a training run into files that cellseg-infer runs, and prove that they count the same cells."""


@command.command("onnx", context_settings=_SETTINGS, epilog=_EPILOG)
@click.argument("run", metavar="RUN", type=_PATH)
@click.option("-o", "--output", required=True, metavar="MODEL.onnx", type=_PATH, help="File to write.")
@_images_option
@click.option(
    "--unverified",
    is_flag=True,
    help="Write the model even if too few cells are found to judge (an untrained network), once the tensors agree.",
)
@click.option("--tile-size", type=click.IntRange(8), metavar="PX", help="Side of the input.  [default: as trained]")
@click.option(
    "--opset", type=click.IntRange(20, 22), default=20, show_default=True, help="ONNX operator set of the graph."
)
@_batch_option
@_threads_option
@_common.log_options
def onnx_command(
    run: Path,
    output: Path,
    images: Path | None,
    unverified: bool,
    tile_size: int | None,
    opset: int,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Write the network of RUN (a run folder of cellseg-train, or its model.safetensors) as one ONNX file.

    Before it gets its name, the file is run with ONNX Runtime against PyTorch on images: counts must be equal, matched
    F1 at IoU 0.9 at least 0.999, and at most 1e-5 of the pixels may differ. The comparison is kept beside the model as
    MODEL.parity.json, also when the model is refused.
    """
    _common.set_up_logging(verbose)
    _common.require_packages("export", "torch", "timm", "safetensors", "onnxscript")
    _require_runtime()

    from cellseg_export.onnx import export_onnx, with_tile_size
    from cellseg_train.checkpoint import load_network

    _set_threads(threads)
    network = load_network(run)
    if tile_size is not None and tile_size != network.config.tile_size:
        network = with_tile_size(network, tile_size)
        click.echo(
            f"tiles of {tile_size} px: the metrics in the run were measured with other tiles and are left out; "
            "measure the model with cellseg-evaluate",
            err=True,
        )
    exported = export_onnx(
        network,
        output,
        images=_gate_images(images),
        unverified=unverified,
        opset=opset,
        tile_batch=tile_batch,
        threads=threads,
        on_image=lambda name: None if quiet else click.echo(f"compared {_common.printable(name)}", err=True),
    )
    if not quiet:
        click.echo(exported.report.to_text())
        click.echo("")
        click.echo(f"model      {_common.printable(exported.path)}, {exported.path.stat().st_size / 1e6:.1f} MB")
        click.echo(f"report     {_common.printable(exported.report_path)}")


@command.command("verify", context_settings=_SETTINGS, epilog=_EPILOG)
@click.argument("reference", metavar="REF", type=_PATH)
@click.argument("candidate", metavar="CANDIDATE", type=_PATH)
@_images_option
@click.option("--report", metavar="FILE.json", type=_PATH, help="Write the whole comparison to this file.")
@click.option("--device", default="cpu", show_default=True, help="Device of both: cpu, cuda or cuda:N.")
@_batch_option
@_threads_option
@_common.log_options
def verify_command(
    reference: Path,
    candidate: Path,
    images: Path | None,
    report: Path | None,
    device: str,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> int:
    """Compare two forms of one network: REF and CANDIDATE are each a run folder, a model.safetensors or an .onnx file.

    Prints how far probabilities, masks, cells and counts lie apart, and ends with exit code 5 unless they pass.
    """
    _common.set_up_logging(verbose)
    for path in (reference, candidate):
        if path.suffix.lower() != ".onnx":
            _common.require_packages("export", "torch", "timm", "safetensors")

    from cellseg_deploy.errors import ParityError
    from cellseg_deploy.outputs.atomic import write_bytes
    from cellseg_export.verify import look_inside, open_form, sample_images, verify

    _set_threads(threads)
    with (
        open_form(reference, device=device, threads=threads) as first,
        open_form(candidate, device=device, threads=threads) as second,
    ):
        compared_on = _gate_images(images) or sample_images(first.spec)
        result = verify(
            first,
            second,
            compared_on,
            batch_size=tile_batch,
            on_image=lambda name: None if quiet else click.echo(f"compared {_common.printable(name)}", err=True),
        )
    if first.name == "pytorch" and candidate.suffix.lower() == ".onnx":
        from cellseg_train.checkpoint import load_network

        result = look_inside(result, load_network(reference), candidate, compared_on)
    if report is not None:
        write_bytes(report, result.to_json())
    if not quiet:
        click.echo(result.to_text())
    return _common.EXIT_OK if result.verdict == "passed" else ParityError.exit_code


@command.command("info", context_settings=_SETTINGS)
@click.argument("file", metavar="FILE", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@_common.log_options
def info_command(file: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show everything a model says of itself: an .onnx file, a model.safetensors or a run folder."""
    del quiet
    _common.set_up_logging(verbose)
    if file.suffix.lower() != ".onnx":
        _common.require_packages("export", "torch", "timm", "safetensors")

    from cellseg_export.info import as_text, describe

    description = describe(file)
    click.echo(json.dumps(description, indent=2) if as_json else as_text(description))


def main() -> None:
    """Entry point of the command."""
    sys.exit(_common.run(command))


def _gate_images(folder: Path | None) -> GateImages | None:
    if folder is None:
        return None
    from cellseg_export.verify import folder_images

    return folder_images(folder)


def _set_threads(threads: int | None) -> None:
    """Threads of PyTorch, if it is here; an engine gets its own."""
    if threads is not None and importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)


def _require_runtime() -> None:
    """Say before a minute of export, not after it, that nothing is here to check the result with."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailableError(
            "ONNX Runtime is not installed, and a model is only written after it was run against PyTorch; run: "
            "pip install 'cellseg-deploy[cpu]' (or [gpu] on a machine with an NVIDIA GPU)"
        )
