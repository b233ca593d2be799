"""Compiled networks kept between starts, each verified by a hash of its bytes.

OpenVINO trusts the content of its own cache: a few flipped bytes changed counts, or crashed the process at every
start. So the compiled network is exported and kept here: 32 bytes of SHA-256, then the network. A damaged network is
discarded and compiled again. While a process opens a network, it holds a lock, and a marker is next to the network. A
marker without a held lock means that opening the network ended a process, and the network is discarded too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.backends.engine_cache import cache_folder, prepare_folder
from cellseg_deploy.errors import OutputError, OutputInUseError
from cellseg_deploy.files.atomic import remove, write_bytes, writing
from cellseg_deploy.files.lock import exclusive

SUFFIX = ".compiled"
_HASH_BYTES = 32
_VERSION = 1
_log = logging.getLogger(__name__)


class CompiledCache:
    """The location of one compiled network."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._marker = path.with_suffix(".opening")

    @classmethod
    def of(cls, folder: Path | None, *facts: object) -> CompiledCache | None:
        """Return the location in ``folder`` (None: the user's cache) for ``facts``: all that distinguishes the network.

        None if the folder is unavailable: the network is then compiled at each start.
        """
        try:
            folder = prepare_folder(cache_folder().with_name("openvino") if folder is None else folder)
        except OutputError as error:
            _log.warning("compiled networks are not cached, so each start takes longer: %s", error)
            return None
        key = hashlib.sha256(msgspec.json.encode((_VERSION, *facts), order="deterministic")).hexdigest()
        return cls(folder / f"{key[:32]}{SUFFIX}")

    def open(self, load: Callable[[bytes], Any]) -> Any | None:
        """Return what ``load`` makes of the kept network; None if the network is missing or damaged."""
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content[_HASH_BYTES:]).digest() != content[:_HASH_BYTES]:
                self._discard("its bytes differ from those written")
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s: the compiled network cannot be read (%s); compiling it again", self.path, error.strerror)
            return None
        try:
            with exclusive(self.path.parent, f"{self._marker.name}-lock"):
                if self._marker.exists():
                    self._discard("an earlier start did not finish opening it")
                    remove(self._marker)
                    return None
                with writing(self._marker):
                    self._marker.touch()
                try:
                    return self._loaded(content, load)
                finally:
                    with contextlib.suppress(OSError):  # a read-only disk: the next start compiles again
                        self._marker.unlink(missing_ok=True)
        except OutputInUseError:  # another process is opening it, and its marker covers both
            return self._loaded(content, load)
        except OutputError as error:
            _log.warning("%s: the compiled network cannot be opened safely (%s); compiling it again", self.path, error)
            return None

    def keep(self, network: bytes) -> None:
        """Keep ``network`` for the next start; if it cannot be written, only log that."""
        try:
            write_bytes(self.path, hashlib.sha256(network).digest() + network)
        except OutputError as error:
            _log.warning("the compiled network was not cached, so the next start takes longer: %s", error)

    def _loaded(self, content: bytes, load: Callable[[bytes], Any]) -> Any | None:
        try:
            return load(content[_HASH_BYTES:])
        except Exception as error:  # from another OpenVINO build; the message text varies
            self._discard(f"OpenVINO refuses it ({error})")
            return None

    def _discard(self, why: str) -> None:
        _log.warning("%s: discarding the compiled network: %s; compiling it again", self.path, why)
        self.path.unlink(missing_ok=True)
