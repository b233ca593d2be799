"""``python -m cellseg_benchmarks robustness``: words to settings, rows to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_benchmarks import options as shared
from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_benchmarks.quality.robustness import Row
    from cellseg_deploy.images.mask_foreground import MaskForeground

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("robustness", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="New folder.")
@click.option("--model", type=click.Path(path_type=Path), help="Model file.  [default: the one that ships]")
@click.option("--images", metavar="DIR", type=_FOLDER, help="Images to change.  [default: sample smears]")
@click.option("--masks", metavar="DIR", type=_FOLDER, help="Their masks.")
@console.mask_options
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one a core]")
@click.option("--quiet", "-q", is_flag=True, help="No lines of progress.")
def robustness_command(
    output: Path,
    model: Path | None,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    threads: int | None,
    quiet: bool,
) -> None:
    """How counts change with cell size, stain, brightness and colour, and with crowding at known truth.

    Writes robustness.csv, robustness.md, conditions.png and crowding.png to DIR.
    """
    console.require_packages("plots", "matplotlib")
    if (images is None) != (masks is None):
        raise click.UsageError("--images and --masks belong together: counts are judged by true cells")

    from cellseg_benchmarks.harness.report import with_remark
    from cellseg_benchmarks.quality import robustness
    from cellseg_deploy.backends import EngineOptions
    from cellseg_deploy.errors import OutputError
    from cellseg_deploy.evaluate.plots import curves_png
    from cellseg_deploy.files.atomic import make_folder, write_bytes
    from cellseg_deploy.images.read import pair_by_stem
    from cellseg_deploy.outputs.tables import csv_rows
    from cellseg_deploy.segmenter import Segmenter

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not an empty folder; choose another -o")
    if images is not None and masks is not None:
        pair_by_stem(images, masks)  # a file without partner must not wait until the folder is there

    def say(line: str) -> None:
        if not quiet:
            console.say(line)

    engine = EngineOptions(threads=threads)
    with ExitStack() as stack:
        segmenters = {
            robustness.FIXED: stack.enter_context(Segmenter.load(model, engine=engine, scale=None)),
            robustness.AUTO: stack.enter_context(Segmenter.load(model, engine=engine)),
        }
        make_folder(output)
        progress = shared.progress(output, "robustness")
        shifted = robustness.conditions(
            segmenters, lambda: _pairs(images, masks, mask_foreground), say=say, progress=progress
        )
        crowded = robustness.crowding(segmenters, say=say, progress=progress)
    rows = [*shifted, *crowded]
    table = [row.flat() for row in rows]
    write_bytes(output / "robustness.csv", csv_rows([list(table[0]), *(list(row.values()) for row in table)]))
    text = with_remark(_markdown(rows), progress)
    write_bytes(output / "robustness.md", text.encode())
    for name, part in (("conditions", shifted), ("crowding", crowded)):
        if not part:
            continue
        panels = [_panel(part, condition) for condition in dict.fromkeys(row.condition for row in part)]
        write_bytes(output / f"{name}.png", curves_png(panels, y_label="F1, and relative count error"))
    click.echo(text)
    progress.finish()


def _pairs(images: Path | None, masks: Path | None, foreground: MaskForeground) -> Iterator[tuple[Any, Any]]:
    from cellseg_benchmarks.harness.images import judged_pairs
    from cellseg_deploy.samples import SmearParams, make_smear

    if images is not None and masks is not None:
        yield from judged_pairs(images, masks, foreground=foreground)
        return
    for seed in range(4):
        smear = make_smear(SmearParams(), seed)
        yield smear.image_hwc, smear.labels_hw


def _panel(rows: list[Row], condition: str) -> tuple[str, dict[str, tuple[list[float], list[float]]]]:
    """Title, and for each curve its x and y: F1 and count error at each scale."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.condition == condition:
            for metric, name in (("f1", "F1"), ("count_mape", "count error")):
                x, y = curves.setdefault(f"{name}, {row.scale}", ([], []))
                x.append(row.value)
                y.append(row.figures[metric])
    return condition, curves


def _markdown(rows: list[Row]) -> str:
    lines = [
        "| condition | factor | scale | Dice | F1 | count error | bias, cells an image | true | found |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        f = row.figures
        lines.append(
            f"| {row.condition} | {row.value:g} | {row.scale} | {f['dice']:.3f} | {f['f1']:.3f} | "
            f"{f['count_mape']:.1%} | {f['count_bias']:+.1f} | {f['n_true']:.0f} | {f['n_predicted']:.0f} |"
        )
    return "\n".join(lines) + "\n"
