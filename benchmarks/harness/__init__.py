"""Shared by all benchmarks: timer, workers, the machine, reports."""
