"""Which options of ``cellseg-evaluate`` go together. Each refusal is one sentence, and comes before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cellseg_deploy.cli.console import refuse_options

MODES = ("calibrate", "describe")
"""What an evaluation can do instead of its usual report."""
EXTRAS = ("sweep", "anatomy", "save_labels")
"""What it can add to it."""
_OF_THE_ENGINE = (
    *("scale", "cell_diameter", "batch_size", "device", "backend", "precision"),
    *("rebuild", "cuda_graph", "threads", "streams", "halo", "border_cells", "field"),
)
_OF_THE_MODEL = (*_OF_THE_ENGINE, "model", "task", "max_pixels", "bit_depth", "save_labels", "sweep", *MODES)
_MODEL_FILES = (".onnx", ".safetensors")
_OUTPUT = {
    "calibrate": "--calibrate writes a model file: give -o OUT.onnx",
    "describe": "give -o OUT, the folder for the description",
    "": "give -o OUT, the folder for the results",
}


def is_model_file(path: Path) -> bool:
    """Whether ``path`` is named as a model file that can be described."""
    return path.suffix.lower() in _MODEL_FILES


def check(context: click.Context, given: Mapping[str, Any]) -> Path:
    """The folder to judge: of images, or of label images. Raises click's usage error if options contradict.

    ``given``: the options by name. After it ``output`` is a path, and ``masks`` too except with ``describe``.
    """
    judged = _judged_folder(context, given)
    mode = _mode(given)
    truths = [name for name in ("masks", "boxes", "points", "counts") if given[name] is not None]
    if len(truths) > 1:
        raise click.UsageError(f"{_flag(truths[0])} and {_flag(truths[1])} exclude each other; give one truth")
    truth = truths[0] if truths else ""
    if truth in ("boxes", "points"):
        for name in (*MODES, *EXTRAS):
            if given[name]:
                raise click.UsageError(f"{_flag(name)} needs --masks, not {_flag(truth)}")
        refuse_options(context, ("count_rule",), f"has no part in {_flag(truth)}: border objects count neither way")
    elif given["classes"] is not None and (given["labels"] is not None or mode):
        raise click.UsageError(
            "--classes needs --boxes, --points, or a model that counts: label images and --calibrate have no classes"
        )
    if truth == "counts":
        _check_counts(given)
    if not truth and mode != "describe":
        raise click.UsageError("give --masks DIR, the truth to judge by (or --boxes, --points or --counts FILE.csv)")
    _check_unused(context, given, mode)
    output = given["output"]
    if output is None:
        raise click.UsageError(_OUTPUT[mode])
    if not mode and is_model_file(output):
        raise click.UsageError(
            f"OUT is the folder for the results, but {output} is named as a model file, which only --calibrate and "
            "--describe write"
        )
    return judged


def _check_counts(given: Mapping[str, Any]) -> None:
    """Refuse what needs to know where the true cells are."""
    for name in ("masks", *EXTRAS, *MODES):
        if given[name]:
            raise click.UsageError(f"{_flag(name)} and --counts exclude each other: counts do not say where cells are")


def _judged_folder(context: click.Context, given: Mapping[str, Any]) -> Path:
    images: Path | None = given["images"]
    labels: Path | None = given["labels"]
    if labels is None:
        if images is None:
            raise click.UsageError("give --images DIR for a model to count, or --labels DIR with label images to judge")
        return images
    if images is not None:
        raise click.UsageError("--images and --labels exclude each other: a model's cells are judged, or given labels")
    without_model = "and --labels exclude each other: given labels are judged without a model"
    refuse_options(context, _OF_THE_MODEL, without_model)
    return labels


def _mode(given: Mapping[str, Any]) -> str:
    """``calibrate``, ``describe``, or empty for the usual report."""
    asked = [name for name in MODES if given[name]]
    for mode in asked:
        for other in (*MODES, *EXTRAS):
            if other != mode and given[other]:
                raise click.UsageError(f"{_flag(other)} and --{mode} exclude each other; run the command twice")
    return asked[0] if asked else ""


def _check_unused(context: click.Context, given: Mapping[str, Any], mode: str) -> None:
    """Refuse what would be asked for in vain."""
    for name in ("sweep", *MODES):
        if given[name]:
            refuse_options(context, ("count_rule",), f"and --{name} exclude each other: it looks at all cells")
    if mode == "calibrate":
        its_own = "and --calibrate exclude each other: the limit at the border is among what it chooses"
        refuse_options(context, ("border_cells",), its_own)
        refuse_options(context, ("task",), "and --calibrate exclude each other: the points of all tasks are chosen")
    if mode == "describe" and given["masks"] is not None:
        unused: Sequence[str] = ("task", *_OF_THE_ENGINE)
        refuse_options(context, unused, "has no part in --describe with --masks: the cells are those of the masks")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
