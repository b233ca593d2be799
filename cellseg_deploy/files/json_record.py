"""JSON files that record which program wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def was_written_by(program: str, record: Path) -> bool:
    """Whether the JSON file ``record`` names ``program`` as its writer; False if the file is missing or invalid."""
    return content_of(record).get("program") == program


def content_of(record: Path) -> dict[str, Any]:
    """JSON object stored in ``record``, or {} if the file is missing or invalid."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
