"""Tiles, labels and measurements. Numpy only, no file access."""
