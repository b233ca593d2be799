"""``cellseg-merge``: join the shards of a run, made by ``cellseg-infer --shard I/N``, into one folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cellseg_deploy.cli import console

_EPILOG = """\b
Example, four jobs of one array:
  cellseg-infer smears/ -o part-1/ --shard 1/4             ... and 2/4, 3/4, 4/4, anywhere, in any order
  cellseg-merge part-1 part-2 part-3 part-4 -o counts/

\b
OUT is what one run over all images would have left: label images, overlays, tables, report, journal. cellseg-infer
without --shard resumes it. Edited files stay edited. The shards are not changed.

\b
Exit codes: 0 all done, 2 these are not all the shards of one run, 3 some images failed (see images.csv), 6 output
folder unusable or of another run, 7 output folder in use, 130 interrupted, 143/129 terminated or terminal closed.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("shards", metavar="SHARD...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--group-by", default="", metavar="PATTERN|CSV", help="Groups, as for cellseg-infer.  [default: folders]")
@click.option("--report/--no-report", default=True, help="Write report.html and files for MultiQC.  [default: report]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout instead of the table.")
@console.log_options
def command(shards: tuple[Path, ...], output: Path, **asked: Any) -> int:
    """Join the output folders of all shards of a run into one."""
    console.set_up_logging(asked["verbose"])
    from cellseg_deploy.run.merge import merge

    summary = merge(shards, output, overwrite=asked["overwrite"], group_by=asked["group_by"], report=asked["report"])
    about = {
        "shards": len(shards),
        "found": summary.found,
        "done": summary.done,
        "failed": summary.failed,
        "cells": summary.cells,
        "counted": summary.counted,
        "output": console.printable(output),
    }
    if asked["as_json"]:
        click.echo(json.dumps(about))
    elif not asked["quiet"]:
        for name, value in about.items():
            click.echo(f"{name:<8} {value}")
    return console.EXIT_SOME_FAILED if summary.failed else console.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
