"""docs/reliability.md names a test for each case: each of them must exist and be run by ``pytest -m reliability``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from bad_models import BAD_MODELS
from conftest import ROOT
from corpus import CASES

pytestmark = pytest.mark.reliability

PAGE = ROOT / "docs" / "reliability.md"
# file::test, and in brackets which of its cases
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)(?:\[([^`]*)\])?`")


def named() -> list[tuple[str, str, str]]:
    return NAMED.findall(PAGE.read_text(encoding="utf-8"))


def is_mark(node: ast.expr) -> bool:
    """``pytest.mark.reliability``, also as one of several or called."""
    return any(isinstance(part, ast.Attribute) and part.attr == "reliability" for part in ast.walk(node))


def marked_tests(path: Path) -> set[str]:
    """Tests of a file that carry the marker, by their own decorators or by the file's ``pytestmark``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole_file = any(
        isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)
        and is_mark(node.value)
        for node in tree.body
    )
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and (whole_file or any(map(is_mark, node.decorator_list)))
    }


def cases_of(file: str) -> set[str]:
    """What may stand in brackets behind a test of ``file``."""
    if file == "test_reliability_images.py":
        return {f"{case.group}-{case.name}" for case in CASES}
    if file == "test_reliability_models.py":
        return {case.name for case in BAD_MODELS}
    if file == "test_reliability_files.py":
        from test_reliability_files import NAMES, STRANGE

        return {*NAMES, *STRANGE}
    from test_reliability_parameters import REFUSED

    assert file == "test_reliability_parameters.py", f"{file} has no named cases"
    return set(REFUSED)


def rows_of_cases() -> list[str]:
    """Lines of the tables whose first column is the case."""
    rows, inside = list[str](), False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        inside = line.startswith("| case |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| case |", "|---")):
            rows.append(line)
    return rows


def test_every_case_on_the_page_has_a_test() -> None:
    assert len(rows_of_cases()) >= 80
    assert [row for row in rows_of_cases() if not NAMED.search(row)] == []
    kinds = ("images", "files", "models", "parameters")
    assert {f"test_reliability_{kind}.py" for kind in kinds} <= {file for file, _, _ in named()}


@pytest.mark.parametrize("file", sorted({file for file, _, _ in named()}))
def test_every_test_on_the_page_exists_and_is_marked(file: str) -> None:
    (path,) = (ROOT / "tests").rglob(file)
    marked = marked_tests(path)
    for name, case in sorted({(test, case) for where, test, case in named() if where == file}):
        assert name in marked, f"{file}::{name} is missing or lacks the marker reliability"
        assert not case or case in cases_of(file), f"{file}::{name} has no case {case!r}"


def test_a_test_without_the_marker_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text(
        "import pytest\n@pytest.mark.reliability\ndef test_a(): ...\ndef test_b(): ...\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_c(x): ...\n"
    )
    assert marked_tests(path) == {"test_a"}
    path.write_text("import pytest\npytestmark = [pytest.mark.slow, pytest.mark.reliability]\ndef test_b(): ...\n")
    assert marked_tests(path) == {"test_b"}
    path.write_text("import pytest\npytestmark = pytest.mark.slow\ndef test_b(): ...\n")
    assert marked_tests(path) == set()
