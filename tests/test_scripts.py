"""The scripts, with stand-ins for the tools they call: what they run, when, and what stops them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SLOW

PROGRAMS = (
    "scripts/check",
    "scripts/demo",
    "scripts/night",
    "scripts/release",
    "scripts/test",
    "scripts/types",
    ".ci/run",
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the scripts are for bash")

# A Python that answers questions about its version truly, makes hollow environments and only notes what pip is to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; touch "$4/pyvenv.cfg" ;;
    "-m pip") echo "pip ${*:3}" >>"$LOG" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""
FAKE_TOOL = """#!/usr/bin/env bash
{ basename "$0"; printf '<%s>' "$@"; } | paste -sd ' ' >>"$LOG"
[[ "$(basename "$0")" != "$FAILING" ]]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts, pyproject.toml and, in ``tools``, stand-ins for all that the scripts call."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("python3", "ruff", "mypy", "pytest", "chromium"):
        program = tmp_path / "tools" / name
        program.write_text(FAKE_PYTHON if name == "python3" else FAKE_TOOL)
        program.chmod(0o755)
    return tmp_path


def run(checkout: Path, *command: str, path: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": path or f"{checkout / 'tools'}:/usr/bin:/bin",
        "LOG": str(checkout / "log"),
        "FAILING": "",
        "REAL_PYTHON": sys.executable,
        **variables,
    }
    program = str(checkout / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def calls(checkout: Path) -> list[str]:
    """What the stand-ins were called with since the last look."""
    log = checkout / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_are_executable_and_stop_at_the_first_error(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(ROOT / name, os.X_OK), f"chmod +x {name}"
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_check_runs_every_tool_and_hands_arguments_to_pytest(checkout: Path) -> None:
    result = run(checkout, "scripts/check", "-k", "two words")
    assert result.returncode == 0, result.stderr
    assert calls(checkout) == [
        "ruff <check><.>",
        "ruff <format><--check><.>",
        "mypy <>",
        "pytest <-m><not slow and not night><-k><two words>",
    ]


@pytest.mark.parametrize(
    ("script", "choice"),
    [
        ("scripts/test", "<-m><not night><--durations=25>"),
        (".ci/run", "<-m><not night><--durations=25>"),
        ("scripts/night", "<-m><not night><--durations=25><-m><night>"),
    ],
)
def test_the_last_choice_of_tests_holds(checkout: Path, script: str, choice: str) -> None:
    assert run(checkout, script).returncode == 0
    assert calls(checkout)[-1] == f"pytest <-m><not slow and not night>{choice}"


def test_slow_rooms_and_modules_exist() -> None:
    assert [name for name in SLOW if not (ROOT / "tests" / name).exists()] == []


def test_pytest_obeys_the_last_choice(tmp_path: Path) -> None:
    """What the scripts rely on."""
    words = ("-m", "not slow and not night", "-m", "not night", "-m", "night")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.night\ndef test_night(): ...\ndef test_day(): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, "-v", *words, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "::test_night PASSED" in result.stdout
    assert "1 passed, 1 deselected" in result.stdout


FAKE_APT = """#!/usr/bin/env bash
echo "apt-get ${@: -1}" >>"$LOG"
[[ "${@: -1}" != "$FAILING" ]] || exit 100
[[ "${@: -1}" == chromium && "$FAILING" != silently ]] || exit 0
echo "#!/bin/sh" >"$TOOLS/chromium"
chmod +x "$TOOLS/chromium"
"""


@pytest.mark.parametrize(
    ("uid", "failing", "asked", "said"),
    [
        ("0", "", ["update", "chromium"], "Installed Chromium for the tests of the pages"),
        ("1000", "", [], "No Chromium, and no right to install it: tests of the pages are skipped"),
        ("0", "update", ["update"], "Chromium cannot be installed here: tests of the pages are skipped"),
        ("0", "chromium", ["update", "chromium"], "Chromium cannot be installed here"),
        ("0", "silently", ["update", "chromium"], "Chromium cannot be installed here"),
    ],
)
def test_ci_installs_a_browser_where_it_may_and_runs_the_tests_in_any_case(
    checkout: Path, uid: str, failing: str, asked: list[str], said: str
) -> None:
    tools = checkout / "tools"
    (tools / "chromium").unlink()
    # All that the scripts call, but no chromium of this machine.
    for name in ("bash", "basename", "cat", "chmod", "cp", "dirname", "env", "ln", "mkdir", "paste", "rm", "timeout"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tools / "touch").symlink_to(str(shutil.which("touch")))
    for name, text in {"id": f"#!/usr/bin/env bash\necho {uid}\n", "apt-get": FAKE_APT}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    result = run(checkout, ".ci/run", path=str(tools), FAILING=failing, TOOLS=str(tools))
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in (result.stdout + result.stderr).splitlines() if "Chromium" in line]
    assert line.startswith(said)
    made = calls(checkout)
    assert made[: len(asked)] == [f"apt-get {word}" for word in asked]
    assert made[-1].startswith("pytest ")
    assert sum("apt-get" in line for line in made) == len(asked)


@pytest.mark.parametrize(("tool", "calls_made"), [("ruff", 1), ("mypy", 3), ("pytest", 4)])
def test_check_fails_where_a_tool_fails(checkout: Path, tool: str, calls_made: int) -> None:
    assert run(checkout, "scripts/check", FAILING=tool).returncode != 0
    assert len(calls(checkout)) == calls_made


def test_check_names_the_missing_tool(checkout: Path) -> None:
    (checkout / "tools" / "mypy").unlink()
    result = run(checkout, "scripts/check")
    assert result.returncode == 8
    assert "mypy is not on PATH" in result.stderr
    assert calls(checkout) == []


def test_types_sees_the_rooms_under_their_installed_names(checkout: Path) -> None:
    for room in ("train", "export", "benchmarks"):
        (checkout / room).mkdir()
    (checkout / "tools" / "mypy").write_text('#!/usr/bin/env bash\nls -d "$MYPYPATH"/*/. >>"$LOG"\n')
    for _ in range(2):  # links may be there already
        assert run(checkout, "scripts/types").returncode == 0
        names = [Path(line).parts[-1] for line in calls(checkout)]
        assert names == ["cellseg_benchmarks", "cellseg_export", "cellseg_train"]
    assert not list((checkout / "train").iterdir()), "a link was made within the room, not anew"


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_test_installs_once_and_again_when_the_project_changes(checkout: Path, script: str) -> None:
    pip = "pip install --quiet --disable-pip-version-check --editable .[dev]"
    first = run(checkout, script)
    assert first.returncode == 0, first.stderr
    assert pip in calls(checkout)
    assert run(checkout, script).returncode == 0
    second = calls(checkout)
    assert pip not in second
    assert any(line.startswith("pytest ") for line in second)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert run(checkout, script).returncode == 0
    assert pip in calls(checkout)


def test_test_installs_again_after_an_installation_that_failed(checkout: Path) -> None:
    broken = FAKE_PYTHON.replace('>>"$LOG" ;;', '>>"$LOG"; [[ "$3" != install ]] ;;')
    assert broken != FAKE_PYTHON
    (checkout / "tools" / "python3").write_text(broken)
    assert run(checkout, "scripts/test").returncode != 0
    assert not any(line.startswith("pytest") for line in calls(checkout))
    (checkout / ".venv/bin/python").write_text(FAKE_PYTHON)
    assert run(checkout, "scripts/test").returncode == 0
    assert any("install" in line for line in calls(checkout))


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test"])
@pytest.mark.parametrize("version", ["3.10.2", "3.14.0"])
def test_a_python_that_does_not_fit_is_named(checkout: Path, script: str, version: str) -> None:
    """The script's own question is asked, of a Python that says it is another version."""
    pretence = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 'final', 0); exec(sys.argv[1])"
    (checkout / "tools" / "python3").write_text(
        f"""#!/usr/bin/env bash
[[ "$1" == --version ]] && echo "Python {version}" && exit
exec "$REAL_PYTHON" -c "{pretence}" "$2"
"""
    )
    result = run(checkout, script)
    assert result.returncode == 2
    assert f"Python {version}" in result.stderr
    assert "PYTHON=" in result.stderr


