"""Less work: the curve of context, and settings compared by time and cells."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DarknessBackend
from PIL import Image as Pillow
from written_reports import written_report

from cellseg_benchmarks.harness.timer import Plan
from cellseg_benchmarks.quality import savings
from cellseg_benchmarks.quality.halo_curve import cut_distance, halo_curve
from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells import tiling
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.samples import SmearParams, make_smear


class NearSighted(Backend):
    """Says "cell" where a tile's edge is nearer than ``blind`` px, whatever the picture shows."""

    name, device, precision = "stub", "cpu", "fp32"

    def __init__(self, spec, blind):
        self.spec, self.blind = spec, blind

    def _predict(self, tiles_nhwc):
        size = self.spec.tile_size
        out = np.zeros((len(tiles_nhwc), len(self.spec.channels), size, size), np.float32)
        out[:, 0] = 1
        out[:, 0, self.blind : size - self.blind, self.blind : size - self.blind] = 0
        return out


def dark_corner(hw):
    image = np.full((*hw, 3), 255, np.uint8)
    image[-10:, -10:] = 0
    return image


@pytest.fixture(scope="module")
def backend():
    with open_backend(default_model_path(), EngineOptions(backend="onnxruntime", threads=1)) as opened:
        yield opened


def test_distance_counts_from_cut_edges_alone():
    plan = tiling.plan((224, 500), 224, 0)
    first, middle, last = (cut_distance(tile, plan) for tile in plan.tiles)
    assert first.shape == (224, 224)
    assert (first[:, 223] == 0).all()  # its right side is cut, the others are the image's border
    assert (first[:, 0] == 223).all()
    assert (middle[:, 0] == 0).all()
    assert middle[100, 100] == 100
    assert middle[100, 130] == 93
    assert (last[:, 0] == 0).all()
    assert (last[:, 223] == 223).all()
    assert (cut_distance(tiling.plan((50, 50), 224, 0).tiles[0], tiling.plan((50, 50), 224, 0)) == 224).all()


@pytest.mark.parametrize("blind", [0, 5, 17])
def test_the_curve_shows_how_far_a_network_is_blind(backend, blind):
    image = np.full((300, 520, 3), 200, np.uint8)
    curve = halo_curve(NearSighted(backend.spec, blind), [image, image], scale=1.0)
    assert curve.needed() == blind
    assert (curve.mean[:blind] > 0.9).all()  # less than 1 only where the rim of the image is near as well
    assert (curve.mean[blind:] == 0).all()
    assert (curve.p99[:blind] == 1).all()
    assert (curve.p99[blind:] == 0).all()
    assert np.array_equal(curve.flipped, curve.mean)
    assert (curve.pixels > 0).all()


def test_an_image_of_one_tile_has_no_cut_edge(backend):
    curve = halo_curve(NearSighted(backend.spec, 5), [np.zeros((100, 90, 3), np.uint8)], scale=1.0)
    assert curve.pixels.sum() == 0
    assert np.isnan(curve.mean).all()
    assert curve.needed() == 0


def test_settings_are_compared_by_time_and_cells(backend):
    smear = make_smear(SmearParams(size_hw=(600, 800), n_cells=25), 3)
    settings = savings.settings_for(backend, halos=(0, 16, backend.spec.halo), scales=(0.25, 1.0))
    assert [s.name for s in settings] == [
        savings.USUAL,
        *(f"halo {halo}" for halo in (0, 16) if halo != backend.spec.halo),
        "scale x 0.25",
    ]
    pairs = [(smear.image_hwc, smear.labels_hw)]
    outcomes, measured = savings.compare(
        backend, pairs, settings, Plan(rounds=1, min_rounds=1, min_seconds=0, settle_seconds=0)
    )
    assert list(measured.times) == [s.name for s in settings]
    usual, bare = outcomes[0], outcomes[1]
    assert usual.faster[0] == 1
    assert bare.tiles <= usual.tiles
    assert outcomes[-1].tiles == 1  # 600 x 800 at a quarter of the model's scale is smaller than a tile
    assert usual.figures["n_true"] == smear.labels_hw.max()
    assert usual.figures["f1"] > 0.9
    assert outcomes[-1].figures["f1"] < 0.5
    assert outcomes[0].flat()["times_faster"] == {"median": 1.0, "low": None, "high": None}


