"""The model without a non-commercial clause: its file is the one that its card describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cellseg_deploy.models
from cellseg_deploy import Segmenter
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.samples import SmearParams, make_smear

OPEN = Path(cellseg_deploy.models.__file__).with_name("smear-open.onnx")


def test_the_card_names_the_file() -> None:
    (digest,) = re.findall(r"SHA-256 `(\w{64})`", OPEN.with_suffix(".md").read_text(encoding="utf-8"))
    assert sha256_of(OPEN) == digest


def test_it_counts_sample_smears() -> None:
    pytest.importorskip("onnxruntime")
    smear = make_smear(SmearParams(size_hw=(600, 800), n_cells=45, cell_diameter_px=90), 0)
    with Segmenter.load(OPEN) as segmenter:
        result = segmenter(smear.image_hwc)
        assert segmenter.backend.spec.name == "smear-open"
        assert segmenter.backend.spec.classes == ("white", "red", "platelet")
    assert result.count == pytest.approx(smear.n_cells, rel=0.05)
