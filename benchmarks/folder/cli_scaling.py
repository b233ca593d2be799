"""``python -m cellseg_benchmarks scaling``: words to settings, points to files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from cellseg_benchmarks import options as shared


@click.command("scaling", context_settings=shared.SETTINGS)
@click.option("--model", type=shared.PATH, help="Model file.  [default: the one that ships]")
@click.option("--megapixels", default="1,4,16,64,256", show_default=True, metavar="N,...", help="Sizes of one image.")
@click.option("--images", default="1,10,100,1000", show_default=True, metavar="N,...", help="Images in a folder.")
@click.option("--max-megapixels", type=float, help="Leave larger images out.")
@click.option("--max-images", type=int, help="Leave larger folders out.")
@click.option("--small", type=float, default=0.48, show_default=True, help="Megapixels of each image of a folder.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="New processes for each size.")
@shared.scale_options
@shared.engine_options
@shared.measuring_options
def scaling_command(
    model: Path | None,
    megapixels: str,
    images: str,
    max_megapixels: float | None,
    max_images: int | None,
    small: float,
    rounds: int,
    scale: float | None,
    cell_diameter: float | None,
    backend: str,
    device: str | None,
    precision: str | None,
    batch_size: int,
    streams: int | None,
    output: Path,
    threads: int | None,
    quiet: bool,
) -> int:
    """How time and memory grow with the size of an image, and with the number of images.

    Large images are sample smears, mirrored at their edges; the largest takes some 6 GB of disk and memory. Writes
    scaling.json, scaling.md and scaling.png to DIR. Exit code 8 if nothing could be measured.
    """
    from cellseg_benchmarks.folder import scaling
    from cellseg_benchmarks.harness import images as image_set
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_deploy.cli import console
    from cellseg_deploy.errors import BackendUnavailableError, UsageError

    sizes = shared.numbers(megapixels, "--megapixels", float)
    counts = shared.numbers(images, "--images")
    for size in (*sizes, small):
        image_set.check_size(size)
    left_out = {
        f"{n:g} megapixels": f"left out by --max-megapixels {max_megapixels:g}"
        for n in sizes
        if max_megapixels is not None and n > max_megapixels
    }
    left_out |= {
        f"{n} images": f"left out by --max-images {max_images}"
        for n in counts
        if max_images is not None and n > max_images
    }
    if len(left_out) == len(sizes) + len(counts):
        raise UsageError(f"nothing is left to measure: {'; '.join(f'{name} {why}' for name, why in left_out.items())}")
    machine, before = shared.start()
    new_folder(output)
    progress = shared.progress(output, "scaling")
    small_hw = image_set.size_for(small)
    with tempfile.TemporaryDirectory(dir=output, prefix="work-") as place:
        points, engine, failed = scaling.measure_scaling(
            {
                **shared.engine_settings(backend, device, precision, batch_size, streams),
                **shared.scale_settings(scale, cell_diameter),
                "path": None if model is None else str(model),
            },
            Path(place),
            megapixels=[n for n in sizes if f"{n:g} megapixels" not in left_out],
            counts=[n for n in counts if f"{n} images" not in left_out],
            small_hw=small_hw,
            rounds=rounds,
            threads=threads,
            say=shared.teller(quiet),
            progress=progress,
        )
    if not points:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise BackendUnavailableError(f"nothing was measured: {reasons}")
    report = scaling.ScalingReport(
        conditions=shared.conditions(machine, before),
        threads=threads,
        engine=engine,
        held_bytes_per_pixel=scaling.held_bytes_per_pixel(engine),
        small_image_hw=small_hw,
        points=tuple(points),
        growth=tuple(scaling.growth_of(points, series) for series in scaling.SERIES),
        left_out=left_out | failed | shared.without_gpu(machine, device),
    )
    shared.publish(output, report, scaling.png(report), progress)
    return console.EXIT_OK
