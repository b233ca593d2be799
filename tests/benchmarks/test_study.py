"""The study on sample smears: it ends in a report, goes on where it was stopped, and compares like with like."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cellseg_benchmarks.quality import study, study_report
from cellseg_deploy.cli import console
from cellseg_deploy.samples import write_samples
from cellseg_train import run as training
from cellseg_train.config import TrainConfig

FAST = [
    "--epochs", "3", "--seeds", "1", "--tile-size", "112", "--tiny-width", "48", "--tiny-depth", "1", "--lr", "3e-3",
    "--patches-per-image", "8", "--image-scale", "0.4", "--device", "cpu", "--threads", "1", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def smears(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smears")
    write_samples(folder / "train", 3, 5, (300, 400))
    write_samples(folder / "val", 3, 9, (300, 400))
    return folder


def run(smears: Path, out: Path, *more: str) -> int:
    places = [
        *("--images", smears / "train/images", "--masks", smears / "train/masks"),
        *("--val-images", smears / "val/images", "--val-masks", smears / "val/masks"),
    ]
    return console.run(study.study_command, [str(a) for a in (*places, "-o", out, *FAST, *more)])


@pytest.fixture(scope="module")
def done(smears, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    assert run(smears, out, "--runs", "plain,distance") == 0
    return out


@pytest.fixture
def copied(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def result_of(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results" / f"{name}.json").read_text())
    return content


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(training, "begin", refuse)
    monkeypatch.setattr(training, "resume", refuse)


def test_each_run_leaves_its_figures_and_the_study_its_report(done):
    plain, distance = result_of(done, "plain-0"), result_of(done, "distance-0")
    assert list(plain["points"]) == ["threshold"]
    assert set(distance["points"]) == {"threshold", "distance"}
    for tasks in distance["points"].values():
        assert set(tasks) == {"counting", "confluence"}
        for point in tasks.values():
            assert len(point["choices"]) == 2  # one for each half of the images
            assert point["figures"]["n_images"] == 3
            assert 0 < point["figures"]["dice"] <= 1
            assert {"f1", "f1_apart", "count_mape", "area_error"} <= point["figures"].keys()
    curves = {(p["method"], p["parameter"]) for p in distance["sweep"]}
    assert ("threshold", "foreground_threshold") in curves
    assert ("distance", "seed_threshold") in curves
    thresholds = [p["threshold"] for p in study_report.curve_of(plain, "threshold", "foreground_threshold")]
    assert len(thresholds) > 8
    assert thresholds == sorted(thresholds)
    text = (done / "study.md").read_text()
    assert "| `distance` | distance |" in text
    assert "no part in the choice" in text
    assert (done / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(done.glob(".cellseg-*"))


def test_a_started_run_goes_on_and_ends_in_the_same_figures(smears, copied, monkeypatch):
    before = result_of(copied, "distance-0")
    (copied / "results" / "distance-0.json").unlink()
    monkeypatch.setattr(training, "begin", None)  # would fail if the run were begun again
    assert run(smears, copied, "--runs", "plain,distance") == 0
    after = result_of(copied, "distance-0")
    assert (after["points"], after["sweep"]) == (before["points"], before["sweep"])


def without(*keys: str) -> Any:
    """A change to a result: the last of ``keys`` is taken out of what the others lead to."""

    def change(result: dict[str, Any]) -> dict[str, Any]:
        place: Any = result
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        del place[keys[-1]]
        return result

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: json.dumps(result).encode()[:200], "truncated"),
        (without("points", "threshold", "counting", "figures", "f1_apart"), "figures without f1_apart"),
        (without("sweep", "0", "figures", "dice"), "figures without dice"),
    ],
)
def test_a_damaged_result_is_named_and_how_to_go_on(smears, copied, monkeypatch, capsys, change, message):
    path = copied / "results" / "plain-0.json"
    content = change(result_of(copied, "plain-0"))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    no_training(monkeypatch)
    assert run(smears, copied, "--runs", "plain") == 5
    error = capsys.readouterr().err
    assert f"{path}: damaged result of a finished run" in error
    assert message in error
    assert "remove the file, and this run is measured again" in error


@pytest.mark.parametrize("lost", ["nothing", "result"])
def test_other_settings_in_the_same_folder_are_refused(smears, copied, monkeypatch, capsys, lost):
    if lost == "result":
        (copied / "results" / "plain-0.json").unlink()
    no_training(monkeypatch)
    assert run(smears, copied, "--runs", "plain", "--lr", "1e-3") == 2
    assert ("is of other settings" if lost == "nothing" else "started with other settings") in capsys.readouterr().err


def test_other_validation_images_are_noticed(smears, copied, monkeypatch, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(smears / "train", other / "train")
    write_samples(other / "val", 3, 77, (300, 400))
    no_training(monkeypatch)
    assert run(other, copied, "--runs", "plain") == 2
    assert "split_sha256" in capsys.readouterr().err


def test_arms_differ_in_what_they_say_and_in_nothing_else():
    base = TrainConfig()
    told = {arm.name: dataclasses.asdict(arm.config(base, 1)) for arm in study.ARMS}

    def differing(a: dict[str, Any], b: dict[str, Any], path: str = "") -> set[str]:
        found: set[str] = set()
        for key in a:
            if isinstance(a[key], dict):
                found |= differing(a[key], b[key], f"{path}{key}.")
            elif a[key] != b[key]:
                found.add(path + key)
        return found - {"name"}

    expected = {
        "plain": {"model.variant"},
        "boundary": set(),
        "distance": {"model.variant"},
        "boundary-surface": {"loss.surface_weight"},
        "boundary-no-gaps": {"loss.gap_weight"},
        "plain-no-gaps": {"model.variant", "loss.gap_weight"},
    }
    assert {name: differing(settings, told["boundary"]) for name, settings in told.items()} == expected
    for settings in told.values():
        assert (settings["seed"], settings["calibrate"]) == (1, False)
        assert settings["validate_every"] == settings["optim"]["epochs"]  # so no epoch can be picked by validation


def made(name: str, variant: str, seed: int, f1: float, dice: float, mape: float | None = 0.1) -> dict[str, Any]:
    """A result of which every figure is known."""
    found = {
        "f1": f1, "f1_apart": f1, "count_mape": mape, "count_mape_apart": mape, "dice": dice, "map": 0.5,
        "area_error": 0.02,
    }  # fmt: skip
    method = {"plain": "threshold"}.get(variant, variant)
    choices = [{"method": method, "foreground_threshold": 0.5 + 0.1 * seed}, {"method": method, "seed_threshold": 0.8}]
    both = {task: {"figures": found, "choices": choices, "intervals": {}} for task in ("counting", "confluence")}
    curve = [
        {"method": "threshold", "parameter": "foreground_threshold", "threshold": t, "figures": found | {k: v}}
        for t, k, v in ((0.5, "dice", 0.96), (0.9, "f1", 0.99))
    ]
    return {
        "run": name,
        "seed": seed,
        "settings": {
            "model": {"variant": variant, "encoder": "tiny", "tile_size": 224},
            "optim": {"epochs": 40, "batch_size": 8},
            "data": {"patches_per_image": 1, "image_scale": 0.5},
            "weights": "none",
        },
        "n_train_images": 80,
        "n_val_images": 10,
        "split_sha256": "0" * 64,
        "points": {"threshold": both} | {method: both},
        "sweep": curve,
        "seconds": {"train": 60.0, "measure": 30.0},
    }


def test_the_report_gives_mean_spread_and_paired_differences():
    results = [
        made("plain", "plain", 0, 0.50, 0.95),
        made("plain", "plain", 1, 0.60, 0.95, None),
        made("boundary", "boundary", 0, 0.70, 0.94),
        made("boundary", "boundary", 1, 0.90, 0.94),
    ]
    text = study_report.markdown([("plain", "a"), ("boundary", "b")], results)
    counting = next(line for line in text.splitlines() if line.startswith("| `plain` | threshold |"))
    assert "| 0.550 ± 0.071 |" in text  # of 0.5 and 0.6
    assert "| 0.800 ± 0.141 |" in text
    assert "3200 tiles of 224 px" in text
    assert "-0.250 ± 0.071" in text  # -0.2 and -0.3, each against the same seed
    assert "+0.0100 ± 0.0000" in text
    assert "0.50 ± 0.00 | 0.9600 ± 0.0000" in text
    assert "0.90 ± 0.00" in text
    assert counting.count("| – |") == 1  # an undefined count error is no number
    assert "| – | – |" in counting
    assert study_report.sweep_figure(["plain", "boundary"], results).startswith(b"\x89PNG")
    alone = study_report.markdown([("plain", "a")], results[:1])
    assert "`boundary` was not among the runs" in alone
    assert "| 0.500 |" in alone


def test_a_study_that_is_stopped_says_which_runs_are_missing(smears, copied, monkeypatch):
    (copied / "study.md").unlink()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_train", stopped)
    arguments = ("--runs", "plain,distance,boundary", "--threads", "2")
    assert run(smears, copied, *arguments) == 130
    title, _, remark, *_ = (copied / "study.md").read_text().splitlines()
    assert title.startswith("# Study")
    assert remark == "**Not finished: still to be trained are boundary with seed 0.**"
