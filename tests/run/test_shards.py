"""Shards of a run: each image in one of them, one scale for all, and merged what a single run leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DarknessBackend, draw_discs, make_spec
from run_records import journal_without_times
from running import results, save

from cellseg_deploy.cli import console
from cellseg_deploy.cli.merge import command as merge_command
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import record
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.run.merge import merge
from cellseg_deploy.run.repeat import RecordedRun
from cellseg_deploy.run.shard import Shard
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")
COUNT = 3


def make_fields(folder: Path) -> Path:
    """Thirteen images in two folders, whose cells differ in size from image to image; one is damaged."""
    for number in range(10):
        centres = [(20 + 40 * (n % 6), 20 + 40 * (n // 6)) for n in range(14 + number % 3)]
        image = draw_discs((140, 260), centres, radius=7 + number % 4)
        save(folder / f"{'ab'[number % 2]}/{number}.png", image)
    save(folder / "a/Same.png", draw_discs((60, 60), [(30, 30)]))
    save(folder / "a/same.png", draw_discs((60, 60), []))
    (folder / "b/bad.png").write_bytes((folder / "b/1.png").read_bytes()[:-30])
    return folder


def run(images: Path, out: Path, *, backend: DarknessBackend | None = None, **options: Any) -> RunSummary:
    segmenter = Segmenter(backend or DarknessBackend(make_spec(cell_diameter_px=14.0)), cell_diameter_px="auto")
    return run_folder(segmenter, find_images([images]), out, options=RunOptions(**options))


def run_shards(images: Path, out: Path, count: int = COUNT, **options: Any) -> list[Path]:
    """All shards, the last first: none knows what another found."""
    parts = [out / f"part-{index}" for index in range(1, count + 1)]
    for index in range(count, 0, -1):
        run(images, parts[index - 1], shard=Shard(index, count), **options)
    return parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in ``fields``, a run of all in ``whole``, the shards in ``part-1``...: not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        make_fields(folder / "fields")
        run(folder / "fields", folder / "whole", report_thresholds=3)
        run_shards(folder / "fields", folder, report_thresholds=3)
    return folder


@pytest.fixture
def fields(made: Path) -> Path:
    return made / "fields"


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the shards."""
    return [shutil.copytree(made / f"part-{n}", tmp_path / f"part-{n}") for n in range(1, COUNT + 1)]


def as_told(out: Path) -> dict[str, Any]:
    """What run.json tells, but for times and where it came from."""
    told = json.loads((out / "run.json").read_text())
    for name in ("started", "wall_seconds", "engine_busy", "stage_seconds", "merged", "threads"):
        told.pop(name, None)
    return told


def test_merged_shards_are_what_a_single_run_leaves(made: Path, parts: list[Path], tmp_path: Path) -> None:
    assert all(len(journals.read(part / "journal.jsonl").entries) > 1 for part in parts)
    summary = merge(parts[::-1], tmp_path / "merged")
    assert results(tmp_path / "merged") == results(made / "whole")
    assert journal_without_times(tmp_path / "merged") == journal_without_times(made / "whole")
    assert as_told(tmp_path / "merged") == as_told(made / "whole")
    assert (summary.found, summary.done, summary.failed) == (13, 12, 1)
    again = run(made / "fields", tmp_path / "merged", report_thresholds=3)
    assert (again.skipped, again.failed) == (12, 1)  # a run like any other: a failed image is retried


def test_an_empty_shard_and_kinds_of_a_whole_run(four: Path, tmp_path: Path) -> None:
    """With eight shards some of four images are empty; COCO is one file for all images."""
    run(four, tmp_path / "whole", save=("coco", "labels"), report=False)
    parts = run_shards(four, tmp_path, 8, save=("coco", "labels"), report=False)
    assert not all(journals.read(part / "journal.jsonl").entries for part in parts)
    merge(parts, tmp_path / "merged", report=False)
    assert results(tmp_path / "merged") == results(tmp_path / "whole")
    assert journal_without_times(tmp_path / "merged") == journal_without_times(tmp_path / "whole")


