"""Training: from images and masks to a run folder whose weights describe themselves. Imported as ``cellseg_train``."""

import os

# Read by the hub's client when timm imports it: no telemetry about the user, also where weights are downloaded.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
