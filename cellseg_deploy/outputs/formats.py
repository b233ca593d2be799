"""Output formats, by the names used in ``save`` of a run.

A format writes one file per image, in a folder of its own, or one file per run when all images are done, or both.
Encoders are imported when called; libraries beyond the base install are checked before the run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cellseg_deploy.errors import UsageError, check_types
from cellseg_deploy.outputs.names import LABEL_SUFFIX, OVERLAY_SUFFIX
from cellseg_deploy.outputs.requirements import require_packages

if TYPE_CHECKING:
    from cellseg_deploy.outputs.segmented import SegmentedImage

EXTRA = "outputs"
CELLS_CSV, IMAGES_CSV, SUMMARY_CSV = "cells.csv", "images.csv", "summary.csv"


@dataclass(frozen=True)
class Format:
    """One kind of file. ``name``: its name in ``save`` of a run, which several kinds may share. ``what``: description.

    ``folder``, ``suffix``: an image's file is OUT/folder/NAMEsuffix; both empty where only ``run_file`` is written.
    ``encoder``: ``module:function`` in this package, a function from ``SegmentedImage`` to the file's bytes.
    ``run_file``: file in OUT for the whole run; ``finisher``: ``module:function`` that writes it from OUT's finished
    tables and the format's own files, (out, files in the order of the images, path to write).
    ``packages``: packages required beyond the base install.
    """

    name: str
    what: str
    folder: str = ""
    suffix: str = ""
    encoder: str = ""
    run_file: str = ""
    finisher: str = ""
    packages: tuple[str, ...] = ()

    def place(self, output_name: str) -> str:
        """Return the path (posix, in OUT) of the file for the image named ``output_name``."""
        return f"{self.folder}/{output_name}{self.suffix}"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes that a single image's file may have: pictures may be PNG too."""
        return (self.suffix, ".png") if self.suffix == ".jpg" else (self.suffix,)

    def encode(self, image: SegmentedImage, suffix: str = "") -> bytes:
        """Return the file's bytes for one image, without writing anything. ``suffix``: one of ``suffixes``."""
        function = cast("Callable[..., bytes]", _function(self.encoder))
        return function(image) if suffix in ("", self.suffix) else function(image, suffix)

    def finish(self, out: Path, files: Sequence[Path], path: Path) -> None:
        """Write ``run_file``'s content to ``path``. ``files``: this format's file of each finished image, in order."""
        function = cast("Callable[[Path, Sequence[Path], Path], None]", _function(self.finisher))
        function(out, files, path)


FORMATS: tuple[Format, ...] = (
    Format("labels", "label image: 0 background, 1..n the cells", "labels", LABEL_SUFFIX, "encoders:labels"),
    Format("overlays", "the image with outlines and count", "overlays", OVERLAY_SUFFIX, "encoders:overlay"),
    Format("numbered", "the same with each cell's number", "numbered", ".jpg", "encoders:numbered"),
    Format("rois", "regions for ImageJ's ROI Manager", "rois", ".zip", "imagej_roi:encode", packages=("roifile",)),
    Format("geojson", "detections for QuPath", "geojson", ".geojson", "geojson:encode"),
    Format(
        "coco",
        "COCO JSON, and one for all images",
        "coco",
        ".json",
        "coco:encode",
        run_file="coco.json",
        finisher="encoders:merge_coco",
        packages=("pycocotools",),
    ),
    Format("probabilities", "network output, 16 bit", "probabilities", ".tif", "probability_tiff:encode"),
    Format("confluence", "map of the covered share", "confluence", ".jpg", "confluence:encode_map"),
    Format("confluence", "its figures", "confluence", ".csv", "confluence:encode_table"),
    Format(
        "parquet",
        "cells.csv as Parquet",
        run_file="cells.parquet",
        finisher="encoders:cells_parquet",
        packages=("pyarrow",),
    ),
    Format(
        "xlsx",
        "all tables as an Excel workbook",
        run_file="results.xlsx",
        finisher="workbook:write",
        packages=("xlsxwriter",),
    ),
)
NAMES: tuple[str, ...] = tuple(dict.fromkeys(format.name for format in FORMATS))
DEFAULT = ("labels", "overlays")
_SAME_ENDING = {".tiff": ".tif", ".jpeg": ".jpg"}


def parse_names(text: str) -> tuple[str, ...]:
    """Return the comma-separated names in ``text``, in the order of ``NAMES``; ``all`` and ``none`` stand alone.

    Raises ``UsageError`` for anything else.
    """
    chosen = {part.strip() for part in text.split(",")} - {""}
    if chosen in ({"all"}, {"none"}):
        return NAMES if chosen == {"all"} else ()
    unknown = sorted(chosen - set(NAMES))
    if unknown or not chosen:
        raise UsageError(
            f"cannot save {', '.join(unknown) or 'nothing'}; expected {', '.join(NAMES)}, or all or none alone"
        )
    return tuple(name for name in NAMES if name in chosen)


def chosen_formats(names: Sequence[str]) -> tuple[Format, ...]:
    """Return the formats named ``names``. Raises ``UsageError`` for an unknown name, ``BackendUnavailableError`` if a
    package for one of them is not installed."""
    check_types("a sequence of names", save=names)
    if unknown := sorted(set(names) - {format.name for format in FORMATS}):
        raise UsageError(f"cannot save {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    formats = tuple(format for format in FORMATS if format.name in names)
    require_packages(EXTRA, *(package for format in formats for package in format.packages))
    return formats


def format_for(path: Path, kind: str | None = None) -> tuple[Format, str]:
    """Return the format of a single image's file ``path`` by its suffix, and that suffix in its usual spelling: the
    first with that suffix, or the one named ``kind``.

    Raises ``UsageError`` if there is none, and ``BackendUnavailableError`` as ``chosen_formats``.
    """
    suffix = path.suffix.lower()
    suffix = _SAME_ENDING.get(suffix, suffix)
    formats = [format for format in (FORMATS if kind is None else chosen_formats([kind])) if format.encoder]
    for format in formats:
        if suffix in (format.suffixes if kind else (format.suffix,)):
            require_packages(EXTRA, *format.packages)
            return format, suffix
    if kind is None:
        expected = (
            ".tif (labels), .jpg (overlay), .csv (table), .zip (ImageJ regions), .geojson or .json (COCO); "
            "for a .png name the picture, as in kind='overlays'"
        )
    elif formats:
        expected = " or ".join(suffix for format in formats for suffix in format.suffixes)
    else:
        raise UsageError(f"{path}: {kind} is a file of a whole run; write it with run(..., save=[{kind!r}])")
    raise UsageError(f"{path}: {kind or 'a result'} cannot be saved with this ending; expected {expected}")


def _function(where: str) -> object:
    module, _, name = where.partition(":")
    return getattr(import_module(f"cellseg_deploy.outputs.{module}"), name)
