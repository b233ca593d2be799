"""``report.html``: one self-contained page on a run, which needs no network and contains no time.

Text and tables are made here by a template that escapes everything; the script in the page draws figures from the JSON
that it finds there, with Observable Plot (vendored, see ``vendor/``), sorts the table and enlarges pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cellseg_deploy.cells import several
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.models import DEFAULT_SHA256
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.outputs.names import LABEL_SUFFIX, OVERLAY_SUFFIX
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.report import figures, flags, summary, thumbnails
from cellseg_deploy.report.results import ImageRow, Results

REPORT_HTML = "report.html"
_VENDORED = ("d3.min.js", "plot.umd.min.js")
_MAX_ROWS = 5000
"""Images in the page's table; images.csv has all."""
_NUMBER = re.compile(r"\d[\d.,]*")


_HEADS = {
    "counted_per_image": "per image",
    "counted_per_image_sd": "sd",
    "counted_per_image_ci95_low": "95 % from",
    "counted_per_image_ci95_high": "to",
    "counted_per_megapixel": "per megapixel",
    "confluence": "covered",
    "median_cell_area_px": "median area, px",
    "counted_per_mm2": "per mm²",
    "median_cell_area_um2": "median area, µm²",
}
"""Columns of summary.csv whose names are too long for a table; the others are words, or the class after ``count_``."""


@dataclass(frozen=True)
class About:
    """What the run was made with. ``identity``: as in the journal's first line. ``spec``: of the model, None if the
    cells were drawn. ``saved``: names of the formats. ``group_by``: as passed."""

    identity: Mapping[str, Any]
    spec: ModelSpec | None
    saved: Sequence[str]
    group_by: str

    @property
    def command(self) -> str:
        """Name of the command that made the run."""
        return "cellseg-measure" if self.spec is None else "cellseg-infer"


def write(path: Path, out: Path, results: Results, about: About, *, pictures: bool = True) -> None:
    """Write the page on ``results``, whose files lie in ``out``, to ``path``.

    ``pictures``: whether to embed thumbnails, which takes some milliseconds per image. Raises ``OutputError``.
    """
    write_bytes(path, render(out, results, about, pictures=pictures))


def render(out: Path, results: Results, about: About, *, pictures: bool = True) -> bytes:
    """Return the page that ``write`` writes."""
    sums = figures.CellSums(results.cells())
    summaries = summary.summarise(results)
    in_run = flags.outliers(results.images)
    unlike = [] if about.spec is None else flags.unlike_training(results.images, about.spec)
    why = flags.reasons(results.images, [*in_run, *unlike])
    shown = _shown(results.images, why)
    small = _thumbnails(out, shown, about.saved) if pictures else [""] * len(shown)
    thresholds = dict(results.read_thresholds())
    data = {
        "images": [
            {
                "name": image.name,
                "note": f"{image.values['counted']} counted" if image.is_done else "failed",
                "file": f"overlays/{quote(image.output_name, errors='surrogateescape')}{OVERLAY_SUFFIX}"
                if image.is_done and "overlays" in about.saved
                else "",
                "flag": ", ".join(why.get(image.name, [])),
            }
            for image in shown
        ],
        "counts": figures.counts_by_group(results),
        "distributions": sums.distributions(),
        "classes": figures.classes_by_group(results, summaries),
        "thresholds": [{"name": name, **json.loads(text)} for name, text in thresholds.items()],
    }
    with_um = any("pixel_size_um" in image.values for image in results.images)
    done = [image for image in results.images if image.is_done]
    page = _template().render(
        command=about.command,
        style=_text("page.css"),
        scripts=[_text(f"vendor/{name}") for name in _VENDORED] + [_text("page.js")],
        data=_json(data),
        pictures=_json(small),
        images=shown,
        left_out=len(results.images) - len(shown),
        totals={
            "images": len(results.images),
            "failed": len(results.images) - len(done),
            "cells": sum(image.values["cells"] for image in done),
            "counted": sum(image.values["counted"] for image in done),
        },
        failed=[image for image in results.images if not image.is_done],
        kinds=_warnings_by_kind(results.images),
        outliers=in_run,
        unlike=unlike,
        suspects=sorted(sums.suspects.items(), key=lambda item: (-item[1], item[0])),
        suspect_rule=f"area at least {several.AREA_REL} times the median, solidity below {several.MAX_SOLIDITY}",
        why=why,
        whole_run=any(one.image == flags.WHOLE_RUN for one in unlike),
        numbers={name: number for number, name in enumerate(image.name for image in shown)},
        columns=summary.columns(results.classes, with_um=with_um),
        rows=summary.rows(summaries, with_um=with_um),
        classes=results.classes,
        has_pictures=any(small),
        has_overlays="overlays" in about.saved,
        thresholds=list(thresholds),
        settings=_settings(about),
        model=_model(about),
        card=_card(about),
        versions={"program": about.identity["program"], **about.identity["versions"]},
    )
    return (utf8(page) + "\n").encode()


