"""Finds the addresses of a host in threads of the SDK's own.

aiohttp's resolver waits for a thread of the loop's default executor, which a caller may have filled
with calls that wait for this very request. It knows the system's resolver, and no requests.
"""

from __future__ import annotations

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from fireworks_training._async.runtime.threads import in_thread

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class Resolver(AbstractResolver):
    """Resolves names as the system does."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Find the addresses of a host.

        Raises:
            OSError: there are none.
        """
        return await in_thread(_look_up, host, port, family)

    async def close(self) -> None:
        """Do nothing: nothing is held."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    infos = socket.getaddrinfo(
        host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    found = list[ResolveResult]()
    for kind, _, protocol, _, address in infos:
        where, number = str(address[0]), int(address[1])
        if kind == socket.AF_INET6 and len(address) == 4 and address[3]:
            # A link-local address is none without the name of its link.
            where, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        found.append(
            ResolveResult(
                hostname=host, host=where, port=number, family=kind, proto=protocol, flags=_NUMERIC
            )
        )
    return found
