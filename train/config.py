"""Every setting of a training, as frozen dataclasses. The commands' defaults come from here, and the whole tree is
saved with each run, so a run can be rebuilt from its folder alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.mask_foreground import MASK_FOREGROUNDS, MaskForeground
from cellseg_deploy.models.spec import Variant, misfit_of_classes

# Short names for common encoders; any other name is passed to timm unchanged. UNI (Chen et al. 2024) is DINOv2's
# ViT-L/16 trained on pathology slides; timm has its architecture, the Mahmood lab its weights (see ``weights.py``).
ENCODER_ALIASES = {
    "small": "vit_small_patch14_dinov2",
    "base": "vit_base_patch14_dinov2",
    "large": "vit_large_patch14_dinov2",
    "uni": "vit_large_patch16_224",
}
# What the published weights of an alias need beyond timm's defaults: UNI was trained with LayerScale.
ENCODER_ARGUMENTS: dict[str, dict[str, float]] = {"uni": {"init_values": 1e-5}}
VARIANT_CHANNELS: dict[Variant, tuple[str, ...]] = {
    "plain": ("foreground",),
    "boundary": ("foreground", "boundary"),
    "distance": ("foreground", "distance"),
}
TINY = "tiny"
HUB_PREFIX = "hf-hub:"
SHIPPED = "shipped"
"""Name of the packaged weights as a starting point."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: enough to rebuild it before loading weights.

    ``encoder``: ``tiny`` (a small ViT/14 of this package), an alias of ``ENCODER_ALIASES`` or any timm ViT name.
    ``tile_size``: side of the square input in px. ``decoder_channels``: width of the decoder at 1/8, 1/4 and 1/2 of
    the tile. ``image_skip``: channels of a shallow convolutional branch from the image itself at 1/8, 1/4 and 1/2
    of the tile, which the decoder joins with the upsampled tokens; empty for none. ``mean``, ``std``: colour
    normalisation of RGB in [0, 1]. ``classes``: names of the cell classes that the network distinguishes, one channel
    each after those of the variant; empty for none.
    """

    encoder: str = TINY
    variant: Variant = "boundary"
    tile_size: int = 224
    decoder_channels: tuple[int, ...] = (96, 64, 32)
    image_skip: tuple[int, ...] = (48, 32, 24)
    tiny_width: int = 192
    tiny_depth: int = 6
    tiny_heads: int = 3
    drop_path: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    classes: tuple[str, ...] = ()

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the output channels, in order."""
        return self.map_channels + self.classes

    @property
    def map_channels(self) -> tuple[str, ...]:
        """Names of the channels that locate cells, which come before the classes."""
        return VARIANT_CHANNELS[self.variant]

    @property
    def encoder_name(self) -> str:
        """The encoder's name with aliases resolved."""
        return ENCODER_ALIASES.get(self.encoder, self.encoder)

    def __post_init__(self) -> None:
        levels = 3
        if self.tiny_heads < 1 or self.tiny_width % self.tiny_heads:
            raise UsageError(
                f"tiny_width must be a multiple of tiny_heads, got {self.tiny_width} and {self.tiny_heads}"
            )
        _require(self.tiny_depth >= 1, "tiny_depth must be at least 1", self.tiny_depth)
        _require(0 <= self.drop_path < 1, "drop_path must be in [0, 1)", self.drop_path)
        if problem := misfit_of_classes(self.classes):
            raise UsageError(problem)
        if len(self.decoder_channels) != levels or min(self.decoder_channels) < 1:
            raise UsageError(f"decoder_channels must be three positive numbers, got {self.decoder_channels}")
        if self.image_skip and (len(self.image_skip) != levels or min(self.image_skip) < 1):
            raise UsageError(f"image_skip must be empty or three positive numbers, got {self.image_skip}")
        if self.tile_size < 8 or self.tile_size % 8:
            raise UsageError(
                f"tile_size must be a multiple of 8 (the decoder doubles three times), got {self.tile_size}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Scale, split and tiles of the training images.

    ``image_scale``: model px per image px. ``cell_diameter_px``: if set, each folder of images is scaled so that
    its median cell is this wide in model px, so that folders of several magnifications train one network;
    ``folder_scales``: the scales measured for it, by mask folder. ``val_fraction``: share of *images* held out
    when no validation folder is passed. ``patches_per_image``: random tiles per image and epoch.
    ``boundary_width_px``: width of the boundary band in model px, half on each side of the cell's edge.
    ``min_object_px``: smaller objects (in image px at full size) are specks, not cells. ``min_object_rel``:
    ``min_object_px`` as a share of the masks' median object, as measured. ``mask_foreground``: which mask values are
    cells (``cellseg_deploy.images.mask_foreground``). ``cache_gb``: memory for decoded images; the
    rest is read again each epoch.
    """

    image_scale: float = 0.5
    cell_diameter_px: float | None = None
    folder_scales: dict[str, float] = field(default_factory=dict)
    val_fraction: float = 0.25
    patches_per_image: int = 1
    boundary_width_px: int = 4
    min_object_px: int = 200
    min_object_rel: float | None = None
    mask_foreground: MaskForeground = "auto"
    cache_gb: float = 4.0

    def scale_of(self, mask: Path) -> float:
        """Model px per image px of the image with this mask."""
        return self.folder_scales.get(str(mask.parent), self.image_scale)

    def __post_init__(self) -> None:
        _require(0 < self.image_scale <= 4, "image_scale must be in (0, 4]", self.image_scale)
        for folder, scale in self.folder_scales.items():
            _require(0 < scale <= 8, f"the scale of {folder} must be in (0, 8]", scale)
        if self.cell_diameter_px is not None:
            _require(8 <= self.cell_diameter_px <= 400, "cell_diameter must be 8 to 400 px", self.cell_diameter_px)
        _require(0 < self.val_fraction < 1, "val_fraction must be in (0, 1)", self.val_fraction)
        _require(self.patches_per_image >= 1, "patches_per_image must be at least 1", self.patches_per_image)
        _require(
            self.boundary_width_px >= 2 and self.boundary_width_px % 2 == 0,
            "boundary_width_px must be even and at least 2 (half on each side of the edge)",
            self.boundary_width_px,
        )
        _require(self.min_object_px >= 0, "min_object_px must be 0 or more", self.min_object_px)
        _require(
            self.mask_foreground in MASK_FOREGROUNDS,
            f"mask_foreground must be one of {', '.join(MASK_FOREGROUNDS)}",
            self.mask_foreground,
        )
        _require(self.cache_gb >= 0, "cache_gb must be 0 or more", self.cache_gb)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training tiles. Ranges are drawn uniformly (scale: log-uniformly); ``*_p`` are probabilities.

    ``stain``: relative spread of each stain's strength in haematoxylin-eosin-residual space (Tellez et al. 2018).
    ``hue``: largest rotation of the colour wheel in degrees. ``brightness``, ``contrast``, ``gamma``, ``saturation``:
    largest relative change. ``illumination``: largest relative drop of light towards one side or the corners.
    """

    scale: tuple[float, float] = (0.65, 1.6)
    stain: float = 0.3
    hue: float = 18.0
    saturation: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.3
    gamma: float = 0.3
    grey_p: float = 0.05
    blur_p: float = 0.3
    blur_sigma_px: float = 1.5
    sharpen_p: float = 0.1
    noise_p: float = 0.3
    noise_sigma: float = 8.0
    jpeg_p: float = 0.2
    illumination: float = 0.3

    def __post_init__(self) -> None:
        fine = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]
        _require(fine, "the scale jitter must be two positive numbers, low first, such as 0.7,1.4", self.scale)
        _require(0 <= self.stain < 1, "the stain jitter must be in [0, 1)", self.stain)


