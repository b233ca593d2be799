"""``python -m cellseg_benchmarks``: measure the forms of a network on this machine."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

from cellseg_benchmarks import options as shared
from cellseg_deploy.cli import console

_MODULES = {
    "cluster": "folder.cluster",
    "cluster-cost": "folder.cluster_cost",
    "correct": "quality.correct",
    "latency": "engine.latency",
    "layers": "engine.layers",
    "limits": "engine.limits",
    "load": "folder.load",
    "parity": "quality.parity_table",
    "peers": "folder.peers",
    "pipeline": "folder.throughput",
    "processes": "folder.processes",
    "robustness": "quality.robustness",
    "savings": "quality.savings",
    "scaling": "folder.scaling",
    "slide-memory": "folder.slide_memory",
    "soak": "folder.soak",
    "streaming": "folder.streaming",
    "study": "quality.study",
    "truths": "quality.truths",
}
"""Command -> module of this package with its ``NAME_command``, with underscores."""


class LazyGroup(click.Group):
    """A group that imports the module of a command on first use, following click's manual."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_MODULES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return super().get_command(ctx, cmd_name)
        module = import_module(f"cellseg_benchmarks.{_MODULES[cmd_name]}")
        found: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return found


@click.group(cls=LazyGroup, context_settings=shared.SETTINGS)
def command() -> None:
    """Measure the forms of a network: what they count, and what they cost."""


@command.command("network", context_settings=shared.SETTINGS)
@click.option("-o", "--output", required=True, metavar="FILE.safetensors", type=shared.PATH, help="File to write.")
@click.option("--encoder", default="large", show_default=True, help="See cellseg-train --help.")
@click.option("--tiles", type=click.IntRange(16), default=320, show_default=True, help="Training tiles.")
@click.option("--epochs", type=click.IntRange(1), default=24, show_default=True, help="Training passes of the decoder.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def network_command(output: Path, encoder: str, tiles: int, epochs: int, seed: int, quiet: bool) -> None:
    """Make a large network that finds cells without any download: random frozen encoder, decoder trained here.

    For measurements of ViT-L/14 and the like. Its encoder has learned nothing: do not count blood with it.
    """
    console.require_packages("train", "torch", "timm", "safetensors")

    from cellseg_benchmarks.engine.network import random_encoder_network
    from cellseg_deploy.errors import OutputError, UsageError
    from cellseg_train.checkpoint import save_network

    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: the name must end in .safetensors")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; make it, or choose another -o")
    made = random_encoder_network(encoder, n_tiles=tiles, epochs=epochs, seed=seed, say=shared.teller(quiet))
    save_network(output, made.net.state_dict(), made.config, made.spec)
    click.echo(f"{output}, {output.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """Entry point of ``python -m cellseg_benchmarks``."""
    sys.exit(console.run(command))
