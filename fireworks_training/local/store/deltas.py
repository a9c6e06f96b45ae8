"""Differences between two snapshots of the same tensors, in the public `arc_v2` encoding.

Knows: the encoding (the XOR of each tensor's bytes, compressed with zstd, one frame a tensor, with
an Adler-32 of the result), and when a difference is not worth having. Does not know snapshots'
names, manifests or who holds what.

A file of `EncodedDelta.tensors` with `EncodedDelta.checksums` as its metadata is what
`fireworks_delta_compression` itself writes, and reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import zstandard
from fireworks_delta_compression.backends.arc2 import (  # pyright: ignore[reportMissingTypeStubs]
    Arc2Backend,
)
from torch import Tensor

FORMAT = "arc_v2"
PAYS_BELOW = 0.7
"""A difference is written if it is smaller than this share of the whole."""

SPARSE = 0.12
"""Share of changed values below which the slower search for long matches pays: there the fast one
stays twice over the entropy of the difference."""
DENSE = 0.5
"""Share of changed values above which no search finds much."""

Effort = Literal["fast", "small"]
"""How long to search: "small" takes a minute for a hundred million values of which an eighth has
changed, and a quarter of the bytes less."""


class DeltaCorrupt(Exception):
    """Raised when a difference can't be read, or does not give what it should."""


Coder = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class EncodedDelta:
    """Holds an encoded difference.

    Attributes:
        tensors: by name, the compressed XOR as bytes (uint8 `[n]`).
        checksums: by name, the Adler-32 of the tensor that it leads to.
        bytes: size of all frames together.
    """

    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, str]
    bytes: int


def _fast(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def _searching(*, table_log: int, search_log: int, min_match: int, target_length: int) -> Coder:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=17,
        chain_log=table_log,
        hash_log=table_log,
        search_log=search_log,
        min_match=min_match,
        target_length=target_length,
        strategy=zstandard.STRATEGY_BTOPT,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress


def _refuse(data: bytes) -> bytes:
    raise AssertionError(f"{len(data)} bytes to decompress by an encoder")


_FAST = Arc2Backend(compress_fn=_fast, decompress_fn=_refuse)
_SPARSE = Arc2Backend(
    compress_fn=_searching(table_log=13, search_log=2, min_match=3, target_length=64),
    decompress_fn=_refuse,
)
_SMALL = Arc2Backend(
    compress_fn=_searching(table_log=17, search_log=5, min_match=6, target_length=256),
    decompress_fn=_refuse,
)


def encode(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], effort: Effort = "fast"
) -> EncodedDelta | None:
    """Encode the difference that leads from `old` to `new`; return None if it would not pay.

    Args:
        old, new: the same names, with the same shapes and dtypes. On the CPU.
        effort: effort of the search.
    """
    most = PAYS_BELOW * sum(tensor.numel() * tensor.element_size() for tensor in new.values())
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    total = 0
    for name, tensor in new.items():
        backend = _coder(_changed(old[name], tensor), effort)
        frame, checksum = backend.compress(src=old[name], dst=tensor)
        tensors[name], checksums[name] = frame, checksum
        total += frame.numel()
        if total >= most:
            return None
    return EncodedDelta(tensors, checksums, total)


def _coder(changed: float, effort: Effort) -> Arc2Backend:
    if effort == "small" and changed < DENSE:
        return _SMALL
    return _SPARSE if changed < SPARSE else _FAST


def _changed(old: Tensor, new: Tensor) -> float:
    """Return the share of the values that differ."""
    return (old != new).float().mean().item() if new.numel() else 0.0


def apply(old: Tensor, frame: Tensor, name: str) -> Tensor:
    """Return the tensor that a compressed XOR leads to, a new one; `old` stays as it is.

    What comes out has to be checked against a hash: the frame may be of another tensor.

    Raises:
        DeltaCorrupt: the frame is damaged, or of another size.
    """
    before = old.contiguous().reshape(-1).view(torch.uint8)
    raw = frame.numpy().tobytes()
    try:
        # Its head names its size: one of another size is not decompressed.
        if zstandard.frame_content_size(raw) != before.numel():
            raise DeltaCorrupt(f"the difference of {name} is of another size")
        xor = bytearray(zstandard.ZstdDecompressor().decompress(raw))
    except zstandard.ZstdError as error:
        raise DeltaCorrupt(f"the difference of {name} is damaged") from error
    if not xor:
        return old.clone()
    after = torch.frombuffer(xor, dtype=torch.uint8).bitwise_xor_(before)
    return after.view(old.dtype).reshape(old.shape)
