"""``python -m cellseg_benchmarks``."""

from cellseg_benchmarks.cli import main

if __name__ == "__main__":
    main()
