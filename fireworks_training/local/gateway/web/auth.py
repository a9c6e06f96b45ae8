"""Access to the gateway: checks the key on every route, and the Host header.

The Host check defeats DNS rebinding: a web page that points its own name at 127.0.0.1 makes the
browser send that name. There is no CORS, so a page can't read an answer either.
"""

from __future__ import annotations

import hmac
import ipaddress

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from fireworks_training.local.gateway.web.problems import HttpProblem

KEY_HEADER = "X-API-Key"
_PREFIXES = ("tml-", "fw_")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised, not bound


def presented_keys(request: web.Request) -> list[str]:
    """Return the keys that a request carries, in either spelling."""
    keys = list(request.headers.getall(KEY_HEADER, []))
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer" and token:
        keys.append(token.strip())
    return keys


def spellings(api_key: str) -> list[bytes]:
    """Return the key, and the same secret as the other API's official client wants it spelt.

    Tinker's takes only keys that start with `tml-`, that of Fireworks only others: so a key
    `tml-<secret>` is also known as `fw_<secret>`, and the other way round.
    """
    found = [api_key]
    for own, other in (_PREFIXES, _PREFIXES[::-1]):
        if api_key.startswith(own):
            found.append(other + api_key.removeprefix(own))
    return [key.encode() for key in found]


def key_middleware(api_key: str) -> Middleware:
    """Refuse every request that does not carry the key; the comparison takes constant time."""
    expected = spellings(api_key)

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        keys = presented_keys(request)
        matches = [
            hmac.compare_digest(key.encode("utf-8", "surrogateescape"), one)
            for key in keys
            for one in expected
        ]
        if not any(matches):
            what = "a wrong API key" if keys else "no API key"
            raise HttpProblem(
                401,
                f"the request carries {what}; send it as `{KEY_HEADER}`"
                " or as `Authorization: Bearer`",
                headers={hdrs.WWW_AUTHENTICATE: "Bearer"},
            )
        return await handler(request)

    return check_key


def host_name(header: str) -> str:
    """Return the name in a Host header, lower case, without port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def host_is_allowed(header: str, bound_host: str) -> bool:
    """Return whether a Host header names this platform.

    Loopback names and the bound host do. A platform bound to every address also takes any literal
    address: only names can be rebound.
    """
    name, bound = host_name(header), bound_host.strip("[]").lower()
    if name in _LOOPBACK or name == bound:
        return bool(name)
    if bound not in _ANY_ADDRESS:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def host_middleware(bound_host: str) -> Middleware:
    """Refuse requests that were meant for another host."""

    @web.middleware
    async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not host_is_allowed(request.headers.get(hdrs.HOST, ""), bound_host):
            raise HttpProblem(
                421,
                "the Host header does not name this platform; connect by the address that it"
                " listens on",
            )
        return await handler(request)

    return check_host