def test_the_scale_is_that_of_all_images(made: Path, fields: Path, tmp_path: Path, parts: list[Path]) -> None:
    """Cells differ in size from image to image, so the images of one shard alone give another scale."""
    whole = journals.read(made / "whole/journal.jsonl").scales
    alone = dict[str, float]()
    for index, part in enumerate(parts, start=1):
        scales = journals.read(part / "journal.jsonl").scales
        assert scales
        assert scales.items() <= whole.items()
        own = tmp_path / f"own-{index}"
        for image in find_images([fields]):
            if Shard(index, COUNT).has(image.name):
                (own / image.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image.path, own / image.name)
        run(own, tmp_path / f"alone-{index}", report=False)
        alone = journals.read(tmp_path / f"alone-{index}/journal.jsonl").scales
        if any(alone[group] != whole[group] for group in alone):
            return
    raise AssertionError("the images of this test do not tell these scales apart")


def test_an_added_image_moves_no_other(tmp_path: Path) -> None:
    fields = make_fields(tmp_path / "fields")
    parts = run_shards(fields, tmp_path, report=False)
    save(fields / "a/new.png", draw_discs((140, 260), [(20, 20)]))
    (owner,) = [index for index in range(1, COUNT + 1) if Shard(index, COUNT).has("a/new.png")]
    for index, part in enumerate(parts, start=1):
        if index == owner:
            assert run(fields, part, shard=Shard(index, COUNT), report=False).done == 1
    with pytest.raises(UsageError, match=r"13 images .* 14 images|14 images .* 13 images"):
        merge(parts, tmp_path / "merged")
    for index, part in enumerate(parts, start=1):
        assert run(fields, part, shard=Shard(index, COUNT), report=False).done == 0
    assert merge(parts, tmp_path / "merged").found == 14


def test_an_interrupted_merge_is_finished_by_the_next(made: Path, parts: list[Path], tmp_path: Path) -> None:
    seen: list[str] = []

    def stop(result: Any) -> None:
        seen.append(result.image)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "merged", on_result=stop)
    merge(parts, tmp_path / "merged")
    assert results(tmp_path / "merged") == results(made / "whole")
    journal = (tmp_path / "merged/journal.jsonl").read_text()
    assert journal.count('"image":"a/0.png"') == 1


def test_an_edited_file_stays_edited(parts: list[Path], tmp_path: Path) -> None:
    edited = next(path for part in parts for path in (part / "labels").rglob("*.tif"))
    other = next(path for part in parts for path in (part / "labels").rglob("*.tif") if path != edited)
    shutil.copy(other, edited)
    merge(parts, tmp_path / "merged")
    place = next(edited.relative_to(part) for part in parts if edited.is_relative_to(part))
    assert (tmp_path / "merged" / place).read_bytes() == other.read_bytes()


# --- what is refused


