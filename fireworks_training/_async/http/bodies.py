"""Reads the body of an answer up to a limit, and keeps what JSON may become within bounds.

Servers are not trusted with this process's memory: a body may have no end, a megabyte of gzip can
hold a gigabyte, and a megabyte of `[[],[],...]` becomes many times its size. The connection hands
over a compressed body in small steps, each of which is counted here. It knows no meaning.
"""

from __future__ import annotations

import io

import aiohttp

from fireworks_training.errors import ProtocolError

MAX_BODY = 56 << 20
"""Bytes of a body, decompressed, unless a caller asks for more."""

PARSE_INLINE = 64 << 10
"""Bytes of JSON up to which it is parsed on the loop; more go to a thread."""

MAX_VALUES = 500_000
"""Values of a JSON body: they take about 50 MB."""


async def read_bounded(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    """Read a body whole; the connection of one that is too large is closed.

    Raises:
        ProtocolError: it has more bytes than the limit, as sent or decompressed.
        aiohttp.ClientError, OSError: the connection broke.
    """
    if (response.content_length or 0) > limit:
        raise _too_large(response, limit, what)
    body, size = io.BytesIO(), 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            raise _too_large(response, limit, what)
        body.write(piece)
    return body.getvalue()


def _too_large(response: aiohttp.ClientResponse, limit: int, what: str) -> ProtocolError:
    response.close()
    return ProtocolError(
        f"{what}: the server's answer has more than {limit >> 20} MiB, which is more than was "
        "asked for; is the base URL right?"
    )


def check_values(body: bytes, request_id: str | None = None) -> None:
    """Refuse JSON that would become too many values, before it is parsed.

    Raises:
        ProtocolError: it has more than `MAX_VALUES`.
    """
    # Each value but the first follows one of these; those inside strings count, too.
    values = sum(map(body.count, (b",", b"[", b"{", b":")))
    if values > MAX_VALUES:
        raise ProtocolError(
            f"the server's answer has about {values} values, more than {MAX_VALUES}; is the base "
            "URL right?",
            request_id=request_id,
        )
