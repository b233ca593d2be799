"""The folder where engines built by ``cellseg-infer`` are kept, so that each is built once.

It is in the platform's user cache folder. Engines are programs: on POSIX the folder must belong to the user and be
writable by nobody else, or nothing in it is opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cellseg_deploy.errors import OutputError

_KEY_VERSION = 1
_PROGRAM = "cellseg-deploy"


def cache_folder(environment: Mapping[str, str] | None = None, platform: str | None = None) -> Path:
    """Return the folder of cached engines: under ``$XDG_CACHE_HOME`` or ``~/.cache``, on Windows ``%LOCALAPPDATA%``, on
    macOS ``~/Library/Caches``. ``environment``, ``platform``: those of this process by default."""
    environment = os.environ if environment is None else environment
    platform = sys.platform if platform is None else platform
    home = Path(environment.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        base = Path(local) if local else home / "AppData" / "Local"
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        # The XDG base directory specification: a relative path is invalid and must be ignored.
        xdg = environment.get("XDG_CACHE_HOME", "")
        base = Path(xdg) if xdg.startswith("/") else home / ".cache"
    return base / _PROGRAM / "engines"


def engine_name(model: str, identity: str, *facts: object) -> str:
    """Return the file name of the engine of network ``identity`` (hex) for ``facts``: all that sets it apart.

    ``facts`` are dataclasses, structs or plain values. ``model``: readable part of the name.
    """
    key = hashlib.sha256(msgspec.json.encode((_KEY_VERSION, identity, *facts), order="deterministic")).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.")[:40] or "model"
    return f"{readable}-{key[:32]}.engine"


def prepare_folder(folder: Path) -> Path:
    """Create ``folder`` for this user alone, or check its owner and permissions. Raises ``OutputError``."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise OutputError(
            f"{folder}: the engine cache folder cannot be created ({error.strerror}); set XDG_CACHE_HOME to a "
            "writable folder"
        ) from error
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise OutputError(
            f"{folder}: other users can write to the engine cache folder, and an engine is a program; "
            f"run: chmod go-w '{folder}' (as its owner), or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder
