"""Folders of images, from files to results."""
