"""Who may call a server on this machine: the Host header, the Origin header and the token."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SECURITY_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Access:
    """Rules for one server.

    ``program``: its name in messages. ``hosts``: accepted Host headers, so that no foreign name can be pointed here
    (DNS rebinding); None accepts any, which is safe only with a token that no browser sends by itself. ``token``: empty
    for none. ``cookie``: name of a cookie that may hold the token, empty for none. ``without_token``: status and
    sentence for a request without the token.

    >>> Access("cellseg-serve", frozenset({"127.0.0.1:8080"})).refusal({"host": "evil.example"})
    (403, 'This is not the address that cellseg-serve printed.')
    """

    program: str
    hosts: frozenset[str] | None
    token: str = ""
    cookie: str = ""
    without_token: tuple[int, str] = (403, "The token is missing or wrong.")

    def refusal(
        self, headers: Mapping[str, str], cookies: Mapping[str, str] | None = None, *, needs_token: bool = True
    ) -> tuple[int, str] | None:
        """Return status and sentence if the request is refused, None if it may pass. ``headers``: names in lower case.

        ``needs_token``: False for what everybody may ask, such as whether the server lives.
        """
        host = headers.get("host", "")
        if not self.knows(host):
            return 403, f"This is not the address that {self.program} printed."
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            return 403, f"Other pages may not use {self.program}."
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if not given and self.cookie and cookies is not None:
            given = cookies.get(self.cookie, "")
        return self.without_token if needs_token and not self.is_token(given) else None

    def knows(self, host: str) -> bool:
        """Whether ``host``, a Host header, names this server."""
        return self.hosts is None or host in self.hosts

    def is_token(self, text: str) -> bool:
        """Whether ``text`` is the token; takes equally long for any text."""
        return not self.token or hmac.compare_digest(text.encode(), self.token.encode())

    def _is_own(self, origin: str, host: str) -> bool:
        if self.hosts is not None:
            return origin in {f"http://{each}" for each in self.hosts}
        return origin in (f"http://{host}", f"https://{host}")


def hosts_of(port: int) -> frozenset[str]:
    """Return the Host headers of a server on ``port`` of this machine."""
    return frozenset(f"{name}:{port}" for name in LOOPBACK) | (frozenset(LOOPBACK) if port == 80 else frozenset())
