"""What several test files share: the photographs if they are there, a network that needs none, tiny model files."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cellseg_deploy.backends import telemetry
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.models.spec import ModelSpec, TrainingInfo, WeightsInfo, default_operating_points, to_json

if TYPE_CHECKING:
    from faults import ForkServer

    from cellseg_deploy.view.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
THREE = [(20, 20), (60, 22), (100, 70)]
"""Centres of cells, x and y in px."""


# Capabilities 1 and 2 (DAC_OVERRIDE, DAC_READ_SEARCH) leave the bounding set (prctl 24) and so the next program: root
# obeys permissions there.
_GIVE_UP_ROOTS_RIGHTS = (
    "import ctypes, os, sys\n"
    "prctl = ctypes.CDLL(None).prctl\n"
    "if os.geteuid() == 0 and (prctl(24, 1, 0, 0, 0) or prctl(24, 2, 0, 0, 0)): sys.exit(99)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


SLOW = (
    "backends/test_backend_contract.py",
    "backends/test_triton_backend.py",
    "backends/test_triton_servers.py",
    "benchmarks",
    "cells/test_scale.py",
    "cli/test_describe.py",
    "cli/test_evaluate_modes.py",
    "cli/test_infer_again.py",
    "cli/test_infer_edited.py",
    "cli/test_infer_given.py",
    "cli/test_infer_signals.py",
    "cluster",
    "export",
    "images/test_read_labels.py",
    "models/test_shipped_model.py",
    "reliability",
    "run/test_folder_run.py",
    "run/test_going_on.py",
    "serve",
    "slides/test_slide_command.py",
    "test_nothing_leaves.py",
    "train/test_corrected.py",
    "train/test_fine_tuning.py",
    "train/test_train.py",
    "view/test_browser.py",
)
"""Rooms and modules whose tests are ``slow``: scripts/check leaves them out. Each takes ten seconds or more of
CPU time. cli/test_infer.py does too, and stays in: it is the command that people use."""


def pytest_itemcollected(item: pytest.Item) -> None:
    path = item.path.relative_to(ROOT / "tests").as_posix()
    if path.startswith(SLOW):
        item.add_marker(pytest.mark.slow)


def pytest_configure() -> None:
    """Tests send these signals to themselves and to what they start, which inherit it if they are ignored: ``nohup``
    ignores SIGHUP, and a script SIGINT for what it runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Before a test module imports an engine by itself, whose threads would then report from here till the last test.
    telemetry.forbid_openvino_telemetry()
    with suppress(ImportError):
        telemetry.import_onnxruntime()


