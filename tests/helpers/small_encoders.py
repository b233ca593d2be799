"""Encoders of timm in their real classes, made small enough for a test."""

from __future__ import annotations

from typing import Any

import pytest
import timm


def shrink_encoders(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Let timm build every model with ``sizes`` (``depth``, ``embed_dim``, ``num_heads``) instead of its own."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        return create(name, **(options | sizes))

    monkeypatch.setattr(timm, "create_model", small)
