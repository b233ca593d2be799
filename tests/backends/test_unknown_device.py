"""A GPU that cannot be queried: two of them need not be of one kind, so no record is kept of one, and none applies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_auto_backend import HERE, ORT, chosen, reason, record, timed

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.selection import Here
from cellseg_deploy.errors import BackendUnavailableError

OnnxFile = Callable[..., Path]


def test_an_unknown_device_is_like_no_other() -> None:
    here = Here("cuda", "cuda-unknown", HERE.versions)
    elsewhere = record(**ORT, device_class="cuda-unknown", timing=timed(1), reference_timing=timed(2))
    result = chosen(elsewhere, here=here)
    assert (result.form.backend, result.verified) == ("onnxruntime", False)
    assert "pip install cuda-bindings" in reason(result, "onnxruntime")
    assert result.candidates[0].ms_per_tile is None
    known = Here("cuda", "cuda-9.0", HERE.versions)
    assert chosen(record(**ORT, device_class="cuda-9.0"), here=known).verified


def test_no_record_is_kept_of_an_unknown_device(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    from cellseg_deploy.parity.policy import policy_for
    from cellseg_export.gate import parity_record

    monkeypatch.setattr(parity_record, "device_class", lambda device: "cuda-unknown")
    with (
        open_backend(onnx_file(), EngineOptions(backend="onnxruntime")) as one,
        pytest.raises(BackendUnavailableError, match="no record can be kept of cuda-unknown"),
    ):
        parity_record.check_recordable(one, one, onnx_file(), policy_for("fp32"))
