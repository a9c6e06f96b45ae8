"""Bodies with more parts than a pass can have are refused before they are decoded."""

from __future__ import annotations

import random

import pytest

from fireworks_training._wire.training import schema
from fireworks_training.local.trainer.wire import counts, json_codec, proto_codec
from fireworks_training.local.trainer.wire.counts import MAX_PARTS, check_json, check_message
from fireworks_training.local.trainer.wire.json_fields import Malformed

MESSAGE = schema.ForwardBackwardRequest.DESCRIPTOR


def _field(name: str, descriptor: object = MESSAGE) -> bytes:
    number = descriptor.fields_by_name[name].number  # type: ignore[attr-defined]
    return bytes([number << 3 | 2])


def _nested(kind: bytes, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return kind + bytes([*length, size]) + content


DATUM = MESSAGE.fields_by_name["data"].message_type


@pytest.mark.parametrize(
    "body",
    [
        (_field("data") + b"\0") * 4_000_000,
        _nested(_field("data"), (_field("model_input", DATUM) + b"\0") * 4_000_000),
        _nested(_field("data"), (_field("loss_fn_inputs", DATUM) + b"\0") * 4_000_000),
        b"\x08\x01" * 4_000_000,
    ],
)
def test_bombs_of_empty_records_are_not_decoded(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proto_codec.protobuf, "decode_request", lambda _raw: pytest.fail("it was decoded")
    )
    with pytest.raises(Malformed, match="1 to 1024 datums"):
        proto_codec.submission("forward", body, lambda _model: pytest.fail("it was looked up"))


@pytest.mark.parametrize("part", [b"{},", b"[],", b'{"a":[{}]},'])
def test_bombs_of_empty_objects_are_not_parsed(
    part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_codec, "parse", lambda _raw: pytest.fail("it was parsed"))
    body = b'{"data":[' + part * 1_000_000 + b"{}]}"
    with pytest.raises(Malformed, match="1 to 1024 datums"):
        json_codec.submission("forward", body, lambda _model: pytest.fail("it was looked up"))


def test_what_a_pass_has_passes() -> None:
    check_json(b"[" * (MAX_PARTS - 1) + b"1," * MAX_PARTS)
    message = schema.ForwardBackwardRequest(model_id="m", seq_id=1)
    for _ in range(1024):
        datum = message.data.add()
        for _ in range(4):
            datum.model_input.add().encoded_text.tokens = bytes(400)
    check_message(message.SerializeToString(), MESSAGE)


def test_bytes_that_are_no_message_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MAX_PARTS", 10_000)
    source = random.Random(5)
    for _ in range(300):
        try:
            check_message(source.randbytes(source.randrange(400)), MESSAGE)
        except Malformed as error:
            pytest.fail(str(error))
