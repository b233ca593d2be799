"""Import engines with telemetry switched off: nothing leaves the machine.

ONNX Runtime 1.32 looks up its vendor's host, and keeps a device identifier and an event database in the user's cache.
OpenVINO looks up a host when it is imported and writes an identifier into the home folder. Both are switched off before
the import: afterwards it would be too late for the look-up.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def import_onnxruntime() -> Any:
    """Import ``onnxruntime``, with telemetry off. Raises ``ImportError``."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    if hasattr(onnxruntime, "disable_telemetry_events"):  # for a process that imported it earlier
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def import_openvino() -> Any:
    """Import ``openvino``, with telemetry off. Raises ``ImportError``."""
    forbid_openvino_telemetry()
    import openvino

    return openvino


def forbid_openvino_telemetry() -> None:
    """Make OpenVINO and NNCF use their own stub for the telemetry package, as if that package were not installed."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # how Python marks a module that cannot be imported
