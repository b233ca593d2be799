"""Convert a model file to 8-bit integers for OpenVINO, kept only if it finds the cells that the original finds.

NNCF measures the range of every activation on real tiles, moves outliers of the transformer's activations into its
weights (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438) and inserts quantisers. Then F1 against true masks decides: if
it drops too far, NNCF's accuracy control ranks the quantised operations by their cost and returns the worst to
floating point, one after another, until F1 is back within the limit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.openvino import import_openvino
from cellseg_deploy.backends.openvino_ir import IrFacts
from cellseg_deploy.backends.telemetry import forbid_openvino_telemetry
from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.instances import segment
from cellseg_deploy.cells.metrics import ImageScore, pool, score_image
from cellseg_deploy.errors import BackendUnavailableError, NothingToDoError, ParityError, UsageError, plural
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.parity.compare import policy_for
from cellseg_deploy.segmenter import Segmenter, resize
from cellseg_export.forms.openvino import ExportedIr, Origin, check_output, hand_over, open_origin, read_network
from cellseg_export.gate.verify import GateImages, sample_images

_QUANTISABLE = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData")
_RANKING_IMAGES = 2  # each operation is tried on these; the final verdict uses all images
_SECONDS_BETWEEN_STEPS = 20.0
_CHATTY = ("nncf", "torch.utils.cpp_extension")  # NNCF loads PyTorch, which reports that there is no GPU
# Operations allowed between a quantiser and the operation that uses it: they change no values.
_SHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "StridedSlice", "Slice", "VariadicSplit", "Split",
            "Gather", "DepthToSpace", "MaxPool", "Broadcast")  # fmt: skip


@dataclass(frozen=True)
class Int8Options:
    """``n_tiles``: for calibration. ``max_f1_drop``: of F1 at IoU 0.5 against the truth, at each operating point.
    ``back_off``: return operations to floating point if that is exceeded. ``seed``: selects the tiles."""

    n_tiles: int = 128
    max_f1_drop: float = 0.01
    back_off: bool = True
    seed: int = 0


def export_int8(
    source: Path,
    path: Path,
    *,
    options: Int8Options | None = None,
    images: GateImages | None = None,
    calibration: GateImages | None = None,
    tile_batch: int = 8,
    threads: int | None = None,
    on_image: Callable[[str], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> ExportedIr:
    """Write the fp32 model file ``source`` in 8 bits to ``path`` (ending in .xml) and its .bin.

    ``images``: with ground truth, for the gate and for backing off; by default sample smears. ``calibration``: images
    for the ranges of activations, by default the same. ``on_step``: called with a description of each step.

    Raises ``ParityError`` if F1 drops too far in every attempt (the report is kept), ``UsageError`` for a model that is
    not fp32 or images without truth, ``BackendUnavailableError`` without NNCF or OpenVINO, else as ``export_openvino``.
    """
    options = options or Int8Options()
    check_output(path)
    ov, nncf = import_openvino(), _import_nncf()
    policy = replace(policy_for("int8"), max_f1_drop=options.max_f1_drop)
    with open_origin(source, path.parent, threads) as origin:
        if origin.file.precision != "fp32":
            raise UsageError(f"{source}: holds {origin.file.precision} weights; int8 is made from the fp32 model")
        images = images or sample_images(origin.file.spec)
        if images.truth is None:
            raise UsageError("int8 is judged by true cells, and these images come without masks; give --masks")
        given = calibration or images
        on_step(f"calibrating on {plural(options.n_tiles, 'tile')} of {given.source}")
        tiles = calibration_tiles(origin.file.spec, given, options.n_tiles, seed=options.seed)
        note = f"ranges of activations from {plural(len(tiles), 'tile')} of {given.source}"
        if calibration is None:
            note += ", the images it is judged by"
        model = quantise(nncf, read_network(ov, origin.file), tiles)
        facts = _facts(origin, ov, nncf)

        def hand(network: Any, made: IrFacts) -> ExportedIr:
            return hand_over(
                ov, network, made, origin, path,
                images=images, policy=policy, notes=(note,), tile_batch=tile_batch, threads=threads, on_image=on_image,
            )  # fmt: skip

        try:
            return hand(model, facts)
        except ParityError as error:
            if not options.back_off:
                raise
            on_step(f"{str(error).splitlines()[0]}; putting operations back into floating point")
        everything = quantised_operations(model)
        del model
        model = quantise_within(
            nncf,
            read_network(ov, origin.file),
            tiles,
            origin,
            images,
            options,
            tile_batch=tile_batch,
            on_step=on_step,
        )
        floating = tuple(sorted(everything - quantised_operations(model)))
        on_step(f"{len(floating)} of {len(everything)} operations stay in floating point: {', '.join(floating)}")
        return hand(model, _facts(origin, ov, nncf, floating))


def calibration_tiles(spec: ModelSpec, images: GateImages, n: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """At most ``n`` tiles (m, H, W, 3) of ``images``, cut as the runtime cuts them, the same number from each image.

    Raises ``NothingToDoError`` without an image.
    """
    by_image = []
    for _, image_hwc in images.load():
        scaled = resize(image_hwc, spec.image_scale)
        plan = tiling.plan((scaled.shape[0], scaled.shape[1]), spec.tile_size, spec.halo)
        by_image.append(tiling.cut(tiling.pad(scaled, plan), plan, 0, len(plan)))
    if not by_image:
        raise NothingToDoError(f"no image to calibrate with ({images.source})")
    rng = np.random.default_rng(seed)
    share = math.ceil(n / len(by_image))
    chosen = [tiles[np.sort(rng.permutation(len(tiles))[:share])] for tiles in by_image]
    return np.concatenate(chosen)[:n]


def quantise(nncf: Any, model: Any, tiles_nhwc: npt.NDArray[np.uint8]) -> Any:
    """``model`` (openvino.Model, changed) with all operations quantised that NNCF supports in a transformer."""
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset([tile[None] for tile in tiles_nhwc]),
            subset_size=len(tiles_nhwc),
            model_type=nncf.ModelType.TRANSFORMER,  # switches SmoothQuant on, and keeps softmax and norms as they are
        )


def quantise_within(
    nncf: Any,
    model: Any,
    tiles_nhwc: npt.NDArray[np.uint8],
    origin: Origin,
    images: GateImages,
    options: Int8Options,
    *,
    tile_batch: int = 8,
    on_step: Callable[[str], None] = lambda _: None,
) -> Any:
    """As ``quantise``, with as many operations left in floating point as F1 needs, worst first.

    The figure that NNCF tracks is 1 - the largest drop of F1 at any operating point. It ranks operations on the images
    that lost most, and reports progress to ``on_step``: each operation is tried, which takes minutes.
    """
    items = list(_with_truth(images))
    before: dict[str, dict[str, ImageScore]] = {task: {} for task in origin.file.spec.operating_points}
    for name, image_hwc, true in items:
        for task, score in _scores(origin.reference, image_hwc, true, tile_batch).items():
            before[task][name] = score

    started = told = time.monotonic()
    tried = 0

    def validate(compiled: Any, chosen: Iterable[Any]) -> tuple[float, list[float]]:
        nonlocal told, tried
        tried += 1
        if time.monotonic() - told > _SECONDS_BETWEEN_STEPS:
            told = time.monotonic()
            on_step(f"backing off: {tried} choices of operations tried in {told - started:.0f} s")
        backend = CompiledBackend(compiled, origin.file.spec)
        after: dict[str, dict[str, ImageScore]] = {task: {} for task in before}
        for name, image_hwc, true in chosen:
            for task, score in _scores(backend, image_hwc, true, tile_batch).items():
                after[task][name] = score
        names = list(next(iter(after.values())))
        by_image = [1 - max(before[t][n].f1_at(0.5) - after[t][n].f1_at(0.5) for t in before) for n in names]
        drops = [pool([before[t][n] for n in names])["f1"] - pool(list(after[t].values()))["f1"] for t in before]
        return 1 - max(drops), by_image

    with _quiet():
        return nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset([tile[None] for tile in tiles_nhwc]),
            nncf.Dataset(items),
            validate,
            max_drop=options.max_f1_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(tiles_nhwc),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=_RANKING_IMAGES
            ),
        )


def quantised_operations(model: Any) -> set[str]:
    """Names of the operations of ``model`` (openvino.Model) whose inputs come through a quantiser."""
    return {
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in _QUANTISABLE and _is_quantised(op.input_value(0).get_node())
    }


class CompiledBackend(Backend):
    """A network already compiled by OpenVINO, with a free batch size."""

    name, device, precision = "openvino", "cpu", "int8"

    def __init__(self, compiled: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self._compiled = compiled

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.array(self._compiled([tiles_nhwc])[0], np.float32)


def _scores(backend: Backend, image_hwc: Any, true: Any, tile_batch: int) -> dict[str, ImageScore]:
    """Score of one image against its truth, for each operating point."""
    spec = backend.spec
    probabilities = Segmenter(backend, batch_size=tile_batch).probabilities(image_hwc)
    return {
        task: score_image(
            true,
            segment(
                probabilities,
                spec.channels,
                params,
                cell_diameter_px=spec.cell_diameter_px,
                out_hw=(image_hwc.shape[0], image_hwc.shape[1]),
            ),
        )  # as the gate scores against the truth
        for task, params in spec.operating_points.items()
    }


def _with_truth(images: GateImages) -> Iterator[tuple[str, Any, Any]]:
    assert images.truth is not None  # checked by export_int8
    for name, image_hwc in images.load():
        yield name, image_hwc, images.truth(name)


def _is_quantised(node: Any) -> bool:
    for _ in range(32):  # no chain of shape operations is that long
        if node.get_type_name() == "FakeQuantize":
            return True
        if node.get_type_name() not in _SHAPING:
            return False
        node = node.input_value(0).get_node()
    return False


def _facts(origin: Origin, ov: Any, nncf: Any, floating: tuple[str, ...] = ()) -> IrFacts:
    return IrFacts(
        model_identity=origin.file.identity,
        onnx_sha256=origin.file.file_sha256,
        precision="int8",
        weights="int8",
        floating=floating,
        made_with={"openvino": str(ov.__version__), "nncf": str(nncf.__version__)},
    )


def _import_nncf() -> Any:
    # NNCF reports its use, unless it runs in continuous integration or the package for it is not installed.
    os.environ.setdefault("NNCF_CI", "1")
    forbid_openvino_telemetry()
    try:
        import nncf
    except ImportError as error:
        raise BackendUnavailableError(
            f"NNCF is not installed or broken ({error}); run: pip install 'cellseg-deploy[int8]'"
        ) from error
    return nncf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence NNCF's logs and progress bars on stdout and stderr, which are for results, unless ``-v`` is set."""
    import io

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    if logging.getLogger("cellseg_deploy").isEnabledFor(logging.INFO):
        yield
        return
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
