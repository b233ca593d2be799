"""A part of a run, for jobs that know nothing of each other: ``--shard 2/4`` is the second of four.

A hash of an image's name decides its shard, so images that are added or removed later do not move the others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cellseg_deploy.errors import UsageError

MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """Shard ``index`` of ``count``, from 1. Raises ``UsageError`` for an impossible one."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count <= MAX_SHARDS:
            raise UsageError(f"`shard` must be 1/N to N/N with N at most {MAX_SHARDS}, got {self}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that ``text`` names: ``2/4``. Raises ``UsageError``."""
        if not (found := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)):
            raise UsageError(f"`shard` must be I/N, such as 2/4 for the second of four, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def has(self, image: str) -> bool:
        """Whether the image named ``image`` belongs to this shard.

        >>> [Shard(index, 2).has("a.png") for index in (1, 2)]
        [True, False]
        """
        digest = hashlib.sha256(os.fsencode(image)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def record_of(shard: Shard, names: Iterable[str]) -> dict[str, Any]:
    """Return what run.json records of ``shard``, one of the run over all images ``names``, for ``merge``."""
    names = sorted(names)
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()
    return {"index": shard.index, "count": shard.count, "images_found": len(names), "names_sha256": digest}
