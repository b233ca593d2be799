"""MkDocs hooks: pages that live outside docs/ become pages of the site, and links to them follow."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # file in the repository -> page of the site
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cellseg_deploy/models/default.md": "model-card.md",
    "cellseg_deploy/models/smear-open.md": "model-card-open.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
}
SITE_TO_FILE = {page: file for file, page in OUTSIDE.items()}
LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[)#])")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Rewrite links between repository files to links between pages of the site."""
    here = SITE_TO_FILE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)
