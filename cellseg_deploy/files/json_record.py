"""JSON files that say which program wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def was_written_by(program: str, record: Path) -> bool:
    """Whether ``record``, a JSON file, says that ``program`` wrote it; False if it is missing or something else."""
    return content_of(record).get("program") == program


def content_of(record: Path) -> dict[str, Any]:
    """Of ``record``, a JSON file; empty if it is missing or something else."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
