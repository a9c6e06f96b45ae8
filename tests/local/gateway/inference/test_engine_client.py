"""What the gateway's end of an engine's socket hands to whom, against an engine played here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from fireworks_training.local.engine_frames import Step, encode_control, encode_step
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.engine_stream import Generation

HELLO = {"op": "hello", "vocab_size": 9, "max_context": 64, "max_slots": 8, "max_waiting": 8}


@asynccontextmanager
async def played(path: Path) -> AsyncIterator[tuple[EngineClient, asyncio.StreamWriter]]:
    """A client that is connected, and the end of the connection that an engine writes to."""
    writers: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_control(HELLO))
        writers.put_nowait(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(engine, path / "e.sock")
    client = EngineClient(path / "e.sock", "bench/0")
    await client.connect()
    try:
        yield client, await writers.get()
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


def step(streams: list[int]) -> bytes:
    """A token 5 for each stream."""
    n = len(streams)
    numbers = np.zeros(n, np.float32)
    return encode_step(
        Step(
            version=1,
            active=n,
            waiting=0,
            streams=np.array(streams, np.uint32),
            tokens=np.array([5 + at for at in range(n)], np.int32),
            logprobs=numbers,
            sampling_logprobs=numbers,
            finished=np.zeros(n, np.uint8),
            top_ids=np.empty((n, 0), np.int32),
            top_logprobs=np.empty((n, 0), np.float32),
        )
    )


async def test_of_a_step_the_newest_stream_has_its_token_first(tmp_path: Path) -> None:
    async with played(tmp_path) as (client, engine):
        streams = [client.generate(Generation([1], 4)) for _ in range(4)]
        got: list[tuple[int, list[int]]] = []

        async def read(number: int) -> None:
            got.append((number, (await streams[number].next()).tokens))

        async with asyncio.timeout(10), asyncio.TaskGroup() as readers:
            for number in range(4):
                readers.create_task(read(number))
            # Engines list the streams that run before those that begin.
            engine.write(step([1, 2, 3, 4]))
        assert got == [(3, [8]), (2, [7]), (1, [6]), (0, [5])]
