"""Signals where OpenVINO has been: its CPU plugin changes the stack that handlers of signals run on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'cellseg-deploy[openvino]'")

OnnxFile = Callable[..., Path]


def test_ctrl_c_is_an_interrupt_after_engines_were_closed(onnx_file: OnnxFile) -> None:
    """Two that overlap, as in a comparison: the later one is closed last."""
    program = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from cellseg_deploy.backends.openvino import OpenVinoBackend\n"
        "first, second = (OpenVinoBackend(Path(sys.argv[1]), use_cache=False) for _ in range(2))\n"
        "first.close()\n"
        "second.close()\n"
        "del first, second\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(onnx_file())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
