"""What is left of an evaluation that failed, was stopped or killed, and what the next one makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_records import identity
from test_evaluate import evaluate, report
from test_evaluate_modes import smears  # noqa: F401  (a fixture)

from cellseg_deploy.cli import evaluate_extras
from cellseg_deploy.errors import OutputError
from cellseg_deploy.evaluate import score
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.files.lock import LOCK_NAME, exclusive
from cellseg_deploy.run.output_folder import held_folder
from cellseg_deploy.run.resume import begin, sweep

NAMES = ["report.json", "table.csv", "anatomy"]
PARTS = {"table.csv": "1", "anatomy/merge-01.jpg": "2", ".cellseg-0123456789abcdef.tmp": "3"}


def killed_while_writing(out: Path, program: str = "us", names: list[str] = NAMES) -> None:
    """Leave in ``out`` what a process leaves that is killed after it wrote parts of its report."""
    words = (
        "import os, signal; from pathlib import Path\n"
        "from cellseg_deploy.evaluate.report_folder import report_folder\n"
        f"out = Path({str(out)!r})\n"
        f"with report_folder(out, {program!r}, {names!r}):\n"
        f"    for name, text in {PARTS!r}.items():\n"
        "        (out / name).parent.mkdir(exist_ok=True); (out / name).write_text(text)\n"
        "    (out / '.cellseg-fedcba9876543210').mkdir(); (out / '.cellseg-fedcba9876543210/page.jpg').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == -signal.SIGKILL
    assert (out / LOCK_NAME).exists()


def there(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_what_a_killed_evaluation_left_is_taken_away(tmp_path: Path) -> None:
    killed_while_writing(tmp_path)
    assert set(PARTS) < set(there(tmp_path))
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "anatomy" / "mine.jpg").touch()
    with pytest.raises(OutputError, match="anatomy: not written by us"), report_folder(tmp_path, "us", NAMES):
        pass
    killed_while_writing(tmp_path / "again")
    with report_folder(tmp_path / "again", "us", NAMES):
        assert there(tmp_path / "again") == [LOCK_NAME]
    assert there(tmp_path) == ["anatomy/mine.jpg", "thesis.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_another_kind_of_report_too(tmp_path: Path) -> None:
    killed_while_writing(tmp_path)
    with report_folder(tmp_path, "us", ["other.json"]):
        (tmp_path / "other.json").write_text('{"program": "us"}')
    assert there(tmp_path) == ["other.json"]


def test_a_killed_second_evaluation_leaves_the_first(tmp_path: Path) -> None:
    with report_folder(tmp_path, "us", NAMES):
        (tmp_path / "report.json").write_text('{"program": "us"}')
    killed_while_writing(tmp_path)
    with report_folder(tmp_path, "us", NAMES):
        assert "report.json" in there(tmp_path)
        assert "table.csv" in there(tmp_path)  # to be replaced


def test_parts_of_another_program_are_not_ours(tmp_path: Path) -> None:
    killed_while_writing(tmp_path, program="they")
    with pytest.raises(OutputError, match="not written by us"), report_folder(tmp_path, "us", NAMES):
        pass
    assert "table.csv" in there(tmp_path)


def test_parts_without_a_lock_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"table\.csv: not written by us"), report_folder(tmp_path, "us", NAMES):
        pass
    assert there(tmp_path) == ["table.csv"]


@pytest.mark.parametrize(
    "note",
    [
        b'{"program": "us", "writes": ["report.json", "../thesis.txt", "sub/table.csv", 3, "table.csv"]}',
        b'{"program": "us", "writes": 3}'.replace(b"3", b'{"table.csv": 1}'),
        b'{"program": "us", "wri',
        b"[1]",
        b"\xff\xfe",
    ],
)
def test_a_note_names_nothing_outside_its_folder(tmp_path: Path, note: bytes) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("years")
    (out / "sub" / "table.csv").write_text("mine")
    (out / LOCK_NAME).write_bytes(note)
    with report_folder(out, "us", NAMES):
        pass
    assert there(tmp_path) == ["out/sub/table.csv", "thesis.txt"]


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "merge-01.jpg").write_text("years")
    out.mkdir()
    (out / "anatomy").symlink_to(theirs)
    (out / LOCK_NAME).write_text('{"program": "us", "writes": ["report.json", "anatomy"]}')
    with report_folder(out, "us", NAMES):
        pass
    assert there(theirs) == ["merge-01.jpg"]


def fail(out: Path, error: type[BaseException]) -> None:
    with report_folder(out, "us", NAMES):
        (out / "table.csv").touch()
        (out / "labels").mkdir(exist_ok=True)
        raise error("stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError])
def test_one_that_fails_takes_its_parts_with_it(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path, error)
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]
    with report_folder(tmp_path, "us", NAMES):
        (tmp_path / "report.json").write_text('{"program": "us"}')
    with pytest.raises(error):
        fail(tmp_path, error)
    assert there(tmp_path) == ["report.json", "table.csv"]


def test_a_lock_remembers_the_killed_owner_s_note_and_no_other(tmp_path: Path) -> None:
    with exclusive(tmp_path) as held:
        assert held.left_behind == b""
        held.note(b"a longer note")
        held.note(b"short")
        assert (tmp_path / LOCK_NAME).read_bytes() == b"short"
        with pytest.raises(ValueError, match="at most"):
            held.note(b" " * 100_000)
    with exclusive(tmp_path) as held:
        assert held.left_behind == b""


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
    """Killed between anatomy.csv and metrics.json; and stopped there, which leaves nothing at all."""
    out = smears / "out"
    masks = ["--labels", smears / "masks", "--masks", smears / "masks", "--anatomy", "-q", "-o", out]
    words = (
        "import os, signal, sys; from cellseg_deploy.evaluate import score as evaluation\n"
        "from cellseg_deploy.cli.evaluate import main\n"
        "evaluation.write_report = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", words, *map(str, masks)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert "anatomy.csv" in there(out)
    assert "metrics.json" not in there(out)
    assert evaluate(*masks) == 0
    assert report(out)["f1"] == 1
    assert LOCK_NAME not in there(out)
    assert "killed" not in capsys.readouterr().err

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "write_report", stopped)
    fresh = smears / "fresh"
    assert evaluate(*masks[:-1], fresh) == 130
    assert there(fresh) == []
    assert evaluate_extras.ANATOMY_CSV in there(out)