@dataclass(frozen=True)
class OverlapConfig:
    """Piles made of a tile's own cells, see ``overlaps``.

    ``share``: share of a tile's whole cells that become the bottom of a pile; 0 for none. ``most``: largest number of
    cells in a pile, with the bottom one. ``further_p``: probability of one more cell on a pile. ``rouleau_p``:
    probability that a pile is a row (rouleau). ``distance``: between centres of neighbours, in mean diameters.
    """

    share: float = 0.0
    most: int = 5
    further_p: float = 0.35
    rouleau_p: float = 0.3
    distance: tuple[float, float] = (0.35, 0.9)

    def __post_init__(self) -> None:
        for name in ("share", "further_p", "rouleau_p"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]", getattr(self, name))
        _require(self.most >= 2, "most must be at least 2 cells", self.most)
        fine = len(self.distance) == 2 and 0 < self.distance[0] <= self.distance[1]
        _require(fine, "distance must be two positive numbers, low first", self.distance)


@dataclass(frozen=True)
class LossConfig:
    """``bce + dice_weight * dice`` on the foreground, plus the loss of the variant's second channel.

    Boundary channel: ``boundary_weight * bce + surface_weight * surface``, the latter the boundary loss of Kervadec et
    al. 2019; 0 switches it off. ``surface_clip_px``: limit at which its distances are clipped, in model px. Distance
    channel: ``distance_weight * bce`` with soft targets.

    ``gap_weight``: extra weight of background pixels in thin gaps between two cells, after Ronneberger et al. 2015
    (U-Net, eq. 2) with ``gap_sigma_px`` in model px; 0 switches it off. ``boundary_positive_weight``: weight of
    boundary pixels relative to the rest, since they are few. ``class_weight``: weight of the classes' cross-entropy, if
    the network has classes.
    """

    dice_weight: float = 1.0
    boundary_weight: float = 1.0
    boundary_positive_weight: float = 2.0
    gap_weight: float = 6.0
    gap_sigma_px: float = 3.0
    surface_weight: float = 0.0
    surface_clip_px: float = 8.0
    distance_weight: float = 1.0
    class_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(0 <= value < math.inf, f"{name} must be 0 or more", value)
        _require(self.gap_sigma_px > 0, "gap_sigma_px must be positive", self.gap_sigma_px)
        _require(self.surface_clip_px > 0, "surface_clip_px must be positive", self.surface_clip_px)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to ``min_lr_ratio * lr``, stepped once per update.

    ``encoder_lr_ratio``: learning rate of the encoder relative to the decoder's. ``layer_decay``: factor from each
    transformer block to the one below it (Bao et al. 2022, BEiT); 1 for none. ``freeze``: train the decoder only.
    ``ema_decay``: decay of the moving average of the weights that is validated and saved; 0 for none.
    ``amp``: autocast precision; ``auto`` takes bf16 where the device has hardware for it, else fp32.
    """

    epochs: int = 100
    batch_size: int = 16
    lr: float = 1e-3
    encoder_lr_ratio: float = 1.0
    layer_decay: float = 1.0
    freeze: bool = False
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    min_lr_ratio: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs must be at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        _require(0 < self.lr < math.inf, "lr must be positive", self.lr)
        _require(self.clip_norm > 0, "clip_norm must be positive", self.clip_norm)
        _require(self.weight_decay >= 0, "weight_decay must be 0 or more", self.weight_decay)
        _require(self.encoder_lr_ratio >= 0, "encoder_lr_ratio must be 0 or more", self.encoder_lr_ratio)
        _require(0 <= self.warmup_fraction < 1, "warmup_fraction must be in [0, 1)", self.warmup_fraction)
        _require(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)", self.ema_decay)
        _require(0 < self.layer_decay <= 1, "layer_decay must be in (0, 1]", self.layer_decay)


@dataclass(frozen=True)
class TrainConfig:
    """One complete training: everything but the folders it reads and writes.

    ``weights``: initial weights of the encoder, see ``weights.py``. ``validate_every``: epochs between validations.
    ``calibrate``: search the operating points on the validation images at the end; if False, keep the defaults and save
    the last network, so that these images do not influence any choice.
    ``threads``: CPU threads of PyTorch, 0 for its default. ``workers``: threads that cut tiles ahead of their use.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    weights: str = "none"
    validate_every: int = 1
    calibrate: bool = True
    device: str = "auto"
    threads: int = 0
    workers: int = 1
    name: str = "cellseg"

    def __post_init__(self) -> None:
        if self.loss.surface_weight and "boundary" not in self.model.channels:
            raise UsageError(
                f"surface_weight is for the boundary channel, which variant {self.model.variant!r} does not have; "
                "use --variant boundary or --surface-weight 0"
            )


def _require(condition: bool, expected: str, received: object) -> None:
    if not condition:
        raise UsageError(f"{expected}, got {received}")
