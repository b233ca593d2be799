"""What fp32 means on an NVIDIA GPU.

From Ampere on, PyTorch rounds the inputs of fp32 convolutions to TF32 (10 bits of mantissa) unless told otherwise. All
other engines are opened without TF32, so the network would be a less exact reference than the forms compared with it.
"""

from __future__ import annotations

import torch


def full_fp32() -> None:
    """Compute fp32 matrix products and convolutions of this process in fp32, without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def uses_tf32() -> bool:
    """Return whether fp32 products or convolutions of this process may be rounded to TF32 on a GPU."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
