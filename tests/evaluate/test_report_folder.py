"""What is left of an evaluation that failed, was stopped or killed, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_records import identity
from test_evaluate import evaluate, report
from test_evaluate_modes import smears  # noqa: F401  (a fixture)

from cellseg_deploy.errors import OutputError
from cellseg_deploy.evaluate import score
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.files import atomic
from cellseg_deploy.files.lock import LOCK_NAME
from cellseg_deploy.run.output_folder import held_folder, sweep
from cellseg_deploy.run.resume import begin

NAMES = ["report.json", "table.csv", "figure.png", "anatomy"]
RECORD = '{"program": "us"}'


def write_parts(place: Path, text: str) -> None:
    """All of a report but its figure, with ``text`` in each part."""
    (place / "anatomy").mkdir()
    for name in ("table.csv", "anatomy/merge-01.jpg", "labels.tif"):
        (place / name).write_text(text)
    (place / "report.json").write_text(RECORD)


def write_report(out: Path, text: str = "first") -> None:
    with report_folder(out, "us", NAMES) as place:
        write_parts(place, text)


def killed(out: Path, moves: int) -> None:
    """A second report, whose process is killed after ``moves`` of its files were moved; below 0: before the end."""
    words = (
        "import os, signal, sys; from pathlib import Path\n"
        "from cellseg_deploy.evaluate import report_folder\n"
        "from cellseg_deploy.files import atomic\n"
        f"from test_report_folder import NAMES, write_parts\n"
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"move, left = atomic.move, iter([atomic.move] * {max(moves, 0)} + [kill])\n"
        "atomic.move = lambda *paths: next(left)(*paths)\n"
        f"with report_folder.report_folder(Path({str(out)!r}), 'us', NAMES) as place:\n"
        "    write_parts(place, 'second')\n"
        f"    {moves} < 0 and kill()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", words], env=environment, check=False).returncode == -signal.SIGKILL
    assert (out / LOCK_NAME).exists()


def there(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def texts(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in there(out) if not name.startswith(".")}


def parts(text: str) -> dict[str, str]:
    return {**dict.fromkeys(("anatomy/merge-01.jpg", "labels.tif", "table.csv"), text), "report.json": RECORD}


def test_nothing_has_its_name_before_all_is_written(tmp_path: Path) -> None:
    with report_folder(tmp_path, "us", NAMES) as place:
        write_parts(place, "first")
        assert texts(tmp_path) == {}
    assert texts(tmp_path) == parts("first")
    assert there(tmp_path) == sorted(parts("first"))


def test_one_that_is_killed_at_work_leaves_the_earlier_report(tmp_path: Path) -> None:
    killed(tmp_path / "new", moves=-1)
    assert texts(tmp_path / "new") == {}
    write_report(tmp_path / "new")
    assert there(tmp_path / "new") == sorted(parts("first"))  # nor is anything left of its workspace
    write_report(tmp_path / "old")
    killed(tmp_path / "old", moves=-1)
    assert texts(tmp_path / "old") == parts("first")


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_one_that_is_killed_while_files_are_moved_says_so(tmp_path: Path, moves: int) -> None:
    """The last of the four is the record."""
    write_report(tmp_path)
    killed(tmp_path, moves)
    found = texts(tmp_path)
    assert json.loads(found.pop("report.json")) == {"program": "us", "complete": False}
    assert list(found.values()).count("second") == moves
    write_report(tmp_path, "third")
    assert texts(tmp_path) == parts("third")
    assert there(tmp_path) == sorted(parts("third"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError])
def test_one_that_fails_leaves_the_earlier_report(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with report_folder(tmp_path, "us", NAMES) as place:
            write_parts(place, "second")
            raise error("stopped")

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []
    write_report(tmp_path)
    with pytest.raises(error):
        fail()
    assert texts(tmp_path) == parts("first")


def test_a_signal_waits_until_all_files_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = atomic.move

    def moved(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        move(source, target)

    monkeypatch.setattr(atomic, "move", moved)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path)
    assert texts(tmp_path) == parts("first")


def test_what_the_new_report_lacks_goes_and_other_files_stay(tmp_path: Path) -> None:
    write_report(tmp_path)
    for name in ("thesis.txt", "anatomy/mine.jpg", "figure.png"):
        (tmp_path / name).write_text("mine")
    with report_folder(tmp_path, "us", NAMES) as place:
        (place / "report.json").write_text(RECORD)
    assert there(tmp_path) == ["anatomy/mine.jpg", "labels.tif", "report.json", "thesis.txt"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"program": "they"}')
    with pytest.raises(OutputError, match=f"{name}: not written by us"):
        write_report(tmp_path)
    assert there(tmp_path) == [name]


@pytest.mark.parametrize("linked", ["anatomy", "labels"])
def test_a_linked_folder_is_never_written_to(tmp_path: Path, linked: str) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "merge-01.jpg").write_text("years")
    write_report(out)
    for path in (out / "anatomy").iterdir():
        path.unlink()
    (out / "anatomy").rmdir()
    (out / linked).symlink_to(theirs)

    def write_labelled() -> None:
        with report_folder(out, "us", NAMES) as place:
            write_parts(place, "second")
            (place / "labels").mkdir()
            (place / "labels" / "a.tif").write_text("second")

    with pytest.raises(OutputError, match=f"{linked}: a link that leads outside the output folder"):
        write_labelled()
    assert texts(theirs) == {"merge-01.jpg": "years"}
    assert (out / "report.json").read_text() == RECORD


def test_a_run_that_was_killed_before_its_first_file_leaves_a_free_folder(tmp_path: Path) -> None:
    (tmp_path / ".cellseg-0123456789abcdef.tmp").touch()
    abandoned = tmp_path / ".cellseg-0123456789abcdef"
    abandoned.mkdir()
    (abandoned / "x").touch()
    (tmp_path / LOCK_NAME).touch()
    with held_folder(tmp_path):
        assert begin(tmp_path, identity(), overwrite=False).kind == "fresh"
        sweep(tmp_path, ())
        assert there(tmp_path) == [LOCK_NAME]
    os.mkdir(tmp_path / ".hidden")  # noqa: PTH102
    with pytest.raises(OutputError, match="not empty"):
        begin(tmp_path, identity(), overwrite=False)


def test_the_command_goes_on_where_it_was_killed(
    smears: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed between anatomy.csv and metrics.json, and stopped there: neither leaves anything of itself."""
    out = smears / "out"
    masks = ["--labels", smears / "masks", "--masks", smears / "masks", "--anatomy", "-q", "-o", out]
    words = (
        "import os, signal, sys; from cellseg_deploy.evaluate import score as evaluation\n"
        "from cellseg_deploy.cli.evaluate import main\n"
        "evaluation.write_report = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", words, *map(str, masks)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(name.endswith("/anatomy.csv") for name in there(out))
    assert texts(out) == {}
    assert evaluate(*masks) == 0
    assert report(out)["f1"] == 1
    assert there(out) == ["anatomy.csv", "metrics.csv", "metrics.json"]
    assert "killed" not in capsys.readouterr().err

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "write_report", stopped)
    fresh = smears / "fresh"
    assert evaluate(*masks[:-1], fresh) == 130
    assert there(fresh) == []
    assert there(out) == ["anatomy.csv", "metrics.csv", "metrics.json"]
