"""Check that the training cells come out at a size that a network can learn, before hours are spent on training."""

from __future__ import annotations

from cellseg_deploy.errors import UsageError
from cellseg_train.config import TrainConfig

SENSIBLE_PX = (20.0, 110.0)
"""Median cell diameters in model px that suit the tiles and the halo."""
USUAL_PX = 50.0
REMARKABLE, REFUSED = 1.5, 2.5
"""Factors from the trained cell size beyond which cells are relearned rather than fine-tuned."""


def check_cell_size(config: TrainConfig, diameter_px: float, taught_px: float | None) -> str:
    """Return a warning about cells with a median diameter of ``diameter_px`` in *model* px, empty if it is sensible.

    ``taught_px``: median diameter in model px that the initial network was trained on, None if there is none.
    Raises ``UsageError`` if cells are larger than the tile, or far from what the network was trained on.
    """
    scale, tile = config.data.image_scale, config.model.tile_size
    model_px = diameter_px
    wanted = min(USUAL_PX, tile / 4) if taught_px is None else taught_px
    if config.data.folder_scales:
        seen = f"cells are {model_px:.0f} px wide for the network"
        advice = f"give --cell-diameter {wanted:.0f}"
    else:
        in_image = diameter_px / scale
        seen = f"cells are {in_image:.0f} px wide, at --image-scale {scale:g} that is {model_px:.0f} px for the network"
        advice = f"give --image-scale {wanted / in_image:.3g} for {wanted:.0f} px"
    if model_px > tile:
        raise UsageError(f"{seen}, larger than its tile of {tile} px; {advice}, or a larger --tile-size")
    if taught_px is not None:
        off = max(model_px / taught_px, taught_px / model_px)
        if off > REFUSED:
            raise UsageError(f"{seen}, but --weights {config.weights} was trained on {taught_px:.0f} px; {advice}")
        return f"{seen}; its weights were trained on {taught_px:.0f} px; {advice}" if off > REMARKABLE else ""
    low, high = SENSIBLE_PX
    return "" if low <= model_px <= min(high, tile / 2) else f"{seen}; {low:.0f} to {high:.0f} px suit it; {advice}"
