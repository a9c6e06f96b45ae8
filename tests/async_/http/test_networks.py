"""Proxies, redirects, keys and URLs as users have them, over real HTTP."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from fireworks_training import (
    ApiError,
    AsyncControlPlane,
    ConnectionFailed,
    FireworksTrainingError,
    InvalidArgument,
    ServerFailed,
)
from fireworks_training._async.http.transport import MAX_REDIRECTS, Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._core.backoff import Backoff

KEY = "fw_do-not-show"


def transport_to(url: str, **more: str) -> Transport:
    owner = OwnerLoop()
    owner.get()
    return Transport(owner=owner, base_url=url, api_key=KEY, additional_headers=more)


@asynccontextmanager
async def serving(handle: object) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)  # type: ignore[arg-type]
    server = TestServer(app)
    await server.start_server()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.close()


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """A plain HTTP proxy that answers for every host itself; its URL, and what it was asked."""
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode().strip())
        while (await reader.readline()) not in (b"\r\n", b""):
            pass
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\n{"a": 1}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()


@pytest.mark.parametrize("scheme", ["http://", "http://user:word@", ""])
async def test_the_environments_proxy_is_used(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    async with proxy() as (address, asked):
        monkeypatch.setenv("http_proxy", scheme + address)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with transport_to("http://cloud.invalid") as transport:
            assert await transport.call("GET", "/x", what="look") == {"a": 1}
    assert asked == ["GET http://cloud.invalid/x HTTP/1.1"]


async def test_a_host_of_no_proxy_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({"direct": 1})

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with serving(handle) as url, transport_to(url) as transport:
        assert await transport.call("GET", "/x", what="look") == {"direct": 1}


async def test_a_dead_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:topsecret@127.0.0.1:{unused_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    async with transport_to("http://cloud.invalid") as transport:
        with pytest.raises(ConnectionFailed, match="proxy") as failure:
            await transport.exchange("GET", "/x")
    assert "topsecret" not in str(failure.value)


async def test_an_unsupported_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1080")
    monkeypatch.delenv("no_proxy", raising=False)
    async with transport_to("http://cloud.invalid") as transport:
        with pytest.raises(InvalidArgument, match="socks5"):
            await transport.exchange("GET", "/x")


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_keeps_method_body_and_key_on_its_host(status: int) -> None:
    seen: list[tuple[str, bytes, str | None]] = []

    async def handle(request: web.Request) -> web.Response:
        if request.path == "/x":
            return web.Response(status=status, headers={"Location": "/moved"})
        seen.append((request.method, await request.read(), request.headers.get("X-API-Key")))
        return web.json_response({})

    large = (b"a" * 300_000, b"b" * 300_000)
    async with serving(handle) as url, transport_to(url) as transport:
        for body in (b"{}", large):
            assert (await transport.exchange("POST", "/x", body=body)).ok
    assert seen == [("POST", b"{}", KEY), ("POST", b"".join(large), KEY)]


async def test_a_redirect_to_another_host_takes_no_key_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "cloud-id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "cloud-secret")
    seen: list[dict[str, str]] = []

    async def note(request: web.Request) -> web.Response:
        seen.append({name.lower(): text for name, text in request.headers.items()})
        return web.json_response({})

    async with serving(note) as other:

        async def handle(request: web.Request) -> web.Response:
            await note(request)
            return web.Response(status=307, headers={"Location": other + "/y"})

        async with serving(handle) as url, transport_to(url, **{"X-Team": "secret"}) as transport:
            assert (await transport.exchange("POST", "/x", body=b"{}")).ok
    private = {"x-api-key", "authorization", "x-team", "cf-access-client-id"}
    private.add("cf-access-client-secret")
    assert private <= seen[0].keys()
    assert not private & seen[1].keys()


SESSION = "01234567-89ab-4def-8123-456789abcdef"


@pytest.mark.parametrize(
    ("source", "session", "sent"),
    [
        ("fireworks-training-skill/1.2", SESSION, {"fireworks-training-skill/1.2", SESSION}),
        ("fireworks-training-skill", "", {"fireworks-training-skill"}),
        ("another-program", SESSION.upper(), set()),
        ("fireworks-training-skill/1\r\nX: y", SESSION + "\n", set()),
    ],
)
async def test_on_whose_behalf_a_program_runs_is_said(
    monkeypatch: pytest.MonkeyPatch, source: str, session: str, sent: set[str]
) -> None:
    monkeypatch.setenv("FIREWORKS_CLIENT_SOURCE", source)
    monkeypatch.setenv("FIREWORKS_SESSION_ID", session)
    async with transport_to("http://127.0.0.1:9") as transport:
        found = {
            value
            for name, value in transport.headers().items()
            if name in ("X-Fireworks-Client-Source", "X-Fireworks-Session-Id")
        }
    assert found == sent


@pytest.mark.parametrize("place", ["/x", "ftp://127.0.0.1/x", "http://127.0.0.1:port/"])
async def test_redirects_end(place: str) -> None:
    asked = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=307, headers={"Location": place})

    async with serving(handle) as url, transport_to(url) as transport:
        with pytest.raises(ConnectionFailed, match="redirect"):
            await transport.exchange("POST", "/x", body=b"{}")
    assert asked == (MAX_REDIRECTS + 1 if place == "/x" else 1)


async def test_a_post_that_would_become_a_get_is_not_followed() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/login"})

    async with serving(handle) as url, transport_to(url) as transport:
        assert (await transport.exchange("POST", "/x", body=b"{}")).status == 302


# -- keys and URLs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["fw_abc\n", " fw_abc", "fw_a\r\nX: y", "“fw_abc”", "fw abc", "fw_\u00e9", '"fw_abc"']
)
async def test_a_key_that_can_not_be_sent_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with pytest.raises(InvalidArgument, match=r"^api_key ") as failure:
        Transport(owner=OwnerLoop(), base_url="http://h", api_key=key)
    assert "abc" not in str(failure.value)
    with pytest.raises(InvalidArgument, match=r"^api_key "):
        AsyncControlPlane.connect(base_url="http://h", api_key=key)
    monkeypatch.setenv("FIREWORKS_API_KEY", key)
    with pytest.raises(InvalidArgument, match=r"^FIREWORKS_API_KEY "):
        AsyncControlPlane.connect(base_url="http://h")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:topsecret@host", "user name"),
        ("https://host/v1", "pass https://host$"),
        ("https://host/inference/v1/", "pass https://host$"),
        ("https://host:port", "port"),
        ("https://host?key=1", "query"),
    ],
)
def test_a_url_with_too_much_is_refused_with_its_cure(url: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as failure:
        AsyncControlPlane.connect(base_url=url, api_key="k")
    assert "topsecret" not in str(failure.value)


async def test_certificates_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{tmp_path}/none.pem")
    async with transport_to("https://127.0.0.1:1") as transport:
        with pytest.raises(InvalidArgument, match="SSL_CERT_FILE"):
            await transport.exchange("GET", "/x")


# -- quick refusals ------------------------------------------------------------------------------


async def hopeless_after(transport: Transport, error: ApiError, times: list[float]) -> list[bool]:
    url = transport.base_url + "/x"
    return [transport.hosts.hopeless(url, error, now) for now in times]


async def test_a_host_that_never_answered_is_given_up_soon_and_another_is_not() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({})

    broken, failed = ConnectionFailed("no"), ServerFailed("no", status=503)
    async with serving(handle) as url, transport_to(url) as transport:
        assert await hopeless_after(transport, broken, [0, 0.5, 1.5]) == [False, False, True]
        assert await hopeless_after(transport, failed, [9]) == [False]
        await transport.exchange("GET", "/x")
        assert transport.hosts.known(url)
        assert await hopeless_after(transport, broken, [99]) == [False]


async def test_a_host_is_not_blamed_for_a_want_of_open_files() -> None:
    error = ConnectionFailed("no", cause=OSError(errno.EMFILE, "too many"))
    async with transport_to("http://127.0.0.1:1") as transport:
        assert await hopeless_after(transport, error, [0, 99]) == [False, False]


async def test_a_dead_port_is_raised_with_its_cure() -> None:
    async with transport_to(f"http://127.0.0.1:{unused_port()}") as transport:
        transport.hosts.hopeless(transport.base_url, ConnectionFailed("first"), -10.0)
        with pytest.raises(ConnectionFailed, match=r"Nothing listens at 127\.0\.0\.1, port"):
            await transport.call("GET", "/x", what="look", backoff=Backoff(attempts=1 << 20))


async def test_https_on_a_port_that_speaks_http_is_told() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({})

    async with serving(handle) as url, transport_to(url.replace("http", "https")) as transport:
        with pytest.raises(FireworksTrainingError, match="write http://"):
            await transport.exchange("GET", "/x")


async def test_http_on_a_port_that_speaks_https_is_told() -> None:
    async def alert(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x15\x03\x01\x00\x02\x02\x46")  # what a TLS server says to plain text
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(alert, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with transport_to(f"http://127.0.0.1:{port}") as transport:
        with pytest.raises(ConnectionFailed, match="https://"):
            await transport.exchange("GET", "/x")
    server.close()
    await server.wait_closed()
