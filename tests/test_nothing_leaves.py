"""Nothing leaves the machine: no socket, no look-up, nothing written but results, temporary files and our cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cellseg_deploy.samples import write_samples

# Runs a command and keeps a line for each use of a socket, look-up and opening for writing, of Python code at least.
PROGRAM = """
import os, sys
log = open(sys.argv.pop(1), "a", encoding="utf-8")
def seen(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            print("open", os.path.abspath(os.fsdecode(path)), file=log, flush=True)
    elif event == "os.mkdir":
        print("mkdir", os.path.abspath(os.fsdecode(args[0])), file=log, flush=True)
    elif event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__"):  # neither goes anywhere
        if event != "socket.bind" or args[1][0] not in ("::1", "127.0.0.1"):  # urllib3 tries IPv6 when imported
            print(event, *args[1:], file=log, flush=True)
    elif event == "import" and args[0] == "openvino_telemetry.main":
        print("telemetry", file=log, flush=True)
sys.addaudithook(seen)
from importlib import import_module
import_module(sys.argv.pop(1)).main()
"""
OWN_CACHE = Path(".cache", "cellseg-deploy")
LIMITS = (
    *("limits", "--rounds", "1", "--min-seconds", "0", "--settle", "0", "--matrix-size", "64"),
    *("--device", "cpu", "--threads", "1", "-q"),
)
"""The shortest benchmark that opens every engine."""


@dataclass(frozen=True)
class Place:
    """A folder with smears to work on, and an empty home."""

    folder: Path

    def run(self, module: str, *arguments: str | Path, prefix: tuple[str | Path, ...] = ()) -> list[str]:
        """Run the command of ``module``; gives what it wrote outside its folder and where it went on the network."""
        home, temporary, log = (self.folder / name for name in ("home", "tmp", "log"))
        for folder in (home, temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        log.unlink(missing_ok=True)
        others = ("XDG_", "MPL", "HF_", "TORCH", "ORT_")  # the last: this process has the telemetry off for itself
        kept = {key: value for key, value in os.environ.items() if not key.startswith(others)}
        done = subprocess.run(
            [*prefix, sys.executable, "-c", PROGRAM, log, module, *arguments],
            env=kept | {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
        fine = ("/dev/", str(self.folder / "out"), str(temporary), str(home / OWN_CACHE), f"{home / '.cache'}\n")
        events = [line for line in lines if not (line.partition(" ")[2] + "\n").startswith(fine)]
        return events + [f"home {path}" for path in files_in(home) if not path.is_relative_to(OWN_CACHE)]


def files_in(home: Path) -> list[Path]:
    return [path.relative_to(home) for path in sorted(home.rglob("*")) if not path.is_dir()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place").resolve()
    for name, seed in (("train", 5), ("val", 9)):
        write_samples(folder / name, 2, seed, (200, 260))
    return Place(folder)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_counting_leaves_nothing(place: Place, engine: str) -> None:
    """Engines write and connect from code that Python's audit does not see: the home stays empty, and, where strace is
    installed, no socket of the internet is opened."""
    pytest.importorskip(engine)
    out = place.folder / f"out-{engine}"
    arguments = ("val/images", "-o", out, "--backend", engine, "-q")
    assert place.run("cellseg_deploy.cli.infer", *arguments) == []
    assert {path.parts[:2] for path in files_in(place.folder / "home")} <= {OWN_CACHE.parts}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_python_api_leaves_nothing(place: Place, engine: str) -> None:
    pytest.importorskip(engine)
    program = place.folder / "count.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "def main():\n"
        "    from cellseg_deploy import EngineOptions, Segmenter\n"
        "    with Segmenter.load(engine=EngineOptions(sys.argv[1], threads=1)) as segmenter:\n"
        "        assert [segmenter(path).count > 0 for path in Path('val/images').iterdir()] == [True, True]\n"
    )
    assert place.run("count", engine) == []
    assert {path.parts[:2] for path in files_in(place.folder / "home")} <= {OWN_CACHE.parts}


def test_a_sweep_leaves_nothing(place: Place) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--images", "val/images", "--masks", "val/masks", "-o", place.folder / "out-sweep", "--sweep", "-q")
    assert place.run("cellseg_deploy.cli.evaluate", *arguments) == []
    assert {path.parts[:2] for path in files_in(place.folder / "home")} <= {OWN_CACHE.parts}


def test_a_benchmark_leaves_nothing(place: Place) -> None:
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    assert place.run("cellseg_benchmarks.cli", *LIMITS, "-o", place.folder / "out-limits") == []
    assert {path.parts[:2] for path in files_in(place.folder / "home")} <= {OWN_CACHE.parts}


TRACED: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("cellseg_deploy.cli.infer", "val/images", "--backend", "onnxruntime", "-q"),
    "openvino": ("cellseg_deploy.cli.infer", "val/images", "--backend", "openvino", "-q"),
    "sweep": ("cellseg_deploy.cli.evaluate", "--images", "val/images", "--masks", "val/masks", "--sweep", "-q"),
    "benchmark": ("cellseg_benchmarks.cli", *LIMITS),
}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("case", TRACED)
def test_no_socket_of_the_internet_is_opened(place: Place, case: str) -> None:
    """By any process of a command, in code of any language."""
    if case in ("onnxruntime", "openvino"):
        pytest.importorskip(case)
    else:
        pytest.importorskip("matplotlib")
    traced = place.folder / "trace"
    prefix = ("strace", "-f", "-qq", "-e", "trace=network", "-o", traced)
    place.run(*TRACED[case], "-o", place.folder / f"out-traced-{case}", prefix=prefix)
    assert [line for line in traced.read_text().splitlines() if "AF_INET" in line] == []


def test_training_writes_only_its_run(place: Place) -> None:
    for package in ("torch", "timm", "tensorboard"):
        pytest.importorskip(package)
    folders = ("--images", "train/images", "--masks", "train/masks", "--val-images", "val/images")
    sizes = ("--tile-size", "112", "--tiny-width", "48", "--tiny-depth", "1", "--image-scale", "0.4")
    few = ("--epochs", "1", "--patches-per-image", "4", "--device", "cpu", "--threads", "1", "--quiet")
    out = place.folder / "out-train"
    assert place.run("cellseg_train.cli", *folders, "--val-masks", "val/masks", "-o", out, *sizes, *few) == []
    assert files_in(place.folder / "home") == []


def test_figures_are_drawn_without_a_trace_in_the_home(place: Place) -> None:
    pytest.importorskip("matplotlib")
    program = place.folder / "draw.py"
    program.write_text(
        "from pathlib import Path\n"
        "from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png\n"
        "from cellseg_deploy.evaluate.plots import Histogram, histograms_png\n"
        "import numpy as np\n"
        "def main():\n"
        "    panel = Bars('t', 'x', (Bar('a', 1.0),))\n"
        "    Path('out-figures').mkdir()\n"
        "    Path('out-figures/1.png').write_bytes(panels_png([panel], title='t'))\n"
        "    histogram = Histogram('x', np.ones(3))\n"
        "    Path('out-figures/2.png').write_bytes(histograms_png([histogram], title='t', columns=1))\n"
    )
    assert place.run("draw") == []
    assert {path.parts[:3] for path in files_in(place.folder / "home")} == {(*OWN_CACHE.parts, "matplotlib")}


def test_quantising_reports_nothing_to_its_maker(place: Place) -> None:
    pytest.importorskip("nncf")
    program = place.folder / "load.py"
    program.write_text(
        "def main():\n"
        "    from cellseg_export.forms.int8 import _import_nncf\n"
        "    from unittest.mock import MagicMock\n"
        "    _import_nncf()\n"
        "    from nncf.telemetry import wrapper\n"
        "    assert isinstance(wrapper.telemetry, MagicMock)\n"
    )
    assert place.run("load") == []
