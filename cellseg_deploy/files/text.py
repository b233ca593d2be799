"""Text files that people hand in."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import DataError


def read_text(path: Path, expected: str) -> str:
    """Return the UTF-8 text in ``path``, without a byte order mark. Raises ``DataError``, which names ``expected``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); expected {expected}") from error
