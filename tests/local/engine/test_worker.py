"""The engine's socket: it serves one gateway after the other, and none can break it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from fireworks_training.local.engine.weights import ServedWeights
from fireworks_training.local.engine.worker import cache_bytes_per_token
from fireworks_training.local.engine_frames import (
    Begun,
    Control,
    Frame,
    FrameDecoder,
    Step,
    encode_begun,
    encode_control,
)
from fireworks_training.local.store.snapshots import SnapshotStore
from tests.local.engine.tiny_model import BASE_MODEL, engine_thread, make_engine, write_base


class Peer:
    """A blocking gateway."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    def send(self, **message: object) -> None:
        self.send_bytes(encode_control(message))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Frame | None:
        """The next frame; None at the end of the connection."""
        while not self._frames:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames = self._decoder.feed(data)
        return self._frames.pop(0)

    def hello(self) -> dict[str, object]:
        frame = self.receive()
        assert isinstance(frame, Control)
        assert frame.message["op"] == "hello"
        return frame.message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path, model_path: Path, store: SnapshotStore) -> Iterator[Path]:
    socket_path = tmp_path / "e.sock"
    with engine_thread(make_engine(model_path, store), socket_path):
        yield socket_path
        with Peer(socket_path) as last:
            last.hello()
            last.send(op="stop")
            assert last.receive() is None


def test_tokens_come_in_frames_of_one_step(path: Path) -> None:
    with Peer(path) as peer:
        hello = peer.hello()
        assert (hello["vocab_size"], hello["max_slots"], hello["identity"]) == (300, 8, None)
        for stream in (1, 2):
            peer.send(op="add", stream=stream, prompt=[4, 5], max_tokens=3, ignore_eos=True)
        tokens: dict[int, int] = {1: 0, 2: 0}
        begun: list[int] = []
        while tokens != {1: 3, 2: 3}:
            frame = peer.receive()
            if isinstance(frame, Begun):
                begun += frame.streams.tolist()
            if isinstance(frame, Step):
                for stream in frame.streams.tolist():
                    tokens[stream] += 1
        assert begun == [1, 2]


def test_the_next_gateway_finds_the_weights_and_no_streams(
    path: Path, store: SnapshotStore
) -> None:
    write_base(store, "step-1", seed=1)
    with Peer(path) as first:
        first.hello()
        first.send(op="load", number=1, identity="step-1")
        while not (
            isinstance(frame := first.receive(), Control) and frame.message["op"] == "load_ended"
        ):
            pass
        for stream in range(8):
            first.send(op="add", stream=stream, prompt=[4], max_tokens=250, ignore_eos=True)
        while not isinstance(first.receive(), Step):
            pass
    with Peer(path) as second:
        assert second.hello()["identity"] == "step-1"
        second.send(op="add", stream=0, prompt=[4], max_tokens=1)
        while not isinstance(frame := second.receive(), Step):
            pass
        assert frame.streams.tolist() == [0]
        assert (frame.active, frame.waiting) == (0, 0)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 20,
        struct.pack("<IB", 2, ord("J")) + b"{}",
        encode_control({"op": "dance"}),
        encode_control({"op": "add", "stream": "one"}),
        encode_control({"op": "load", "number": 1}),
        encode_begun(Begun(0, *(np.zeros(0, kind) for kind in ("u4", "f4", "f4", "u4", "u4")))),
    ],
)
def test_nonsense_ends_the_connection_and_not_the_engine(path: Path, nonsense: bytes) -> None:
    with Peer(path) as peer:
        peer.hello()
        peer.send_bytes(nonsense)
        assert peer.receive() is None


def test_the_cache_budget_counts_keys_and_values(model_path: Path, store: SnapshotStore) -> None:
    # 2 layers, 2 key/value heads of 8, keys and values, 4 bytes each
    assert cache_bytes_per_token(ServedWeights(model_path, store, BASE_MODEL)) == 2 * 2 * 8 * 2 * 4
