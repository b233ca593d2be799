"""``python -m cellseg_deploy.samples OUT``: write synthetic smears with their truth."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import UsageError, plural
from cellseg_deploy.samples.write import CLASSES_FILE, TRUTH_FILE, write_samples


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--n", default=6, help="Number of smears.")
@click.option("--seed", default=0, help="The same seed gives the same smears.")
@click.option("--size", default="1600x1200", help="WIDTHxHEIGHT of each picture in px.")
@click.option("--vary/--same-laboratory", default=False, help="Vary stain, camera and blood from smear to smear.")
def main(out: Path, n: int, seed: int, size: str, vary: bool) -> None:
    """Write synthetic blood smears to OUT: images/, masks/ (label images), truth.csv (cells per image), classes.csv."""
    rows = write_samples(out, n, seed, parse_size(size), vary=vary)
    for name, n_cells in rows:
        click.echo(f"{name}  {plural(n_cells, 'cell')}")
    click.echo(f"Wrote {out}; the truth is in {out / TRUTH_FILE} and {out / 'masks'}")
    click.echo(f"The class of each cell, for cellseg-train --classes, is in {out / CLASSES_FILE}")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``WIDTHxHEIGHT``; raises ``UsageError``."""
    match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    if match is None:
        raise UsageError(f"--size must be WIDTHxHEIGHT in px such as 1600x1200, got {text!r}")
    return int(match[2]), int(match[1])


if __name__ == "__main__":
    sys.exit(run(main))
