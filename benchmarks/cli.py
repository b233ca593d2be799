"""``python -m cellseg_benchmarks``: what the forms of a network are worth, measured on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.engine.cli_latency import latency_command, limits_command
from cellseg_benchmarks.engine.cli_layers import layers_command
from cellseg_benchmarks.folder.cli_peers import peers_command
from cellseg_benchmarks.folder.cli_scaling import scaling_command
from cellseg_benchmarks.folder.cli_soak import soak_command
from cellseg_benchmarks.folder.cli_throughput import pipeline_command
from cellseg_benchmarks.quality.cli_robustness import robustness_command
from cellseg_benchmarks.quality.cli_savings import savings_command
from cellseg_benchmarks.quality.cli_study import study_command
from cellseg_deploy.cli import console as _common

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings=SETTINGS)
def command() -> None:
    """Measure the forms of a network: what they count, and what they cost."""


@command.command("parity", context_settings=SETTINGS)
@click.argument("network", metavar="[RUN]", required=False, type=_PATH)
@click.option("-o", "--output", required=True, metavar="DIR", type=_PATH, help="Folder for the forms and the table.")
@click.option(
    "--forms",
    metavar="NAME,...",
    help="Of fp32, fp16, mixed, openvino-fp32, openvino-bf16, int8.  [default: all but mixed]",
)
@click.option("--images", metavar="DIR", type=_FOLDER, help="Images to compare on.  [default: sample smears]")
@click.option("--masks", metavar="DIR", type=_FOLDER, help="Their true masks.")
@_common.mask_options
@click.option("--tile-batch", type=click.IntRange(1), default=8, show_default=True, help="Tiles a call.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one a core]")
@click.option("--quiet", "-q", is_flag=True, help="No lines of progress.")
def parity_command(
    network: Path | None,
    output: Path,
    forms: str | None,
    images: Path | None,
    masks: Path | None,
    mask_foreground: str,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
) -> None:
    """Make every form of a network with cellseg-export and show the gate's verdicts side by side.

    RUN is a run folder of cellseg-train or its model.safetensors, by default the model that ships. The forms and
    their reports stay in DIR, beside parity.json and parity.md; the same command goes on with a table that was
    stopped. Exit code 5 if a form was refused.
    """
    _common.require_packages("export", "torch", "timm", "safetensors", "onnxscript")
    if (images is None) != (masks is None):
        raise click.UsageError("--images and --masks belong together: INT8 is judged by true cells")

    from cellseg_benchmarks.harness.report import with_remark
    from cellseg_benchmarks.quality.parity_table import DEFAULT_FORMS, TABLE_FILE, TABLE_TEXT, forms_named, parity_table
    from cellseg_deploy.errors import ModelError, OutputError, ParityError, UsageError
    from cellseg_deploy.files.atomic import make_folder, write_bytes
    from cellseg_deploy.models import default_weights_path

    network = network or default_weights_path()
    if not network.exists():
        raise ModelError(f"{network}: no such file or folder; give a run folder or its model.safetensors")
    if not network.is_dir() and network.suffix.lower() != ".safetensors":
        raise UsageError(f"{network}: expected a run folder or its model.safetensors, from which every form is made")
    names = DEFAULT_FORMS if forms is None else [name.strip() for name in forms.split(",")]
    forms_named(names)  # raises before anything is made
    if output.exists() and not (output / TABLE_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not the folder of such a table; choose another -o")
    make_folder(output)
    progress = shared.progress(output, "parity")
    gate = ["--tile-batch", str(tile_batch)]
    if threads is not None:
        gate += ["--threads", str(threads)]
    if images is not None and masks is not None:
        gate += ["--images", str(images), "--masks", str(masks), "--mask-foreground", mask_foreground]
    table = parity_table(
        network,
        output,
        names,
        gate=gate,
        say=lambda line: None if quiet else _common.say(_common.printable(line)),
        progress=progress,
    )
    text = with_remark(table.to_markdown(), progress)
    write_bytes(output / TABLE_TEXT, text.encode())
    click.echo(text)
    progress.finish()
    refused = [row.form for row in table.rows if row.verdict not in ("passed", "not run")]
    if refused:
        raise ParityError(f"refused by the parity gate: {', '.join(refused)}; the table says why")


@command.command("network", context_settings=SETTINGS)
@click.option("-o", "--output", required=True, metavar="FILE.safetensors", type=_PATH, help="File to write.")
@click.option("--encoder", default="large", show_default=True, help="As for cellseg-train.")
@click.option("--tiles", type=click.IntRange(16), default=320, show_default=True, help="Tiles to learn from.")
@click.option("--epochs", type=click.IntRange(1), default=24, show_default=True, help="Passes of the decoder.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="No lines of progress.")
def network_command(output: Path, encoder: str, tiles: int, epochs: int, seed: int, quiet: bool) -> None:
    """Make a large network that finds cells without any download: random frozen encoder, decoder trained here.

    For measurements of ViT-L/14 and the like. Its encoder has learned nothing: do not count blood with it.
    """
    _common.require_packages("train", "torch", "timm", "safetensors")

    from cellseg_benchmarks.engine.network import random_encoder_network
    from cellseg_deploy.errors import OutputError, UsageError
    from cellseg_train.checkpoint import save_network

    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: the name must end in .safetensors")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; make it, or choose another -o")
    made = random_encoder_network(
        encoder,
        n_tiles=tiles,
        epochs=epochs,
        seed=seed,
        say=lambda line: None if quiet else _common.say(line),
    )
    save_network(output, made.net.state_dict(), made.config, made.spec)
    click.echo(f"{output}, {output.stat().st_size / 1e6:.0f} MB")


for added in (
    latency_command,
    limits_command,
    pipeline_command,
    scaling_command,
    peers_command,
    savings_command,
    layers_command,
    study_command,
    robustness_command,
    soak_command,
):
    command.add_command(added)


def main() -> None:
    """Entry point of ``python -m cellseg_benchmarks``."""
    sys.exit(_common.run(command))
