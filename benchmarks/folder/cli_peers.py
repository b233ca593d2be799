"""``python -m cellseg_benchmarks peers``: words to settings, rows to files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_benchmarks import options as shared

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@click.command("peers", context_settings=shared.SETTINGS)
@click.argument("paths", metavar="[IMAGE]...", nargs=-1, type=shared.PATH)
@click.option(
    "--model", "models", multiple=True, type=shared.PATH, help="Model file of ours; again for more.  [default: shipped]"
)
@click.option("--peers", "names", metavar="NAME,...", help="Of cellpose, stardist, instanseg.  [default: all]")
@click.option(
    "--cell-diameter",
    type=float,
    metavar="PX",
    help="Diameter of cells in the images, from which every tool gets its scale.  [default: that of sample smears]",
)
@click.option("--megapixels", type=float, default=1.92, show_default=True, help="Of the sample smear.")
@click.option("--folder-images", type=click.IntRange(1), default=8, show_default=True, help="Images in our folder run.")
@click.option("--cellpose-weights", type=shared.PATH, help="A Cellpose 4 model.  [default: random weights]")
@shared.engine_options
@shared.rounds_options(5, min_seconds=0.0)
@shared.measuring_options
def peers_command(
    paths: tuple[Path, ...],
    models: tuple[Path, ...],
    names: str | None,
    cell_diameter: float | None,
    megapixels: float,
    folder_images: int,
    cellpose_weights: Path | None,
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
) -> None:
    """The same images through Cellpose 4, StarDist and InstanSeg: how many times as long they take.

    Tools that are not installed are rows that say so: pip install cellpose, stardist with tensorflow-cpu,
    instanseg-torch. All images must have one size. Writes peers.json, peers.md and peers.png to DIR. Exit code 8 if
    none of ours could be timed.
    """
    from cellseg_benchmarks.folder import peers
    from cellseg_benchmarks.harness import images as image_set
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
    from cellseg_deploy.models import default_model_path

    chosen = shared.words(names)
    chosen = list(peers.PEERS) if chosen is None else chosen
    unknown = [name for name in chosen if name not in peers.PEERS]
    if unknown:
        raise UsageError(f"no peer named {', '.join(unknown)}; there are {', '.join(peers.PEERS)}")
    if paths and cell_diameter is None:
        raise click.UsageError("--cell-diameter must be given with images of your own: every tool needs its scale")
    ours = list(models) or [default_model_path()]
    for path in (*ours, *([cellpose_weights] if cellpose_weights else [])):
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
    if len({path.stem for path in ours}) < len(ours):
        raise UsageError(f"two models of one name cannot be told apart: {', '.join(path.name for path in ours)}")
    image_set.check_size(megapixels)
    plan = shared.plan_of(rounds, min_seconds, settle, budget)
    machine, before = shared.start()
    if paths:
        images: list[npt.NDArray[np.uint8]] = list(image_set.given_images(paths))
        labels = None
    else:
        images, labels, cell_diameter = _smear(megapixels)
    if len({image.shape for image in images}) > 1:
        raise UsageError("the images have different sizes; give images of one size, or one image")
    assert cell_diameter is not None
    new_folder(output)
    progress = shared.progress(output, "peers")
    with tempfile.TemporaryDirectory(dir=output, prefix="work-") as place:
        rows = peers.measure_peers(
            images,
            labels,
            ours,
            Path(place),
            plan,
            diameter_px=cell_diameter,
            peers=chosen,
            folder_images=folder_images,
            device=device or "cpu",
            threads=threads,
            cellpose_weights=cellpose_weights,
            settings=shared.engine_settings(backend, device, precision, batch_size, streams),
            say=shared.teller(quiet),
            progress=progress,
        )
    report = peers.PeersReport(
        conditions=shared.conditions(machine, before),
        threads=threads,
        plan=plan,
        image_hw=images[0].shape[:2],
        images_from="given images" if paths else "a sample smear",
        diameter_px=cell_diameter,
        rows=tuple(rows),
        not_run=shared.without_gpu(machine, device),
    )
    shared.publish(output, report, peers.png(report), progress)
    if not any(row.ours and row.times for row in rows):
        raise BackendUnavailableError("none of our models could be timed; the report says why")


def _smear(megapixels: float) -> tuple[list[Any], Any, float]:
    """A sample smear, its true cells, and their diameter in px."""
    from cellseg_benchmarks.harness import images as image_set

    smear = image_set.smear_with_truth(image_set.size_for(megapixels))
    return [smear.image_hwc], smear.labels_hw, image_set.DIAMETER_PX
