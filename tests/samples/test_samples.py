"""Synthetic smears: the truth is exact, the picture shows it, and the folder and its comparison are as documented."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError, OutputError, UsageError
from cellseg_deploy.samples import SmearParams, make_smear, random_params, write_samples
from cellseg_deploy.samples.__main__ import main as write_command
from cellseg_deploy.samples.__main__ import parse_size
from cellseg_deploy.samples.compare import main as compare_command
from cellseg_deploy.samples.layout import ANGLES, N_ANGLES, outlines, place_discs
from cellseg_deploy.samples.optics import smooth_noise
from cellseg_deploy.samples.smear import MIN_VISIBLE, Slide, raster_order
from cellseg_deploy.samples.write import Count, compare_counts, count_table

SMALL = SmearParams(size_hw=(240, 320), n_cells=24, cell_diameter_px=40.0)
PLAIN = replace(
    SMALL,
    crenated_share=0.0,
    teardrop_share=0.0,
    white_cell_share=0.0,
    parasite_share=0.0,
    platelets_per_cell=0.0,
    debris=0.0,
    residue=0.0,
    texture=0.0,
    halo=0.0,
    pallor=0.0,
    rim=0.0,
)
DISC_20 = np.full(N_ANGLES, 20.0)


def one_region(mask: np.ndarray) -> bool:
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return bool(count == 2)


# --- truth ------------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_smear_and_another_seed_another() -> None:
    first, again, other = make_smear(SMALL, 1), make_smear(SMALL, 1), make_smear(SMALL, 2)
    np.testing.assert_array_equal(first.image_hwc, again.image_hwc)
    np.testing.assert_array_equal(first.labels_hw, again.labels_hw)
    assert not np.array_equal(first.labels_hw, other.labels_hw)


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_single_regions_numbered_in_raster_order(seed: int) -> None:
    params = random_params(np.random.default_rng(seed), size_hw=(400, 500), cell_diameter_px=50.0)
    params = replace(params, overlap=0.8, clustering=0.9, n_cells=90)  # crowded: this is where truth goes wrong
    labels = make_smear(params, seed).labels_hw
    assert labels.dtype == np.int32
    assert labels.shape == (400, 500)
    values, first = np.unique(labels, return_index=True)
    np.testing.assert_array_equal(values, np.arange(labels.max() + 1))
    assert list(first[1:]) == sorted(first[1:])
    assert labels.max() > 20
    assert all(one_region(labels == value) for value in values[1:])


def test_stain_and_camera_leave_the_truth_alone() -> None:
    changed = replace(SMALL, cell_density=(0.05, 0.2, 0.3), noise=3.0, blur_px=2.0, debris=1.0, jpeg_quality=60)
    before, after = make_smear(SMALL, 5), make_smear(changed, 5)
    np.testing.assert_array_equal(before.labels_hw, after.labels_hw)
    assert not np.array_equal(before.image_hwc, after.image_hwc)


def test_upper_cell_owns_the_overlap_and_the_lower_keeps_what_shows() -> None:
    slide = Slide(PLAIN, np.random.default_rng(0))
    slide.add_cell(100.0, 100.0, DISC_20, "red")
    slide.add_cell(125.0, 100.0, DISC_20, "red")
    assert slide.labels[100, 112] == 2
    assert slide.labels[100, 85] == 1
    assert np.count_nonzero(slide.labels == 2) == pytest.approx(np.pi * 20**2, rel=0.01)


def test_a_cell_that_would_hide_another_is_not_placed_and_leaves_no_trace() -> None:
    slide = Slide(PLAIN, np.random.default_rng(0))
    slide.add_cell(100.0, 100.0, DISC_20, "red")
    labels, density = slide.labels.copy(), slide.density.copy()
    slide.add_cell(106.0, 100.0, 1.1 * DISC_20, "red")  # more than 60 % of the first would go
    np.testing.assert_array_equal(slide.labels, labels)
    np.testing.assert_array_equal(slide.density, density)


def test_a_cell_that_would_cut_another_in_two_is_not_placed() -> None:
    bar = 4 / np.maximum(np.abs(np.cos(ANGLES)), 4 / 40)  # 8 px wide, 80 px long, upright
    slide = Slide(PLAIN, np.random.default_rng(0))
    slide.add_cell(100.0, 100.0, DISC_20, "red")
    slide.add_cell(100.0, 100.0, bar, "red")
    assert slide.labels.max() == 1
    assert one_region(slide.labels == 1)


def test_a_spike_thinner_than_a_pixel_leaves_no_loose_pixels() -> None:
    spiked = np.where(np.abs(ANGLES - 0.7) < 0.01, 60.0, 20.0)
    slide = Slide(PLAIN, np.random.default_rng(0))
    slide.add_cell(100.3, 100.6, spiked, "red")
    assert one_region(slide.labels == 1)


def test_outlines_point_where_their_angles_say() -> None:
    right_and_down = np.where(np.less(ANGLES, np.pi / 2), 30.0, 10.0)  # y grows downwards
    slide = Slide(PLAIN, np.random.default_rng(0))
    slide.add_cell(100.0, 100.0, right_and_down, "red")
    rows, columns = np.nonzero(slide.labels)
    assert (rows.min(), rows.max()) == pytest.approx((90, 130), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((90, 130), abs=1)
    assert slide.labels[119, 119] == 1


def test_every_cell_keeps_its_visible_share() -> None:
    params = replace(PLAIN, size_hw=(400, 500), n_cells=80, overlap=1.0, clustering=1.0)
    slide = Slide(params, np.random.default_rng(3))
    rng = np.random.default_rng(4)
    discs = place_discs(rng, params)
    for disc, outline in zip(discs, outlines(rng, params, discs), strict=True):
        slide.add_cell(disc.x, disc.y, outline, disc.kind)
    visible = np.bincount(slide.labels.ravel())[1:] / np.array(slide.areas[1:])
    assert visible.min() >= MIN_VISIBLE
    assert np.count_nonzero(visible < 0.95) > 10


def test_pressed_cells_do_not_cross_and_leave_the_gap() -> None:
    params = replace(SMALL, overlap=0.0, clustering=1.0, contact_gap_px=3.0, irregularity=0.05, elongation=0.2)
    rng = np.random.default_rng(0)
    discs = place_discs(rng, params)
    forms = outlines(rng, params, discs)
    touching = 0
    for i, (disc, form) in enumerate(zip(discs, forms, strict=True)):
        x, y = disc.x + form * np.cos(ANGLES), disc.y + form * np.sin(ANGLES)
        for other, other_form in zip(discs[:i], forms[:i], strict=True):
            dx, dy = x - other.x, y - other.y
            towards = np.round((np.arctan2(dy, dx) % (2 * np.pi)) * N_ANGLES / (2 * np.pi)).astype(int) % N_ANGLES
            between = np.hypot(dx, dy) - other_form[towards]
            assert between.min() > 0.5
            touching += int(between.min() < 8)
    assert touching > 10


def test_raster_order_renumbers_by_first_pixel() -> None:
    labels = np.array([[0, 7, 7], [3, 0, 7], [3, 5, 0]], np.int32)
    np.testing.assert_array_equal(raster_order(labels), [[0, 1, 1], [2, 0, 1], [2, 3, 0]])
    np.testing.assert_array_equal(raster_order(np.zeros((2, 2), np.int32)), np.zeros((2, 2)))


# --- picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_picture_shows_what_the_labels_say(seed: int) -> None:
    smear = make_smear(replace(PLAIN, vignette=0.0, gradient=0.0), seed)
    green = smear.image_hwc[..., 1].astype(int)
    cells = green < 180  # background 231, cells about 231 * 10 ** -0.48 = 76; halfway on the edge is near 150
    truth = smear.labels_hw > 0
    assert np.count_nonzero(cells & truth) / np.count_nonzero(cells | truth) > 0.93


def test_densities_add_up_where_cells_overlap() -> None:
    params = replace(PLAIN, overlap_density=1.0)
    alone, both = Slide(params, np.random.default_rng(0)), Slide(params, np.random.default_rng(0))
    for slide in (alone, both):
        slide.add_cell(100.0, 100.0, DISC_20, "red")
    both.add_cell(125.0, 100.0, DISC_20, "red")
    upper = both.density[100, 135]  # upper cell only
    np.testing.assert_allclose(both.density[100, 112], alone.density[100, 112] + upper, rtol=0.25)
    assert (both.density[100, 112] > 1.5 * upper).all()


def test_platelets_and_dirt_are_drawn_but_not_labelled() -> None:
    clean = replace(PLAIN, n_cells=12, noise=0.0)
    dirty = replace(clean, platelets_per_cell=2.0, debris=1.0)
    before, after = make_smear(clean, 3), make_smear(dirty, 3)
    np.testing.assert_array_equal(before.labels_hw, after.labels_hw)
    darker = before.image_hwc[..., 1].astype(int) - after.image_hwc[..., 1] > 20
    assert np.count_nonzero(darker & (before.labels_hw == 0)) > 100


def test_white_cells_are_larger_darker_and_labelled() -> None:
    params = replace(PLAIN, n_cells=6, white_cell_share=1.0)
    smear = make_smear(params, 1)
    areas = np.bincount(smear.labels_hw.ravel())[1:]
    assert areas.max() > 1.5 * np.pi / 4 * params.cell_diameter_px**2
    inside = smear.image_hwc[smear.labels_hw > 0]
    assert np.percentile(inside[:, 1], 10) < 60


def test_no_cells_at_all_is_an_empty_field() -> None:
    smear = make_smear(replace(SMALL, n_cells=0), 0)
    assert smear.n_cells == 0
    assert smear.image_hwc.mean() > 200


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 3), (13, 300), (224, 224)])
def test_any_size_works(size_hw: tuple[int, int]) -> None:
    smear = make_smear(random_params(np.random.default_rng(0), size_hw=size_hw), 0)
    assert smear.image_hwc.shape == (*size_hw, 3)
    assert smear.image_hwc.dtype == np.uint8
    assert smear.labels_hw.shape == size_hw


def test_scale_bar_and_jpeg_change_the_picture_only() -> None:
    plain = make_smear(SMALL, 2)
    for changed in (replace(SMALL, scale_bar=True), replace(SMALL, jpeg_quality=40)):
        other = make_smear(changed, 2)
        assert not np.array_equal(plain.image_hwc, other.image_hwc)
        np.testing.assert_array_equal(plain.labels_hw, other.labels_hw)
        np.testing.assert_allclose(plain.image_hwc.mean((0, 1)), other.image_hwc.mean((0, 1)), atol=3)


def test_smooth_noise_is_centred_has_unit_spread_and_wide_features() -> None:
    noise = smooth_noise(np.random.default_rng(0), (500, 500), 20.0)
    assert noise.shape == (500, 500)
    assert abs(float(noise.mean())) < 0.2
    assert float(noise.std()) == pytest.approx(1.0, abs=0.15)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.15


# --- parameters -------------------------------------------------------------------------------------------------------


def test_random_params_span_stains_and_backgrounds() -> None:
    drawn = [random_params(np.random.default_rng(seed)) for seed in range(200)]
    darkness = np.array([params.cell_density[1] for params in drawn])
    brightness = np.array([params.background[1] for params in drawn])
    assert darkness.min() < 0.12
    assert darkness.max() > 0.6
    assert brightness.min() < 160
    assert brightness.max() > 245
    reddish = [params.cell_density[0] < 0.6 * params.cell_density[2] for params in drawn]
    bluish = [params.cell_density[0] > 1.5 * params.cell_density[2] for params in drawn]
    assert min(sum(reddish), sum(bluish)) > 30


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"overlap": 1.5}, "overlap"),
        ({"n_cells": -1}, "n_cells"),
        ({"n_cells": 70000}, "65535"),
        ({"noise": float("nan")}, "noise"),
        ({"size_hw": (0, 10)}, "size_hw"),
        ({"cell_diameter_px": 3.0}, "cell_diameter_px"),
        ({"pallor_size": 0.0}, "pallor_size"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"background": (300.0, 0.0, 0.0)}, "background"),
    ],
)
def test_impossible_params_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        replace(SMALL, **changes)  # type: ignore[arg-type]


# --- folder and commands ----------------------------------------------------------------------------------------------


def test_written_folder_holds_images_labels_and_truth(tmp_path: Path) -> None:
    rows = write_samples(tmp_path / "out", 2, seed=7, size_hw=(240, 320), vary=True)
    assert [name for name, _ in rows] == ["smear-000.png", "smear-001.png"]
    with (tmp_path / "out" / "truth.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["image", "n_cells"], *([name, str(n)] for name, n in rows)]
    with (tmp_path / "out" / "classes.csv").open(newline="") as file:
        header, *classes = csv.reader(file)
    assert header == ["image", "label", "class"]
    assert [(name, label) for name, label, _ in classes] == [
        (name, str(label)) for name, n_cells in rows for label in range(1, n_cells + 1)
    ]
    for name, n_cells in rows:
        image = cv2.imread(str(tmp_path / "out" / "images" / name), cv2.IMREAD_UNCHANGED)
        labels = cv2.imread(str(tmp_path / "out" / "masks" / name), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert image.shape == (240, 320, 3)
        assert labels is not None
        assert labels.dtype == np.uint16
        assert labels.max() == n_cells


def test_the_class_of_a_cell_is_that_of_its_label() -> None:
    smear = make_smear(replace(SmearParams(), size_hw=(400, 500), n_cells=40, white_cell_share=0.3), 1)
    areas = np.bincount(smear.labels_hw.ravel())[1:]
    white = np.array([name == "white" for name in smear.classes])
    assert len(areas) == len(white)
    assert set(smear.classes) == {"red", "white"}
    dark = [smear.image_hwc[smear.labels_hw == label].min() for label in range(1, len(areas) + 1)]  # nuclei are
    assert np.median(np.array(dark)[white]) + 20 < np.median(np.array(dark)[~white])


def test_png_holds_red_first(tmp_path: Path) -> None:
    write_samples(tmp_path / "out", 1, seed=0, size_hw=(120, 160))
    image = cv2.imread(str(tmp_path / "out" / "images" / "smear-000.png"), cv2.IMREAD_COLOR_RGB)
    labels = cv2.imread(str(tmp_path / "out" / "masks" / "smear-000.png"), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert labels is not None
    red, green, blue = image[labels > 0].mean(axis=0)
    assert blue > red > green  # Giemsa violet absorbs green most, blue least


def test_a_longer_series_begins_with_the_shorter_one(tmp_path: Path) -> None:
    short = write_samples(tmp_path / "short", 1, seed=3, size_hw=(120, 160))
    long = write_samples(tmp_path / "long", 2, seed=3, size_hw=(120, 160))
    assert long[:1] == short
    name = short[0][0]
    assert (tmp_path / "short/images" / name).read_bytes() == (tmp_path / "long/images" / name).read_bytes()


def test_images_of_a_series_and_of_another_seed_differ(tmp_path: Path) -> None:
    write_samples(tmp_path / "a", 2, seed=3, size_hw=(120, 160))
    write_samples(tmp_path / "b", 1, seed=4, size_hw=(120, 160))
    first, second = ((tmp_path / "a/images" / name).read_bytes() for name in ("smear-000.png", "smear-001.png"))
    assert len({first, second, (tmp_path / "b/images/smear-000.png").read_bytes()}) == 3


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("do not touch")
    with pytest.raises(OutputError, match="not an empty folder"):
        write_samples(tmp_path, 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_write_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_command, [str(tmp_path / "out"), "--n", "1", "--size", "160x120"]) == 0
    assert "smear-000.png" in capsys.readouterr().out
    image = cv2.imread(str(tmp_path / "out" / "images" / "smear-000.png"))
    assert image is not None
    assert image.shape == (120, 160, 3)
    assert run(write_command, [str(tmp_path / "out")]) == OutputError.exit_code
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--n", "0"], ["--seed", "-1"], ["--size", "1600"], ["--size", "0x10"]])
def test_write_command_refuses_what_cannot_be_meant(tmp_path: Path, options: list[str]) -> None:
    assert run(write_command, [str(tmp_path / "out"), *options]) == UsageError.exit_code
    assert not (tmp_path / "out" / "truth.csv").exists()


def test_size_is_width_by_height() -> None:
    assert parse_size("1600x1200") == (1200, 1600)


def test_comparison_lists_every_image_of_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, images = tmp_path / "truth.csv", tmp_path / "images.csv"
    truth.write_text("image,n_cells\na.png,10\nb.png,20\nc.png,5\n")
    images.write_text(
        "image,status,cells,error\nb.png,done,19,\na.png,done,12,\nc.png,failed,0,truncated\nx.png,done,3,\n"
    )
    counts = compare_counts(truth, images)
    assert counts == [Count("a.png", 10, 12), Count("b.png", 20, 19), Count("c.png", 5, None)]
    table = [line.split() for line in count_table(counts).splitlines()]
    assert table[1:] == [
        ["a.png", "10", "12", "+2"],
        ["b.png", "20", "19", "-1"],
        ["c.png", "5", "failed"],
        ["together", "30", "31", "+1"],
    ]
    assert run(compare_command, [str(truth), str(images)]) == 0
    assert capsys.readouterr().out == count_table(counts) + "\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,status,cells\nb.png,done,1\n", "no row for a.png"),
        ("image,cells\na.png,1\n", "no column status"),
        ("image,status,cells\na.png,done,many\n", "'many' is not a number"),
        (None, "cannot be read"),
    ],
)
def test_comparison_names_what_is_wrong_with_the_run(tmp_path: Path, table: str | None, message: str) -> None:
    (tmp_path / "truth.csv").write_text("image,n_cells\na.png,10\n")
    if table is not None:
        (tmp_path / "images.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        compare_counts(tmp_path / "truth.csv", tmp_path / "images.csv")
    arguments = [str(tmp_path / "truth.csv"), str(tmp_path / "images.csv")]
    assert run(compare_command, arguments) == DataError.exit_code
