"""Examples run: Python in README and docs/api.md, and those in the docstrings of all public names."""

from __future__ import annotations

import doctest
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cellseg_deploy as cs
from cellseg_deploy.models import default_model_path
from cellseg_deploy.outputs import label_tiff
from cellseg_deploy.outputs.image_table import ImageTable
from cellseg_deploy.samples import SmearParams, make_smear

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/api.md")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
CLASSES = {"Segmenter": cs.Segmenter, "Segmentation": cs.Segmentation, "ImageTable": ImageTable}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("samples")
    for name in ("val/images", "val/masks", "other-tool", "photographs"):
        (folder / name).mkdir(parents=True)
    for seed, stem in enumerate(("smear", "other")):
        smear = make_smear(SmearParams(size_hw=(300, 360), cell_diameter_px=60, n_cells=14), seed)
        for place in ("", "val/images/"):
            Image.fromarray(smear.image_hwc).save(folder / f"{place}{stem}.png")
        for place in ("val/masks", "other-tool"):
            (folder / place / f"{stem}.tif").write_bytes(label_tiff.encode(smear.labels_hw))
    shutil.copy(folder / "smear.png", folder / "photographs" / "a.png")
    for name in ("my.onnx", "my-other.onnx"):
        shutil.copy(default_model_path(), folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def there(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the samples as the working directory."""
    shutil.copytree(samples, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def opened() -> Iterator[cs.Segmenter]:
    pytest.importorskip("onnxruntime")
    with cs.Segmenter.load(engine=cs.EngineOptions(threads=1)) as model:
        yield model


@pytest.mark.parametrize("page", PAGES)
def test_python_on_a_page_runs(page: str, there: Path) -> None:
    if page == "docs/api.md":
        pytest.importorskip("distributed")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    names["model"].close()
    assert list(there.glob("*.jpg")), "no overlay was written"


def doctests() -> list[doctest.DocTest]:
    """Of the package, all public names and the public methods of its classes."""
    finder = doctest.DocTestFinder(recurse=False)
    objects: dict[str, Any] = {"cellseg_deploy": cs, "parity.compare": cs.parity.compare}
    objects |= {name: getattr(cs, name) for name in cs.__all__ if name not in ("__version__", "parity")}
    from cellseg_deploy.evaluate.api import evaluate

    objects["evaluate"] = evaluate
    for name, kind in CLASSES.items():
        objects[name] = kind
        public = [part for part in vars(kind) if part == "__call__" or not part.startswith("_")]
        objects |= {f"{name}.{part}": getattr(kind, part) for part in public if callable(getattr(kind, part, None))}
    return [test for name, item in objects.items() for test in finder.find(item, name)]


@pytest.mark.parametrize("example", [test for test in doctests() if test.examples], ids=lambda test: test.name)
def test_examples_of_docstrings_run(example: doctest.DocTest, there: Path, opened: cs.Segmenter) -> None:
    if example.name == "open_cluster":
        pytest.importorskip("distributed")
    example.globs = {name: getattr(cs, name) for name in cs.__all__} | {"cs": cs, "model": opened}
    example.globs["compare"] = cs.parity.compare
    failures = list[str]()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_every_public_name_has_an_example() -> None:
    with_example = {test.name for test in doctests() if test.examples}
    missing = {name for name in cs.__all__ if name not in ("__version__", "parity")} - with_example
    assert not missing
    of_segmenter = {f"Segmenter.{name}" for name in ("load", "__call__", "map", "run", "run_slide")}
    methods = (*of_segmenter, "parity.compare")
    assert {"cellseg_deploy", "ImageTable", *methods} <= with_example


def test_public_names_are_documented() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    unsaid = {"__version__", "ModelSpec", "Evaluation", "FolderResult"}  # what is on the page gives them
    assert {name for name in cs.__all__ if name not in page} == unsaid
