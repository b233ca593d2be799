"""Engines that report their use, imported with that switched off: nothing leaves the machine.

ONNX Runtime 1.32 looks up its maker's host, keeps an identifier of the device and a database of events in the user's
cache. OpenVINO looks up a host when it is imported and writes an identifier into the home. Both are switched off before
the import: afterwards it would be too late for the look-up.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``, silent. Raises ``ImportError``."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    if hasattr(onnxruntime, "disable_telemetry_events"):  # for a process that had imported it before
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def import_openvino() -> Any:
    """The module ``openvino``, silent. Raises ``ImportError``."""
    forbid_openvino_telemetry()
    import openvino

    return openvino


def forbid_openvino_telemetry() -> None:
    """Have OpenVINO and NNCF take their own stand-in for the package that reports: as if it were not installed."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # how Python marks a module that cannot be imported
