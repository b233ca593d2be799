"""Parts of ``gpu-check`` about the machine: what it is, what it does at most, TensorRT-RTX on its card."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import msgspec

from cellseg_benchmarks.gpu.bench import EXPORT, MEASURE, Bench
from cellseg_benchmarks.gpu.findings import Findings, one_line
from cellseg_benchmarks.gpu.plan import PEAKS, RTX_BUILDS, RTX_OPENS, TORCH_RUNS
from cellseg_benchmarks.harness import machine
from cellseg_deploy.errors import CellsegError

_ROOT = Path(__file__).resolve().parent.parent.parent
_ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,mig.mode.current"


def facts(at: Bench, found: Findings) -> None:
    """Card, driver, versions, and whether PyTorch can use the device."""
    found.fact("commit", _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty") or "unknown")
    found.fact("python", platform.python_version())
    found.fact("nvidia-smi", _said("nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader") or "none")
    found.fact("compiler", (_said("cc", "--version") or "none").partition("\n")[0])
    found.fact("machine", msgspec.to_builtins(machine.look()))
    found.fact("missing", {name: text for name in ("onnxruntime", "tensorrt") if (text := at.missing(name))})
    try:
        found.claim(TORCH_RUNS, "shown", _torch_product(at, found))
    except ImportError as error:
        found.claim(TORCH_RUNS, "open", str(error))
    except Exception as error:  # PyTorch is there: it must run
        found.claim(TORCH_RUNS, "refuted", f"{type(error).__name__}: {error}")


def _torch_product(at: Bench, found: Findings) -> str:
    import torch

    from cellseg_train.fp32 import full_fp32, uses_tf32

    by_default = uses_tf32()
    full_fp32()
    about = {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    found.fact("torch", about | {"tf32 by default": by_default, "tf32 here": uses_tf32()})
    if not at.dry:
        card = torch.cuda.get_device_properties(0)
        found.fact("multiprocessors", card.multi_processor_count)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=generator)
    apart = float(((a.to(at.device) @ a.to(at.device)).cpu().double() - a.double() @ a.double()).abs().max())
    if apart > 1e-3:  # of sums of 256 products of about 1: fp32 leaves 1e-5, TF32 1e-2
        raise ArithmeticError(f"an fp32 product is off by {apart:.1e}")
    return f"a product of fp32 matrices is off by {apart:.1e}"


def limits(at: Bench, found: Findings) -> None:
    """Products of matrices in each precision, bandwidth of memory, from ``cellseg_benchmarks limits``."""
    if not at.dry:
        at.require("torch")  # the only library here that multiplies matrices on a GPU
    size = ("--matrix-size", 256, "--rounds", 1, "--min-seconds", 0, "--settle", 0) if at.dry else ("--budget", 60)
    done = at.python(*MEASURE, "limits", "--device", at.device, *size, "-q", "-o", at.work / "limits")
    found.claim(PEAKS, "shown" if done.code == 0 else "open" if done.cut_off else "refuted", done.words)
    report = at.work / "limits" / "limits.md"
    if report.is_file():
        found.table("what the card does at most", report.read_text(encoding="utf-8"))


def rtx(at: Bench, found: Findings) -> None:
    """TensorRT-RTX, which needs no TensorRT: does it parse and build the graph, and does this card open the engine?"""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        for sentence in (RTX_BUILDS, RTX_OPENS):
            found.claim(sentence, "open", "not installed: pip install 'cellseg-deploy[trt-check]'")
        return
    one = ("--compute-capability", "86") if at.dry else ()
    done = at.python(*EXPORT, "tensorrt", at.model, "--check-only", *one)
    found.claim(RTX_BUILDS, "shown" if done.code == 0 else "open" if done.cut_off else "refuted", done.words)
    if at.dry:
        found.claim(RTX_OPENS, "open", "needs a GPU")
        return
    try:
        found.claim(RTX_OPENS, "shown", _open_rtx(at))
    except CellsegError as error:
        found.claim(RTX_OPENS, "refuted", str(error))


def _open_rtx(at: Bench) -> str:
    """Build the fp16 graph for the card at hand, and open the engine; raises ``CellsegError``."""
    from cellseg_deploy.backends.tensorrt import import_tensorrt_rtx
    from cellseg_deploy.backends.tensorrt_build import BuildOptions, build_engine, make_logger, why
    from cellseg_deploy.errors import ModelError
    from cellseg_deploy.models.onnx_file import read_model_file

    trt = import_tensorrt_rtx()
    data = build_engine(trt, read_model_file(at.shipped / "fp16.onnx"), BuildOptions())
    logger = make_logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is None or engine.create_execution_context() is None:
        raise ModelError(f"an engine of {len(data)} bytes was built but not opened: {why(logger)}")
    return f"TensorRT-RTX {trt.__version__}: engine of {len(data) / 1e6:.1f} MB"


def _said(*command: str) -> str:
    """Output of ``command``, "" if it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ""
    return one_line(done.stdout) if done.returncode == 0 else ""
