"""When the reader of a stream is woken."""

from __future__ import annotations

import asyncio
import itertools

from fireworks_training.local.engine_frames import Finish
from fireworks_training.local.gateway.inference.engine_stream import EngineStream

FLUSH = 8


class Owner:
    """Made the streams; keeps what they asked for."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def identity_of(self, version: int) -> str | None:
        return f"snapshot-{version}"


async def wakings(number: int, tokens: int) -> list[int]:
    """How many tokens the stream had at each time that its reader was woken."""
    stream = EngineStream(Owner(), number, FLUSH)
    seen: list[int] = []

    async def read() -> None:
        count, finish = 0, Finish.RUNNING
        while finish is Finish.RUNNING:
            delta = await stream.next()
            count, finish = count + len(delta.tokens), delta.finish
            seen.append(count)

    reader = asyncio.ensure_future(read())
    for index in range(tokens):
        last = Finish.LENGTH if index == tokens - 1 else Finish.RUNNING
        stream.push(1, index, -1.0, -1.0, int(last))
        for _ in range(4):  # the reader takes what there is before the next token
            await asyncio.sleep(0)
    await reader
    return seen


async def test_the_first_token_and_the_end_wake_at_once() -> None:
    for number in range(FLUSH):
        seen = await wakings(number, 50)
        assert (seen[0], seen[-1]) == (1, 50)


async def test_no_more_tokens_wait_than_asked_for() -> None:
    for number in range(FLUSH):
        seen = await wakings(number, 50)
        assert max(b - a for a, b in itertools.pairwise(seen)) == FLUSH


async def test_streams_that_began_together_are_woken_at_different_steps() -> None:
    at = [set((await wakings(number, 50))[1:-1]) for number in range(FLUSH)]
    for step in range(10, 40):
        assert sum(step in woken for woken in at) == 1


async def test_a_reader_that_wants_the_end_is_woken_twice() -> None:
    stream = EngineStream(Owner(), 5, 1 << 30)
    stream.push(1, 7, -1.0, -1.0, 0)
    assert (await stream.next()).tokens == [7]
    for _ in range(1000):
        stream.push(1, 7, -1.0, -1.0, 0)
    waiting = asyncio.ensure_future(stream.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.push(1, 7, -1.0, -1.0, int(Finish.LENGTH))
    assert len((await waiting).tokens) == 1001
