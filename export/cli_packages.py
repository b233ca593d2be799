"""``cellseg-export triton`` and ``cellseg-export bioimageio``: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import console
from cellseg_export import cli_options as shared

if TYPE_CHECKING:
    from cellseg_export.forms.triton import Kind

_EPILOG = """\b
Exit codes: 0 done, 2 usage, 5 model refused, 6 cannot be written, 8 engine not available.
"""


@click.command("triton", context_settings=shared.SETTINGS, epilog=_EPILOG)
@click.argument("source", metavar="MODEL", type=shared.PATH)
@click.option("-o", "--output", required=True, metavar="REPO", type=shared.PATH, help="Model repository to add it to.")
@click.option("--name", help="Name of the model in the server.  [default: its own]")
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Most tiles per call.")
@click.option(
    "--preferred", type=click.IntRange(1), multiple=True, help="Batch size the server waits for; can be repeated."
)
@click.option(
    "--queue-delay",
    type=click.IntRange(0),
    default=2000,
    show_default=True,
    metavar="US",
    help="Longest wait to fill a batch, in microseconds.",
)
@click.option(
    "--instances", type=click.IntRange(1), default=1, show_default=True, help="Model instances on each device."
)
@click.option(
    "--kind", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True, help="Device to run on."
)
@console.log_options
def triton_command(
    source: Path,
    output: Path,
    name: str | None,
    max_batch: int,
    preferred: tuple[int, ...],
    queue_delay: int,
    instances: int,
    kind: Kind,
    quiet: bool,
    verbose: int,
) -> None:
    """Add MODEL (.onnx, .xml or .engine) to a model repository of NVIDIA's Triton Inference Server.

    The server answers with probabilities; cutting, stitching and labelling stay with the client, and the ModelSpec that
    says how is among the parameters of config.pbtxt.
    """
    console.set_up_logging(verbose)
    from cellseg_export.forms.triton import TritonOptions, export_triton

    options = TritonOptions(
        max_batch_size=max_batch,
        preferred=preferred or tuple(sorted({max(1, max_batch // 2), max_batch})),
        queue_delay_us=queue_delay,
        instances=instances,
        kind=kind,
    )
    folder = export_triton(source, output, name=name, options=options)
    if not quiet:
        click.echo(f"model      {console.printable(folder)}")


@click.command("bioimageio", context_settings=shared.SETTINGS, epilog=_EPILOG)
@click.argument("source", metavar="MODEL.onnx", type=shared.PATH)
@click.option("-o", "--output", required=True, metavar="PACKAGE.zip", type=shared.PATH, help="Package to write.")
@click.option("--author", "authors", multiple=True, help="Author of the model; can be repeated.")
@click.option("--licence", help="SPDX identifier, as CC-BY-4.0.  [default: what the model states, if it is one]")
@shared.threads_option
@console.log_options
def bioimageio_command(
    source: Path,
    output: Path,
    authors: tuple[str, ...],
    licence: str | None,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Write MODEL.onnx as a model package of bioimage.io, with test tensors made from a sample smear."""
    console.set_up_logging(verbose)
    shared.require_runtime()
    from cellseg_export.forms.bioimageio import Credits, export_bioimageio

    credits = Credits(authors=authors, licence=licence) if authors else Credits(licence=licence)
    path = export_bioimageio(source, output, credits=credits, threads=threads)
    if not quiet:
        click.echo(f"package    {console.printable(path)}, {path.stat().st_size / 1e6:.1f} MB")
