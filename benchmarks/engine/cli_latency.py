"""``python -m cellseg_benchmarks latency`` and ``limits``: words to settings, rows to files."""

from __future__ import annotations

from pathlib import Path

import click

from cellseg_benchmarks import options as shared
from cellseg_deploy.cli import console

_size_option = click.option(
    "--matrix-size",
    type=click.IntRange(16),
    metavar="N",
    help="Side of the matrices for the peak.  [default: 2048, on a GPU 8192]",
)


@click.command("latency", context_settings=shared.SETTINGS)
@click.argument("networks", metavar="[NETWORK]...", nargs=-1, type=shared.PATH)
@click.option(
    "--made",
    multiple=True,
    metavar="DIR",
    type=shared.FOLDER,
    help="Folder that `parity` made of the NETWORK in the same place.  [default: made in -o, which takes long]",
)
@click.option("--forms", metavar="NAME,...", help="Forms to time, as pytorch-fp32,openvino-bf16.  [default: all]")
@click.option("--batch-sizes", metavar="N,...", default="1,8", show_default=True, help="Tiles a call.")
@shared.device_option
@shared.rounds_options(10)
@_size_option
@shared.measuring_options
def latency_command(
    networks: tuple[Path, ...],
    made: tuple[Path, ...],
    forms: str | None,
    batch_sizes: str,
    device: str,
    rounds: int,
    min_seconds: float,
    settle: float,
    budget: float | None,
    matrix_size: int | None,
    output: Path,
    threads: int | None,
    quiet: bool,
) -> None:
    """Time every form of networks beside PyTorch, tile by tile, as a share of what the machine can do.

    NETWORK is a run folder of cellseg-train or its model.safetensors, by default the model that ships. Its forms come
    from --made; without it they are made first, through the parity gate, and stay in DIR/forms. Writes latency.json,
    latency.md and latency.png to DIR. Exit code 8 if nothing could be timed.
    """
    console.require_packages("export", "torch", "timm", "safetensors")
    from cellseg_benchmarks.engine.latency import LatencyReport, measure_latency
    from cellseg_benchmarks.engine.latency_report import png
    from cellseg_benchmarks.harness.form_files import make_forms, network_of
    from cellseg_benchmarks.harness.forms import forms_for
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_deploy.errors import BackendUnavailableError, ModelError
    from cellseg_deploy.models import default_weights_path

    weights = list(networks) or [default_weights_path()]
    for path in weights:
        if not path.exists():
            raise ModelError(f"{path}: no such file or folder; give a run folder or its model.safetensors")
    if made and len(made) != len(weights):
        raise click.UsageError(
            f"--made must be given once for each NETWORK or not at all: {len(made)} and {len(weights)}"
        )
    batches = shared.numbers(batch_sizes, "--batch-sizes")
    plan = shared.plan_of(rounds, min_seconds, settle, budget)
    machine, before = shared.start()
    devices, absent = shared.devices_for(device, machine)
    chosen = forms_for(devices, shared.words(forms))
    if not chosen:
        raise click.UsageError(f"none of the forms {forms} runs on {', '.join(devices)}")
    new_folder(output)
    progress = shared.progress(output, "latency")
    say = shared.teller(quiet)
    folders = list(made)
    if not made:
        for place, path in enumerate(weights):
            folders.append(output / "forms" / f"{place + 1}-{path.stem}")
            make_forms(path, folders[-1], [form for form in chosen if form.device not in absent], say=say)
    found = [network_of(path, folder) for path, folder in zip(weights, folders, strict=True)]
    rows, limits = measure_latency(
        found, chosen, batches, plan, threads=threads, absent=absent, limit_size=matrix_size, say=say, progress=progress
    )
    report = LatencyReport(
        conditions=shared.conditions(machine, before),
        threads=threads,
        plan=plan,
        gflop_per_tile={n.name: None if n.flops is None else n.flops.total / 1e9 for n in found},
        rows=tuple(rows),
        limits=tuple(limits),
    )
    shared.publish(output, report, png(report), progress)
    if not any(row.status == "measured" for row in rows):
        raise BackendUnavailableError("no form could be timed; the report says why")


@click.command("limits", context_settings=shared.SETTINGS)
@shared.device_option
@shared.rounds_options(7)
@_size_option
@shared.measuring_options
def limits_command(
    device: str,
    rounds: int,
    min_seconds: float,
    settle: float,
    budget: float | None,
    matrix_size: int | None,
    output: Path,
    threads: int | None,
    quiet: bool,
) -> None:
    """What this machine can do: products of matrices in each precision, memory, reading and writing images.

    Writes limits.json, limits.md and limits.png to DIR.
    """
    plan = shared.plan_of(rounds, min_seconds, settle, budget)
    machine, before = shared.start()
    from cellseg_benchmarks.engine.limits import LimitsReport, limit_workers, png
    from cellseg_benchmarks.harness.report import new_folder
    from cellseg_benchmarks.harness.timer import interleave

    devices, absent = shared.devices_for(device, machine)
    new_folder(output)
    progress = shared.progress(output, "limits")
    here = [name for name in devices if name not in absent]
    with limit_workers(here, threads=threads, size=matrix_size) as workers:
        workers.missing |= absent
        measured = interleave(workers.entries(), plan, say=shared.teller(quiet), progress=progress)
        limits = workers.limits(measured)
    report = LimitsReport(shared.conditions(machine, before), threads, plan, limits)
    shared.publish(output, report, png(report), progress)
