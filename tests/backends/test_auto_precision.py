"""Which arithmetic ``--backend auto`` takes where nobody asked for one, and names of arithmetic that nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellseg_deploy.backends import EngineOptions, open_backend, selection
from cellseg_deploy.errors import UsageError


@pytest.mark.parametrize("model", ["fp32", "mixed", "fp16", "bf16", "int8"])
def test_only_the_models_own_precision_or_fp32_is_taken_unasked(model: str) -> None:
    """As many bits are not the same arithmetic: bf16 has a tenth of fp16's digits."""
    known = ("fp32", "mixed", "fp16", "bf16", "int8", "fp8")
    forms = [selection.Form(Path(f"m.{name}.xml"), "openvino", name) for name in known]
    found = selection.as_precise_as(model, [selection.Candidate(form, True, "passed") for form in forms])
    assert {c.form.precision for c in found if c.eligible} == {"fp32", model}
    reasons = {c.form.precision: c.reason for c in found if not c.eligible}
    assert reasons.pop("fp8") == "unknown precision 'fp8': never used"
    assert reasons == {name: f"{name}, the model is {model}: used only with `precision={name!r}`" for name in reasons}
    assert not any(c.eligible for c in selection.as_precise_as("fp8", [found[-1]]))


def test_a_form_that_is_not_eligible_keeps_its_reason() -> None:
    form = selection.Form(Path("m.xml"), "openvino", "fp8")
    refused = selection.Candidate(form, False, "not installed")
    assert selection.as_precise_as("fp32", [refused]) == (refused,)


def test_an_unknown_precision_is_refused(onnx_file: Callable[..., Path]) -> None:
    path = onnx_file()
    words = "unknown precision 'fp8'; expected one of fp32, mixed, fp16, bf16, int8"
    with pytest.raises(UsageError, match=words):
        selection.select(path, precision="fp8")
    for backend in ("auto", "openvino", "onnxruntime"):
        with pytest.raises(UsageError, match=words):
            open_backend(path, EngineOptions(backend=backend, precision="fp8"))
