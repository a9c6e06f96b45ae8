"""Remembers which hosts have answered, and says what an unreachable one probably is.

A host that has answered once and does so no longer is down, and is waited for by the clock. One
that never answered is more likely written wrongly: its failure is raised within seconds, with what
to do. It knows addresses and errors of connections, and no requests.
"""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

import aiohttp

from fireworks_training._async.http import open_files
from fireworks_training.errors import ApiError, ConnectionFailed

STRANGER_SECONDS = 1.0
"""Seconds after its first failure for which a host that has never answered is tried again; with
the pause before the next try, its failure is raised within 3 s."""

Origin = tuple[str, str, int]


def origin_of(url: str) -> Origin:
    """Read scheme, host and port of an absolute URL.

    Raises:
        ValueError: its port is no number.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


class Hosts:
    """Keeps the record of the hosts of one connection pool."""

    def __init__(self) -> None:
        self._answered = set[Origin]()
        self._silent_since: dict[Origin, float] = {}

    def answered(self, url: str) -> None:
        """Note that the host of a URL has answered, whatever it said."""
        self._answered.add(origin_of(url))

    def known(self, url: str) -> bool:
        """Whether the host of a URL has answered before."""
        return origin_of(url) in self._answered

    def hopeless(self, url: str, error: ApiError, now: float) -> bool:
        """Whether a failed connection need not be tried again: the host has never answered.

        Args:
            now: seconds of a steady clock, the same at each call.
        """
        if not isinstance(error, ConnectionFailed) or _ours(error) or self.known(url):
            return False
        since = self._silent_since.setdefault(origin_of(url), now)
        return now - since >= STRANGER_SECONDS


def _ours(error: ConnectionFailed) -> bool:
    """Whether this process had no file left for a connection, which says nothing of the host."""
    cause = error.cause
    system = cause.os_error if isinstance(cause, aiohttp.ClientConnectorError) else cause
    return open_files.exhausted(system)


def advice(url: str, error: BaseException) -> str:
    """Say what is probably wrong where a host can't be reached."""
    scheme, host, port = origin_of(url)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return (
            "The certificate is not trusted: name your network's certificates by SSL_CERT_FILE, "
            "or pass verify_ssl=False"
        )
    if isinstance(error, (aiohttp.ClientConnectorSSLError, ssl.SSLError)):
        return f"Does port {port} speak plain http? Then write http:// instead of https://"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"No address is known for {host}: check base_url, and the proxy of your network"
    if isinstance(error, (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)):
        return "The proxy of HTTP(S)_PROXY refused, or does not run; NO_PROXY lists exceptions"
    if isinstance(error, aiohttp.ClientConnectorError):
        return (
            f"Nothing listens at {host}, port {port}: check base_url and the network; "
            "`fireworks-training serve` starts a platform here"
        )
    if scheme == "http" and isinstance(
        error, (aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError)
    ):
        return f"Does port {port} speak https? Then write https:// instead of http://"
    return "Check base_url and the network"
