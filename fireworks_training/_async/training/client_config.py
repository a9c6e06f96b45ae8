"""The flags by which a trainer asks for its requests (`client/config` of the Tinker API).

They are read once a session. Precedence: the caller (`dialect=`) decides how passes are written;
the flags, how they are cut, sent and compressed; where a flag is missing or makes no sense, the
SDK's own value holds. A trainer without that route has no flags.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fireworks_training._async.training.data_plane import DataPlane
from fireworks_training._core.chunking import MAX_BYTES, MAX_DATUMS
from fireworks_training.errors import ApiError, ApiStatusError

logger = logging.getLogger("fireworks_training.trainer")

NO_SUCH_ROUTE = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The flags of a trainer for the requests of its clients.

    Attributes:
        compress: whether requests in protobuf go out in zstd.
        parallel_chunks: whether the requests of one pass go out side by side.
        max_datums: the most datums of one request.
        max_bytes: the most bytes of one request, encoded and before compression.
    """

    compress: bool = False
    parallel_chunks: bool = True
    max_datums: int = MAX_DATUMS
    max_bytes: int = MAX_BYTES

    @classmethod
    def read(cls, payload: Mapping[str, Any]) -> ClientConfig:
        """Read the trainer's answer; other flags in it are not for this client."""
        return cls(
            compress=payload.get("proto_compress_fwdbwd") is True,
            parallel_chunks=payload.get("parallel_fwdbwd_chunks") is not False,
            max_datums=_count(payload, "fwdbwd_max_chunk_len", MAX_DATUMS),
            max_bytes=_count(payload, "fwdbwd_max_chunk_bytes_count", MAX_BYTES),
        )


def _count(payload: Mapping[str, Any], name: str, default: int) -> int:
    value = payload.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    logger.warning("client/config: %s=%r is no count above 0; %d is taken", name, value, default)
    return default


async def read_client_config(plane: DataPlane) -> ClientConfig:
    """Ask a trainer for its flags; an answer that can't be read is logged and counts as none."""
    try:
        return ClientConfig.read(await plane.client_config())
    except ApiError as error:
        absent = isinstance(error, ApiStatusError) and error.status in NO_SUCH_ROUTE
        logger.log(
            logging.DEBUG if absent else logging.WARNING,
            "the trainer does not say how it wants its requests (%s); the defaults are taken",
            error,
        )
        return ClientConfig()
