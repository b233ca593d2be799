"""The training loop, read from top to bottom.

All randomness depends on (seed, epoch) and not on earlier events, so a run that was killed and resumed at an
epoch boundary gives the same losses as an uninterrupted one on a CPU; on a GPU nearly.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from cellseg_deploy.cells.metrics import pool
from cellseg_deploy.errors import CellsegError, ModelError
from cellseg_deploy.evaluate.calibration import Labelling
from cellseg_deploy.models.spec import ModelSpec, TrainingInfo, WeightsInfo, default_operating_points
from cellseg_train import checkpoint, pictures, validate
from cellseg_train.cell_classes import CellClasses
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.config import TrainConfig
from cellseg_train.data import ExampleStore, Split, TileDataset, TileLoader, TrainingCells, read_pair
from cellseg_train.fp32 import full_fp32
from cellseg_train.logs import TrainingLog
from cellseg_train.losses import class_loss, is_finite, segmentation_loss
from cellseg_train.model import CellSegNet
from cellseg_train.optim import choose_amp, choose_device, make_optimizer, make_schedule
from cellseg_train.weights import check_source, load_initial_weights

HALO_SHARE = 1 / 7  # of the tile, on each side: 32 px of 224
PICTURES = 3  # validation images drawn at each validation


class TrainingDivergedError(CellsegError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """State of a training after an update."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    tiles_per_second: float


class Reporter:
    """Receives progress events. The base class ignores them; subclasses display them."""

    def say(self, line: str) -> None:
        """Report an event that deserves a line."""

    def warn(self, line: str) -> None:
        """Report a warning."""

    def read(self, done: int, total: int) -> None:
        """``done`` of ``total`` images were read and checked."""

    def update(self, state: Progress) -> None:
        """One more update was made."""

    def epoch(self, row: Mapping[str, float], epochs: int) -> None:
        """An epoch of ``epochs`` ended; its row of ``log.csv``."""

    def calibrate(self, done: int, total: int) -> None:
        """``done`` of at most ``total`` calibration steps are done: images predicted, settings tried."""


def load(
    config: TrainConfig, split: Split, reporter: Reporter, classes: CellClasses | None = None
) -> tuple[ExampleStore, TrainingCells]:
    """Read and check every pair of both sides; return the cached training images and their statistics.

    ``classes``: classes of the cells of both sides, if the network has classes.

    Raises ``DataError`` naming an unusable file, ``UsageError`` if both sides share an image.
    """
    split.check_apart()
    store = ExampleStore(split.train, config, classes)
    n_train, total = len(split.train), len(split.train) + len(split.val)
    cells = store.check_and_fill(lambda done: reporter.read(done, total))
    for done, pair in enumerate(split.val, start=1):
        read_pair(
            pair, config.data.min_object_px, config.data.mask_foreground, classes
        )  # a mask of the wrong size must not wait for the first validation
        reporter.read(n_train + done, total)
    return store, cells


def initial_network(config: TrainConfig) -> tuple[CellSegNet, WeightsInfo]:
    """Return the network before its first update, on its device, and the source of its weights.

    Raises what ``load_initial_weights`` raises: it may download from a hub or read a file.
    """
    torch.manual_seed(config.seed)
    net = CellSegNet(config.model)
    weights = load_initial_weights(net, config.weights)
    return _placed(net, choose_device(config.device)), weights


