"""Benchmarks: time, memory and accuracy of every form, with the machine they ran on. Imported as ``cellseg_benchmarks``."""
