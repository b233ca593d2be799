"""The parity gate on made-up networks: what it measures by hand, and that it refuses what it must, saying why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from conftest import draw_discs, make_spec

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import DataError, NothingToDoError, ParityError, UsageError
from cellseg_deploy.parity.compare import ParityPolicy, ParityReport, compare, compare_tensors, differing_pixels
from cellseg_deploy.parity.tensors import pool_differences

POLICY = ParityPolicy(min_cells=30)
SPEC = make_spec(variant="boundary")


class InkBackend(Backend):
    """A network of small receptive field: foreground where red is dark, boundary where foreground changes."""

    name = "stub"
    device = "cpu"
    precision = "fp32"

    def __init__(self) -> None:
        self.spec = SPEC

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        red = tiles_nhwc[..., 0].astype(np.float32)
        foreground = 1 / (1 + np.exp((red - 160) / 8))
        kernel = np.ones((3, 3), np.uint8)
        boundary = np.stack([cv2.dilate(f, kernel) - cv2.erode(f, kernel) for f in foreground])
        return np.stack([foreground, boundary], axis=1).astype(np.float32)


class Changed(InkBackend):
    """``InkBackend`` whose answer goes through ``change(probabilities_nkhw)``."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self._change = change

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(self._change(super()._predict(tiles_nhwc)), np.float32)


def images() -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Two images of 20 discs, 24 px apart and 20 px wide; in the second, half of them touch their neighbour."""
    apart = [(24.0 * i + 20, 24.0 * j + 20) for i in range(5) for j in range(4)]
    close = [(x - (4.0 if k // 4 % 2 else 0.0), y) for k, (x, y) in enumerate(apart)]
    return [(f"image-{i}", draw_discs((120, 140), centres)) for i, centres in enumerate((apart, close))]


def gate(candidate: Backend, policy: ParityPolicy = POLICY) -> ParityReport:
    return compare(InkBackend(), candidate, images(), policy, images_from="discs")


# --- tensors


def test_tensor_difference_by_hand() -> None:
    reference = np.array([[0.0, 0.5], [1.0, 0.0]], np.float32)
    candidate = np.array([[0.0, 0.25], [1.0, 0.5]], np.float32)
    got = compare_tensors(reference, candidate, tolerance=0.25)
    assert (got.n, got.max, got.mean) == (4, 0.5, 0.1875)
    assert got.quantiles[0] == 0.25  # of 0, 0, 0.25, 0.5
    assert got.share_over == 0.25  # 0.25 is not over 0.25
    assert (got.worst_at, got.worst_reference, got.worst_candidate) == ((1, 1), 0.0, 0.5)
    assert got.cosine == pytest.approx(1.125 / np.sqrt(1.25 * 1.3125))
    assert got.candidate_range == (0.0, 1.0)
    assert not got.candidate_is_constant


def test_pooled_tensors_equal_the_whole() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 7, 30))
    whole = compare_tensors(a, b, tolerance=0.3)
    pooled, worst = pool_differences([compare_tensors(a[i], b[i], tolerance=0.3) for i in range(7)])
    assert worst == whole.worst_at[0]
    for name in ("n", "max", "mean", "share_over", "cosine", "worst_reference", "reference_range", "candidate_range"):
        assert getattr(pooled, name) == pytest.approx(getattr(whole, name)), name
    assert all(p >= w for p, w in zip(pooled.quantiles, whole.quantiles, strict=True))


def test_cosine_of_nothing() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert compare_tensors(zero, zero, tolerance=0.1).cosine == 1.0
    assert compare_tensors(zero, one, tolerance=0.1).cosine == 0.0


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (3, 2)), ((0,), (0,))])
def test_tensors_that_cannot_be_compared(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="one shape"):
        compare_tensors(np.zeros(shapes[0]), np.zeros(shapes[1]), tolerance=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_comparison_with_a_value_that_is_none(value: float) -> None:
    broken = np.array([0.0, value, 1.0])
    with pytest.raises(DataError, match="NaN"):
        compare_tensors(np.zeros(3), broken, tolerance=0.1)


# --- pixels


def labels(*rows: str) -> npt.NDArray[np.int32]:
    return np.array([[int(sign) for sign in row] for row in rows], np.int32)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        (("1102", "1102"), ("2201", "2201"), 0),  # numbers do not matter
        (("1100", "1100"), ("0000", "0000"), 4),  # a lost cell
        (("0000", "0000"), ("0000", "0003"), 1),  # a found one
        (("1110", "1110"), ("1100", "1110"), 1),  # a rim pixel
        (("111222", "111222"), ("112222", "111222"), 1),  # the line between two cells
        (("1122", "1122"), ("1111", "1111"), 8),  # merged: at IoU 0.5 neither is a match
        (("111112", "111112"), ("111111", "111111"), 2),  # a small one swallowed
        (("0000",), ("0000",), 0),
    ],
)
def test_differing_pixels_by_hand(reference: Any, candidate: Any, expected: int) -> None:
    assert differing_pixels(labels(*reference), labels(*candidate)) == expected


# --- gate


def test_a_network_passes_against_itself() -> None:
    report = gate(InkBackend())
    assert report.verdict == "passed"
    assert report.reasons == ()
    assert report.n_cells == 40
    assert report.tasks == ("counting", "confluence")
    summary = report.summary("counting")
    assert (summary["reference_cells"], summary["candidate_cells"], summary["differing_px"]) == (40, 40, 0)
    assert summary["f1_at_0.5"] == summary["f1_at_0.9"] == summary["dice"] == 1.0
    assert report.max_difference == 0


def test_differences_that_change_no_cell_pass() -> None:
    report = gate(Changed(lambda p: np.clip(p + 1e-4, 0, 1)))
    assert report.verdict == "passed"
    assert 0.9e-4 < report.max_difference < 1.1e-4


def test_the_report_survives_json_and_shows_its_policy() -> None:
    report = gate(Changed(lambda p: p * 0.9))
    content = json.loads(report.to_json())
    assert content["verdict"] == report.verdict
    assert content["policy"]["min_cells"] == 30
    assert content["images_from"] == "discs"
    assert [row["image"] for row in content["images"]] == ["image-0", "image-1"]
    assert content["tensors"]["foreground"]["max"] == pytest.approx(0.1, abs=2e-3)
    assert content["tasks"]["counting"]["reference_cells"] == 40
    text = report.to_text()
    for words in ("discs", "policy     fp32", "counting", "foreground", f"verdict    {report.verdict}"):
        assert words in text


def faint_first_cell(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Nothing left in the upper left of a tile: cells of image-0 and image-1 vanish there."""
    p = p.copy()
    p[:, :, :28, :28] = 0
    return p