def _warnings_by_kind(images: Sequence[ImageRow]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return each kind of warning, the text for all its images, and name and text of each image, "" if that says it.

    Texts that differ in numbers alone are one text, with the numbers of the first image.
    """
    kinds = dict[str, list[tuple[str, str]]]()
    for image in images:
        for kind, text in image.warnings.items():
            kinds.setdefault(kind, []).append((image.name, text))
    found = []
    for kind, texts in sorted(kinds.items()):
        first_name, first = texts[0]
        pattern = _NUMBER.sub("", first)
        alike = {text for _, text in texts if _NUMBER.sub("", text) == pattern}
        hint = first if len(alike) == 1 else f"{first} (numbers of {first_name})"
        found.append((kind, hint, [(name, "" if text in alike else text) for name, text in texts]))
    return found


def _shown(images: Sequence[ImageRow], why: Mapping[str, Any]) -> list[ImageRow]:
    if len(images) <= _MAX_ROWS:
        return list(images)
    first = sorted(images, key=lambda image: image.name not in why)[:_MAX_ROWS]
    return sorted(first, key=lambda image: image.name)


def _thumbnails(out: Path, images: Sequence[ImageRow], saved: Sequence[str]) -> list[str]:
    def place(folder: str, image: ImageRow, suffix: str) -> Path | None:
        return out / folder / f"{image.output_name}{suffix}" if folder in saved and image.is_done else None

    return thumbnails.thumbnails(
        [(place("overlays", image, OVERLAY_SUFFIX), place("labels", image, LABEL_SUFFIX)) for image in images]
    )


def _settings(about: About) -> dict[str, Any]:
    point = {f"{name} (operating point)": value for name, value in about.identity["operating_point"].items()}
    return {
        "task": about.identity["task"],
        **{name.replace("_", " "): value for name, value in about.identity["settings"].items()},
        **{name.replace("_", " "): value for name, value in point.items()},
        "files": ", ".join(about.saved) or "none",
        "groups": about.group_by or "folders",
        "input": ", ".join(about.identity["inputs"]),
    }


def _model(about: About) -> dict[str, Any]:
    spec, engine = about.spec, about.identity["backend"]
    if spec is None:
        return {"name": about.identity["model"]["name"], "network": "none: the cells were drawn or edited"}
    training = spec.training
    return {
        "name": spec.name,
        "SHA-256": about.identity["model"].get("sha256"),
        "variant": spec.variant,
        "encoder": spec.encoder,
        "cells in the network": f"{spec.cell_diameter_px:g} px",
        "weights": spec.weights.origin,
        "licence of the weights": spec.weights.licence,
        "training data": training.data,
        "training images": training.n_train_images or None,
        **{f"validation {name}": f"{value:.4g}" for name, value in training.val_metrics.items()},
        "checked against PyTorch": spec.parity,
        "engine": f"{engine['name']} {engine['precision']} on {engine['device']}",
    }


def _card(about: About) -> str:
    """Text of the card of the shipped model; "" for another model."""
    if about.identity["model"].get("sha256") != DEFAULT_SHA256:
        return ""
    return files("cellseg_deploy.models").joinpath("default.md").read_text(encoding="utf-8")


@cache
def _text(name: str) -> str:
    return files("cellseg_deploy.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    environment.filters["noun"] = lambda n, one, more="": one if n == 1 else more or f"{one}s"
    environment.filters["head"] = lambda name: _HEADS.get(name, name.removeprefix("count_"))
    return environment.from_string(_text("page.html"))


def _number(value: Any) -> str:
    """Format a value for people: four significant digits, whole numbers whole, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_number, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _json(value: Any) -> str:
    """Return ``value`` as JSON that can stand in a script element: no ``<``, ``>`` or ``&`` of a name ends it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
