"""Who gets in, and what errors look like."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import subprocess
import sys

import pytest
from yarl import URL

from fireworks_training.local.gateway.web.auth import host_is_allowed
from tests.local.gateway.platform_fakes import HTTP, KEY, MODEL, Gateway, PlatformFolders

FILLED = {
    "session_id": "ts-0",
    "session": "ts-0",
    "sampler": "ts-0:sampler:0",
    "run": "ts-0:train:0",
    "kind": "weights",
    "name": "x",
    "account": "local",
    "model": "tiny",
    "shape": "cpu",
    "version": "1",
    "job": "j1",
    "deployment": "d1",
    "operation": "o1",
    "checkpoint": "c1",
    "tail": "api/v1/healthz",
}


def _routes(gateway: Gateway) -> list[tuple[str, str]]:
    """Method and a concrete path of every registered route."""
    found: list[tuple[str, str]] = []
    for route in gateway.app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical.format(**FILLED)
        found.append(("POST" if route.method == "*" else route.method, path))
    return found


async def test_every_route_wants_the_key(gateway: Gateway) -> None:
    routes = _routes(gateway)
    assert len(routes) > 25
    for method, path in routes:
        for key in (None, "", "tml-test-ke", f"{KEY}x", "schlüssel"):
            async with gateway.session.request(
                method,
                f"{gateway.base_url}{path}",
                headers={} if key is None else {"X-API-Key": key},
            ) as response:
                assert response.status == 401, (method, path, key)
                if method != "HEAD":
                    assert (await response.json())["error"]["code"] == "UNAUTHENTICATED"
    assert gateway.spawner.processes == []


async def test_the_key_opens_every_route(gateway: Gateway) -> None:
    """The control of the test above: with the key, no route answers 401."""
    for method, path in _routes(gateway):
        headers = {"X-API-Key": KEY}
        async with gateway.session.request(
            method, f"{gateway.base_url}{path}", headers=headers
        ) as response:
            assert response.status != 401, (method, path)


async def test_an_unknown_path_tells_strangers_nothing(gateway: Gateway) -> None:
    assert (await gateway.call("GET", "/nothing", key=None))[0] == 401
    status, body = await gateway.call("GET", "/nothing")
    assert status == 404
    assert body["error"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-API-Key": KEY}, 200),
        ({"x-api-key": KEY}, 200),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": KEY}, 401),
        ({"Cookie": f"X-API-Key={KEY}"}, 401),
    ],
)
async def test_where_the_key_may_be(gateway: Gateway, headers: dict[str, str], status: int) -> None:
    assert (await gateway.call("GET", "/healthz", key=None, headers=headers))[0] == status


async def test_a_key_in_the_query_is_none(gateway: Gateway) -> None:
    assert (await gateway.call("GET", f"/healthz?X-API-Key={KEY}", key=None))[0] == 401


@pytest.mark.parametrize(
    ("header", "bound", "allowed"),
    [
        ("localhost:8000", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("[::1]:8000", "127.0.0.1", True),
        ("LOCALHOST", "127.0.0.1", True),
        ("evil.example:8000", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("192.168.0.7:8000", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("gpu-box:8000", "gpu-box", True),
        ("192.168.0.7:8000", "0.0.0.0", True),
        ("[fe80::1]:8000", "::", True),
        ("evil.example", "0.0.0.0", False),
        ("evil.example", "::", False),
    ],
)
def test_host_names(header: str, bound: str, allowed: bool) -> None:
    assert host_is_allowed(header, bound) is allowed


async def test_a_rebound_name_is_refused_with_the_key_too(gateway: Gateway) -> None:
    good = await gateway.call("GET", "/healthz", headers={"Host": "localhost"})
    assert good == (200, {"status": "ok"})
    status, body = await gateway.call("GET", "/healthz", headers={"Host": "evil.example"})
    assert status == 421
    assert "Host" in body["error"]["message"]


async def test_there_is_no_cors(gateway: Gateway) -> None:
    headers = {"X-API-Key": KEY, "Origin": "http://evil.example"}
    url = f"{gateway.base_url}/healthz"
    async with gateway.session.get(url, headers=headers) as response:
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    status, _ = await gateway.call("OPTIONS", "/v1/accounts", headers={"Origin": "http://x"})
    assert status == 405


async def test_every_answer_names_its_request(gateway: Gateway) -> None:
    url = f"{gateway.base_url}/healthz"
    headers = {"X-API-Key": KEY, "x-request-id": "mine-1"}
    async with gateway.session.get(url, headers=headers) as response:
        assert response.headers["x-request-id"] == "mine-1"
    async with gateway.session.get(url, headers={"x-request-id": "bad id\t"}) as response:
        assert response.status == 401
        assert len(response.headers["x-request-id"]) == 32


async def test_a_failure_inside_says_where_to_look_and_no_more(gateway: Gateway) -> None:
    status, body = await gateway.call("GET", "/boom", headers={"x-request-id": "r-9"})
    assert status == 500
    assert "r-9" in body["error"]["message"]
    assert "secret" not in body["error"]["message"]


async def test_bodies_are_bounded_and_are_objects(gateway: Gateway) -> None:
    path = f"{HTTP}/deployments"
    assert (await gateway.call("POST", path, [1]))[0] == 400
    headers = {"X-API-Key": KEY}
    url = f"{gateway.base_url}{path}"
    long = io.BytesIO(b'{"x": "' + b"y" * (1 << 20) + b'"}')
    async with gateway.session.post(url, data=long, headers=headers) as response:
        assert response.status == 413
    for data in (b"{", b"\xff", b"[" * 5000):
        async with gateway.session.post(url, data=data, headers=headers) as response:
            assert response.status == 400


async def test_a_foreign_method_names_the_right_ones(gateway: Gateway) -> None:
    url = f"{gateway.base_url}/v1/accounts"
    async with gateway.session.put(url, headers={"X-API-Key": KEY}) as response:
        assert response.status == 405
        assert "GET" in response.headers["Allow"]
        assert (await response.json())["error"]["code"] == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "path",
    [
        f"{HTTP}/rlorTrainerJobs/..%2f..%2fstate",
        f"{HTTP}/rlorTrainerJobs/%2e%2e",
        f"{HTTP}/rlorTrainerJobs/A",
        f"{HTTP}/deployments/..%2fx",
        f"{HTTP}/deployments/{'a' * 64}",
        f"{HTTP}/models/..%2f..%2fetc/tokenizer",
        "/v1/accounts/..%2flocal/models",
    ],
)
async def test_path_tricks(gateway: Gateway, path: str) -> None:
    url = URL(f"{gateway.base_url}{path}", encoded=True)
    async with gateway.session.get(url, headers={"X-API-Key": KEY}) as response:
        assert response.status in (400, 404)


async def test_the_tokenizer_and_nothing_else(gateway: Gateway, folders: PlatformFolders) -> None:
    status, body = await gateway.call("GET", f"/v1/{MODEL}/tokenizer")
    assert status == 200
    assert sorted(body["files"]) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    content = base64.b64decode(body["files"]["tokenizer.json"])
    assert content == (folders.model_dir / "tokenizer.json").read_bytes()
    lines = "".join(
        f"{name}:{hashlib.sha256(base64.b64decode(data)).hexdigest()}\n"
        for name, data in sorted(body["files"].items())
    )
    assert body["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    known = {"If-None-Match": f'"{body["sha256"]}"'}
    assert await gateway.call("GET", f"/v1/{MODEL}/tokenizer", headers=known) == (304, None)
    stand_in = await gateway.call("GET", "/v1/accounts/fireworks/models/qwen3-8b/tokenizer")
    assert stand_in[1]["sha256"] == body["sha256"]
    assert stand_in[1]["statusMessage"].startswith("Warning:")
    assert (await gateway.call("GET", f"/v1/{MODEL}x/tokenizer"))[0] == 404


async def test_half_a_request_holds_nobody_up(gateway: Gateway) -> None:
    port = URL(gateway.base_url).port
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/accounts/local/deployments HTTP/1.1\r\nHost: localhost\r\n")
    await writer.drain()
    assert (await gateway.call("GET", "/healthz"))[0] == 200
    writer.close()
    await writer.wait_closed()


def test_the_gateway_loads_no_torch() -> None:
    code = (
        "import sys, fireworks_training.local.gateway.__main__, fireworks_training.local.__main__\n"
        "print([m for m in ('torch', 'transformers', 'tinker', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_the_key_has_a_spelling_for_each_official_client(gateway: Gateway) -> None:
    """Tinker's client refuses keys without `tml-`, that of Fireworks keys with it."""
    secret = KEY.removeprefix("tml-")
    assert (await gateway.call("GET", "/healthz", key=f"fw_{secret}"))[0] == 200
    for other in (secret, f"fw-{secret}", f"tml-fw_{secret}", f"fw_{KEY}"):
        assert (await gateway.call("GET", "/healthz", key=other))[0] == 401
