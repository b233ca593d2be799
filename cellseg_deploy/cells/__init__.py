"""Numpy only, no input or output: tiles, labels, numbers."""
