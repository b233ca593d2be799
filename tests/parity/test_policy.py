"""Policies of the forms, judgement by true labels, and the picture of the worst image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from conftest import draw_discs
from test_parity import POLICY, Changed, InkBackend, eroded, faint_first_cell, images

from cellseg_deploy.cells.metrics import pool, score_image
from cellseg_deploy.errors import DataError, ParityError, UsageError
from cellseg_deploy.parity import picture as parity_picture
from cellseg_deploy.parity.compare import ParityReport, compare, differing_mask, differing_pixels, policy_for
from cellseg_deploy.segmenter import Segmenter
from cellseg_export.gate.gate_result import judge
from cellseg_export.gate.verify import folder_images, sample_images

INT8 = replace(policy_for("int8"), min_cells=30)
HALF = replace(policy_for("fp16"), min_cells=30)


def truth(name: str) -> npt.NDArray[np.int32]:
    """What the undisturbed network finds, which so has F1 1; cells are larger than a speck."""
    return Segmenter(InkBackend())(dict(images())[name]).labels


def judged(candidate: Any, policy: Any = INT8) -> ParityReport:
    return compare(InkBackend(), candidate, images(), policy, truth=truth)


# --- policies


def test_each_form_has_its_policy() -> None:
    assert policy_for("fp32").name == "fp32"
    assert policy_for("mixed") == policy_for("fp16")
    half = policy_for("fp16")
    assert (half.min_f1, half.f1_iou, half.max_total_difference) == (0.99, 0.9, 0.005)
    assert (half.max_count_difference, half.max_differing_share) == (None, None)
    assert policy_for("int8").max_f1_drop == 0.01
    assert policy_for("int8").needs_truth
    assert not half.needs_truth
    with pytest.raises(UsageError, match="no parity policy for precision 'fp8'"):
        policy_for("fp8")


def test_a_policy_prints_what_it_demands_and_no_more() -> None:
    assert str(policy_for("bf16")) == "bf16: total count within 0.50%, F1 at IoU 0.9 >= 0.99, at least 200 cells"
    assert str(policy_for("int8")) == "int8: F1 against truth falls by at most 0.01, at least 200 cells"


def test_the_candidates_precision_chooses_the_policy() -> None:
    candidate = InkBackend()
    candidate.precision = "bf16"
    assert compare(InkBackend(), candidate, images()).policy == policy_for("bf16")


def test_the_total_count_decides_for_half() -> None:
    lenient = replace(HALF, min_f1=None)
    report = compare(InkBackend(), Changed(faint_first_cell), images(), lenient)  # a cell less in each of two images
    assert report.verdict == "failed"
    assert report.reasons[0].startswith("counting: 38 cells in all, 40 in the reference: 5.00% apart, allowed 0.50%")
    wide = replace(lenient, max_total_difference=0.05)  # exactly at the limit
    assert compare(InkBackend(), Changed(faint_first_cell), images(), wide).verdict == "passed"


def test_cells_of_another_form_are_refused_for_half_though_counts_agree() -> None:
    report = compare(InkBackend(), Changed(eroded), images(), HALF)
    assert report.verdict == "failed"
    assert report.summary("counting")["candidate_cells"] == 40
    assert "matched F1 at IoU 0.9" in report.reasons[0]


# --- truth


def test_both_metric_rows_stand_side_by_side() -> None:
    report = judged(Changed(faint_first_cell))
    expected, got = report.truth("counting")
    candidate = Segmenter(Changed(faint_first_cell))
    by_hand = pool([score_image(truth(name), candidate(image).labels) for name, image in images()])
    assert expected["f1"] == 1.0
    assert got == by_hand
    assert 0.8 < got["f1"] < 0.9
    content = json.loads(report.to_json())["truth"]["counting"]
    assert (content["reference"]["f1"], content["candidate"]["f1"]) == (1.0, got["f1"])
    lines = report.to_text().splitlines()
    assert any(line.startswith("counting, reference") and "1.0000" in line for line in lines)
    assert any(line.startswith("counting, candidate") and f"{got['f1']:.4f}" in line for line in lines)


def test_int8_may_lose_a_hundredth_of_f1_and_no_more() -> None:
    refused = judged(Changed(faint_first_cell))
    assert refused.verdict == "failed"
    drop = 1 - refused.truth("counting")[1]["f1"]
    wanted = f"F1 against the truth falls from 1.0000 to {1 - drop:.4f}, by {drop:.4f}; allowed 0.01"
    assert wanted in refused.reasons[0]
    assert judged(Changed(faint_first_cell), replace(INT8, max_f1_drop=drop - 1e-3)).verdict == "failed"
    assert judged(Changed(faint_first_cell), replace(INT8, max_f1_drop=drop)).verdict == "passed"
    assert judged(InkBackend()).verdict == "passed"


def test_int8_may_gain() -> None:
    """The reference loses cells, the candidate has them: other counts, better F1."""
    report = compare(Changed(faint_first_cell), InkBackend(), images(), INT8, truth=truth)
    assert report.verdict == "passed"
    assert compare(Changed(faint_first_cell), InkBackend(), images(), POLICY, truth=truth).verdict == "failed"


def test_int8_needs_true_labels_and_enough_of_them() -> None:
    with pytest.raises(UsageError, match="no true labels; give the masks"):
        compare(InkBackend(), InkBackend(), images(), INT8)
    empty = compare(InkBackend(), InkBackend(), images(), INT8, truth=lambda name: truth(name) * 0)
    assert empty.verdict == "inconclusive"
    assert "the true labels hold 0 cells in 2 images, at least 30" in empty.reasons[0]


def test_a_fault_refuses_whatever_the_counts_say() -> None:
    report = replace(judged(InkBackend()), faults=("overflow in x",), notes=("kept: y",))
    assert report.verdict == "failed"
    assert report.reasons == ("overflow in x",)
    assert json.loads(report.to_json())["faults"] == ["overflow in x"]
    assert "note       kept: y" in report.to_text()


def test_the_samples_bring_their_truth() -> None:
    found = sample_images(InkBackend().spec, 1)
    (name, image) = next(iter(found.load()))
    assert found.truth is not None
    labels = found.truth(name)
    assert labels.shape == image.shape[:2]
    assert 60 <= labels.max() <= 90


def test_masks_pair_with_images(tmp_path: Path) -> None:
    photographs, masks = tmp_path / "images", tmp_path / "masks"
    photographs.mkdir()
    masks.mkdir()
    for name, image in images():
        assert cv2.imwrite(str(photographs / f"{name}.png"), image[..., ::-1])
        assert cv2.imwrite(str(masks / f"{name}.png"), truth(name).astype(np.uint8))
    found = folder_images(photographs, masks)
    assert found.source == "folder images, truth in masks"
    report = compare(InkBackend(), InkBackend(), found.load(), INT8, truth=found.truth)
    assert report.n_true_cells == 40
    assert report.truth("counting")[0]["f1"] == 1.0
    for name, _ in images():
        assert cv2.imwrite(str(masks / f"{name}.png"), np.where(truth(name) > 0, 0, 255).astype(np.uint8))
    dark = folder_images(photographs, masks, "dark")
    assert dark.truth is not None
    assert all(np.array_equal(dark.truth(name) > 0, truth(name) > 0) for name, _ in dark.load())
    with pytest.raises(DataError, match="mask_foreground='dark'"):
        list(folder_images(photographs, masks).load())
    assert cv2.imwrite(str(masks / "image-1.png"), np.zeros((5, 5), np.uint8))
    with pytest.raises(DataError, match="must be of one size"):
        list(folder_images(photographs, masks, "dark").load())
    (masks / "image-1.png").unlink()
    with pytest.raises(DataError, match="no mask of the same name"):
        folder_images(photographs, masks)


# --- picture


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (["1102", "1102"], ["2201", "2201"]),
        (["1122", "1122"], ["1111", "1111"]),
        (["111222", "111222"], ["112222", "111222"]),
        (["1100", "1100"], ["0000", "0000"]),
    ],
)
def test_the_marked_pixels_are_the_counted_ones(reference: list[str], candidate: list[str]) -> None:
    a, b = (np.array([[int(s) for s in row] for row in rows], np.int32) for rows in (reference, candidate))
    assert int(differing_mask(a, b).sum()) == differing_pixels(a, b)


def test_the_worst_image_is_drawn() -> None:
    report = compare(InkBackend(), Changed(faint_first_cell), images(), POLICY)
    worst = report.worst
    assert worst is not None
    assert worst.name == report.summary("counting")["worst_image"]
    assert (worst.reference.max(), worst.candidate.max()) == (20, 19)
    picture = parity_picture.draw(worst)
    factor = 3  # enlarged, so that an outline can be seen; the caption lies above and needs more room than there is
    picture = picture[-120 * factor :, : 140 * factor]

    def at(y: int, x: int) -> tuple[int, ...]:
        return tuple(int(v) for v in picture[y * factor + factor // 2, x * factor + factor // 2])

    places = np.argwhere(worst.differing)
    y, x = (int(v) for v in places[len(places) // 2])  # inside the lost cell
    assert at(y, x) not in ((120, 40, 90), parity_picture.BOTH_RGB)  # orange over the cell's own colour
    colours = {tuple(int(v) for v in pixel) for pixel in np.unique(picture.reshape(-1, 3), axis=0)}
    assert {parity_picture.REFERENCE_RGB, parity_picture.BOTH_RGB, parity_picture.DIFFERENCE_RGB} <= colours
    assert parity_picture.CANDIDATE_RGB in colours  # other cells were cut


def test_a_refusal_leaves_the_older_report_alone_and_is_cleared_by_a_success(tmp_path: Path) -> None:
    model, report = tmp_path / "model.onnx", tmp_path / "model.parity.json"
    good = compare(InkBackend(), InkBackend(), images(), POLICY)
    bad = compare(InkBackend(), Changed(faint_first_cell), images(), POLICY)
    assert judge(good, model, report, unverified=False).startswith("verified: counts as stub does")
    model.touch()
    kept = report.read_bytes()
    assert json.loads(kept)["verdict"] == "passed"
    refused = tmp_path / "model.refused.json"
    with pytest.raises(ParityError, match="the older file of that name and its report were left as") as caught:
        judge(bad, model, report, unverified=True)
    assert f"see {refused}\n  - counting: counts differ" in str(caught.value)
    assert report.read_bytes() == kept
    assert json.loads(refused.read_bytes())["verdict"] == "failed"
    assert cv2.imread(str(tmp_path / "model.refused.jpg")) is not None
    judge(good, model, report, unverified=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.parity.json"]


def test_unverified_is_for_too_few_cells_whose_tensors_agree(tmp_path: Path) -> None:
    few = compare(InkBackend(), InkBackend(), images(), replace(POLICY, min_cells=200))
    model, report = tmp_path / "model.xml", tmp_path / "model.xml.parity.json"
    with pytest.raises(ParityError, match="--unverified writes it anyway"):
        judge(few, model, report, unverified=False)
    assert json.loads((tmp_path / "model.xml.refused.json").read_bytes())["verdict"] == "inconclusive"
    for unlike in (replace(few, parts_at="the two diverge at x"), replace(few, faults=("overflow in x",))):
        with pytest.raises(ParityError):
            judge(unlike, model, report, unverified=True)
    apart = compare(InkBackend(), Changed(faint_first_cell), images(), replace(POLICY, min_cells=200))
    with pytest.raises(ParityError, match=r"needs probabilities that agree to 0\.001 \(they differ by 9\.9e-01\)"):
        judge(apart, model, report, unverified=True)
    assert not report.exists()
    assert judge(few, model, report, unverified=True).startswith("unverified: too few cells to judge by")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.xml.parity.json"]


def test_pictures_have_two_formats() -> None:
    worst = compare(InkBackend(), Changed(faint_first_cell), images(), POLICY).worst
    assert worst is not None
    assert parity_picture.encode(worst, ".PNG").startswith(b"\x89PNG")
    assert parity_picture.encode(worst, ".jpeg").startswith(b"\xff\xd8")
    parity_picture.check_suffix(Path("a.JPG"))
    with pytest.raises(UsageError, match=r"must end in one of \.png"):
        parity_picture.check_suffix(Path("a.tif"))


def test_a_name_that_cannot_be_drawn_does_not_stop_the_picture() -> None:
    image = draw_discs((120, 140), [(30.0, 30.0)])
    report = compare(InkBackend(), InkBackend(), [("bild-ä-\udcff", image)], POLICY)
    assert report.worst is not None
    assert parity_picture.encode(report.worst, ".png")