def no_boundary(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    p = p.copy()
    p[:, 1] = 0.5
    return p


def eroded(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.stack([np.stack([cv2.erode(plane, np.ones((3, 3), np.uint8)) for plane in tile]) for tile in p])


def bridged(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Foreground dilated and no boundary: cells that are 4 px apart melt into one."""
    p = p.copy()
    p[:, 0] = np.stack([cv2.dilate(plane, np.ones((5, 5), np.uint8)) for plane in p[:, 0]])
    p[:, 1] = 0
    return p


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (faint_first_cell, ["counting: counts differ in 2 of 2 images, most in image-", "channel foreground: "]),
        (eroded, ["counting: matched F1 at IoU 0.9 is 0.", "of the pixels differ, allowed 1e-05", "worst in image-"]),
        (bridged, ["merges", "channel boundary", "says 0.0000 everywhere"]),
        (no_boundary, ["channel boundary", "says 0.5000 everywhere"]),
        (
            lambda p: p[:, ::-1],
            ["foreground is the reference's boundary", "boundary is the reference's foreground"],
        ),
    ],
    ids=["lost cell", "eroded", "merged", "boundary cut off", "channels swapped"],
)
def test_a_broken_form_is_refused_and_the_report_points_at_it(change: Any, words: list[str]) -> None:
    report = gate(Changed(change))
    assert report.verdict == "failed"
    for word in words:
        assert any(word in reason for reason in report.reasons), (word, report.reasons)
    assert report.reasons[0] in report.to_text()


def test_reversed_colours_are_recognised() -> None:
    class Bgr(InkBackend):
        def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            return super()._predict(np.ascontiguousarray(tiles_nhwc[..., ::-1]))

    tinted = []
    for name, image in images():
        image[(image == (120, 40, 90)).all(axis=2)] = (120, 40, 220)
        tinted.append((name, image))
    report = compare(InkBackend(), Bgr(), tinted, POLICY)
    assert report.verdict == "failed"
    assert any("BGR" in reason for reason in report.reasons)


def test_the_worst_place_is_given_with_both_values() -> None:
    def spot(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        p = p.copy()
        p[:, 0, 20:40, 20:40] *= 0.3
        return p

    worst, name = gate(Changed(spot)).tensor("foreground")
    assert name in {"image-0", "image-1"}
    assert worst.worst_candidate == pytest.approx(0.3 * worst.worst_reference)
    assert f"row {worst.worst_at[0]}, column {worst.worst_at[1]}" in gate(Changed(spot)).to_text()


def test_too_few_cells_prove_nothing() -> None:
    report = gate(InkBackend(), ParityPolicy())
    assert report.verdict == "inconclusive"
    assert "found 40 cells in 2 images, at least 200" in report.reasons[0]
    assert len(report.reasons) == 1


def test_too_few_cells_prove_nothing_of_a_wrong_form_either() -> None:
    report = gate(Changed(no_boundary), ParityPolicy())
    assert report.verdict == "inconclusive"
    assert not report.tensors_agree
    assert any("everywhere" in reason for reason in report.reasons)


@pytest.mark.parametrize(
    "stricter",
    [{"min_f1": 0.999}, {"max_differing_share": 1e-5}, {"max_count_difference": 0}],
    ids=lambda change: next(iter(change)),
)
def test_each_limit_of_the_policy_counts_by_itself(stricter: dict[str, Any]) -> None:
    lenient = ParityPolicy(min_cells=30, min_f1=0.0, max_differing_share=1.0, max_count_difference=99)
    candidate = Changed(faint_first_cell)
    assert gate(candidate, lenient).verdict == "passed"
    assert gate(candidate, replace(lenient, **stricter)).verdict == "failed"


def test_a_form_that_answers_nan_is_refused() -> None:
    with pytest.raises(ParityError, match=r"candidate .* image-0: .*NaN"):
        gate(Changed(lambda p: p * np.nan))


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(ParityError, match="sigmoid"):
        gate(Changed(lambda p: p * 20 - 10))


@pytest.mark.parametrize("change", [{"image_scale": 0.5}, {"tile_size": 112}, {"cell_diameter_px": 21.0}])
def test_two_networks_are_not_two_forms(change: dict[str, Any]) -> None:
    other = InkBackend()
    other.spec = make_spec(variant="boundary", **change)
    with pytest.raises(ParityError, match=f"not two forms of one network: {next(iter(change))}"):
        gate(other)


def test_no_image_no_verdict() -> None:
    with pytest.raises(NothingToDoError, match="no image"):
        compare(InkBackend(), InkBackend(), [], POLICY)
