"""Frames a datum in Tinker protobuf, around arrays that stay where they are in memory.

A datum becomes *parts*: what stands before an array, the array's own memory, and so on, to be
joined once, for a whole request. A generated message would copy each array three times on its way.
The tests compare with the generated classes. Knows the numbers of the fields; checks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from struct import pack
from typing import Any

import numpy as np
import numpy.typing as npt

from fireworks_training._wire.training.datums import Encoding

Array = npt.NDArray[Any]

FLOAT32, INT64 = 1, 2
"""The values of the schema's DType that a request may have."""

_I8, _F4 = np.dtype("<i8"), np.dtype("<f4")

# Field numbers, each with its wire type: 0 varint, 2 length and bytes.
_DATA = 3 << 3 | 2  # ForwardBackwardRequest.data
_MODEL_INPUT, _LOSS_FN_INPUTS = 1 << 3 | 2, 2 << 3 | 2  # of Datum
_ENCODED_TEXT = 1 << 3 | 2  # of Chunk
_TOKENS = 1 << 3 | 2  # of EncodedTextChunk
_KEY, _VALUE = 1 << 3 | 2, 2 << 3 | 2  # of a map's entry
_DENSE, _DTYPE, _SHAPE = 1 << 3 | 2, 3 << 3 | 0, 4 << 3 | 2  # of Tensor


def varint(value: int) -> bytes:
    """Write a number that is not negative, seven bits a byte, the lowest first."""
    if value < 0x80:
        return value.to_bytes(1, "little")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Write token ids as little-endian int32.

    Raises:
        struct.error: one is no integer, or none of 32 bits.
    """
    return pack(f"<{len(tokens)}i", *tokens)


def datum_parts(tokens: bytes, inputs: Mapping[str, Array]) -> Encoding:
    """Write a request's field `data` with one datum.

    Args:
        tokens: of the model input; from `token_bytes`.
        inputs: arrays by name, any numeric dtype; integers go as int64, others as float32.
    """
    parts: list[Any] = [b"", tokens]
    size = len(tokens)
    for name, values in inputs.items():
        dtype, number = (_I8, INT64) if values.dtype.kind in "iu" else (_F4, FLOAT32)
        dense = values.astype(dtype, order="C", copy=False)
        before = _input_head(name, number, dense.shape)
        parts += (before, dense)
        size += len(before) + dense.nbytes
    text = _text_head(len(tokens))
    size += len(text)
    parts[0] = b"%c%b%b" % (_DATA, varint(size), text)
    return Encoding(size + len(parts[0]) - len(text), parts)


@lru_cache(maxsize=1024)
def _text_head(length: int) -> bytes:
    """The bytes before so many bytes of tokens, inside a Datum."""
    tokens = b"%c%b" % (_TOKENS, varint(length))
    chunk = b"%c%b%b" % (_ENCODED_TEXT, varint(len(tokens) + length), tokens)
    return b"%c%b%b" % (_MODEL_INPUT, varint(len(chunk) + length), chunk)


@lru_cache(maxsize=4096)
def _input_head(name: str, dtype: int, shape: tuple[int, ...]) -> bytes:
    """The bytes before the elements of a loss input, inside a Datum."""
    length = int(np.prod(shape, dtype=np.int64)) * (8 if dtype == INT64 else 4)
    dims = b"".join(map(varint, shape))
    tensor = b"%c%c%c%b%b%c%b" % (
        *(_DTYPE, dtype),
        *(_SHAPE, varint(len(dims)), dims),
        *(_DENSE, varint(length)),
    )
    key = name.encode()
    entry = b"%c%b%b%c%b%b" % (
        *(_KEY, varint(len(key)), key),
        *(_VALUE, varint(len(tensor) + length), tensor),
    )
    return b"%c%b%b" % (_LOSS_FN_INPUTS, varint(len(entry) + length), entry)
