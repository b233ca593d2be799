"""Cells that people marked without drawing them: boxes and points, from the files that annotation tools write."""
