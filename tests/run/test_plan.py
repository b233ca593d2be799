"""What a run would do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from run_records import BAD, NAMES, identity, make_images, run

from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.run import plan as plans
from cellseg_deploy.run.plan import RunPlan
from cellseg_deploy.run.resume import FolderState, classify, look_at
from cellseg_deploy.run.state import RunState

FORMATS = chosen_formats(("labels", "overlays", "confluence"))


def plan(images: Sequence[FoundImage], out: Path, folder: FolderState) -> RunPlan:
    known = folder.journal if folder.kind == "resume" else None
    return plans.plan(images, out, folder.kind, RunState.of(known), FORMATS)


def test_of_a_new_folder_everything_is_work(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in")
    images[-1] = FoundImage(images[-1].path, images[-1].name, problem="a link that leads outside the folder")
    planned = plan(images, tmp_path / "out", classify(tmp_path / "out", identity()))
    assert planned.counts == {"work": 3, "skip": 0, "fail": 1}
    assert planned.items[0].reason == "not done yet"
    assert planned.items[-1].reason == "a link that leads outside the folder"
    assert planned.items[0].files == (
        "labels/a.png.tif",
        "overlays/a.png.jpg",
        "confluence/a.png.jpg",
        "confluence/a.png.csv",
    )
    assert not (tmp_path / "out").exists()


def test_of_a_finished_run_nothing_but_what_failed_or_changed(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "in"), tmp_path / "out"
    run(images, out)
    (out / "labels" / "z.png.tif").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    planned = plan(images, out, classify(out, identity()))
    assert {item.image.name: (item.action, item.reason) for item in planned.items} == {
        NAMES[0]: ("skip", ""),
        NAMES[1]: ("skip", ""),
        BAD: ("work", "failed before"),
        "z.png": ("work", "its file labels/z.png.tif is missing"),
    }
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    data = planned.to_json()
    assert (data["folder"], data["found"], data["work"], data["skip"], data["fail"]) == ("resume", 4, 2, 2, 0)
    assert json.loads(json.dumps(data)) == data
    assert data["images"][0] == {
        "image": "a.png",
        "action": "skip",
        "reason": "",
        "files": list(planned.items[0].files),
    }


def test_of_another_run_everything_is_work(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "in"), tmp_path / "out"
    run(images, out)
    state = classify(out, identity(task="confluence"))
    assert plan(images, out, state).counts == {"work": 4, "skip": 0, "fail": 0}


def test_an_image_that_came_later_takes_no_name_that_is_in_use(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "in"), tmp_path / "out"
    run(images, out)
    later = tmp_path / "in" / "A.png"
    later.write_bytes(b"later")
    planned = plan([FoundImage(later, "A.png"), *images], out, look_at(out))
    assert [(item.action, item.output_name) for item in planned.items[:2]] == [("work", "A.png~2"), ("skip", "a.png")]


def test_names_that_are_no_unicode_can_be_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.png")
    data = plan([FoundImage(tmp_path / name, name)], tmp_path, look_at(tmp_path / "out")).to_json()
    assert json.dumps(data, ensure_ascii=False).encode()