def test_specks_are_judged_by_the_truths_size(backend):
    """Cells of 100 px: a fixed limit of 200 px would take them all for specks."""
    labels = np.zeros((60, 60), np.int32)
    labels[10:20, 10:20], labels[40:50, 10:20] = 1, 2
    image = np.where(labels[..., None] > 0, 100, 230).astype(np.uint8).repeat(3, axis=2)
    plan = Plan(rounds=1, min_rounds=1, min_seconds=0, settle_seconds=0)
    outcomes, _ = savings.compare(backend, [(image, labels)], [savings.usual_setting(backend, "usual")], plan)
    assert outcomes[0].figures["n_true"] == 2


def test_another_model_takes_part_with_its_own_tiles(backend):
    blind = NearSighted(msgspec.structs.replace(backend.spec, tile_size=112, halo=20), blind=0)
    smear = make_smear(SmearParams(size_hw=(600, 800), n_cells=25), 3)
    outcomes, _ = savings.compare(
        backend,
        [(smear.image_hwc, smear.labels_hw)],
        savings.settings_for(backend, halos=(), scales=()),
        Plan(rounds=1, min_rounds=1, min_seconds=0, settle_seconds=0),
        others=[(savings.usual_setting(blind, "small tiles"), blind)],
    )
    assert [(o.setting.name, o.setting.tile_size, o.tiles) for o in outcomes] == [
        (savings.USUAL, backend.spec.tile_size, 2),
        ("small tiles", 112, 12),
    ]
    assert outcomes[1].figures["n_predicted"] == 0


def test_two_models_of_one_name_are_told_apart_or_refused(backend):
    """Times and cells are kept by name: one's would be taken for the other's."""
    blind = NearSighted(msgspec.structs.replace(backend.spec, tile_size=112, halo=20), blind=0)
    with pytest.raises(UsageError, match="two settings are called net"):
        savings.compare(
            backend,
            [(dark_corner((60, 60)), np.zeros((60, 60), np.int32))],
            savings.settings_for(backend, halos=(), scales=()),
            Plan(rounds=1, min_rounds=1, min_seconds=0, settle_seconds=0),
            others=[(savings.usual_setting(of, "net"), of) for of in (blind, NearSighted(backend.spec, blind=0))],
        )


def test_empty_tiles_are_those_without_a_cell(backend):
    spec = msgspec.structs.replace(backend.spec, tile_size=112, halo=0, image_scale=1.0)
    assert savings.empty_tiles(NearSighted(spec, 0), [np.zeros((112, 336, 3), np.uint8)]) == (3, 3)
    assert savings.empty_tiles(NearSighted(spec, 4), [np.zeros((112, 336, 3), np.uint8)]) == (0, 3)
    assert savings.empty_tiles(DarknessBackend(spec), [dark_corner((224, 336))]) == (5, 6)


@pytest.fixture
def words(tmp_path):
    """What the command is called with: an image with its mask, a round, and DIR/out."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    smear = make_smear(SmearParams(size_hw=(480, 640), n_cells=15), 5)
    Pillow.fromarray(smear.image_hwc).save(images / "a.png")
    Pillow.fromarray(smear.labels_hw.astype(np.uint16)).save(masks / "a.png")
    settings = ["--rounds", "1", "--min-seconds", "0", "--settle", "0", "--threads", "1", "--quiet"]
    return ["--images", str(images), "--masks", str(masks), "-o", str(tmp_path / "out"), *settings]


def test_the_command_writes_its_three_files(words, tmp_path):
    out = tmp_path / "out"
    told = CliRunner().invoke(savings.savings_command, words)
    assert told.exit_code == 0, told.output
    report = written_report(out, "savings", savings.SavingsReport)
    assert report["n_images"] == 1
    assert next(row["setting"] for row in report["outcomes"]) == savings.USUAL
    assert len(report["raw_seconds"]) == len(report["outcomes"])
    assert len(report["curve"]["flipped"]) == report["outcomes"][0]["tile_size_px"] // 2
    assert "| as the model says |" in (out / "savings.md").read_text()
