"""What a part of ``gpu-check`` found: claims with a verdict, facts, rows and tables, kept on disk as they come.

A *claim* is a sentence of this project about GPUs: ``shown``, ``refuted``, or ``open`` if it could not be tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from cellseg_deploy.files.atomic import write_bytes

Verdict = Literal["shown", "refuted", "open"]
Cell = str | int | float | bool | None


class Claim(msgspec.Struct, frozen=True):
    """A sentence, what became of it, and the figures or the reason."""

    sentence: str
    verdict: Verdict
    evidence: str


class Content(msgspec.Struct):
    """All that a part found. ``tables``: Markdown by title. ``rows``: a table of the part's own, one mapping a row."""

    claims: list[Claim] = []
    facts: dict[str, Any] = {}
    rows: list[dict[str, Cell]] = []
    tables: dict[str, str] = {}


class Findings:
    """Content that is written to a file at each change: what was found stays if the process is killed."""

    def __init__(self, path: Path) -> None:
        self.content = Content()
        self._path = path
        self._save()

    def claim(self, sentence: str, verdict: Verdict, evidence: str) -> None:
        self.content.claims.append(Claim(sentence, verdict, one_line(evidence)))
        print(f"{verdict}: {sentence}: {one_line(evidence)}", flush=True)
        self._save()

    def fact(self, name: str, value: Any) -> None:
        self.content.facts[name] = value
        self._save()

    def row(self, **cells: Cell) -> None:
        """Add a row; all rows of a part must have the same keys."""
        self.content.rows.append(cells)
        self._save()

    def table(self, title: str, markdown: str) -> None:
        self.content.tables[title] = markdown
        self._save()

    def _save(self) -> None:
        text = msgspec.json.encode(self.content, enc_hook=str)
        write_bytes(self._path, msgspec.json.format(text, indent=2) + b"\n")


def read_content(path: Path) -> Content:
    """Return what is in the file ``path``; nothing if the part was killed before it began."""
    return msgspec.json.decode(path.read_bytes(), type=Content) if path.is_file() else Content()


def one_line(text: str, most: int = 500) -> str:
    """Return ``text`` on one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."
