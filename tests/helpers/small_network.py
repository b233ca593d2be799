"""Hosts of a network of their own: network namespaces, joined by a bridge in one more. No other network is reached."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class SmallNetwork:
    """``addresses``: of each host by name."""

    def __init__(self, names: Sequence[str], folder: Path, stack: ExitStack) -> None:
        self.addresses = {name: f"10.99.0.{number}" for number, name in enumerate(names, start=1)}
        self._folder, self._stack = folder, stack
        self._bridge = self._add("bridge")
        ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "br0", "up")
        for name, address in self.addresses.items():
            host = self._add(name)
            ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", f"to-{name}", "netns", self._bridge)
            ip("-n", self._bridge, "link", "set", f"to-{name}", "master", "br0", "up")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "eth0", "up")

    def start(self, host: str, *words: object, **environment: str) -> tuple[subprocess.Popen[str], Path]:
        """Start Python with ``words`` on ``host``; return the process, which ends with the test, and its log."""
        log = self._folder / f"{host}.log"
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace(host), sys.executable, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=self._stack.enter_context(log.open("a")),
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            text=True,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        return process, log

    def cut(self, host: str, *, off: bool) -> None:
        """Take the cable of ``host`` out, or put it back."""
        ip("-n", self._bridge, "link", "set", f"to-{host}", "down" if off else "up")

    def _namespace(self, name: str) -> str:
        return f"cellseg-{os.getpid()}-{name}"

    def _add(self, name: str) -> str:
        namespace = self._namespace(name)
        ip("netns", "add", namespace)
        self._stack.callback(ip, "netns", "delete", namespace)
        return namespace


@contextmanager
def small_network(names: Sequence[str], folder: Path) -> Iterator[SmallNetwork]:
    """Make hosts of these ``names``, whose logs go into ``folder``; skips where that is not allowed."""
    with ExitStack() as stack:
        try:
            network = SmallNetwork(names, folder, stack)
        except FileNotFoundError:
            pytest.skip("no program ip, to make network namespaces with")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield network
