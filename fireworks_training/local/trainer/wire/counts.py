"""Counts what is in a body of a pass before anything of it is decoded.

A few bytes of an encoded message can stand for an object each; a thousand datums are the most that
a pass has. Knows the framing of protobuf and the brackets of JSON, and no meaning.
"""

from __future__ import annotations

from typing import Any

from fireworks_training.local.trainer.wire.datums import MAX_DATUMS
from fireworks_training.local.trainer.wire.json_fields import Malformed

MAX_PARTS = MAX_DATUMS * 64
"""Objects, lists or records of a pass: its datums with up to 64 tensors and chunks each."""
_TOO_MANY = f"the body has over {MAX_PARTS} parts; data must be a list of 1 to {MAX_DATUMS} datums"


def check_json(raw: bytes) -> None:
    """Raise Malformed for a JSON body with more objects or lists than a pass can have."""
    if len(raw) > MAX_PARTS and (raw.count(b"{") > MAX_PARTS or raw.count(b"[") > MAX_PARTS):
        raise Malformed(_TOO_MANY)


def check_message(raw: bytes, descriptor: Any) -> None:
    """Raise Malformed for a message with more records than a pass can have, at any depth.

    Bytes that are no message pass: the decoder says what is wrong with them.

    Args:
        descriptor: of the message's type; its fields tell which records are messages themselves.
    """
    spans = [(0, len(raw), descriptor)]
    seen = 0
    while spans:
        at, end, kind = spans.pop()
        while at < end:
            seen += 1
            if seen > MAX_PARTS:
                raise Malformed(_TOO_MANY)
            tag, at = _varint(raw, at, end)
            if tag & 7 != 2:
                at = _behind(raw, at, end, tag & 7)
                continue
            length, at = _varint(raw, at, end)
            field = kind.fields_by_number.get(tag >> 3)
            if field is not None and field.message_type is not None:
                spans.append((at, min(at + length, end), field.message_type))
            at += length


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number and the place behind it; the end where the bytes break off."""
    value = shift = 0
    while at < end and shift < 64:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return 0, end


def _behind(raw: bytes, at: int, end: int, wire_type: int) -> int:
    """Return the place behind a value without a length."""
    if wire_type == 0:
        return _varint(raw, at, end)[1]
    return at + {1: 8, 5: 4}.get(wire_type, end)
