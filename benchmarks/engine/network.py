"""Make a large network that finds cells, within minutes: to compare its forms where no weights can be downloaded.

The encoder has random weights and stays frozen (with its LayerScale set, so that each block matters); only the
decoder learns, from token maps that were computed once. Without an image branch every cell found depends on the
whole encoder, so a form that breaks one block loses cells. Its accuracy says nothing about a trained encoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from cellseg_deploy.evaluate.calibration import Labelling
from cellseg_deploy.models.spec import ModelSpec, TrainingInfo, WeightsInfo, default_operating_points
from cellseg_deploy.samples import write_samples
from cellseg_train import validate
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from cellseg_train.data import ExampleStore, TileDataset, TrainingCells, find_pairs
from cellseg_train.loop import halo_of
from cellseg_train.losses import segmentation_loss
from cellseg_train.model import CellSegNet, enliven_layer_scale
from cellseg_train.optim import make_optimizer, make_schedule

LAYER_SCALE = 0.2
SMEARS, VALIDATION_SMEARS = 40, 3
SMEAR_HW = (900, 1200)
TILE_BATCH = 8

Say = Callable[[str], None]


def random_encoder_network(
    encoder: str = "large",
    *,
    n_tiles: int = 320,
    epochs: int = 24,
    seed: int = 0,
    say: Say = lambda _: None,
) -> LoadedNetwork:
    """A network with a random, frozen ``encoder`` and a decoder trained on synthetic smears; needs no photographs.

    ``n_tiles``: augmented tiles that the encoder sees once. ``epochs``: passes of the decoder over their token maps.
    The same arguments give the same network on one machine. Takes about twice the time of ``n_tiles`` encoder runs.
    """
    config = TrainConfig(
        name=f"random-{encoder}",
        seed=seed,
        model=ModelConfig(encoder=encoder, image_skip=()),
        data=DataConfig(patches_per_image=-(-n_tiles // SMEARS)),
        optim=OptimConfig(epochs=epochs, lr=2e-3, freeze=True),
    )
    torch.manual_seed(seed)
    net = CellSegNet(config.model)
    awake = enliven_layer_scale(net, LAYER_SCALE)
    say(f"{config.model.encoder_name}: random weights, {awake} LayerScales set to {LAYER_SCALE}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_samples(root / "train", SMEARS, seed + 1, SMEAR_HW, vary=True)
        write_samples(root / "val", VALIDATION_SMEARS, seed + 2, SMEAR_HW, vary=True)
        store = ExampleStore(find_pairs([root / "train" / "images"], [root / "train" / "masks"]), config)
        cells = store.check_and_fill()
        _train_decoder(net, _token_maps(net, TileDataset(store, config), n_tiles, say), config, say)
        spec = _describe(net, config, cells)
        return _calibrated(net, config, spec, root / "val", say)


def _token_maps(net: CellSegNet, tiles: TileDataset, n_tiles: int, say: Say) -> dict[str, Tensor]:
    """Token maps (n, C, G, G) of ``n_tiles`` tiles with their targets and gap weights."""
    patches = tiles.config.data.patches_per_image
    kept: dict[str, list[Tensor]] = {"tokens": [], "targets": [], "gap": []}
    net.eval()
    for start in range(0, n_tiles, TILE_BATCH):
        items = [tiles[0, i // patches, i % patches] for i in range(start, min(start + TILE_BATCH, n_tiles))]
        images = net.normalise(torch.stack([item["image"] for item in items]).float())
        with torch.inference_mode():
            tokens = net.tokens(images)
        kept["tokens"].append(tokens.clone())
        for name in ("targets", "gap"):
            kept[name].append(torch.stack([item[name] for item in items]))
        if start % (8 * TILE_BATCH) == 0:
            say(f"encoded {start + len(items)} of {n_tiles} tiles")
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _train_decoder(net: CellSegNet, maps: dict[str, Tensor], config: TrainConfig, say: Say) -> None:
    n_tiles, batch = len(maps["tokens"]), config.optim.batch_size
    steps = config.optim.epochs * -(-n_tiles // batch)
    optimizer = make_optimizer(net, config.optim)
    schedule = make_schedule(optimizer, config.optim, steps)
    rng = np.random.default_rng(config.seed)
    step = 0
    net.decoder.train()
    for epoch in range(config.optim.epochs):
        losses = []
        for chosen in np.array_split(rng.permutation(n_tiles), -(-n_tiles // batch)):
            schedule.step_update(step)
            picked = torch.from_numpy(chosen)
            logits = net.decoder(maps["tokens"][picked], [])
            loss, _ = segmentation_loss(
                logits, maps["targets"][picked].float(), maps["gap"][picked], config.model.channels, config.loss
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.decoder.parameters(), config.optim.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        say(f"decoder epoch {epoch + 1} of {config.optim.epochs}: loss {np.mean(losses):.3f}")
    net.eval()


def _describe(net: CellSegNet, config: TrainConfig, cells: TrainingCells) -> ModelSpec:
    return ModelSpec(
        name=config.name,
        variant=config.model.variant,
        channels=config.model.channels,
        tile_size=config.model.tile_size,
        halo=halo_of(config.model.tile_size),
        image_scale=config.data.image_scale,
        cell_diameter_px=round(cells.diameter_px, 2),
        patch_size=net.patch_size,
        encoder=config.model.encoder_name,
        weights=WeightsInfo(origin="random initialisation", licence="MIT"),
        training=TrainingInfo(
            data="synthetic smears; the decoder only",
            epochs=config.optim.epochs,
            seed=config.seed,
            data_summary=cells.summary,
        ),
        operating_points=default_operating_points(config.model.variant),
    )


def _calibrated(net: CellSegNet, config: TrainConfig, spec: ModelSpec, folder: Path, say: Say) -> LoadedNetwork:
    pairs = find_pairs([folder / "images"], [folder / "masks"])
    predictions = list(validate.predict_pairs(net, pairs, config, spec.halo, torch.device("cpu")))
    labelling = Labelling(spec.channels, spec.cell_diameter_px, config.data.min_object_px)
    chosen = validate.calibrate(predictions, spec.variant, labelling)
    metrics = chosen["counting"][1]
    say(f"on {len(pairs)} other synthetic smears: Dice {metrics['dice']:.3f}, F1 {metrics['f1']:.3f}")
    training = msgspec.structs.replace(
        spec.training, val_metrics={name: round(float(value), 5) for name, value in metrics.items()}
    )
    points = {str(task): params for task, (params, _) in chosen.items()}
    return LoadedNetwork(net, config.model, msgspec.structs.replace(spec, operating_points=points, training=training))
