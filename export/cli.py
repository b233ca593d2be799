"""``cellseg-export``: make the deployable forms of a network, compare any two of them, show the description of one.

Each command has its own file; this module collects them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from cellseg_deploy.cli import console as _common
from cellseg_export.cli_onnx import onnx_command
from cellseg_export.cli_openvino import int8_command, openvino_command
from cellseg_export.cli_options import EPILOG, PATH, SETTINGS
from cellseg_export.cli_packages import bioimageio_command, triton_command
from cellseg_export.cli_tensorrt import tensorrt_command
from cellseg_export.cli_verify import verify_command


@click.group(context_settings=SETTINGS, epilog=EPILOG)
@click.version_option(package_name="cellseg-deploy")
def command() -> None:
    """Turn a training run into files that cellseg-infer runs, and prove that they count the same cells."""


@command.command("info", context_settings=SETTINGS)
@click.argument("file", metavar="FILE", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_common.log_options
def info_command(file: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show everything recorded in a model.

    FILE is an .onnx, .xml, .engine or model.safetensors file, a bioimage.io package (.zip), or the folder of a training
    run or of a Triton model repository or one of its entries.
    """
    del quiet
    _common.set_up_logging(verbose)
    from cellseg_export.info import as_text, describe, needs_torch

    if needs_torch(file):
        _common.require_packages("export", "torch", "timm", "safetensors")
    description = describe(file)
    click.echo(json.dumps(description, indent=2) if as_json else as_text(description))


command.add_command(onnx_command)
command.add_command(verify_command)
command.add_command(tensorrt_command)
command.add_command(openvino_command)
command.add_command(int8_command)
command.add_command(triton_command)
command.add_command(bioimageio_command)


def main() -> None:
    """Entry point of the command."""
    sys.exit(_common.run(command))
