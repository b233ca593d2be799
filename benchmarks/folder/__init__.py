"""Benchmarks of folder runs, from image files to results."""
