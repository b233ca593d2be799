"""Comparison of two forms of one network."""

from __future__ import annotations

from cellseg_deploy.parity.compare import ParityPolicy, ParityReport, compare, policy_for

__all__ = ["ParityPolicy", "ParityReport", "compare", "policy_for"]