def test_a_python_that_is_not_there_is_named(checkout: Path) -> None:
    result = run(checkout, "scripts/test", PYTHON="python-of-nobody")
    assert result.returncode == 2
    assert "python-of-nobody was not found" in result.stderr


def test_demo_leaves_a_folder_alone_that_it_did_not_make(checkout: Path) -> None:
    (checkout / "demo-out").mkdir()
    (checkout / "demo-out" / "results.txt").write_text("mine")
    result = run(checkout, "scripts/demo")
    assert result.returncode == 6
    assert "was not made by this script" in result.stderr
    assert (checkout / "demo-out" / "results.txt").read_text() == "mine"
    assert not (checkout / ".venv-demo").exists()


def test_release_leaves_earlier_files_alone(checkout: Path) -> None:
    (checkout / "dist").mkdir()
    result = run(checkout, "scripts/release")
    assert (result.returncode, calls(checkout), list((checkout / "dist").iterdir())) == (6, [], [])
    assert "dist exists; move it away" in result.stderr


def test_gpu_check_goes_on_without_tensorrt(checkout: Path) -> None:
    """NVIDIA's index is not reached from every network."""
    broken = FAKE_PYTHON.replace('>>"$LOG" ;;', '>>"$LOG"; [[ "$*" != *tensorrt* ]] ;;')
    broken = broken.replace('exec "$REAL_PYTHON" "$@"', '[[ "$2" == *gpu_check ]] || exec "$REAL_PYTHON" "$@"')
    (checkout / "tools" / "python3").write_text(broken)
    (checkout / "tools" / "nvidia-smi").write_text("#!/usr/bin/env bash\n")
    (checkout / "tools" / "nvidia-smi").chmod(0o755)
    result = run(checkout, "scripts/gpu-check")
    assert result.returncode == 0, result.stderr
    assert "[tensorrt] could not be installed: its parts of the check stay open" in result.stderr
    assert "[trt-check]" not in result.stderr
    assert [line.split()[-1] for line in calls(checkout)] == ["pytest>=8.3", ".[tensorrt]", ".[trt-check]"]


def test_an_environment_folder_that_is_none_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "notes.txt").write_text("mine")
    result = run(checkout, "scripts/test")
    assert result.returncode == 6
    assert (checkout / ".venv" / "notes.txt").read_text() == "mine"
