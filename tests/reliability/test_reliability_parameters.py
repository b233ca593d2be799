"""Settings that cannot be meant: refused before work begins, in a line that names the setting; nothing is written."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from conftest import DarknessBackend, make_spec
from running import infer

from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import BoundaryParams, DistanceParams, InstanceParams, ThresholdParams
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.reliability


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "batch 0": (("--batch-size", 0), "batch size.*at least 1"),
    "batch below 0": (("--batch-size", -4), "batch size"),
    # tiles of 56 px: a halo of 28 leaves nothing of them
    "halo of half a tile": (("--halo", 28), r"halo 28 does not fit.*56 px.*0 to 27"),
    "halo of a tile": (("--halo", 56), "halo 56 does not fit"),
    "halo below 0": (("--halo", -1), "halo -1"),
    "unknown device": (("--device", "gpu"), r"unknown device 'gpu'; expected cpu, cuda or cuda:N"),
    "device without number": (("--device", "cuda:first"), "cuda:first"),
    "unknown backend": (("--backend", "tensorflow"), "tensorflow"),
    "unknown task": (("--task", "magic"), "magic"),
    "unknown kind of file": (("--save", "everything"), "everything"),
    "threads 0": (("--threads", 0), "threads"),
    "scale 0": (("--scale", 0), "scale"),
    "scale NaN": (("--scale", "nan"), "scale"),
    "scale infinite": (("--scale", "inf"), "scale"),
    "cell diameter NaN": (("--cell-diameter", "nan"), "diameter"),
    "cell diameter and scale": (("--cell-diameter", 5, "--scale", 1), "exclude"),
    "pixel limit 0": (("--max-pixels", 0), "max"),
    "bit depth 8": (("--bit-depth", 8), "bit depth"),
    "bit depth 17": (("--bit-depth", 17), "bit depth"),
    "pixel size 0": (("--pixel-size", 0), r"pixel size must be above 0.*got 0\.0"),
    "pixel size NaN": (("--pixel-size", "nan"), "pixel size must be above 0.*got nan"),
    "unknown option": (("--nonsense",), "nonsense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_cannot_be_meant(
    case: str, model: Path, smears: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = REFUSED[case]
    assert infer(smears, "-o", tmp_path / "out", "--model", model, *arguments) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert re.search(words, said.err), said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", [ThresholdParams, BoundaryParams, DistanceParams])
def test_a_threshold_outside_0_to_1(kind: type[InstanceParams], value: float) -> None:
    """0 and 1 themselves too: everything would be a cell, or nothing."""
    for name in (field for field in kind.__struct_fields__ if field.endswith("threshold")):
        spec = make_spec(operating_points={"counting": kind(**{name: value})})
        with pytest.raises(UsageError, match=rf"{name} must lie between 0 and 1 .both excluded., got {value}"):
            Segmenter(DarknessBackend(spec))


def test_thresholds_that_can_be_meant() -> None:
    for value in (1e-6, 0.5, 1 - 1e-6):
        spec = make_spec(operating_points={"counting": ThresholdParams(foreground_threshold=value)})
        assert Segmenter(DarknessBackend(spec)).params.foreground_threshold == value


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_output_and_input_inside_each_other(model: Path, smears: Path, tmp_path: Path, overwrite: list[str]) -> None:
    """Also where only a link leads there: the run would read its own pictures, or replace the photographs."""
    (tmp_path / "link").symlink_to(smears)
    before = sorted(smears.rglob("*"))
    for given, out in (
        (smears, smears),
        (smears, smears / "out"),
        (smears, smears / "sub" / ".." / "out"),
        (smears, tmp_path / "link" / "out"),
        (tmp_path / "link", smears / "out"),
        (smears / "sub", smears),
        (smears / "a.png", smears),
        (smears / "sub" / "small.tif", tmp_path / "link"),
    ):
        assert infer(given, "-o", out, "--model", model, *overwrite) == 2, (given, out)
        assert sorted(smears.rglob("*")) == before
    assert infer(smears / "a.png", "-o", smears / "out", "--model", model, "-q") == 0  # one file and a folder beside it