def train(
    run: Path,
    config: TrainConfig,
    split: Split,
    store: ExampleStore,
    *,
    cells: TrainingCells,
    data_note: str,
    reporter: Reporter,
    initial: tuple[CellSegNet, WeightsInfo] | None = None,
    classes: CellClasses | None = None,
) -> ModelSpec:
    """Train into folder ``run`` (which exists and holds ``config.json``), resuming its last checkpoint if there is one.

    ``store``, ``cells``: from ``load``. ``data_note``: the training data in words, for the model's description.
    ``initial``: from ``initial_network``, if already made. ``classes``: as for ``load``. Returns the spec of the
    best network.
    Raises ``TrainingDivergedError`` when the loss is no longer finite; the last checkpoint is kept.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False  # it may pick other kernels in another run, and so give other losses
    full_fp32()
    device = choose_device(config.device)
    amp = choose_amp(config.optim.amp, device)
    reporter.say(f"device {device}, {'fp32' if amp is None else str(amp).removeprefix('torch.') + ' autocast'}")

    loader = TileLoader(TileDataset(store, config))
    steps = config.optim.epochs * len(loader)

    state = checkpoint.load_checkpoint(run)
    if state is None:
        net, weights = initial or initial_network(config)
    else:  # the initial weights have been trained over, and their file may be gone
        net = _placed(CellSegNet(config.model), device)
        weights = msgspec.convert(state["weights"], WeightsInfo)
    optimizer = make_optimizer(net, config.optim)
    schedule = make_schedule(optimizer, config.optim, steps)
    ema = ModelEmaV3(net, decay=config.optim.ema_decay, use_warmup=True) if config.optim.ema_decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    describe = _SpecMaker(config, split, weights, data_note, cells, net.patch_size, classes)
    class_weights = torch.from_numpy(cells.class_weights()).to(device)
    n_maps = len(config.model.map_channels)

    first_epoch, step, best = 0, 0, -math.inf
    if state is not None:
        try:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            if ema is not None:
                ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"the checkpoint of {run} does not fit its settings ({error}); was {checkpoint.CONFIG_FILE} edited?"
            ) from error
        first_epoch, step, best = state["epoch"], state["step"], state["best"]
        reporter.say(f"resuming after epoch {first_epoch} of {config.optim.epochs}")
    log = TrainingLog(run, keep_epochs=first_epoch)

    averaged = net if ema is None else cast(CellSegNet, ema.module)
    for epoch in range(first_epoch, config.optim.epochs):
        torch.manual_seed(config.seed + 1 + epoch)  # drop path
        net.train()
        if config.optim.freeze:
            net.encoder.eval()
        sums: dict[str, float] = {}
        started, tiles = time.perf_counter(), 0
        for batch in loader.epoch(epoch):
            schedule.step_update(step)
            with _autocast(device, amp):
                logits = net(_images(batch, net, device)).float()
            total, parts = segmentation_loss(
                logits,
                batch["targets"].to(device),
                batch["gap"].to(device),
                config.model.map_channels,
                config.loss,
                batch["surface"].to(device) if "surface" in batch else None,
                batch["known"].to(device),
                batch["taught"].to(device),
            )
            if config.model.classes:
                of_class = class_loss(logits[:, n_maps:], batch["class_map"].to(device), class_weights)
                total = total + config.loss.class_weight * of_class
                parts["classes"] = of_class.detach()
            if not is_finite(total):
                raise TrainingDivergedError(
                    f"the loss is {total.item()} in epoch {epoch + 1}, update {step}; "
                    "start a new run with a lower --lr, a longer --warmup-fraction or --amp off"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            if ema is not None:
                ema.update(net, step=step)
            for name, value in {"loss": total.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            tiles += len(batch["image"])
            rate = tiles / (time.perf_counter() - started)
            lr = optimizer.param_groups[-1]["lr"]
            reporter.update(Progress(epoch + 1, config.optim.epochs, step, steps, total.item(), lr, rate))

        row: dict[str, Any] = {"epoch": epoch + 1, "step": step, "lr": optimizer.param_groups[-1]["lr"]}
        row |= {name: value / len(loader) for name, value in sums.items()}
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.optim.epochs:
            metrics = _validate(averaged, describe, device, run / "samples" / f"epoch_{epoch + 1:04d}.jpg")
            row |= {f"val_{name}": metrics[name] for name in ("dice", "f1", "map", "count_mae", "count_bias")}
            row |= {f"val_f1_{name}": metrics[f"f1_{name}"] for name in config.model.classes}
            if validate.merit(metrics) > best:
                best = validate.merit(metrics)
                spec = describe(epoch + 1, metrics)
                checkpoint.save_network(run / checkpoint.WEIGHTS_FILE, averaged.state_dict(), config.model, spec)
        log.add(row)
        reporter.epoch(row, config.optim.epochs)
        checkpoint.save_checkpoint(
            run,
            {
                "net": net.state_dict(),
                "ema": {} if ema is None else ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": epoch + 1,
                "step": step,
                "best": best,
                "weights": msgspec.to_builtins(weights),
            },
        )
    log.close()
    if not config.calibrate:
        spec = describe(config.optim.epochs, {})
        checkpoint.save_network(run / checkpoint.WEIGHTS_FILE, averaged.state_dict(), config.model, spec)
        return spec
    networks = [checkpoint.load_network(run)]
    if networks[0].spec.training.epochs < config.optim.epochs:
        networks.append(LoadedNetwork(averaged, config.model, describe(config.optim.epochs, {})))
    return _finish(run, networks, describe, device, reporter)


def check_settings(config: TrainConfig) -> None:
    """Raise what ``train`` would raise for an unavailable network, weights or device, at little cost."""
    choose_device(config.device)
    with torch.device("meta"):  # shapes without memory
        CellSegNet(config.model)
    check_source(config.model, config.weights)


@dataclass(frozen=True)
class _SpecMaker:
    """Makes the ModelSpec of a network at a given epoch of this run."""

    config: TrainConfig
    split: Split
    weights: WeightsInfo
    data_note: str
    cells: TrainingCells
    patch_size: int
    classes: CellClasses | None = None

    @property
    def cell_diameter_px(self) -> float:
        """Median cell diameter in model px."""
        return self.cells.diameter_px

    def __call__(self, epoch: int, metrics: dict[str, float]) -> ModelSpec:
        model, data = self.config.model, self.config.data
        return ModelSpec(
            name=self.config.name,
            variant=model.variant,
            channels=model.channels,
            tile_size=model.tile_size,
            halo=halo_of(model.tile_size),
            image_scale=data.image_scale,
            cell_diameter_px=round(self.cell_diameter_px, 2),
            patch_size=self.patch_size,
            encoder=model.encoder_name,
            weights=self.weights,
            training=TrainingInfo(
                data=self.data_note,
                split_sha256=self.split.sha256,
                n_train_images=len(self.split.train),
                n_val_images=len(self.split.val),
                epochs=epoch,
                seed=self.config.seed,
                val_metrics=_rounded(metrics),
                data_summary=self.cells.summary,
            ),
            operating_points=default_operating_points(model.variant),
            min_object_rel=data.min_object_rel,
            classes=model.classes,
        )


def halo_of(tile_size: int) -> int:
    """Context in px on each side of a tile that stitching discards."""
    return int(tile_size * HALO_SHARE)


def _placed(net: CellSegNet, device: torch.device) -> CellSegNet:
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def _images(batch: dict[str, Tensor], net: CellSegNet, device: torch.device) -> Tensor:
    images: Tensor = net.normalise(batch["image"].to(device, non_blocking=True).float())
    return images.contiguous(memory_format=torch.channels_last)


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if amp is None else torch.autocast(device.type, amp)


def _validate(net: CellSegNet, describe: _SpecMaker, device: torch.device, samples: Path) -> dict[str, float]:
    """Return metrics at the uncalibrated counting point, including F1 per class, and pictures of the first images."""
    net.eval()
    config, split = describe.config, describe.split
    params = default_operating_points(config.model.variant)["counting"]
    labelling = Labelling(config.model.channels, describe.cell_diameter_px, config.data.min_object_px)
    scores, drawn = [], list[validate.Prediction]()
    by_class = validate.ClassScores.of(config.model.classes)
    halo = halo_of(config.model.tile_size)
    for item in validate.predict_pairs(net, split.val, config, halo, device, describe.classes):
        scores.append(labelling.score(item, params))
        if config.model.classes:
            by_class.add(item, config.model.channels, params, describe.cell_diameter_px)
        if len(drawn) < PICTURES:
            drawn.append(item)
    pictures.save_samples(samples, drawn)
    return pool(scores) | {f"f1_{name}": value for name, value in by_class.f1().items()}


def _finish(
    run: Path,
    networks: list[LoadedNetwork],
    describe: _SpecMaker,
    device: torch.device,
    reporter: Reporter,
) -> ModelSpec:
    """Calibrate ``networks`` on the validation images and save the better one with its operating points.

    The best network was selected at uncalibrated settings; the last one has completed the whole schedule.
    """
    config, split = describe.config, describe.split
    labelling = Labelling(config.model.channels, networks[0].spec.cell_diameter_px, config.data.min_object_px)
    finished: list[tuple[float, LoadedNetwork]] = []
    steps_each = len(split.val) + validate.most_settings(config.model.variant)
    for number, loaded in enumerate(networks):
        steps = itertools.count(number * steps_each)

        def advance(steps: Iterator[int] = steps) -> None:
            reporter.calibrate(next(steps), len(networks) * steps_each)

        advance()
        spec = loaded.spec
        net = loaded.net.to(device).eval()
        predictions = []
        for prediction in validate.predict_pairs(net, split.val, config, spec.halo, device, describe.classes):
            predictions.append(prediction)
            advance()
        chosen = validate.calibrate(predictions, spec.variant, labelling, on_trial=advance)
        metrics = chosen["counting"][1]
        reporter.say(
            f"calibrated epoch {spec.training.epochs}: Dice {metrics['dice']:.4f}, F1 {metrics['f1']:.4f}, "
            f"count error {metrics['count_mae']:.1f} cells per image"
        )
        spec = msgspec.structs.replace(
            spec,
            operating_points={str(task): params for task, (params, _) in chosen.items()},
            training=msgspec.structs.replace(spec.training, val_metrics=_rounded(metrics)),
        )
        finished.append((validate.merit(metrics), LoadedNetwork(net, loaded.config, spec)))
    reporter.calibrate(len(networks) * steps_each, len(networks) * steps_each)
    _, best = max(finished, key=lambda entry: entry[0])
    checkpoint.save_network(run / checkpoint.WEIGHTS_FILE, best.net.state_dict(), best.config, best.spec)
    reporter.say(f"kept epoch {best.spec.training.epochs}")
    return best.spec


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """Defined metrics, rounded: without inner cells some are NaN, which JSON cannot represent."""
    return {name: round(float(value), 5) for name, value in metrics.items() if math.isfinite(value)}
