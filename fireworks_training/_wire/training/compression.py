"""Compresses request bodies (`Content-Encoding: zstd`), and decompresses them within a bound."""

from __future__ import annotations

import zstandard

from fireworks_training.errors import ProtocolError

ENCODING = "zstd"
LEVEL = 1
"""The fastest level: token ids and logprobs hardly compress further at higher ones."""


def compress(body: bytes) -> bytes:
    """Compress `body` to one zstd frame."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(body)


def decompress(body: bytes, *, limit: int) -> bytes:
    """Decompress a zstd body.

    Args:
        limit: bytes that the content may have; also where a frame's header does not say how many.

    Raises:
        ProtocolError: it is no zstd, is cut off, or has more.
    """
    try:
        if zstandard.frame_content_size(body) > limit:
            raise ProtocolError(f"the body has more than {limit} bytes once decompressed")
        return zstandard.ZstdDecompressor().decompress(
            body, max_output_size=limit, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ProtocolError(
            f"the body is not one zstd frame of at most {limit} bytes, as its Content-Encoding "
            f"says: {error}"
        ) from error
