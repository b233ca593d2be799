"""Cells marked by boxes or points instead of outlines, from the files of annotation tools."""
