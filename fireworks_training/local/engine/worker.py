"""The engine's process: a Unix socket, one gateway at a time, and the loop that drives the engine.

Knows descriptors and the settings it is started with. Does not know requests or tensors. One thread
does everything: between two ticks it reads the frames that have arrived, without waiting while
there is work, and sends what the socket takes. Only a hot load is prepared in another thread, which
wakes this one by a byte in a pipe.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from pathlib import Path
from typing import Self, cast

from fireworks_training.local.engine.core import Engine, EngineCapacity
from fireworks_training.local.engine.loads import in_a_thread
from fireworks_training.local.engine.weights import ServedWeights
from fireworks_training.local.engine_frames import Control, FrameDecoder, FrameError
from fireworks_training.local.model.memory import (
    PageReturn,
    c_library_trim,
    check_memory,
    free_bytes,
)
from fireworks_training.local.model.model import SnapshotDtype, configure_torch
from fireworks_training.local.store.snapshots import SnapshotStore

MAX_UNSENT = 64 * 1024 * 1024
"""Unsent bytes, for a slow gateway, at which the engine stops stepping."""

CACHE_BYTES = 2 * 1024**3
"""Bytes of the key/value cache at most, keys and values in fp32."""

PROMPT_BYTES = 256 * 1024**2
"""Bytes of the prefix cache at most."""

BYTES_PER_PARAMETER = 12
"""Memory of a parameter: fp32 to compute with, another copy in the layout of the products, the
base's values in bf16, and as much again while a snapshot is being read."""

_LEAST_CACHE = 256 * 1024**2
"""Bytes of memory without which the caches could hold no stream."""

_SOCKET_BYTES = 1 << 18


def main(settings: dict[str, object]) -> None:
    """Serve one deployment's replica until SIGTERM or a `stop` control.

    Args:
        settings: "socket", "model_path", "base_model" (resource name that snapshots must come
            from), "snapshots_dir", "max_context_length"; "snapshot_dtype" ("bfloat16") and
            "max_slots" (256) may be missing.

    Raises:
        UnsupportedModelError: this engine would not serve the model faithfully.
        NotEnoughMemory: the model does not fit into this machine.
        OSError: the model or the socket is not there.
    """
    configure_torch()
    model_path = Path(cast(str, settings["model_path"]))
    check_memory(model_path, BYTES_PER_PARAMETER, _LEAST_CACHE, free_bytes(), "an engine")
    listener = listen(Path(cast(str, settings["socket"])))
    weights = ServedWeights(
        model_path,
        SnapshotStore(Path(cast(str, settings["snapshots_dir"]))),
        base_model=cast(str, settings["base_model"]),
        dtype=cast(SnapshotDtype, settings.get("snapshot_dtype", "bfloat16")),
    )
    limits = EngineCapacity(
        max_slots=cast(int, settings.get("max_slots", 256)),
        max_context=cast(int, settings["max_context_length"]),
        cache_tokens=CACHE_BYTES // cache_bytes_per_token(weights),
        prompt_tokens=PROMPT_BYTES // cache_bytes_per_token(weights),
    )
    serve(Engine(weights, limits, run=in_a_thread), listener)


def cache_bytes_per_token(weights: ServedWeights) -> int:
    """Computes the bytes of keys and values of one token of one stream, over all layers."""
    config = weights.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * size)


def listen(path: Path) -> socket.socket:
    """Opens a listening Unix socket at `path`, which must not be in use."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(4)
    return listener


def serve(engine: Engine, listener: socket.socket) -> None:
    """Drive the engine for one gateway after the other until one sends `stop`."""
    pages = PageReturn(c_library_trim())
    with listener, _Waker() as waker:
        engine.loads.wake = waker.wake
        while True:
            connection, _ = listener.accept()
            with connection, selectors.DefaultSelector() as selector:
                stopped = _Connection(connection, selector, engine, waker, pages).run()
            engine.reset()
            if stopped:
                return


class _Waker:
    """Wakes the engine's loop from another thread."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)

    def wake(self) -> None:
        # A full pipe wakes as well as one more byte; a closed one has nobody behind it.
        with contextlib.suppress(OSError):
            os.write(self._writer, b"w")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 4096)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.reader)
        writer, self._writer = self._writer, -1
        os.close(writer)


class _Connection:
    """Serves one gateway's connection, from the hello frame to its end."""

    def __init__(
        self,
        connection: socket.socket,
        selector: selectors.BaseSelector,
        engine: Engine,
        waker: _Waker,
        pages: PageReturn,
    ) -> None:
        self._socket = connection
        self._selector = selector
        self._engine = engine
        self._waker = waker
        self._pages = pages
        self._decoder = FrameDecoder()
        self._unsent = bytearray(engine.hello())
        self._stopped = False
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        selector.register(waker.reader, selectors.EVENT_READ)

    def run(self) -> bool:
        """Runs until the gateway closes, breaks the protocol or sends `stop`; True for `stop`."""
        while self._exchange():
            if self._engine.busy and len(self._unsent) < MAX_UNSENT:
                for frame in self._engine.tick():
                    self._unsent += frame
                self._pages.worked(time.monotonic())
        return self._stopped

    def _exchange(self) -> bool:
        """Sends and reads what the socket allows; waits only if there is nothing else to do."""
        try:
            self._send()
            idle = not self._engine.busy or len(self._unsent) >= MAX_UNSENT
            if idle:
                self._pages.paused(time.monotonic())
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            self._selector.modify(self._socket, wanted)
            for key, events in self._selector.select(None if idle else 0):
                if key.fd == self._waker.reader:
                    self._waker.drain()
                elif events & selectors.EVENT_READ and not self._read():
                    return False
            return True
        except (ConnectionError, FrameError):
            # The gateway died or can't be understood: to both, a closed connection is the answer.
            return False

    def _send(self) -> None:
        while self._unsent:
            try:
                with memoryview(self._unsent) as unsent:
                    sent = self._socket.send(unsent[:_SOCKET_BYTES])
            except BlockingIOError:
                return
            del self._unsent[:sent]

    def _read(self) -> bool:
        data = self._socket.recv(_SOCKET_BYTES)
        for frame in self._decoder.feed(data):
            if not isinstance(frame, Control):
                raise FrameError("a gateway sends controls only")
            if frame.message["op"] == "stop":
                self._stopped = True
                return False
            try:
                self._engine.control(frame.message)
            except ValueError as error:
                raise FrameError(str(error)) from error
        return bool(data)
