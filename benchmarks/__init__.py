"""Benchmarks: time, memory and accuracy of every form. Imported as ``cellseg_benchmarks``."""
