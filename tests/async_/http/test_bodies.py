"""Bodies of hostile servers: they end typed, before they take memory; no text of theirs leaks."""

from __future__ import annotations

import contextlib
import random
import resource
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fireworks_training import ApiError, ApiStatusError, ProtocolError
from fireworks_training._async.http.bodies import MAX_BODY, MAX_VALUES, check_values
from fireworks_training._async.http.transport import Response, Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._wire.completions.errors import status_error
from fireworks_training._wire.server_words import scrubbed, words_of

KEY = "plainly-a-key-without-a-prefix"
TOKENS = [5021, 318, 1462, 29901, 77]


@asynccontextmanager
async def answering(handle: object) -> AsyncIterator[Transport]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)  # type: ignore[arg-type]
    server = TestServer(app)
    await server.start_server()
    owner = OwnerLoop()
    owner.get()
    url = str(server.make_url(""))
    async with Transport(owner=owner, base_url=url, api_key=KEY) as transport:
        yield transport
    await server.close()


def peak() -> int:
    """Bytes of memory that this process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


async def test_a_megabyte_of_gzip_takes_no_gigabyte() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    async with answering(handle) as transport:
        before = peak()
        with pytest.raises(ProtocolError, match="more than"):
            await transport.call("GET", "/x", what="look")
        assert peak() - before < 80 << 20


async def test_a_body_without_end_is_left() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async with answering(handle) as transport:
        with pytest.raises(ProtocolError, match="more than"):
            await transport.exchange("GET", "/x", limit=1 << 20)


async def test_a_length_over_the_limit_is_refused_before_it_is_read() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(MAX_BODY + 1)})
        await response.prepare(request)
        await response.write(b"{")
        return response

    async with answering(handle) as transport:
        with pytest.raises(ProtocolError, match="more than"):
            await transport.exchange("GET", "/x")


async def test_a_body_of_the_limit_is_taken() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=bytes(1000))

    async with answering(handle) as transport:
        assert len((await transport.exchange("GET", "/x", limit=1000)).body) == 1000
        with pytest.raises(ProtocolError):
            await transport.exchange("GET", "/x", limit=999)


async def test_many_small_values_are_refused_before_they_are_parsed() -> None:
    body = b'{"a":[' + b"[]," * MAX_VALUES + b"[]]}"

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with answering(handle) as transport:
        with pytest.raises(ProtocolError, match="values"):
            await transport.call("GET", "/x", what="look")
    check_values(b'{"a": "' + b"x" * (1 << 20) + b'"}')


async def test_a_large_answer_is_parsed_whole() -> None:
    rows = [{"name": f"row-{number}", "text": "x" * 100} for number in range(2000)]

    async def handle(_: web.Request) -> web.Response:
        return web.json_response({"rows": rows})

    async with answering(handle) as transport:
        assert await transport.call("GET", "/x", what="look") == {"rows": rows}


# -- what no message repeats ---------------------------------------------------------------------

ECHOES = [
    {"detail": [{"type": "int_type", "loc": ["body", "data", 0], "msg": "not an integer",
                 "input": {"tokens": TOKENS}, "ctx": {"header": f"Bearer {KEY}"}}]},
    {"error": {"message": f"bad key {KEY} for {TOKENS}", "code": KEY}},
    {"error": f"got {TOKENS} and Authorization: Bearer {KEY}"},
    {"detail": f"input_value='the prompt of a user', tokens {' '.join(map(str, TOKENS))}"},
    {"message": f'prompt: "the prompt of a user" ({KEY})'},
    {"tokens": TOKENS, "prompt": "the prompt of a user", "key": KEY},
    {"error": {"body": {"prompt": "the prompt of a user", "tokens": TOKENS, "k": KEY}}},
    [TOKENS, KEY, "the prompt of a user"],
    TOKENS,
]  # fmt: skip


def leaks(text: str) -> list[str]:
    return [word for word in (KEY, "the prompt of a user", "5021, 318", "5021 318") if word in text]


@pytest.mark.parametrize("echo", ECHOES)
async def test_no_message_of_a_route_repeats_key_prompt_or_tokens(echo: object) -> None:
    body = orjson.dumps(echo)

    async def handle(_: web.Request) -> web.Response:
        return web.Response(
            status=422, body=body, headers={"x-request-id": KEY, "Content-Type": "text/json"}
        )

    async with answering(handle) as transport:
        with pytest.raises(ApiStatusError) as failure:
            await transport.call("POST", "/x", what="look", json={"tokens": TOKENS})
    error = failure.value
    assert not leaks(f"{error} {error!r} {error.error_class} {error.request_id}")
    assert not leaks(str(status_error(422, body.replace(KEY.encode(), b"fw_3Zabcdefghijkl"),
                                      retry_after=None, request_id=None)))  # fmt: skip
    plain = Response(500, {}, b"<pre>" + body, None, secrets=(KEY,)).error("look")
    assert not leaks(str(plain)) or isinstance(echo, list)


def test_the_guard_sees_a_text_that_leaks() -> None:
    assert leaks(str(ECHOES[0])) == [KEY, "5021, 318"]


def test_plain_words_stay() -> None:
    text = "trainer job tj-1 is JOB_STATE_FAILED: 2 of 4 replicas; rank 3, at step 17"
    assert scrubbed(text, (KEY, "k")) == text
    assert words_of(b'{"error": {"message": "no such model", "code": "NOT_FOUND"}}') == (
        "no such model",
        "NOT_FOUND",
    )
    assert words_of(b'{"detail": [{"loc": ["body", "rank"], "msg": "too large", "input": 9}]}') == (
        "body.rank: too large",
        None,
    )


# -- mutated answers -----------------------------------------------------------------------------


def mutated(random_: random.Random, seed: bytes) -> bytes:
    body = bytearray(seed)
    for _ in range(random_.randrange(1, 5)):
        at = random_.randrange(len(body) + 1)
        match random_.randrange(5):
            case 0:
                body[at:at] = random_.choice(
                    [b"[" * 2000, b"NaN", b"1e999", b"\xff", b"null", b"{"]
                )
            case 1:
                del body[at : at + random_.randrange(1, 9)]
            case 2:
                body[at : at + 1] = bytes([random_.randrange(256)])
            case 3:
                body[at:at] = body[: random_.randrange(200)]
            case _:
                body[at:at] = b"9" * random_.randrange(1, 3000)
    return bytes(body)


def test_mutated_answers_raise_typed_errors_only() -> None:
    random_ = random.Random(7)
    seeds = [orjson.dumps(echo) for echo in ECHOES]
    for _ in range(4000):
        body = mutated(random_, random_.choice(seeds))
        response = Response(random_.choice([200, 400, 500]), {}, body, None, secrets=(KEY,))
        with contextlib.suppress(ApiError):
            response.object()
        assert isinstance(response.error("look"), ApiStatusError)
        message, code = words_of(body, (KEY,))
        assert message
        assert KEY not in message
        assert len(message) <= 2000
        assert code is None or len(code) <= 60


@pytest.mark.parametrize("text", ["9" * 8000, "1," * 4000, "1 " * 4000, "'" * 8000, "key-" * 2000])
def test_scrubbing_ends_whatever_the_text(text: str) -> None:
    assert len(scrubbed(text)) <= 2000
