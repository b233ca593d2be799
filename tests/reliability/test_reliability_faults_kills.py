"""SIGKILL at random moments and between any two calls that change the folder: nothing torn, lost or done twice."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults import (
    BAD,
    ForkServer,
    check_nothing_is_torn,
    done_lines,
    files,
    finished_files,
    left_overs,
    linux,
    make_images,
    results,
    say,
)

from cellseg_deploy.run.journal import JOURNAL

pytestmark = [pytest.mark.reliability, linux]
KILLS, KILLS_BY_DAY = 100, 12
IMAGES = 8
EACH_BY_DAY = 9
"""By day every ninth call that changes the folder is killed, at night each."""
SEED = 20_261_123


def check_after_a_kill(out: Path, whole: dict[str, bytes], before: dict[str, tuple[int, int]]) -> None:
    """Nothing torn, nothing said to be done twice, and what was finished ``before`` was not touched."""
    check_nothing_is_torn(out, whole)
    assert set(done_lines(out).values()) <= {1}
    assert before.items() <= finished_files(out).items()


def test_a_few_random_kills(server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_kills(server, tmp_path, capsys, KILLS_BY_DAY)


@pytest.mark.night
def test_a_hundred_random_kills(server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_kills(server, tmp_path, capsys, KILLS)


def random_kills(server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int) -> None:
    """Kill and resume runs, each until it was left in peace to its end, until ``most`` were killed.

    Half of the kills come from outside at a moment of time, half at a call that changes the folder, on a slow machine
    as on a fast one.
    """
    images = make_images(tmp_path / "in", IMAGES)
    n_calls = len(server.trace(images, tmp_path / "first"))
    start = time.monotonic()
    assert server.run(images, tmp_path / "whole").code == 0
    seconds = time.monotonic() - start
    whole, expected = files(tmp_path / "whole"), results(tmp_path / "whole")
    dice = random.Random(SEED)
    kills, runs, at_work = 0, 0, 0
    while kills < most:
        out = tmp_path / f"out{runs}"
        runs += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            before = finished_files(out)
            at = dice.randint(1, n_calls) if kills % 2 and kills < most else 0
            run = server.start(images, out, fault={"action": "kill", "at": at})
            if kills % 2 == 0 and kills < most and not run.ended_within(dice.uniform(0, seconds)):
                run.signal(signal.SIGKILL)
            ended = run.wait()
            code = ended.code
            check_after_a_kill(out, whole, before)
            kills += code == -signal.SIGKILL
            at_work += code == -signal.SIGKILL and 0 < len(done_lines(out)) < IMAGES
        assert code == 0, ended.said
        assert results(out) == expected
        assert set(done_lines(out).values()) == {1}
        assert len(done_lines(out)) == IMAGES
        assert left_overs(out) == []
    assert at_work >= most / 10  # else the moments were badly chosen, and little is proved
    say(
        capsys,
        f"{kills} random SIGKILLs ({at_work} with some images done) of {runs} runs, all resumed: same files",
    )


@pytest.mark.parametrize("step", [EACH_BY_DAY, pytest.param(1, marks=pytest.mark.night)])
def test_a_kill_at_each_call_that_changes_the_folder(
    server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Also in the middle of each write. A failed image is tried again, and fails again."""
    images = make_images(tmp_path / "in", 3, bad=True)
    calls = server.trace(images, tmp_path / "whole", code=3)
    assert {call for call, _ in calls} >= {"open", "write", "fsync", "rename", "mkdir", "remove"}
    assert not [path for call, path in calls if call == "unwatched open"]
    whole, expected = files(tmp_path / "whole"), results(tmp_path / "whole")
    moments = range(1, len(calls) + 1, step)
    for at in moments:
        out = tmp_path / f"out{at}"
        ended = server.run(images, out, fault={"action": "kill", "at": at})
        assert ended.code == -signal.SIGKILL, ended.said
        check_after_a_kill(out, whole, {})
        before = finished_files(out)
        ended = server.run(images, out)
        assert ended.code == 3, f"killed at {calls[at - 1]}: {ended.said}"
        check_after_a_kill(out, whole, before)
        assert results(out) == expected, f"killed at {calls[at - 1]}"
        assert BAD not in done_lines(out)
        assert left_overs(out) == []
    say(capsys, f"SIGKILL at {len(moments)} of {len(calls)} calls that change the folder, all resumed: same files")


@pytest.mark.parametrize("step", [EACH_BY_DAY, pytest.param(1, marks=pytest.mark.night)])
def test_a_kill_while_an_earlier_run_is_replaced(
    server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """``--overwrite``, killed at each call: what is left is never taken for the new run before its journal is there."""
    images = make_images(tmp_path / "in", 1)
    first = tmp_path / "first"
    assert server.run(images, first, "--task", "confluence").code == 0
    calls = server.trace(images, Path(shutil.copytree(first, tmp_path / "whole")), "--overwrite")
    whole, expected = files(tmp_path / "whole"), results(tmp_path / "whole")
    new_journal = calls.index(("rename", JOURNAL)) + 1
    moments = sorted({*range(1, len(calls) + 1, step), new_journal, new_journal + 1})
    for at in moments:
        out = Path(shutil.copytree(first, tmp_path / f"out{at}"))
        ended = server.run(images, out, "--overwrite", fault={"action": "kill", "at": at})
        assert ended.code == -signal.SIGKILL, ended.said
        is_new = at > new_journal
        if is_new:
            check_nothing_is_torn(out, whole)
        ended = server.run(images, out, *(() if is_new else ("--overwrite",)))
        assert ended.code == 0, f"killed at {calls[at - 1]}: {ended.said}"
        assert results(out) == expected, f"killed at {calls[at - 1]}"
        assert left_overs(out) == []
    say(
        capsys,
        f"SIGKILL at {len(moments)} of {len(calls)} calls of a run that replaces another, all repeated: same files",
    )


@pytest.mark.parametrize("step", [EACH_BY_DAY, pytest.param(1, marks=pytest.mark.night)])
def test_a_kill_while_a_changed_image_is_done_again(
    server: ForkServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Its files, the former and the new ones, are never taken for edited ones."""
    images, first = make_images(tmp_path / "in", 2), tmp_path / "first"
    assert server.run(images, first).code == 0
    names = sorted(path.name for path in images.iterdir() if path.is_file())
    shutil.copy(images / names[1], images / names[0])
    calls = server.trace(images, Path(shutil.copytree(first, tmp_path / "whole")))
    expected = results(tmp_path / "whole")
    moments = range(1, len(calls) + 1, step)
    for at in moments:
        out = Path(shutil.copytree(first, tmp_path / f"out{at}"))
        ended = server.run(images, out, fault={"action": "kill", "at": at})
        assert ended.code == -signal.SIGKILL, ended.said
        ended = server.run(images, out)
        assert ended.code == 0, f"killed at {calls[at - 1]}: {ended.said}"
        assert results(out) == expected, f"killed at {calls[at - 1]}"
        assert left_overs(out) == []
    kills = f"{len(moments)} of {len(calls)} calls"
    say(capsys, f"SIGKILL at {kills} while a changed image is done again, all resumed: same files")
