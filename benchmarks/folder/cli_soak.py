"""``python -m cellseg_benchmarks soak``: words to settings, figures to files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from cellseg_benchmarks import options as shared

if TYPE_CHECKING:
    from cellseg_benchmarks.folder.soak import Leak


@click.command("soak", context_settings=shared.SETTINGS)
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="New folder.")
@click.option("--files", type=click.IntRange(20, 99_999), default=10_000, show_default=True, help="How many images.")
@click.option("--bad", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Share of damaged ones.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides which are damaged.")
@click.option(
    "--leak",
    type=click.Choice(["memory", "descriptors", "files"]),
    is_flag=False,
    flag_value="memory",
    help="The network leaks on purpose, memory unless something else is named: then the verdict must fail.",
)
@click.option("--quiet", "-q", is_flag=True, help="No lines of progress.")
def soak_command(output: Path, files: int, bad: float, seed: int, leak: str | None, quiet: bool) -> None:
    """A folder run over thousands of small images with a stub network: does anything grow, and what does a file cost?

    Makes the images in DIR/files, runs to DIR/run, and writes soak.json, soak.md and soak.png to DIR. Exit code 5 if a
    criterion fails: memory flat; descriptors, threads and temporary files back to where they were; at most 30 ms a file
    outside the network; each result the right one. Linux only.
    """
    machine, before = shared.start()

    from cellseg_benchmarks.folder import soak_report
    from cellseg_benchmarks.folder.soak import Limits, soak
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_deploy.errors import ParityError

    new_folder(output)
    progress = shared.progress(output, "soak")
    found = soak(
        output,
        n_files=files,
        bad=bad,
        seed=seed,
        leak=cast("Leak | None", leak),
        say=shared.teller(quiet),
        progress=progress,
    )
    settings: dict[str, Any] = {"files": files, "bad": bad, "seed": seed, "leak": leak}
    report = soak_report.judged(found, Limits(), shared.conditions(machine, before), settings)
    shared.publish(output, report, soak_report.png(report), progress)
    if report.verdict != "holds":
        raise ParityError(f"the soak {report.verdict}; see {output / 'soak.md'}")