def change_run_json(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((part / "run.json").read_text())
    change(told)
    (part / "run.json").write_text(json.dumps(told))


def test_other_settings_models_and_versions_are_refused(fields: Path, tmp_path: Path, parts: list[Path]) -> None:
    one = Shard(1, COUNT)
    run(fields, tmp_path / "rule", shard=one, count_rule="all")
    with pytest.raises(UsageError, match=r"not of the same run .*count rule \(`count_rule`\): all there, half now"):
        merge([tmp_path / "rule", *parts[1:]], tmp_path / "out")
    run(fields, tmp_path / "model", shard=one, backend=DarknessBackend(make_spec(name="other", cell_diameter_px=14.0)))
    with pytest.raises(UsageError, match="model name: other there, stub now"):
        merge([tmp_path / "model", *parts[1:]], tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "library_versions", lambda: {"numpy": "1.0"})
        run(fields, tmp_path / "version", shard=one)
    with pytest.raises(UsageError, match=r"versions numpy: 1\.0 there"):
        merge([tmp_path / "version", *parts[1:]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_repeated_shards_are_refused(fields: Path, tmp_path: Path, parts: list[Path]) -> None:
    with pytest.raises(UsageError, match="1 shard of 3 missing: 2/3; pass all of them"):
        merge([parts[0], parts[2]], tmp_path / "out")
    shutil.copytree(parts[0], tmp_path / "copy")
    with pytest.raises(UsageError, match="are both shard 1/3; pass each shard once"):
        merge([*parts, tmp_path / "copy"], tmp_path / "out")
    run(fields, tmp_path / "of-2", shard=Shard(1, 2))
    with pytest.raises(UsageError, match="expected shards of one run"):
        merge([*parts[1:], tmp_path / "of-2"], tmp_path / "out")
    run(fields, tmp_path / "whole")
    with pytest.raises(UsageError, match="a whole run, not a shard"):
        merge([*parts, tmp_path / "whole"], tmp_path / "out")
    with pytest.raises(UsageError, match="not the output folder of a shard"):
        merge([*parts, fields], tmp_path / "out")


def test_an_unfinished_shard_and_a_missing_file_are_refused(tmp_path: Path, parts: list[Path]) -> None:
    change_run_json(parts[1], lambda told: told.update(status="running"))
    with pytest.raises(UsageError, match="shard 2/3 has not finished"):
        merge(parts, tmp_path / "out")
    change_run_json(parts[1], lambda told: told.update(status="finished"))
    next((parts[2] / "labels").rglob("*.tif")).unlink()
    with pytest.raises(UsageError, match="is missing; start shard 3/3 again"):
        merge(parts, tmp_path / "out")


def test_another_scale_is_refused(fields: Path, tmp_path: Path, parts: list[Path]) -> None:
    scales = dict.fromkeys(journals.read(parts[0] / "journal.jsonl").scales, 1.5)
    run(fields, tmp_path / "other", shard=Shard(1, COUNT), scales=scales)
    with pytest.raises(UsageError, match="run the later shards again with `cellseg-infer --like`"):
        merge([tmp_path / "other", *parts[1:]], tmp_path / "out")


def test_a_folder_of_something_else_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        merge(parts, tmp_path / "out")


def test_a_shard_is_resumed_as_itself_only(fields: Path, parts: list[Path]) -> None:
    with pytest.raises(OutputError, match=r"shard \(`shard`\): 1/3 there, 2/3 now"):
        run(fields, parts[0], shard=Shard(2, COUNT))
    with pytest.raises(OutputError, match=r"shard \(`shard`\): 1/3 there, nothing now"):
        run(fields, parts[0])


def test_the_run_of_one_shard_gives_another_its_scales(
    fields: Path, tmp_path: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = journals.read(parts[0] / "journal.jsonl")
    recorded = RecordedRun(parts[0], first.identity, Path("a.onnx"), Path("a.onnx"), 1, first.scales)
    out = tmp_path / "like"
    run(fields, out, shard=Shard(2, COUNT), report=False, scales=dict.fromkeys(recorded.scales, 1.25))
    told = json.loads((out / "run.json").read_text())["settings"]["scales"]
    assert set(told.values()) == {1.25}
    assert not journals.read(out / "journal.jsonl").scales  # nothing was measured
    recorded.check(journals.read(out / "journal.jsonl").identity)
    assert not caplog.records


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/1000000000000", "-1/3"])
def test_an_impossible_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="`shard` must be"):
        Shard.parse(text)


def test_each_image_is_in_one_shard() -> None:
    names = [f"{number}.png" for number in range(2000)]
    for count in (1, 2, 7):
        sizes = [sum(Shard(index, count).has(name) for name in names) for index in range(1, count + 1)]
        assert sum(sizes) == len(names)
        assert min(sizes) > 0.8 * len(names) / count


def test_the_commands(model: Path, four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from running import infer

    for index in (1, 2):
        code = infer(
            four, "-o", tmp_path / str(index), "--model", model, "--shard", f"{index}/2", "--cell-diameter", 20
        )
        assert code == 0
    capsys.readouterr()
    arguments = [str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(tmp_path / "out")]
    assert console.run(merge_command, [*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 4
    assert console.run(merge_command, [*arguments[1:], "-q"]) == 2
    assert "1 shard of 2 missing: 1/2" in capsys.readouterr().err
    assert infer(four, "-o", tmp_path / "x", "--model", model, "--shard", "3/2") == 2
    assert "--shard must be 1/N to N/N" in capsys.readouterr().err
