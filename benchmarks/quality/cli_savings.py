"""``python -m cellseg_benchmarks savings``: words to settings, outcomes to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_benchmarks import options as shared
from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground


@click.command("savings", context_settings=shared.SETTINGS)
@click.option("--model", type=shared.PATH, help="Model file.  [default: the one that ships]")
@click.option(
    "--also",
    multiple=True,
    metavar="MODEL",
    type=shared.PATH,
    help="Another model file, as the same network for tiles of another size; may be given more than once.",
)
@click.option("--images", metavar="DIR", type=shared.FOLDER, help="Images.  [default: six sample smears]")
@click.option("--masks", metavar="DIR", type=shared.FOLDER, help="Their masks.")
@console.mask_options
@click.option("--most", type=click.IntRange(1), default=10, show_default=True, help="Images, held in memory.")
@shared.engine_options
@shared.rounds_options(3)
@shared.measuring_options
def savings_command(
    model: Path | None,
    also: tuple[Path, ...],
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    most: int,
    backend: str,
    device: str | None,
    precision: str | None,
    batch_size: int,
    streams: int | None,
    rounds: int,
    min_seconds: float,
    settle: float,
    budget: float | None,
    output: Path,
    threads: int | None,
    quiet: bool,
) -> int:
    """What less context around a tile, a smaller scale and other tiles save, and what they cost in cells found.

    Writes savings.json, savings.md and savings.png to DIR. The curve of context takes some fifty times the tiles of
    a usual run.
    """
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_benchmarks.quality import savings
    from cellseg_benchmarks.quality.halo_curve import halo_curve
    from cellseg_deploy.backends import EngineOptions, open_backend
    from cellseg_deploy.models import default_model_path

    if (images is None) != (masks is None):
        raise click.UsageError("--images and --masks belong together: settings are judged by true cells")
    plan = shared.plan_of(rounds, min_seconds, settle, budget)
    machine, before = shared.start()
    say = shared.teller(quiet)
    engine = EngineOptions(backend, device, precision, threads, streams)
    with ExitStack() as stack:
        opened = stack.enter_context(open_backend(model or default_model_path(), engine))
        also_opened = [stack.enter_context(open_backend(path, engine)) for path in also]
        others = [
            (savings.usual_setting(other, f"model {path.stem}"), other)
            for path, other in zip(also, also_opened, strict=True)
        ]
        new_folder(output)
        progress = shared.progress(output, "savings")
        pairs = list(_pairs(images, masks, most, mask_foreground))
        scale = opened.spec.image_scale
        curve = halo_curve(opened, (image for image, _ in pairs), scale=scale, batch_size=batch_size, say=say)
        empty = savings.empty_tiles(opened, (image for image, _ in pairs), batch_size=batch_size)
        outcomes, measured = savings.compare(
            opened,
            pairs,
            savings.settings_for(opened),
            plan,
            others=others,
            batch_size=batch_size,
            say=say,
            progress=progress,
        )
        report = savings.report_of(
            outcomes,
            measured,
            curve,
            empty=empty,
            conditions=shared.conditions(machine, before),
            threads=threads,
            backend=opened,
            n_images=len(pairs),
        )
    shared.publish(output, report, savings.png(report), progress)
    return console.EXIT_OK


def _pairs(images: Path | None, masks: Path | None, most: int, foreground: MaskForeground) -> Iterator[tuple[Any, Any]]:
    from cellseg_benchmarks.harness.images import judged_pairs, smear_with_truth

    if images is not None and masks is not None:
        yield from judged_pairs(images, masks, most, foreground)
        return
    for index in range(min(most, 6)):
        smear = smear_with_truth(index=index, seed=0)
        yield smear.image_hwc, smear.labels_hw
