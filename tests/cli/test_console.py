"""The library names arguments; the commands name options."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import pytest

from cellseg_deploy.cli import console, evaluate, infer, serve, slide, view

ROOT = Path(__file__).resolve().parents[2] / "cellseg_deploy"
# Commands name options themselves.
EXEMPT = ("cli/", "samples/")
LIBRARY = [path for path in sorted(ROOT.rglob("*.py")) if not path.relative_to(ROOT).as_posix().startswith(EXEMPT)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("give `bit_depth=12`", "give --bit-depth 12"),
        ("`cell_diameter_px='auto'` counts them", "--cell-diameter auto counts them"),
        ("`pixel_size_um` takes micrometres", "--pixel-size takes micrometres"),
        ("`rebuild` belongs to `backend='tensorrt'`", "--rebuild belongs to --backend tensorrt"),
        ("build it again with `rebuild=True`", "build it again with --rebuild"),
        ("start over with `overwrite=True`", "start over with --overwrite"),
        ("scale (`scale` or `cell_diameter_px`)", "scale (--scale or --cell-diameter)"),
        ("saved (`save`)", "saved (--save)"),
        (
            "`cellseg-export verify REF MODEL --record` and `other=1`",
            "`cellseg-export verify REF MODEL --record` and `other=1`",
        ),
    ],
)
def test_arguments_become_options(text: str, words: str) -> None:
    assert console.in_options(text) == words


@pytest.mark.parametrize(
    "name", ["`scale`.png", "a `model`.tif", "my `scale` smear.png", "in/`scale`/`model=x`.tif", "a b/ `save` .png"]
)
def test_a_file_name_is_no_mark(name: str) -> None:
    assert console.printable(name) == name
    assert console.in_options(f"{name}: too large; raise `max_pixels`.") == f"{name}: too large; raise --max-pixels."
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: give `bit_depth=12`", (name,), None)
    assert console._InOptions("%(levelname)s: %(message)s").format(record) == f"WARNING: {name}: give --bit-depth 12"


def test_errors_and_the_log_speak_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging(0)
    logging.getLogger("cellseg_deploy.images").warning("%s: give `bit_depth=12`", "a.tif")
    console.print_error("raise `max_pixels`")
    assert capsys.readouterr().err == "WARNING: a.tif: give --bit-depth 12\nerror: raise --max-pixels\n"


def strings(path: Path) -> list[str]:
    """Texts in the source of ``path``, docstrings left out; of an f-string its fixed parts, with ``{}`` between."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (lone | parts):
            found.append(node.value)
    return found


def test_no_message_of_the_library_names_an_option() -> None:
    named = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in LIBRARY
        for text in strings(path)
        if re.search(r"(?<![\w-])--[a-z]", re.sub(r"`[^`]* [^`]*`", "", text))  # commands are quoted whole
    ]
    assert not named, "\n".join(named)


def test_marked_arguments_are_options_of_a_command() -> None:
    marked = {
        name for path in LIBRARY for text in strings(path) for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", text)
    }
    assert {"bit_depth", "cell_diameter_px", "backend"} <= marked
    commands = [infer.command, serve.command, slide.command, view.command, *evaluate.command.commands.values()]
    options = {option for command in commands for p in command.params for option in p.opts}
    for name in marked:
        assert console.in_options(f"`{name}`") in options, f"{name}: give it a place in console._ARGUMENTS"
