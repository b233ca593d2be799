"""Benchmarks of single networks and engines."""
