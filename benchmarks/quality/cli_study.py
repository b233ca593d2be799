"""``python -m cellseg_benchmarks study``: words to settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(
    "study",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--images", required=True, type=_FOLDER, help="Training images.")
@click.option("--masks", required=True, type=_FOLDER, help="Their masks.")
@click.option("--val-images", required=True, type=_FOLDER, help="Images that every figure is measured on.")
@click.option("--val-masks", required=True, type=_FOLDER, help="Their masks.")
@console.mask_options
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Study folder.")
@click.option(
    "--runs",
    metavar="NAME,...",
    help="Of plain, boundary, distance, boundary-surface, boundary-no-gaps (the default) and plain-no-gaps.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True)
@click.option("--patches-per-image", type=click.IntRange(1), default=1, show_default=True, help="Tiles an epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Tiles an update.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--ema-decay", type=float, default=0.99, show_default=True, help="Of the averaged weights.")
@click.option("--image-scale", type=float, default=0.5, show_default=True, help="Model px per image px.")
@click.option("--tile-size", type=int, default=224, show_default=True, help="Side of the network's input in px.")
@click.option("--encoder", default="tiny", show_default=True, help="As for cellseg-train.")
@click.option("--tiny-width", type=int, default=192, show_default=True, help="Width of the tiny encoder.")
@click.option("--tiny-depth", type=int, default=6, show_default=True, help="Blocks of the tiny encoder.")
@click.option("--weights", default="none", show_default=True, help="As for cellseg-train.")
@click.option("--layer-decay", type=float, default=1.0, show_default=True, help="As for cellseg-train.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="CPU threads; 0: PyTorch's own.")
@click.option("-q", "--quiet", is_flag=True, help="A line a run only.")
def study_command(
    images: Path,
    masks: Path,
    val_images: Path,
    val_masks: Path,
    mask_foreground: MaskForeground,
    output: Path,
    runs: str | None,
    seeds: int,
    epochs: int,
    patches_per_image: int,
    batch_size: int,
    lr: float,
    ema_decay: float,
    image_scale: float,
    tile_size: int,
    encoder: str,
    tiny_width: int,
    tiny_depth: int,
    weights: str,
    layer_decay: float,
    device: str,
    threads: int,
    quiet: bool,
) -> int:
    """Train networks that differ in one thing on the same images, and say what it is worth.

    \b
    python -m cellseg_benchmarks study --images train/images --masks train/masks \\
        --val-images val/images --val-masks val/masks -o study/

    Called again with the same settings it goes on where it was stopped. DIR/results keeps a small JSON file for each
    finished run, DIR/runs the networks, DIR/study.md and DIR/sweep.png what came out.
    """
    console.require_packages("train", "torch", "torchvision", "timm", "safetensors", "tensorboard")
    console.require_packages("plots", "matplotlib")

    from cellseg_benchmarks.quality.study import DEFAULT_ARMS, arms_named, run_study
    from cellseg_train.checkpoint import RunInputs
    from cellseg_train.cli import absolute_source
    from cellseg_train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

    chosen = arms_named(DEFAULT_ARMS if runs is None else [name.strip() for name in runs.split(",")])
    base = TrainConfig(
        model=ModelConfig(encoder=encoder, tile_size=tile_size, tiny_width=tiny_width, tiny_depth=tiny_depth),
        data=DataConfig(image_scale=image_scale, patches_per_image=patches_per_image, mask_foreground=mask_foreground),
        optim=OptimConfig(epochs=epochs, batch_size=batch_size, lr=lr, ema_decay=ema_decay, layer_decay=layer_decay),
        weights=absolute_source(weights),
        device=device,
        threads=threads,
    )
    inputs = RunInputs(*((str(path.absolute()),) for path in (images, masks, val_images, val_masks)))
    run_study(
        output,
        chosen,
        range(seeds),
        base,
        inputs,
        say=lambda line: console.say(console.printable(line)),
        quiet=quiet,
    )
    click.echo(f"report: {console.printable(output / 'study.md')}")
    return console.EXIT_OK


def main() -> None:
    """The command alone."""
    sys.exit(console.run(study_command))


if __name__ == "__main__":
    main()
