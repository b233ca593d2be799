"""README, pages and what describes the package elsewhere: links lead somewhere, versions agree, nothing is left out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "cellseg_deploy" / "models").glob("*.md")),
    *PAGES,
    *sorted((ROOT / "docs" / "performance-results").glob("*.md")),
]
LINK = re.compile(r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
README_LINES = 110


def without_code(text: str) -> str:
    """Markdown without code blocks and code spans."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{slug}-{n}" if (n := found.count(slug)) else slug)
    return frozenset(found)


def broken_links(path: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for link in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = path.parent / file if file else path
        if not target.is_file():  # pages of the site link to files, not to folders
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            broken.append(f"{link}: {target.name} has no such heading")
    return broken


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# Title\n\n## What's new (2)\n```\n## in code\n```\n## Title\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#whats-new-2) [c](#here) [d](https://x.y/z) [e](there.md#title-1)\n"
        "`[f](nowhere)`\n\n# Here\n"
    )
    assert broken_links(page) == []
    page.write_text("[a](gone.md) [b](there.md#in-code) [c](#nowhere) [d](.) ![e](gone.png)\n")
    assert [line.partition(":")[0] for line in broken_links(page)] == [
        *("gone.md", "there.md#in-code", "#nowhere", ".", "gone.png")
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_nothing_is_a_placeholder(path: Path) -> None:
    assert broken_links(path) == []
    assert "@@" not in path.read_text(encoding="utf-8")


def test_no_page_offers_an_engine_that_cannot_be_opened() -> None:
    """ONNX Runtime is linked against another TensorRT than the one that pip installs next to it."""
    for page in [README, *PAGES]:
        assert not re.search(
            r"`--backend tensorrt`, ONNX Runtime's TensorRT provider|--ort-provider", page.read_text(encoding="utf-8")
        ), page


def test_each_page_is_in_the_index_and_in_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.name != "index.md":
            assert f"]({page.name})" in index, f"add {page.name} to docs/index.md"
        assert f": {page.name}\n" in site, f"add {page.name} to nav in mkdocs.yml"


def test_the_readme_is_short_and_its_python_compiles() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES, "move details to the page in docs/ that owns them"
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_contributing_names_modules_and_functions_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:Where|Who) .+?\? \| (.+?) \| (.*?) ?\|$", text, flags=re.MULTILINE)
    assert len(rows) >= 8
    for modules, functions in rows:
        source = "".join((ROOT / module).read_text(encoding="utf-8") for module in re.findall(r"`(.+?)`", modules))
        for name in re.findall(r"`(.+?)`", functions):
            assert re.search(rf"^ *(?:def|class) {name}\b", source, flags=re.MULTILINE), f"{modules}: {name}"
    for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_commands_are_in_the_readme(command: str) -> None:
    assert command in README.read_text(encoding="utf-8")


def test_the_citation_is_complete_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # what Citation File Format 1.2.0 requires
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["type"] == "software"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", citation["date-released"])
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert citation["version"] == PROJECT["version"]


def test_the_changelog_has_this_version_below_the_unreleased_changes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert headings[:2] == [("Unreleased", ""), (PROJECT["version"], citation["date-released"])]


def test_the_licences_of_all_direct_dependencies_are_listed() -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \| .+ \|$", page, flags=re.MULTILINE))
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    names = {re.split(r"[\s\[<>=!~;]", item, maxsplit=1)[0] for group in groups for item in group}
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names} - {PROJECT["name"]}
    assert set(listed) == wanted, "run: scripts/licences > docs/licences.md"
    assert not [name for name, licence in listed.items() if licence.startswith("not ")]


def test_the_list_of_licences_is_made_by_one_command() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "licences"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert made.partition("\n| `")[0] == page.partition("\n| `")[0]
    assert re.search(r"^\| `numpy` \| .*BSD.* \| base \|$", made, flags=re.MULTILINE)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "site" / "model-card.html").read_text(encoding="utf-8")
    assert 'href="performance.html"' in card  # ../../docs/performance.md in the repository
    assert (tmp_path / "site" / "images" / "sample-overlay.jpg").is_file()
    assert 'src="images/sample-overlay.jpg"' in (tmp_path / "site" / "readme.html").read_text(encoding="utf-8")
