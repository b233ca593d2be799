"""``python -m cellseg_benchmarks pipeline``: words to settings, runs to files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from cellseg_benchmarks import options as shared


@click.command("pipeline", context_settings=shared.SETTINGS)
@click.argument("paths", metavar="[IMAGE|FOLDER]...", nargs=-1, type=shared.PATH)
@click.option("--model", type=shared.PATH, help="Model file.  [default: the one that ships]")
@click.option("--images", "n_images", type=click.IntRange(1), default=50, show_default=True, help="Images in a folder.")
@click.option("--megapixels", type=float, default=1.92, show_default=True, help="Of a sample smear.")
@click.option("--formats", default="png,jpg,tif", show_default=True, metavar="NAME,...", help="Formats to convert to.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="New processes for each format.")
@click.option("--warm", type=click.IntRange(0), default=2, show_default=True, help="Warm runs in each process.")
@click.option(
    "--save", default="labels,overlays", show_default=True, help="As for cellseg-infer; none for tables only."
)
@shared.scale_options
@shared.engine_options
@shared.measuring_options
def pipeline_command(
    paths: tuple[Path, ...],
    model: Path | None,
    n_images: int,
    megapixels: float,
    formats: str,
    rounds: int,
    warm: int,
    save: str,
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
) -> None:
    """A folder of images from files to results: images a second, where the time goes, how busy the engine is.

    Takes the images given, or sample smears, as often as --images asks for, converted to each format. Writes
    pipeline.json, pipeline.md and pipeline.png to DIR.
    """
    from cellseg_benchmarks.engine.limits import Limits, limit_workers
    from cellseg_benchmarks.folder import throughput
    from cellseg_benchmarks.harness import images as image_set
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_benchmarks.harness.timer import Plan, interleave
    from cellseg_deploy.errors import UsageError
    from cellseg_deploy.models import default_model_path

    names = shared.words(formats) or []
    unknown = [name for name in names if name not in image_set.FORMATS]
    if unknown or not names:
        raise UsageError(f"unknown format {', '.join(unknown)}; expected some of {', '.join(image_set.FORMATS)}")
    image_set.check_size(megapixels)
    machine, before = shared.start()
    new_folder(output)
    progress = shared.progress(output, "pipeline")
    say = shared.teller(quiet)
    with tempfile.TemporaryDirectory(dir=output, prefix="work-") as place:
        work = Path(place)
        say("writing the images ...")
        images = (
            image_set.given_images(paths, n_images)
            if paths
            else image_set.smears(min(n_images, image_set.DIFFERENT), image_set.size_for(megapixels))
        )
        folders, hw = image_set.write_set(work, images, names, n_images)
        settings = {
            **shared.engine_settings(backend, device, precision, batch_size, streams),
            **shared.scale_settings(scale, cell_diameter),
            "path": None if model is None else str(model),
        }
        runs, engine, evicted = throughput.measure_pipeline(
            folders,
            settings,
            work,
            rounds=rounds,
            warm=warm,
            threads=threads,
            save=[] if save == "none" else shared.words(save),
            model_file=model or default_model_path(),
            say=say,
            progress=progress,
        )
        sizes = {name: sum(file.stat().st_size for file in folder.iterdir()) / 1e6 for name, folder in folders.items()}
        pixels = sum(height * width for height, width in hw)
        limits = Limits()
        if not progress.skips("what the machine can do"):
            say("measuring what the machine can do ...")
            with limit_workers([engine["device"]], threads=threads) as workers:
                measured = interleave(workers.entries(), Plan(rounds=3), say=say, progress=progress, name="limits")
                limits = workers.limits(measured)
    report = throughput.PipelineReport(
        conditions=shared.conditions(machine, before),
        threads=threads,
        images=n_images,
        megapixels=pixels / 1e6,
        images_from="given images" if paths else "sample smears",
        megabytes=sizes,
        engine=engine,
        evicted=evicted,
        runs=tuple(runs),
        summaries=tuple(throughput.summarise(runs, pixels / 1e6)),
        shares=tuple(throughput.shares_of(runs, hw, engine, limits, _flops(model or default_model_path()))),
        limits=limits,
        not_run=shared.without_gpu(machine, device),
    )
    shared.publish(output, report, throughput.png(report), progress)


def _flops(model: Path) -> int | None:
    """Operations a tile; only an .onnx shows them."""
    from cellseg_benchmarks.harness.flops import count_flops

    return count_flops(model).total if model.suffix.lower() == ".onnx" else None
