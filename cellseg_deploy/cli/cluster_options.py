"""Options of ``cellseg-infer`` and ``cellseg-slide`` for running on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.cluster.engine import ClusterEngine


def cluster_options(function: console.F) -> console.F:
    """Add the options of ``opened``."""
    options = [
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="Run on a Dask cluster: local (processes on this machine), tls://HOST:PORT, or "
            "tcp://127.0.0.1:PORT. Images and OUT must have the same paths on all machines.",
        ),
        click.option(
            "--workers", type=click.IntRange(1, 1024), metavar="N", help="Processes of --scheduler local.  [default: 1]"
        ),
        click.option("--tls-ca-file", type=click.Path(path_type=Path), metavar="PEM", help="Authority for tls://."),
        click.option("--tls-cert", type=click.Path(path_type=Path), metavar="PEM", help="Own certificate for tls://."),
        click.option("--tls-key", type=click.Path(path_type=Path), metavar="PEM", help="Its key."),
    ]
    return console.with_options(function, options)


def check(context: click.Context) -> None:
    """Raise click's usage error for options that do not fit each other, ``UsageError`` for a wrong address."""
    asked = context.params
    tls = ("tls_ca_file", "tls_cert", "tls_key")
    if asked["scheduler"] is None:
        console.refuse_options(context, ("workers", *tls), "needs --scheduler")
        return
    if asked.get("watch"):
        raise click.UsageError("--scheduler and --watch exclude each other")
    from cellseg_deploy.cluster.connection import LOCAL, check_address

    check_address(asked["scheduler"])
    if asked["scheduler"] != LOCAL:
        console.refuse_options(context, ("workers",), "needs --scheduler local: others have the workers they have")
    if not asked["scheduler"].startswith("tls"):
        console.refuse_options(context, tls, "needs --scheduler tls://HOST:PORT")


@contextmanager
def opened(asked: Mapping[str, Any]) -> Iterator[ClusterEngine | None]:
    """Yield the cluster of ``--scheduler``; None without."""
    if asked["scheduler"] is None:
        yield None
        return
    from cellseg_deploy.cluster.connection import TlsFiles
    from cellseg_deploy.cluster.engine import open_cluster

    tls = TlsFiles(asked["tls_ca_file"], asked["tls_cert"], asked["tls_key"])
    with open_cluster(asked["scheduler"], workers=asked["workers"], threads=asked["threads"], tls=tls) as engine:
        yield engine
