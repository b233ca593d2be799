"""What every command that measures leaves: three files that agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec


def written_report(out: Path, name: str, kind: type[Any]) -> dict[str, Any]:
    """The JSON in ``out``, after a look at all three files: their names, and that the JSON reads back as a ``kind``
    which makes the Markdown that was written."""
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    content = (out / f"{name}.json").read_bytes()
    assert msgspec.json.decode(content, type=kind).to_markdown() in (out / f"{name}.md").read_text()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(content)
    return found
