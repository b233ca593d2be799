"""Certificates for TLS, by the program openssl."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def authority(folder: Path) -> Callable[[str, int], dict[str, Path]]:
    """Make an authority in ``folder``. Return a function that makes a certificate of it: its name, and for how many
    days from now it is valid, also a negative number; returns the files ``ca``, ``cert`` and ``key``."""

    def openssl(*arguments: object) -> None:
        try:
            subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("no openssl program to make certificates with")

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", 2)

    def make(name: str, days: int) -> dict[str, Path]:
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", days)
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
        return {"ca": folder / "ca.pem", "cert": folder / f"{name}.pem", "key": folder / f"{name}.key"}

    return make
