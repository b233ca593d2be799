"""Training: from images and masks to a run folder whose weights describe themselves. Imported as ``cellseg_train``."""
