"""Training: from images and masks to a run folder whose weights describe themselves. Imported as ``cellseg_train``."""

import os

# Read by the hub's client when timm imports it: it says nothing of who uses it, also where weights are fetched.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
