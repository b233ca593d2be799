"""``cellseg-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellseg_deploy.cli import console
from cellseg_export import cli_options as shared

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground

# Forms that do not need PyTorch.
_DEPLOYABLE = (".onnx", ".engine", ".xml")


@click.command("verify", context_settings=shared.SETTINGS, epilog=shared.EPILOG)
@click.argument("reference", metavar="REF", type=shared.PATH)
@click.argument("candidate", metavar="CANDIDATE", type=shared.PATH)
@shared.images_option
@shared.masks_option
@click.option(
    "--policy",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Parity policy.  [default: by the precision of CANDIDATE]",
)
@click.option("--report", metavar="FILE.json", type=shared.PATH, help="Write the whole comparison to this file.")
@click.option(
    "--picture",
    metavar="FILE.png",
    type=shared.PATH,
    help="Write a picture of the worst image, with the outlines of both forms and their differences (PNG or JPEG).",
)
@click.option("--device", default="cpu", show_default=True, help="Device of CANDIDATE: cpu, cuda or cuda:N.")
@click.option("--reference-device", metavar="DEVICE", help="Device of REF.  [default: that of CANDIDATE]")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "openvino", "tensorrt"]),
    help="Engine of CANDIDATE.  [default: ONNX Runtime for an .onnx, the only one that opens it for another form]",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of CANDIDATE in OpenVINO.")
@click.option(
    "--record",
    is_flag=True,
    help="Time both, and keep the verdict beside CANDIDATE, where cellseg-infer --backend auto looks for it.",
)
@shared.batch_option
@shared.threads_option
@console.log_options
def verify_command(
    reference: Path,
    candidate: Path,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    policy: str | None,
    report: Path | None,
    picture: Path | None,
    device: str,
    reference_device: str | None,
    backend: str | None,
    precision: str | None,
    record: bool,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
    verbose: int,
) -> None:
    """Compare two forms of one network: REF and CANDIDATE are each a run folder, a model.safetensors, an .onnx file or
    another form that cellseg-export wrote.

    Prints how much probabilities, masks, cells and counts differ, and ends with exit code 5 unless they pass. With
    true labels (--masks, or on the sample smears) both are judged by these too, side by side; int8 forms must be.
    """
    console.set_up_logging(verbose)
    if any(path.suffix.lower() not in _DEPLOYABLE for path in (reference, candidate)):
        console.require_packages("export", "torch", "timm", "safetensors")

    from cellseg_deploy.errors import ParityError
    from cellseg_deploy.files.atomic import write_bytes
    from cellseg_deploy.parity import picture as parity_picture
    from cellseg_deploy.parity.compare import policy_for
    from cellseg_export.gate.parity_record import check_recordable, record_form
    from cellseg_export.gate.verify import look_inside, open_form, sample_images, verify

    if picture is not None:
        parity_picture.check_suffix(picture)
    given = shared.gate_images(images, masks, mask_foreground)
    shared.set_threads(threads)
    with (
        open_form(reference, device=reference_device or device, threads=threads) as first,
        open_form(
            candidate,
            device=device,
            threads=threads,
            backend=backend,
            precision=precision,
        ) as second,
    ):
        seen = given or sample_images(first.spec)
        limits = policy_for(policy or second.precision)
        if record:  # before the comparison, which takes long
            check_recordable(first, second, candidate, limits)
        result = verify(
            first,
            second,
            seen,
            limits,
            batch_size=tile_batch,
            on_image=lambda name: None if quiet else click.echo(f"compared {console.printable(name)}", err=True),
        )
        if record and result.verdict == "inconclusive":
            click.echo("no record is kept: too few cells to judge by", err=True)
        elif record:
            record_form(result, first, second, candidate, seen, (candidate, reference), batch_size=tile_batch)
    if first.name == "pytorch" and candidate.suffix.lower() == ".onnx":
        from cellseg_train.checkpoint import load_network

        result = look_inside(result, load_network(reference), candidate, seen)
    if report is not None:
        write_bytes(report, result.to_json())
    if picture is not None and result.worst is not None:
        write_bytes(picture, parity_picture.encode(result.worst, picture.suffix))
    if not quiet:
        click.echo(result.to_text())
    if result.verdict != "passed":
        why = result.reasons if quiet else ()  # otherwise the reasons are in the table
        lines = (f"{console.printable(candidate)}: parity {result.verdict} under policy {limits.name}", *why)
        raise ParityError("\n  - ".join(lines))
