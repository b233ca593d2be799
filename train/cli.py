"""``cellseg-train``: options to settings, settings to ``loop.train``. PyTorch is imported once a training starts."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from cellseg_deploy.cli.console import refuse_options, require_packages, run, say
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.images.mask_foreground import MASK_FOREGROUNDS
from cellseg_train.config import (
    HUB_PREFIX,
    SHIPPED,
    AugmentConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OverlapConfig,
    TrainConfig,
)

F = TypeVar("F", bound=Callable[..., Any])
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)
_EPILOG = """\b
Exit codes: 0 done, 2 usage, 3 an image or mask cannot be used, 5 weights or run refused, 6 run folder unusable,
7 the run is being trained by another process, 8 PyTorch or the device is not available, 129/130/143 interrupted
(continue with --resume).
"""
NO_TEACHER = "none"
MARKS = "marks"
"""Value in place of a class file: use the classes of the boxes or points."""
_TEACHING = ("teacher", "marked_cell_diameter", "whole_class", "leave_out_class")
_SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "overlap": OverlapConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
}


def absolute_source(weights: str) -> str:
    """``weights`` with a file's path made absolute: a later --resume may run in another folder."""
    is_file = weights not in ("hub", "none", SHIPPED) and not weights.startswith(HUB_PREFIX)
    return str(Path(weights).absolute()) if is_file else weights


