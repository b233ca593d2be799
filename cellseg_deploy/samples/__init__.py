"""Synthetic blood smears with exact instance truth, for the demo, tests, benchmarks and training.

    params = random_params(np.random.default_rng(0))
    smear = make_smear(params, seed=0)        # smear.image_hwc uint8, smear.labels_hw int32

``python -m cellseg_deploy.samples OUT`` writes a folder of them. Pure numpy and OpenCV; no photographs are used.
"""

from cellseg_deploy.samples.params import SmearParams, random_params
from cellseg_deploy.samples.smear import Smear, make_smear
from cellseg_deploy.samples.write import write_samples

__all__ = ["Smear", "SmearParams", "make_smear", "random_params", "write_samples"]
