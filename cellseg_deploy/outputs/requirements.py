"""Optional packages, installed by an extra of this package: checked before the job that needs them begins."""

from __future__ import annotations

import importlib.util

from cellseg_deploy.errors import BackendUnavailableError


def require_packages(extra: str, *names: str) -> None:
    """Raise ``BackendUnavailableError`` with the install command if one of the packages ``names`` is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"missing packages: {', '.join(missing)}; run: pip install 'cellseg-deploy[{extra}]'"
        )
