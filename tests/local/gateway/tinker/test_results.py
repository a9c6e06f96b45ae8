"""What became of requests for samples: told once taken, in their order, and never waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fireworks_training.local.gateway.inference.engine_stream import EngineGone
from fireworks_training.local.gateway.tinker.results import CLONE, MAX_PENDING, SampleResults
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.results import SamplingTarget

S = "ts-0:sampler:0"


class Requests:
    """Requests that end when the test says so."""

    def __init__(self, most: int) -> None:
        self.results = SampleResults(most)
        self.ends: dict[int, asyncio.Future[bytes]] = {}

    def take(self, seq_id: int, digest: bytes = b"", samples: int = 1) -> str:
        end = asyncio.get_running_loop().create_future()

        async def run() -> tuple[bytes, str]:
            self.ends[seq_id] = end
            return await end, "kind"

        return self.results.take(S, seq_id, digest, samples, run)

    async def finish(self, *seq_ids: int) -> list[str]:
        taken = [self.take(seq_id) for seq_id in seq_ids]
        await asyncio.sleep(0)
        for seq_id in seq_ids:
            self.ends[seq_id].set_result(b"%d" % seq_id)
            await self.results.result(f"{S}:sample-{seq_id}", 5.0)
        return taken

    async def ended(self, cursor: int, hold_s: float = 5.0, clone: int = 0) -> list[str]:
        target = SamplingTarget(
            type="sampling_session", sampling_session_id=S, cloned_sampler_id=clone
        )
        rows, _ = await self.results.ended(target, cursor, hold_s)
        return [f"{row.request_id.rpartition('-')[2]} {row.failed} {row.body!r}" for row in rows]


@pytest.fixture
async def requests() -> AsyncIterator[Requests]:
    made = Requests(most=3)
    yield made
    await made.results.close()


async def test_a_request_is_taken_once(requests: Requests) -> None:
    first = requests.take(1)
    assert requests.results.taken(S, 1, b"") == (first, True)
    # Two of the same came at once, and both were found new.
    assert requests.take(1) == first
    await asyncio.sleep(0)
    with pytest.raises(HttpProblem, match="another request"):
        requests.take(1, b"other")
    assert await requests.results.result(first, 0.0) is None
    requests.ends[1].set_result(b"x")
    assert await requests.results.result(first, 5.0) == (b"x", "kind")
    assert await requests.ended(0) == ["1 False b'x'"]


async def test_endings_are_told_in_their_order(requests: Requests) -> None:
    ids = [requests.take(seq_id) for seq_id in (1, 2, 3, CLONE + 1)]
    await asyncio.sleep(0)
    waits = asyncio.create_task(requests.ended(0))
    requests.ends[CLONE + 1].set_result(b"c")
    await asyncio.sleep(0)
    assert not waits.done(), "another clone's ending wakes nobody"
    requests.ends[3].set_exception(HttpProblem(400, "no"))
    assert await waits == ["3 True None"]
    requests.results.cancel(ids[0])
    requests.ends[2].set_result(b"b")
    await requests.results.result(ids[1], 5.0)
    assert (await requests.ended(1))[-1] == "2 False b'b'"
    assert "1 True None" in await requests.ended(0)
    assert await requests.ended(0, clone=1) == [f"{CLONE + 1} False b'c'"]
    told = await requests.results.result(ids[2], 5.0)
    assert told == (b'{"error":"no","category":"user"}', "application/json")


async def test_nobody_waits_for_what_is_not_under_way(requests: Requests) -> None:
    with pytest.raises(HttpProblem, match="Make another sampling client"):
        await requests.ended(0)
    assert await requests.ended(0, hold_s=0.0) == []
    await requests.finish(1)
    assert len(await requests.ended(0)) == 1
    for cursor, hold_s in ((1, 5.0), (2, 0.0), (2, 5.0)):
        with pytest.raises(HttpProblem, match="is gone"):
            await requests.ended(cursor, hold_s)


async def test_a_request_whose_engine_died_is_sent_again(requests: Requests) -> None:
    taken = requests.take(1)
    await asyncio.sleep(0)
    requests.ends[1].set_exception(EngineGone("it died"))
    with pytest.raises(HttpProblem, match="sample again") as caught:
        await requests.results.result(taken, 5.0)
    assert caught.value.status == 410
    assert requests.results.taken(S, 1, b"other") == (taken, False)


async def test_what_is_kept_is_bounded(requests: Requests) -> None:
    ids = await requests.finish(1, 2, 3)
    requests.take(4)
    with pytest.raises(HttpProblem, match="no result"):
        await requests.results.result(ids[0], 0.0)
    assert await requests.results.result(ids[2], 0.0) == (b"3", "kind")
    # What runs stays, however much there is of it, but no more is taken than so many samples.
    requests.take(5, samples=MAX_PENDING - 1)
    with pytest.raises(HttpProblem, match="run or wait already"):
        requests.take(6, samples=1)
    await asyncio.sleep(0)
    requests.ends[5].set_result(b"5")
    await requests.results.result(f"{S}:sample-5", 5.0)
    requests.take(6, samples=1)


async def test_delivered_results_go_first(requests: Requests) -> None:
    ids = [requests.take(seq_id) for seq_id in (1, 2, 3)]
    await asyncio.sleep(0)
    for seq_id in (1, 2, 3):
        requests.ends[seq_id].set_result(b"")
    await requests.ended(0)
    requests.results.retrieved(S, [ids[1], "ts-9:sampler:0:sample-1", "nonsense"])
    requests.take(4)
    assert await requests.results.result(ids[0], 0.0) is not None
    with pytest.raises(HttpProblem, match="no result"):
        await requests.results.result(ids[1], 0.0)
