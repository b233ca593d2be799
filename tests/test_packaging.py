"""Guards of the house: who may import whom, what loads when, what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from functools import cache
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # folder -> name it is imported by, and what it may import of the others
    "cellseg_deploy": ("cellseg_deploy", set[str]()),
    "train": ("cellseg_train", {"cellseg_deploy"}),
    "export": ("cellseg_export", {"cellseg_deploy", "cellseg_train"}),
    "benchmarks": ("cellseg_benchmarks", {"cellseg_deploy", "cellseg_train", "cellseg_export"}),
}
OUR_NAMES = {name for name, _ in ROOMS.values()}
FOLDER_NAMES = set(ROOMS) - OUR_NAMES
TORCH = {"torch", "torchvision", "timm", "safetensors"}
# Engine -> the only module that may import it.
ENGINES = {
    "onnxruntime": "cellseg_deploy/backends/telemetry.py",
    "openvino": "cellseg_deploy/backends/telemetry.py",
    "tensorrt": "cellseg_deploy/backends/tensorrt.py",
    "tensorrt_rtx": "cellseg_deploy/backends/tensorrt.py",
    "cuda": "cellseg_deploy/backends/cuda_runtime.py",
    "tritonclient": "cellseg_deploy/backends/v2_client.py",
}
# Package of an extra -> the only modules of the runtime that may import it, in a function; commands ask for it by name
# before they begin.
OF_EXTRAS = {
    "httpx": ("cellseg_deploy/serve/client.py",),
    "dask": ("cellseg_deploy/cluster/connection.py",),
    "distributed": (
        "cellseg_deploy/cluster/connection.py",
        "cellseg_deploy/cluster/outcomes.py",
        "cellseg_deploy/cluster/worker.py",
    ),
    "obstore": ("cellseg_deploy/files/urls.py",),
    "openslide": ("cellseg_deploy/slides/openslide_reader.py",),
    "matplotlib": ("cellseg_deploy/evaluate/plots.py",),
    "pandas": ("cellseg_deploy/outputs/image_table.py",),
    "prometheus_client": ("cellseg_deploy/serve/metrics.py",),
    "pyarrow": ("cellseg_deploy/outputs/parquet.py",),
    "pylibCZIrw": ("cellseg_deploy/slides/czi_reader.py",),
    "pycocotools": ("cellseg_deploy/outputs/coco.py",),
    "roifile": ("cellseg_deploy/outputs/imagej_roi.py", "cellseg_deploy/annotations/imagej.py"),
    "starlette": ("cellseg_deploy/view/app.py", "cellseg_deploy/serve/app.py"),
    "uvicorn": ("cellseg_deploy/web/server.py",),
    "zarr": ("cellseg_deploy/slides/zarr_labels.py", "cellseg_deploy/slides/zarr_reader.py"),
    "xlsxwriter": ("cellseg_deploy/outputs/workbook.py",),
}
HEAVY = sorted(
    {
        *TORCH,
        *ENGINES,
        *OF_EXTRAS,
        "cv2",
        "imagecodecs",
        "jinja2",
        "numpy",
        "onnx",
        "PIL",
        "scipy",
        "skimage",
        "tifffile",
    }
)
MAX_LINES = 500

SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RUNTIME = [path for path in SOURCES if path.is_relative_to(ROOT / "cellseg_deploy")]


@dataclass(frozen=True)
class Import:
    """One import: full module name, line, and whether it stands in a function or under ``if TYPE_CHECKING``."""

    module: str
    line: int
    in_function: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(source: str) -> list[Import]:
    """Every import in ``source``: statements, and ``import_module("...")`` or ``__import__("...")`` with a literal."""
    return list(_walk(ast.parse(source), in_function=False, for_types=False))


def _walk(node: ast.AST, *, in_function: bool, for_types: bool) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            for name in names:
                yield Import(name.name, node.lineno, in_function, for_types)
        case ast.ImportFrom(module=module, level=level):
            yield Import("." * level + (module or ""), node.lineno, in_function, for_types)
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            yield Import(module, node.lineno, in_function, for_types)
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
            for statement in body:
                yield from _walk(statement, in_function=in_function, for_types=True)
            for statement in orelse:
                yield from _walk(statement, in_function=in_function, for_types=for_types)
            return
    inner = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, in_function=inner, for_types=for_types)


@cache
def imports_of(path: Path) -> list[Import]:
    return imports(path.read_text(encoding="utf-8"))


def wrong_imports(path: Path, found: list[Import]) -> list[str]:
    """What is wrong with the imports of the file ``path`` (relative to the root): one sentence each."""
    name, allowed = ROOMS.get(path.parts[0], ("", OUR_NAMES))
    problems = []
    for item in found:
        if item.top in FOLDER_NAMES:
            problems.append(f"{path}:{item.line}: import {item.module}: use the installed name cellseg_{item.top}")
        if item.module.startswith("."):
            problems.append(f"{path}:{item.line}: relative import; write the full name")
        if item.top in OUR_NAMES - allowed - {name}:
            problems.append(f"{path}:{item.line}: {name} must not import {item.top}")
        if name == "cellseg_deploy" and item.top in TORCH:
            problems.append(f"{path}:{item.line}: the runtime must not import {item.top}")
        if name == "cellseg_deploy" and item.top in ENGINES:
            if path.as_posix() != ENGINES[item.top]:
                problems.append(f"{path}:{item.line}: only {ENGINES[item.top]} may import {item.top}")
            elif not (item.in_function or item.for_types):
                problems.append(f"{path}:{item.line}: import {item.top} in the function that opens it")
    return problems


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement_names(requirements: list[str]) -> set[str]:
    """Names of the distributions, normalised, without versions and extras."""
    return {re.split(r"[\s\[<>=!~;]", item, maxsplit=1)[0].lower().replace("_", "-") for item in requirements}


# --- the guards guard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("cellseg_deploy/a.py", "import torch", "must not import torch"),
        ("cellseg_deploy/a.py", "def f():\n    from torch import nn", "must not import torch"),
        ("cellseg_deploy/a.py", "import importlib\nimportlib.import_module('timm.models')", "must not import timm"),
        ("cellseg_deploy/a.py", "from cellseg_train.model import CellSegNet", "must not import cellseg_train"),
        ("cellseg_deploy/a.py", "def f():\n    import onnxruntime", "only cellseg_deploy/backends/telemetry.py"),
        ("cellseg_deploy/backends/telemetry.py", "import onnxruntime", "in the function"),
        ("train/a.py", "import cellseg_export", "must not import cellseg_export"),
        ("export/a.py", "import cellseg_benchmarks.harness.timer", "must not import cellseg_benchmarks"),
        ("benchmarks/a.py", "from train import model", "use the installed name cellseg_train"),
        ("tests/a.py", "import export.onnx", "use the installed name cellseg_export"),
        ("train/a.py", "from . import model", "relative import"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, complaint: str) -> None:
    assert any(complaint in problem for problem in wrong_imports(Path(path), imports(source)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cellseg_deploy/backends/telemetry.py", "def f():\n    import onnxruntime"),
        ("train/a.py", "import torch\nfrom cellseg_deploy.errors import DataError\nfrom cellseg_train import model"),
        ("benchmarks/a.py", "import cellseg_export, cellseg_train, cellseg_deploy"),
        ("tests/a.py", "import cellseg_export\nfrom benchmark import x"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert wrong_imports(Path(path), imports(source)) == []


# --- source -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    problems = wrong_imports(path.relative_to(ROOT), imports_of(path))
    assert not problems, "\n".join(problems)


# Floors of the runtime, ground first: a module imports from floors below its own, and from its own room.
FLOORS = (
    ("errors",),
    ("threads", "web"),
    ("files",),
    ("models",),
    ("cells", "backends"),
    ("images", "outputs"),
    ("batching", "report"),
    ("segmenter",),
    ("annotations", "slides"),
    ("parity", "run", "evaluate"),
    ("cluster",),
    ("view", "serve"),
    ("cli",),
    ("samples",),
)
DOORS = {("segmenter", "run"), ("segmenter", "slides")}
"""Arrows up: ``Segmenter.run`` and ``run_slide`` are methods because people look for them there."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_stand_on_floors(path: Path) -> None:
    room = path.relative_to(ROOT / "cellseg_deploy").with_suffix("").parts[0]
    if room == "__init__":  # the front door
        return
    assert room in FLOOR_OF, f"{room}: give it a floor in FLOORS"
    ours = [item for item in imports_of(path) if item.module.startswith("cellseg_deploy.")]
    used = {item.module.split(".")[1]: item for item in ours}
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line}: {room} must not import {other}"
        for other, item in used.items()
        if other != room
        and not ((room, other) in DOORS and (item.in_function or item.for_types))
        and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_of_the_runtime_are_declared() -> None:
    declared = requirement_names(project()["project"]["dependencies"]) | {"protobuf"}  # a dependency of onnx itself
    homes = packages_distributions()
    undeclared = []
    for path in RUNTIME:
        for item in imports_of(path):
            if item.top in sys.stdlib_module_names or item.top in OUR_NAMES or item.top in ENGINES:
                continue
            is_its_module = path.relative_to(ROOT).as_posix() in OF_EXTRAS.get(item.top, ())
            if is_its_module and (item.in_function or item.for_types):
                continue
            installed_as = {name.lower().replace("_", "-") for name in homes.get(item.top, [])}
            if not installed_as & declared:
                undeclared.append(
                    f"{path.relative_to(ROOT)}:{item.line}: {item.module} ({installed_as or 'not installed'})"
                )
    assert not undeclared, "\n".join(undeclared)