def _numbers(kind: type) -> Any:
    """Return a callback that reads ``96,64,32`` (or ``none``) as a tuple of ``kind``."""

    def parse(_: click.Context, __: click.Parameter, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return () if value == "none" else tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not a list of numbers such as 96,64,32") from error

    return parse


def _setting(
    section: str, name: str, flag: str | None = None, *, numbers: type | None = None, **more: Any
) -> Callable[[F], F]:
    """An option whose default, and whose place in ``TrainConfig``, is the dataclass field ``section.name``."""
    default: Any = next(f.default for f in dataclasses.fields(_SECTIONS[section]) if f.name == name)
    if numbers is not None:
        more["callback"] = _numbers(numbers)
        default = ",".join(map(str, default)) if default else "none"
    flag = flag or "--" + name.replace("_", "-")
    option: Callable[[F], F] = click.option(flag, f"{section}__{name}", default=default, show_default=True, **more)
    return option


@click.command(
    "cellseg-train", epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--images", multiple=True, type=_FOLDER, help="Folder of training images (PNG, JPEG, TIFF). Repeatable.")
@click.option(
    "--masks",
    multiple=True,
    type=_EXISTING,
    help="Its masks, by stem: binary, label images, or files of Cellpose, ImageJ, QuPath, COCO or YOLO. Repeatable.",
)
@click.option(
    "--boxes",
    multiple=True,
    type=_EXISTING,
    help="Boxes of --images instead of masks (CSV, YOLO, COCO): label images are made from them. Repeatable.",
)
@click.option(
    "--points", multiple=True, type=_EXISTING, help="Points (CSV image,class,x,y) instead of masks. Repeatable."
)
@click.option(
    "--corrections",
    type=_FOLDER,
    metavar="OUT",
    help="Folder corrected with cellseg-view: its corrected and its confirmed images, with their corrected labels.",
)
@click.option(
    "--hold-out/--no-hold-out",
    default=True,
    show_default=True,
    help="Keep every second image of --corrections out of the training, in RUN/corrected/held-out, to evaluate on.",
)
@click.option(
    "--teacher",
    metavar="FILE|none",
    help="Model that locates the cells for --boxes, --points; none: boxes become ellipses.  [default: the shipped one]",
)
@click.option(
    "--marked-cell-diameter",
    type=float,
    metavar="PX",
    help="Diameter of the cells in the images, for the teacher.  [default: of the boxes, or the teacher's own]",
)
@click.option(
    "--whole-class",
    multiple=True,
    metavar="NAME",
    help="Boxes whose class contains NAME are white cells: their whole ellipse is the cell. Repeatable.  "
    "[default: white, WBC, leuko, lympho, neutro, mono, ...]",
)
@click.option(
    "--leave-out-class", multiple=True, metavar="NAME", help="Marks of this class are not cells, such as platelets."
)
@click.option(
    "--classes",
    multiple=True,
    metavar="FILE|marks",
    help="CSV (image,label,class) of the cells' classes, each a channel of the network; or marks for those in the "
    "files of --boxes, --points, --masks or --corrections. Cells of the class ignore are left out. Repeatable.",
)
@click.option("--truth-only", is_flag=True, help="Make the label images in RUN/truth and stop.")
@click.option("--val-images", multiple=True, type=_FOLDER, help="Validation images.  [default: some of --images]")
@click.option("--val-masks", multiple=True, type=_EXISTING, help="Masks of --val-images.")
@click.option("--val-boxes", multiple=True, type=_EXISTING, help="Boxes of --val-images instead, as --boxes.")
@click.option("--val-points", multiple=True, type=_EXISTING, help="Points of --val-images instead, as --points.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder to create; it must not exist.")
@click.option("--resume", type=_FOLDER, help="Resume this run folder, with the settings and data it was started with.")
@click.option("--name", default="cellseg", show_default=True, help="Name written into the model.")
@click.option(
    "--data-note", default="", help="The training data and its licence in words, for the model's description."
)
@_setting("model", "variant", type=click.Choice(["plain", "boundary", "distance"]), help="Channels to learn.")
@_setting("model", "encoder", help="tiny; small, base, large (DINOv2 ViT/14); uni (ViT-L/16); or any timm ViT.")
@click.option(
    "--weights",
    default="none",
    show_default=True,
    help="Initial weights: shipped (the package's own network, to fine-tune), none, hub (timm's own encoder; for uni "
    "MahmoodLab/UNI), hf-hub:OWNER/NAME, or a checkpoint file.",
)
@_setting("model", "tile_size", help="Side of the network's input in px, a multiple of the ViT's patch.")
@_setting("model", "decoder_channels", numbers=int, help="Decoder width at 1/8, 1/4, 1/2 of the tile.")
@_setting(
    "model", "image_skip", numbers=int, help="Channels of the image branch at 1/8, 1/4, 1/2; none to leave it out."
)
@_setting("model", "tiny_width", help="Width of the tiny encoder, a multiple of --tiny-heads.")
@_setting("model", "tiny_depth", help="Blocks of the tiny encoder.")
@_setting("model", "tiny_heads", help="Attention heads of the tiny encoder.")
@_setting("model", "drop_path", help="Stochastic depth of the encoder.")
@_setting("data", "image_scale", help="Model px per image px.")
@click.option(
    "--cell-diameter",
    "data__cell_diameter_px",
    type=float,
    metavar="PX",
    help="Scale each folder of images so that its median cell is this wide for the network, instead of --image-scale: "
    "for folders of several magnifications.",
)
@_setting("data", "val_fraction", help="Share of images held out when no --val-images is given.")
@_setting("data", "patches_per_image", help="Random tiles from each image in an epoch.")
@_setting("data", "boundary_width_px", "--boundary-width", help="Width of the boundary band in model px.")
@click.option(
    "--min-object",
    "data__min_object_px",
    type=int,
    metavar="PX",
    help="Smaller objects in the masks are specks, in image px.  [default: 2.45 % of the masks' median object]",
)
@_setting(
    "data",
    "mask_foreground",
    type=click.Choice(MASK_FOREGROUNDS),
    help="Numbers in the masks that are cells: above 0 (light), or all but the largest (dark: the masks are "
    "negatives). auto takes those above 0 and refuses a mask that looks like a negative.",
)
@_setting("data", "cache_gb", help="Memory for decoded images in GB.")
@_setting("augment", "scale", "--scale-jitter", numbers=float, help="Lowest and highest random zoom.")
@_setting("augment", "stain", "--stain-jitter", help="Relative spread of each stain's strength.")
@_setting(
    "overlap", "share", "--overlap-share", help="Share of whole cells that become piles of overlapping real cells."
)
@_setting("overlap", "most", "--overlap-most", help="Most cells in such a pile.")
@_setting("loss", "dice_weight", help="Weight of the Dice loss.")
@_setting("loss", "boundary_weight", help="Weight of the boundary channel's loss.")
@_setting("loss", "gap_weight", help="Extra weight of background in thin gaps between cells.")
@_setting("loss", "surface_weight", help="Weight of the boundary channel's surface loss; 0 for none.")
@_setting("loss", "distance_weight", help="Weight of the distance channel's loss.")
@_setting("loss", "class_weight", help="Weight of the classes' cross-entropy.")
@_setting("optim", "epochs", help="Passes over the images.")
@_setting("optim", "batch_size", help="Tiles per update.")
@_setting("optim", "lr", help="Peak learning rate.")
@_setting("optim", "encoder_lr_ratio", help="Learning rate of the encoder relative to the rest.")
@_setting("optim", "layer_decay", help="Learning rate factor from each encoder block to the one below.")
@_setting("optim", "freeze", "--freeze/--no-freeze", help="Train the decoder only.")
@_setting("optim", "weight_decay", help="AdamW's.")
@_setting("optim", "warmup_fraction", help="Share of all updates with rising learning rate.")
@_setting("optim", "clip_norm", help="Largest gradient norm.")
@_setting("optim", "ema_decay", help="Decay of the averaged weights that are validated and saved; 0 for none.")
@_setting("optim", "amp", type=click.Choice(["auto", "off", "bf16", "fp16"]), help="Autocast precision.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed for split, tiles and weights."
)
@click.option(
    "--validate-every", default=1, show_default=True, type=click.IntRange(1), help="Epochs between validations."
)
@click.option(
    "--calibrate/--no-calibrate",
    default=TrainConfig.calibrate,
    show_default=True,
    help="Search the operating points on the validation images at the end; otherwise the last network is kept "
    "unchanged.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 leaves it to PyTorch."
)
@click.option(
    "--workers",
    default=TrainConfig.workers,
    show_default=True,
    type=click.IntRange(0),
    help="Threads that cut tiles ahead of their use.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress; errors and warnings only.")
@click.version_option(package_name="cellseg-deploy")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Train a cell-segmentation network on images and masks.

    \b
    cellseg-train --images smears/ --masks masks/ -o runs/first --weights shipped --image-scale 0.5 --epochs 20
    cellseg-train --images smears/ --boxes boxes.csv -o runs/boxes --weights shipped --cell-diameter 32
    cellseg-train --corrections counts/ -o runs/corrected --weights shipped --cell-diameter 32
    cellseg-train --resume runs/first

    The run folder keeps settings, split, log, pictures, the last checkpoint, and in model.safetensors the best network,
    which cellseg-export turns into a file that cellseg-infer runs.
    """
    quiet, resume, out = options.pop("quiet"), options.pop("resume"), options.pop("out")
    if resume is not None:
        given = [
            option.opts[0]
            for option in context.command.params
            if option.name not in ("resume", "quiet")
            and context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            raise UsageError(
                "--resume continues a run as it was started and takes no folders, -o or settings, got "
                + ", ".join(given)
            )
        _resume(resume, quiet)
        _say_next(resume)
        return
    kinds = [kind for kind in ("masks", "boxes", "points") if options[kind]]
    corrected = options["corrections"] is not None
    has_folders = bool(options["images"]) and len(kinds) == 1
    if out is None or not (has_folders or (corrected and not options["images"] and not kinds)):
        raise UsageError(
            "give --images DIR, one of --masks DIR, --boxes FILE and --points FILE, or --corrections OUT, and -o RUN "
            "to start a training, or --resume RUN to resume one"
        )
    of_val = [kind for kind in ("masks", "boxes", "points") if options[f"val_{kind}"]]
    if len(of_val) != bool(options["val_images"]):
        raise UsageError("give --val-images DIR with one of --val-masks DIR, --val-boxes FILE and --val-points FILE")
    are_drawn = not {"boxes", "points"} & {*kinds, *of_val}
    if not corrected:
        refuse_options(context, ("hold_out",), "belongs to --corrections")
    truth_only = options.pop("truth_only")
    if truth_only and are_drawn:
        raise UsageError("--truth-only makes label images from --boxes or --points; got --masks")
    if (teacher := options["teacher"]) is not None and teacher != NO_TEACHER and not Path(teacher).is_file():
        raise UsageError(f"--teacher {teacher}: no such file; give a model file, or {NO_TEACHER}")
    for file in options["classes"]:
        if file != MARKS and not Path(file).is_file():
            raise UsageError(f"--classes {file}: no such file; give a CSV file with image,label,class, or {MARKS}")
    if _start(out, options, quiet, truth_only=truth_only):
        _say_next(out)


def _start(out: Path, options: dict[str, Any], quiet: bool, *, truth_only: bool) -> bool:
    """Start a training; return whether a network was trained."""
    require_packages("train", "torch", "torchvision", "timm", "safetensors", "tensorboard")
    if options["weights"] != "hub" and not options["weights"].startswith(HUB_PREFIX):
        _stay_offline()
    from cellseg_train import checkpoint
    from cellseg_train import run as start

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; choose another -o, or --resume {out}")
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for key in [key for key in options if "__" in key]:
        section, name = key.split("__")
        sections[section][name] = options.pop(key)
    marks = {kind: options.pop(kind) for kind in ("boxes", "points", "val_boxes", "val_points")}
    teaching = {name: options.pop(name) for name in _TEACHING}
    folders = {name: options.pop(name) for name in ("images", "masks", "val_images", "val_masks")}
    note, class_files = options.pop("data_note"), options.pop("classes")
    corrections, hold_out = options.pop("corrections"), options.pop("hold_out")
    options["weights"] = absolute_source(options["weights"])
    measure = sections["data"]["min_object_px"] is None
    if measure:
        del sections["data"]["min_object_px"]
    config = TrainConfig(**{name: _SECTIONS[name](**values) for name, values in sections.items()}, **options)
    made: tuple[Path, ...] = ()
    for side in ("", "val_"):
        images, masks = f"{side}images", f"{side}masks"
        if folders[masks]:
            folders[masks], found = _label_images(out, folders[images], folders[masks], masks, quiet)
            made += found
        for kind in ("boxes", "points"):
            if marks[f"{side}{kind}"]:
                truth = _make_truth(out, side, kind, folders[images], marks, teaching, config.threads, quiet)
                folders[masks] = tuple(each.labels for each in truth)
                made += tuple(each.classes for each in truth)
    if truth_only:
        return False
    if corrections is not None:
        from cellseg_train import corrected

        taken = corrected.take(corrections, out, hold_out=hold_out)
        for line in () if quiet else taken.words:
            say(line)
        folders["images"], folders["masks"] = (*folders["images"], taken.images), (*folders["masks"], taken.masks)
        made = (*made, taken.classes)
    if MARKS in class_files and not made:
        raise UsageError(f"--classes {MARKS}: the masks have no classes; give a CSV file with image,label,class")
    folders["classes"] = tuple(
        path for file in dict.fromkeys(class_files) for path in (made if file == MARKS else (Path(file),))
    )
    inputs = checkpoint.RunInputs(**{name: tuple(str(p.absolute()) for p in paths) for name, paths in folders.items()})
    start.begin(out, checkpoint.RunRecord(config, inputs, note), quiet=quiet, measure_specks=measure)
    return True


def _label_images(
    out: Path, images: tuple[Path, ...], masks: tuple[Path, ...], name: str, quiet: bool
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the folders of label images of ``masks``, made in RUN/truth if they are files of other programs, and the
    files of their classes."""
    from cellseg_deploy.annotations.labels import as_label_images

    if len(images) != len(masks):
        return masks, ()  # refused by the training, which says it better
    made = []
    for number, (folder, given) in enumerate(zip(images, masks, strict=True), start=1):
        place = out / "truth" / (name.replace("_", "-") + (f"-{number}" if number > 1 else ""))
        made.append(as_label_images(folder, given, partial(Path, place)))
        for line in () if quiet else made[-1].said:
            say(line)
    return tuple(each.folder for each in made), tuple(each.classes for each in made if each.classes is not None)


def _make_truth(
    out: Path,
    side: str,
    kind: str,
    images: tuple[Path, ...],
    marks: dict[str, tuple[Path, ...]],
    teaching: dict[str, Any],
    threads: int,
    quiet: bool,
) -> tuple[Any, ...]:
    """Make label images and their classes (``truth.MadeTruth``) from the ``marks`` of ``kind``, for each folder of
    ``images``. ``side``: "val_" for validation images, else ""."""
    from cellseg_train import truth

    files, flag = marks[f"{side}{kind}"], "--" + side.replace("_", "-")
    if len(files) != len(images):
        raise UsageError(f"got {len(images)} {flag}images and {len(files)} {flag}{kind}; give them in pairs")
    say_so: Callable[[str], None] = (lambda _: None) if quiet else say
    settings = truth.TruthSettings(
        teacher=teaching["teacher"],  # a model file, or none
        whole_classes=teaching["whole_class"] or truth.WHOLE_CLASSES,
        left_out_classes=teaching["leave_out_class"],
        cell_diameter_px=teaching["marked_cell_diameter"],
        threads=threads,
    )
    return tuple(
        truth.make_truth(folder, file, kind, out / "truth", number, settings, say_so, side=side.replace("_", "-"))
        for number, (folder, file) in enumerate(zip(images, files, strict=True), start=1)
    )


def _resume(run_folder: Path, quiet: bool) -> None:
    require_packages("train", "torch", "torchvision", "timm", "safetensors", "tensorboard")
    _stay_offline()  # weights were fetched when the run began
    from cellseg_train import run as start

    start.resume(run_folder, quiet=quiet)


def _stay_offline() -> None:
    """Keep the hub's client offline; call before timm imports it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _say_next(run_folder: Path) -> None:
    from cellseg_train.checkpoint import WEIGHTS_FILE

    click.echo(f"network: {run_folder / WEIGHTS_FILE}")
    click.echo(f"next:    cellseg-export onnx {run_folder} -o model.onnx")


def main() -> None:
    """Entry point of ``cellseg-train``."""
    sys.exit(run(command))
