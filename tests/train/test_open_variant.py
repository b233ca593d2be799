"""Training data of the variant without a non-commercial clause, from a small copy of its sources to a network."""

from __future__ import annotations

import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import draw_discs

from cellseg_deploy.cli import console
from cellseg_train.checkpoint import load_network
from cellseg_train.cli import command
from cellseg_train.open_variant import COMMANDS, main, prepare

DISCS = [(40.0, 40.0), (120.0, 50.0), (60.0, 130.0), (140.0, 140.0)]
FAST = "--epochs 1 --tile-size 112 --tiny-width 48 --tiny-depth 1 --decoder-channels 16,16,8 --image-skip none "
FAST += "--device cpu --threads 1 --no-calibrate --quiet --batch-size 4"


def draw(path: Path, hw: tuple[int, int], light: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.clip(draw_discs(hw, DISCS).astype(int) - light, 0, 255).astype(np.uint8)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two fields of each source; one of txl_white has the size of PBC's."""
    folder = tmp_path / "data"
    for source, sizes in (("txl_bccd", [(200, 200), (200, 210)]), ("txl_white", [(363, 360), (575, 575)])):
        rows = ["image,class,x0,y0,x1,y1"]
        for number, hw in enumerate(sizes):
            name = f"{source}-{number}.png"
            draw(folder / source / "images" / name, hw, 7 * number)
            for (x, y), kind in zip(DISCS, ("RBC", "RBC", "WBC", "platelet"), strict=True):
                rows.append(f"{name},{kind},{x - 10:.0f},{y - 10:.0f},{x + 10:.0f},{y + 10:.0f}")
        (folder / source / "boxes.csv").write_text("\n".join(rows) + "\n")
    chula = folder / "chula_rbc12"
    rows = ["image,label,class,has_point,touches_edge,area_px"]
    for number in (1, 2):
        draw(chula / "images" / f"{number}.png", (180, 180), 20 * number)
        labels = np.zeros((180, 180), np.uint16)
        for label, (x, y) in enumerate(DISCS, start=1):
            cv2.circle(labels, (int(x), int(y)), 10 if label < 4 else 3, label, -1)
        (chula / "labels").mkdir(exist_ok=True)
        assert cv2.imwrite(str(chula / "labels" / f"{number}.png"), labels)
        rows += [f"{number}.png,1,normal,1,0,317", f"{number}.png,2,normal,1,0,317"]
        rows += [f"{number}.png,3,,0,0,317", f"{number}.png,4,,0,0,29"]
    (chula / "instances.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_the_recipe_takes_the_free_sources_and_trains_on_no_weights(data, tmp_path):
    out = tmp_path / "open"
    assert prepare(data, out, n_smears=2, size_hw=(200, 260)) == [
        ("bccd", 2),
        ("pbc", 1),
        ("chula", 2),
        ("synthetic", 2),
    ]
    assert [file.name for file in (out / "pbc" / "images").iterdir()] == ["txl_white-0.png"]
    assert (out / "pbc" / "boxes.csv").read_text().count("txl_white-0.png,red,") == 2
    assert "txl_white-1" not in (out / "pbc" / "boxes.csv").read_text()
    classes = (out / "chula" / "classes.csv").read_text().splitlines()
    assert classes[:5] == ["image,label,class", "1.png,1,red", "1.png,2,red", "1.png,3,", "1.png,4,ignore"]
    for line in COMMANDS.format(out=out).replace("\\\n", "").splitlines()[:2]:
        program, *arguments = shlex.split(line)
        assert program == "cellseg-train"
        fast = [] if "--truth-only" in arguments else shlex.split(FAST)
        assert console.run(command, [*arguments, *fast]) == 0
    spec = load_network(out / "run").spec
    assert set(spec.classes) == {"red", "white", "platelet"}
    assert spec.weights.origin != ""
    assert "shipped" not in spec.weights.origin


def test_a_missing_source_and_a_used_folder_are_named(data, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert console.run(main, [str(data), str(tmp_path / "used")]) == 6
    (data / "txl_bccd" / "boxes.csv").unlink()
    assert console.run(main, [str(data), str(tmp_path / "new")]) == 2
    assert "txl_bccd/boxes.csv: no such file; expected chula_rbc12" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