def test_files_are_small_enough_to_read() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*SOURCES, *TESTS]}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]
    assert not long, f"longer than {MAX_LINES} lines, split them: {long}"


# --- what loads when --------------------------------------------------------------------------------------------------

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} was imported, but must not be")
sys.meta_path.insert(0, Blocked())
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_block_blocks() -> None:
    result = run_python(BLOCK.format(blocked=["colorsys"]) + "import colorsys")
    assert result.returncode != 0
    assert "colorsys was imported" in result.stderr


@pytest.mark.parametrize("module", ["infer", "evaluate", "measure", "merge", "convert", "slide", "view", "serve"])
def test_help_of_runtime_commands_loads_nothing_heavy(module: str) -> None:
    code = BLOCK.format(blocked=HEAVY) + f"from cellseg_deploy.cli.{module} import main\nsys.exit(main())"
    result = run_python(code, "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_every_runtime_module_imports_without_torch_or_an_engine() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in RUNTIME if path.name != "__main__.py"]
    code = BLOCK.format(blocked=sorted({*TORCH, *ENGINES}))
    code += "from importlib import import_module\n" + "\n".join(f"import_module({name!r})" for name in modules)
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# --- installation -----------------------------------------------------------------------------------------------------


def test_every_folder_with_source_is_listed_as_a_package() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    there = {".".join((ROOMS[folder.parts[0]][0], *folder.parts[1:])) for folder in folders}
    assert there == listed
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


@pytest.mark.parametrize("command", sorted(project()["project"]["scripts"]))
def test_commands_are_installed_and_explain_themselves(command: str) -> None:
    installed = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert installed.get(command) == project()["project"]["scripts"][command], "pip install -e . again"
    program = Path(sys.executable).with_name(command)
    result = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_the_base_brings_no_engine_and_no_torch() -> None:
    base = requirement_names(project()["project"]["dependencies"])
    unwanted = {name for name in base if name.startswith(("torch", "onnxruntime", "openvino", "tensorrt", "timm"))}
    assert not unwanted
    extras = {name: requirement_names(items) for name, items in project()["project"]["optional-dependencies"].items()}
    assert "onnxruntime" in extras["cpu"]
    assert extras["gpu"] == {"onnxruntime-gpu", "cuda-bindings"}
    (of_gpu,) = [item for item in project()["project"]["optional-dependencies"]["gpu"] if "onnxruntime" in item]
    assert of_gpu.startswith("onnxruntime-gpu[cuda,cudnn]")  # alone it brings none of the libraries it needs
    assert extras["cluster"] == {"dask-jobqueue", "distributed"}
    assert extras["plots"] == {"matplotlib"}
    assert extras["pandas"] == {"pandas"}
    assert extras["triton"] == {"tritonclient"}
    assert extras["view"] == {"starlette", "uvicorn"}
    assert extras["serve"] == {"cellseg-deploy", "httpx", "prometheus-client"}
    assert extras["outputs"] == {"pyarrow", "pycocotools", "roifile", "xlsxwriter"}
    for name, items in extras.items():  # the two builds of ONNX Runtime overwrite each other's files
        assert not {"onnxruntime", "onnxruntime-gpu"} <= items, name
    assert not extras["export"] & {"onnxruntime", "onnxruntime-gpu"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, so that nothing an earlier build left gets in."""
    copy = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, call: str) -> zipfile.ZipFile:
    """Run ``call`` of setuptools' build backend in ``source``; gives the wheel that it made in ``out``."""
    code = f"import sys\nfrom setuptools.build_meta import *\nout = sys.argv[1]\n{call}"
    out = source / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", code, os.fspath(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(source: Path) -> Iterator[zipfile.ZipFile]:
    with build(source, "build_wheel(out)") as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel_names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


def test_the_wheel_holds_all_source_under_our_names(wheel_names: set[str]) -> None:
    expected = {Path(ROOMS[path.relative_to(ROOT).parts[0]][0], *path.relative_to(ROOT).parts[1:]) for path in SOURCES}
    assert {path.as_posix() for path in expected} == {name for name in wheel_names if name.endswith(".py")}
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == OUR_NAMES


def test_the_wheel_holds_models_type_markers_and_licence(wheel_names: set[str]) -> None:
    shipped = ("*.onnx", "*.safetensors", "*.md", "*.json")
    models = [path for pattern in shipped for path in (ROOT / "cellseg_deploy" / "models").glob(pattern)]
    page = (ROOT / "cellseg_deploy" / "view" / "static").iterdir()
    files = [path for path in (*models, *page) if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files} | {f"{name}/py.typed" for name in OUR_NAMES}
    assert expected <= wheel_names
    assert any(re.search(r"\.dist-info/.*LICENSE$", name) for name in wheel_names)


def test_the_wheel_says_what_it_is_and_how_to_use_it(wheel: zipfile.ZipFile, wheel_names: set[str]) -> None:
    (name,) = [name for name in wheel_names if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    said = project()["project"]
    assert metadata["Version"] == said["version"]
    assert metadata["Summary"] == said["description"]
    assert metadata["Author"] == said["authors"][0]["name"] == "cellseg-deploy contributors"
    assert metadata["License-Expression"] == said["license"]
    assert metadata["Keywords"].split(",") == said["keywords"]
    assert metadata.get_all("Classifier") == sorted(said["classifiers"])
    assert set(metadata.get_all("Provides-Extra") or ()) == set(said["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert "cellseg-infer photographs/ -o counts/" in description
    # An index has no files of the repository: no picture, no relative link, and nothing left of either.
    assert not re.findall(r"!\[|\]\((?!https?://)", description)
    assert "counting photographs (`docs/counting.md`)" in description
    assert "outline of every cell" not in description


def test_a_wheel_from_the_sdist_holds_the_same_files(source: Path, tmp_path: Path, wheel_names: set[str]) -> None:
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, capture_output=True, timeout=120, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    with build(tmp_path / sdist.name.removesuffix(".tar.gz"), "build_wheel(out)") as archive_of_wheel:
        assert set(archive_of_wheel.namelist()) == wheel_names


def test_a_strict_editable_installation_shows_type_checkers_all_packages(source: Path) -> None:
    with build(source, "build_editable(out, {'editable-mode': 'strict'})") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        folder = Path(archive.read(name).decode().strip())
    for room, (package, _) in ROOMS.items():
        assert (folder / package / "__init__.py").samefile(source / room / "__init__.py")
        assert (folder / package / "py.typed").is_file()


@pytest.mark.slow
def test_the_wheel_counts_cells_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys, cellseg_deploy\n"
        "assert cellseg_deploy.__file__.startswith(sys.argv.pop(1)), cellseg_deploy.__file__\n"
        "from cellseg_deploy.samples import write_samples\n"
        "from cellseg_deploy.cli.infer import main\n"
        "from pathlib import Path\n"
        "write_samples(Path(sys.argv[1]).parent, 1, 0, (300, 400))\n"
        "main()"
    )
    site, samples, out = (str(tmp_path / name) for name in ("site", "samples", "out"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, site, f"{samples}/images", "-o", out, "--cell-diameter", "90"],
        env=os.environ | {"PYTHONPATH": site, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "done" in (tmp_path / "out" / "images.csv").read_text(encoding="utf-8")


COMMANDS = [path for path in SOURCES if path.parent.name == "cli" or path.name.startswith("cli")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_raise_what_ends_them(path: Path) -> None:
    """A code that is returned is silent under ``-q``; an error that is raised is always said."""
    returned = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Return)]
    silent = [ast.unparse(value) for value in returned if value is not None and ".exit_code" in ast.unparse(value)]
    assert [text for text in silent if not text.startswith("error.")] == []  # _common.run has said it
