"""Peak memory of ``cellseg-slide`` against the size of the image, blank and full of cells.

Each run is the command as shipped, in a process of its own; its peak is the kernel's account of that process, with
Python and all libraries, as the process reads it at its end. (What the kernel tells the parent includes the parent's.)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.figures import Lines, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, megabytes, number, table
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.samples.params import SmearParams
from cellseg_deploy.samples.slide import TILE_PX, write_slide

CONTENTS = ("blank", "cells")
_FIELD_PX = 5 * TILE_PX
_CELLS_PER_FIELD = 300
_GLASS = (232, 228, 236)
_SEED = 11
_COMMAND = """
from cellseg_benchmarks.harness.memory import peak_rss_bytes
from cellseg_deploy.cli.slide import main

try:
    main()
finally:
    print(peak_rss_bytes())
"""


@dataclass(frozen=True)
class Run:
    """One image of ``side`` x ``side`` px. ``true_cells``: drawn, 0 on blank glass; ``cells``: found."""

    content: str
    side: int
    true_cells: int
    cells: int
    counted: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class SlideMemoryReport:
    """``memory``: passed as ``--memory``, in bytes."""

    conditions: Conditions
    threads: int | None
    memory: int
    runs: tuple[Run, ...]
    benchmark: str = "slide-memory"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """One table."""
        rows = [
            [
                run.content,
                f"{run.side:,} x {run.side:,}",
                megabytes(run.peak_bytes),
                str(run.true_cells),
                str(run.cells),
                str(run.counted),
                number(run.seconds),
            ]
            for run in self.runs
        ]
        head = ("image", "px", "peak, MB", "cells drawn", "found", "counted", "s")
        lines = [
            "# Memory of a streamed image",
            "",
            *machine_lines(self.conditions, self.threads),
            f"`cellseg-slide --memory {self.memory}`: peak memory of the process, Python and libraries included.",
            "",
            *table(head, rows, words=1),
        ]
        return "\n".join(lines) + "\n"

    def to_png(self) -> bytes:
        """Peak memory against megapixels, a curve for each content."""
        curves = {}
        for content in dict.fromkeys(run.content for run in self.runs):
            of_content = [run for run in self.runs if run.content == content]
            curves[content] = ([run.side**2 / 1e6 for run in of_content], [run.peak_bytes / 1e9 for run in of_content])
        panel = Lines("Peak memory of the process", "megapixels", "GB", curves, logarithmic=False)
        return panels_png([panel], title="Streamed images")


def measure(content: str, side: int, work: Path, *, memory: int, threads: int | None, model: Path | None = None) -> Run:
    """Write an image, count it with ``cellseg-slide`` and ``model``, and remove both.

    Raises ``DataError`` if the command fails.
    """
    image, out = work / "slide.tif", work / "out"
    if content == "blank":
        _write_blank(image, side)
        true_cells = 0
    else:
        params = SmearParams(size_hw=(_FIELD_PX, _FIELD_PX), n_cells=_CELLS_PER_FIELD)
        n = side // _FIELD_PX
        true_cells = write_slide(image, (n, n), params, _SEED, distinct=min(n * n, 8))
    words = ["-c", _COMMAND, str(image), "-o", str(out), "-q", "--save", "labels", "--memory", str(memory)]
    words += [] if threads is None else ["--threads", str(threads)]
    words += [] if model is None else ["--model", str(model)]
    since = stopwatch()
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    seconds = since()
    if ended.returncode:
        raise DataError(f"cellseg-slide ended with {ended.returncode}: {ended.stderr.strip()}")
    row = json.loads((out / "slide.json").read_text())["result"]
    shutil.rmtree(out)
    image.unlink()
    return Run(content, side, true_cells, row["cells"], row["counted"], seconds, int(ended.stdout))


def _write_blank(path: Path, side: int) -> None:
    import tifffile

    tile = np.full((TILE_PX, TILE_PX, 3), _GLASS, np.uint8)
    n = (-(-side // TILE_PX)) ** 2

    def tiles() -> Iterator[npt.NDArray[np.uint8]]:
        for _ in range(n):
            yield tile

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        compression="zlib",
        bigtiff=True,
        maxworkers=1,
        metadata=None,
    )


@click.command("slide-memory", context_settings=shared.SETTINGS)
@shared.model_option
@click.option(
    "--blank", default="5000,10000,20000,40000", show_default=True, metavar="PX,...", help="Sides of blank images."
)
@click.option(
    "--cells",
    default="5120,10240,20480",
    show_default=True,
    metavar="PX,...",
    help="Sides of images of cells, multiples of 2560.",
)
@click.option("--memory", type=click.FloatRange(0.01), default=1.0, show_default=True, metavar="GB", help="For blocks.")
@shared.measuring_options
def slide_memory_command(model: Path | None, blank: str, cells: str, memory: float, **given: Any) -> None:
    """Peak memory of cellseg-slide against the size of the image, blank and full of cells.

    Cells are counted, too. Writes slide-memory.json, slide-memory.md and slide-memory.png to DIR.
    """
    sides = {name: shared.numbers(text, f"--{name}") for name, text in (("blank", blank), ("cells", cells))}
    if wrong := [side for side in sides["cells"] if side % _FIELD_PX]:
        raise UsageError(f"images of cells are made of fields of {_FIELD_PX} px; got a side of {wrong[0]}")
    bench = shared.Bench("slide-memory", given)
    bench.begin()
    bytes_ = round(memory * 1e9)
    runs = []
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as work:
        for content in CONTENTS:
            for side in sides[content]:
                runs.append(measure(content, side, Path(work), memory=bytes_, threads=bench.threads, model=model))
                bench.say(f"{content}, {side} px: {runs[-1].peak_bytes / 1e9:.2f} GB, {runs[-1].seconds:.0f} s")
    report = SlideMemoryReport(bench.conditions(), bench.threads, bytes_, tuple(runs))
    bench.publish(report, report.to_png())
