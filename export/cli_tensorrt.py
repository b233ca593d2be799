"""``cellseg-export tensorrt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import console
from cellseg_export.cli_options import PATH, SETTINGS, gate_images, images_option, masks_option, threads_option

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground
    from cellseg_export.forms.tensorrt import Precision

_EPILOG = """\b
Exit codes: 0 done, 2 usage, 3 an image cannot be read, 4 no image found, 5 model refused by TensorRT, or the engine
does not count the same (or too few cells were found to judge), 6 file cannot be written, 8 no GPU, TensorRT or driver.
"""

_NOT_CHECKED = ("device", "images", "masks", "mask_foreground", "reference", "unverified", "threads")


@click.command("tensorrt", context_settings=SETTINGS, epilog=_EPILOG)
@click.argument("model", metavar="MODEL.onnx", type=PATH)
@click.option("-o", "--output", metavar="MODEL.engine", type=PATH, help="Engine to write; MODEL.engine.json beside it.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="fp16 turns an fp32 model into half precision first; a half model is taken as it is.",
)
@click.option("--min-batch", type=click.IntRange(1), default=1, show_default=True, help="Fewest tiles per call.")
@click.option("--opt-batch", type=click.IntRange(1), help="Tiles per call to tune for.  [default: --max-batch]")
@click.option("--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Most tiles per call.")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="GPU memory for a layer.  [default: all]")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N; builds and compares there.")
@images_option
@masks_option
@click.option(
    "--reference",
    metavar="REF",
    type=PATH,
    help="Compare with this form: a training run or an .onnx.  [default: MODEL.onnx in ONNX Runtime on the CPU]",
)
@click.option("--unverified", is_flag=True, help="Write the engine even if too few cells are found to judge.")
@click.option(
    "--check-only",
    is_flag=True,
    help="Without a GPU: parse and build with TensorRT-RTX, keep no engine (not at -o either).",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="LIST",
    help="For --check-only, as 86,89.  [default: 75,80,86,89,120,121]",
)
@threads_option
@console.log_options
@click.pass_context
def tensorrt_command(
    context: click.Context,
    model: Path,
    output: Path | None,
    precision: Precision,
    min_batch: int,
    opt_batch: int | None,
    max_batch: int,
    workspace: int | None,
    device: str,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    reference: Path | None,
    unverified: bool,
    check_only: bool,
    compute_capabilities: str | None,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Build a TensorRT engine (10 or 11) of MODEL.onnx on the GPU that will run it.

    Strongly typed: the precision is that of the graph. Before the engine gets its name it is run beside the model on
    images, on this GPU; if the counts differ, it is not kept. MODEL.engine.json beside it says what it is and where it
    may run.
    """
    console.set_up_logging(verbose)
    from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
    from cellseg_deploy.backends.tensorrt_build import BuildOptions

    options = BuildOptions(
        profile=BatchProfile(min_batch, max_batch if opt_batch is None else opt_batch, max_batch),
        workspace_mib=workspace,
    )
    say: Any = (lambda _: None) if quiet else (lambda text: click.echo(text, err=True))
    if check_only:
        console.refuse_options(context, _NOT_CHECKED, "and --check-only exclude each other: nothing is run or kept")
        _check(model, options, precision, compute_capabilities, say, quiet=quiet)
        return
    if compute_capabilities is not None:
        raise click.UsageError("--compute-capability goes with --check-only; an engine is built for the GPU at hand")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output' (only --check-only needs none).")

    from cellseg_export.forms.tensorrt import export_tensorrt

    built = export_tensorrt(
        model,
        output,
        options,
        precision=precision,
        device=device,
        reference=reference,
        images=gate_images(images, masks, mask_foreground),
        unverified=unverified,
        threads=threads,
        on_image=lambda name: say(f"compared {console.printable(name)}"),
    )
    if not quiet:
        click.echo(built.report.to_text())
        click.echo("")
        click.echo(f"engine     {console.printable(built.path)}, {built.sidecar.engine_bytes / 1e6:.1f} MB")
        click.echo(f"report     {console.printable(built.report_path)}")
        if built.record is not None:
            click.echo("record     kept beside the engine and its model, where --backend auto looks for it")


def _check(model: Path, options: Any, precision: Precision, capabilities: str | None, say: Any, *, quiet: bool) -> None:
    from cellseg_export.forms.tensorrt import COMPUTE_CAPABILITIES, check_only

    chosen: tuple[str, ...] = COMPUTE_CAPABILITIES
    if capabilities is not None:
        chosen = tuple(part.strip().replace(".", "") for part in capabilities.split(",") if part.strip())
    result = check_only(
        model,
        options,
        precision=precision,
        compute_capabilities=chosen,
        on_build=lambda capability: say(f"built for {capability}"),
    )
    if not quiet:
        click.echo(result.to_text())
