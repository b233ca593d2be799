"""``python -m cellseg_deploy.samples.compare truth.csv images.csv``: a run's counts next to the truth."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cellseg_deploy.cli.console import run
from cellseg_deploy.samples.write import compare_counts, count_table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("truth_csv", type=click.Path(path_type=Path))
@click.argument("images_csv", type=click.Path(path_type=Path))
def main(truth_csv: Path, images_csv: Path) -> None:
    """Print the counts of IMAGES_CSV (from cellseg-infer) next to those of TRUTH_CSV (written with the smears)."""
    click.echo(count_table(compare_counts(truth_csv, images_csv)))


if __name__ == "__main__":
    sys.exit(run(main))