def run_obeying_permissions(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``cellseg_deploy.cli.COMMAND`` in a process that may do what the permissions allow and no more, root or not."""
    program = f"from cellseg_deploy.cli.{command} import main; main()"
    words = [sys.executable, "-c", _GIVE_UP_ROOTS_RIGHTS, "-c", program, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode == 99:
        pytest.skip("root may write anywhere here, and cannot give that up")
    return done


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the photographs: ``$CELLSEG_DATA``, else ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("CELLSEG_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "bbbc041seg").is_dir():
        pytest.skip(f"no photographs in {folder}; set CELLSEG_DATA to their folder")
    return folder


def make_spec(**changes: Any) -> ModelSpec:
    """ModelSpec of a stub: plain, tiles of 56 px, images at their own scale, cells of 20 px."""
    variant = changes.get("variant", "plain")
    values: dict[str, Any] = {
        "name": "stub",
        "variant": variant,
        "channels": ("foreground", "boundary") if variant == "boundary" else ("foreground",),
        "tile_size": 56,
        "halo": 8,
        "image_scale": 1.0,
        "cell_diameter_px": 20.0,
        "patch_size": 14,
        "encoder": "none",
        "weights": WeightsInfo(origin="made in a test", licence="MIT"),
        "training": TrainingInfo(),
        "operating_points": default_operating_points(variant),
    }
    return ModelSpec(**(values | changes))


class DarknessBackend(Backend):
    """A network of receptive field 1 x 1: a pixel is cell as far as it is darker than middle grey."""

    name = "stub"
    device = "cpu"
    precision = "fp32"

    def __init__(self, spec: ModelSpec | None = None) -> None:
        self.spec = make_spec() if spec is None else spec
        self.batches: list[int] = []
        self.closed = False

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.batches.append(len(tiles_nhwc))
        mean = tiles_nhwc.astype(np.float32).mean(axis=3)
        foreground = 1 / (1 + np.exp((mean - 128) / 8))
        out = np.zeros((len(tiles_nhwc), len(self.spec.channels), *mean.shape[1:]), np.float32)
        out[:, 0] = foreground
        return out

    def _close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def logging_as_in_a_new_process() -> None:
    """What a command set for its process (``cli._common.set_up_logging``), in another test or fixture, is undone."""
    logger = logging.getLogger("cellseg_deploy")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def stub_backend() -> DarknessBackend:
    return DarknessBackend()


def make_onnx(spec: ModelSpec | None = None, *, contrast: float = 8.0, size: int | None = None) -> Any:
    """onnx.ModelProto that computes what ``DarknessBackend`` does, for the tile size and channels of ``spec``."""
    from onnx import TensorProto, helper, numpy_helper

    spec = make_spec() if spec is None else spec
    k, size = len(spec.channels), spec.tile_size if size is None else size
    weight = np.zeros((k, 3, 1, 1), np.float32)
    weight[0] = -1 / (3 * contrast)
    bias = np.full(k, -20, np.float32)
    bias[0] = 128 / contrast
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["as_float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["nchw", "weight", "bias"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
        ],
        "darkness",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", size, size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", k, size, size])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.metadata_props.add(key="cellseg", value=to_json(spec))
    return model


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model file: ``onnx_file()``, ``onnx_file(make_spec(...))`` or ``onnx_file(model=proto)``."""

    def write(spec: ModelSpec | None = None, *, model: Any = None, name: str = "stub.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes((make_onnx(spec) if model is None else model).SerializeToString())
        return path

    return write


def draw_discs(
    hw: tuple[int, int], centres_xy: list[tuple[float, float]], radius: float = 10, background: int = 230
) -> npt.NDArray[np.uint8]:
    """A bright RGB image (h, w, 3) with a dark disc at each centre."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    image = np.full((*hw, 3), background, np.uint8)
    for cx, cy in centres_xy:
        image[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = (120, 40, 90)
    return image


# --- folder runs


@pytest.fixture
def model(onnx_file: Callable[..., Path]) -> Path:
    """The stub network as a model file that ONNX Runtime runs."""
    pytest.importorskip("onnxruntime")
    return onnx_file()


@pytest.fixture
def smears(tmp_path: Path) -> Path:
    """Four images: 3, 3 and 1 cells, and an empty field."""
    folder = tmp_path / "smears"
    (folder / "sub").mkdir(parents=True)
    three = Image.fromarray(draw_discs((100, 130), THREE))
    three.save(folder / "a.png")
    three.save(folder / "a.jpg", quality=95)
    Image.fromarray(draw_discs((30, 40), [(20, 15)])).save(folder / "sub" / "small.tif")
    Image.fromarray(draw_discs((57, 200), [])).save(folder / "empty.png")
    return folder


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Four images with 3, 3, 0 and 1 cells."""
    three = draw_discs((100, 130), THREE)
    fields = [three, three, draw_discs((57, 200), []), draw_discs((30, 40), [(20, 15)])]
    (tmp_path / "four").mkdir()
    for name, image in zip("abcd", fields, strict=True):
        Image.fromarray(image).save(tmp_path / "four" / f"{name}.png")
    return tmp_path / "four"


@pytest.fixture
def folder(four: Path) -> Path:
    """``four`` with a damaged image among them."""
    (four / "bad.png").write_bytes((four / "a.png").read_bytes()[:-30])
    return four


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Threads of a run end with it."""
    from made_jobs import our_threads

    yield
    assert not our_threads()


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is tested elsewhere; here it would be most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


# --- runs that meet faults (tests/helpers/faults.py)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The real command with a stub network, forked for each run."""
    from faults import ForkServer

    with ForkServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images as the module's ``COUNT`` says."""
    from faults import make_images

    return make_images(tmp_path_factory.mktemp("images") / "in", request.module.COUNT)


@pytest.fixture(scope="module")
def whole(server: ForkServer, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert server.run(images, out).code == 0
    return out


# --- what cellseg-view shows (tests/helpers/view_stub.py)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run in ``out``, and its photographs in ``smears``."""
    from view_stub import make_viewed_run

    return make_viewed_run(tmp_path_factory.mktemp("viewed")).parent


@pytest.fixture
def out(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, whose photographs stay where they are."""
    shutil.copytree(finished_run / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def workspace(out: Path) -> Iterator[Workspace]:
    """A viewer of ``out`` with the stub network."""
    from view_stub import StubWorkspace

    from cellseg_deploy.view.source import open_source

    with StubWorkspace(open_source(out)) as opened:
        yield opened


@pytest.fixture
def ids(workspace: Workspace) -> SimpleNamespace:
    """Ids of the images of ``workspace``."""
    by_name = {image.name: key for key, image in workspace.source.images.items()}
    return SimpleNamespace(a=by_name["a.png"], b=by_name["sub/b<i>.png"], bad=by_name["bad.png"])
