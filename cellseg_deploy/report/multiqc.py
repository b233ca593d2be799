"""Two files by which MultiQC shows a run next to other instruments: custom content in its JSON form."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.report.results import Results
from cellseg_deploy.report.summary import GroupSummary

IMAGES_MQC, GROUPS_MQC = "images_mqc.json", "groups_mqc.json"
_IMAGES: dict[str, dict[str, Any]] = {
    "counted": {"title": "Counted", "description": "Cells that the count rule counts", "format": "{:,.0f}", "min": 0},
    "cells": {"title": "Found", "description": "All cells found", "format": "{:,.0f}", "min": 0, "hidden": True},
    "confluence": {
        "title": "Covered",
        "description": "Covered share of the field",
        "min": 0,
        "max": 1,
        "format": "{:.3f}",
    },
    "median_cell_area_px": {"title": "Median area", "description": "Of the cells found", "suffix": " px"},
    "warnings": {"title": "Warnings", "description": "Kinds of warnings", "format": "{:,.0f}", "min": 0},
    "failed": {"title": "Failed", "description": "1 if the image could not be counted", "format": "{:,.0f}", "min": 0},
}
_GROUPS: dict[str, dict[str, Any]] = {
    "images": {"title": "Images", "format": "{:,.0f}", "min": 0},
    "failed": {"title": "Failed", "format": "{:,.0f}", "min": 0},
    "warned": {"title": "With warning", "format": "{:,.0f}", "min": 0},
    "counted": {"title": "Counted", "format": "{:,.0f}", "min": 0},
    "mean": {"title": "Per image", "description": "Mean of counted cells per image", "min": 0},
    "sd": {"title": "sd", "description": "Standard deviation of counted cells per image", "min": 0},
    "confluence": {"title": "Covered", "min": 0, "max": 1, "format": "{:.3f}"},
    "median_area_px": {"title": "Median area", "suffix": " px", "min": 0},
}


def write_images(path: Path, results: Results, command: str) -> None:
    """Write a table with a row per image. ``command``: what made the run, named in titles. Raises ``OutputError``."""
    data = dict[str, dict[str, Any]]()
    stems = Counter(_sample(image.name.rpartition(".")[0] or image.name) for image in results.images)
    for image in results.images:
        stem, _, ending = image.name.rpartition(".")
        sample = _sample(stem or image.name)
        if stems[sample] > 1:
            sample = f"{sample} ({_sample(ending)})"
        known = {name: image.values.get(name) for name in _IMAGES}
        known |= {"warnings": len(image.warnings), "failed": int(not image.is_done)}
        data[sample] = {name: value for name, value in known.items() if value is not None}
    _write(path, "images", "Images", "One row per image: images.csv has more.", _IMAGES, data, command)


def write_groups(path: Path, summaries: Sequence[GroupSummary], command: str) -> None:
    """Write a table with a row per group, as ``write_images``. Raises ``OutputError``."""
    data = {
        _sample(one.group): {name: value for name in _GROUPS if (value := getattr(one, name)) is not None}
        for one in summaries
    }
    text = "One row per folder, or per named group: summary.csv has more."
    _write(path, "groups", "Groups", text, _GROUPS, data, command)


def _sample(name: str) -> str:
    """Return ``name`` as MultiQC takes it: it cuts names at slashes and known endings, and writes them into its page
    without escaping them."""
    return html.escape(utf8(name)).replace("/", " › ")


def _write(
    path: Path,
    name: str,
    title: str,
    text: str,
    headers: dict[str, dict[str, Any]],
    data: dict[str, dict[str, Any]],
    command: str,
) -> None:
    content = {
        "id": f"{command.replace('-', '_')}_{name}",
        "parent_id": command.replace("-", "_"),
        "parent_name": command,
        "parent_description": "Cells counted in photographs.",
        "section_name": title,
        "description": text,
        "plot_type": "table",
        "pconfig": {"id": f"{command.replace('-', '_')}_{name}_table", "title": f"{command}: {title}"},
        "headers": headers,
        "data": data,
    }
    write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode("ascii") + b"\n")
