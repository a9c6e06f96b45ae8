"""`stream()`: deltas while the server generates, on any loop and in any thread, and early ends."""

from __future__ import annotations

import asyncio
import gc

import pytest

from fireworks_training import (
    ClientClosed,
    DeploymentSampler,
    InvalidArgument,
    SamplingClientClosedError,
    SamplingRequestError,
    WrongLoop,
)
from fireworks_training._async.sampling.concurrency import FixedConcurrencyController
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import (
    KEY,
    MODEL,
    CharacterTokenizer,
    Make,
    cancel,
    nothing_left,
    quick,
    until,
)


async def test_deltas_come_while_the_server_generates(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    deltas = either().stream([1], max_tokens=3, logprobs=True)
    text, tokens, logprobs, sampling = "", list[int](), list[float](), list[float]()
    async for delta in deltas:
        if not text:
            assert (delta.text, list(delta.tokens)) == ("<2>", [2])
            with pytest.raises(InvalidArgument, match="iterate to the end"):
                _ = deltas.completion
            server.go_on.set()
        text += delta.text
        tokens += delta.tokens
        logprobs.extend(delta.logprobs)
        sampling.extend(delta.sampling_logprobs)
    one = deltas.completion
    assert (one.text, one.completion_tokens) == (text, tokens)
    assert (one.inference_logprobs, one.sampling_logprobs) == (logprobs, sampling)
    assert [delta async for delta in deltas] == []  # the end stays the end
    assert len(server.bodies) == 1


def test_a_plain_function_iterates_too() -> None:
    with stub.CompletionsServer() as server, DeploymentSampler(server.url, MODEL, KEY) as sampler:
        with sampler.stream([1], max_tokens=4) as deltas:
            assert "".join(delta.text for delta in deltas) == "<2><3><4><5>"
        assert deltas.completion.finish_reason == "length"


async def test_a_conversation_may_be_streamed(server: CompletionsServer, make: Make) -> None:
    sampler = make(tokenizer=CharacterTokenizer())
    deltas = sampler.stream([{"role": "u", "content": "hi"}], max_tokens=1)
    assert [delta.text async for delta in deltas] == ["<59>"]
    with pytest.raises(InvalidArgument, match="tokenizer="):
        make().stream([{"role": "u", "content": "hi"}])
    with pytest.raises(InvalidArgument, match="one prompt"):
        make().stream([[1], [2]])  # type: ignore[list-item]


@pytest.mark.parametrize("how", ["aclose", "block", "drop", "cancel"])
async def test_leaving_early_stops_the_server(
    server: CompletionsServer, either: Make, how: str
) -> None:
    server.otherwise = stub.hang_mid_stream
    controller = FixedConcurrencyController(2)
    sampler = either(concurrency_controller=controller)
    async with nothing_left(controller):
        deltas = sampler.stream([1], max_tokens=9)
        assert (await anext(deltas)).text == "<5>"
        if how == "aclose":
            await deltas.aclose()
        elif how == "block":
            async with deltas:
                pass
        elif how == "drop":
            del deltas
            gc.collect()
        else:
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            await cancel(waiting)
        await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 1
    if how == "aclose":
        with pytest.raises(ClientClosed):
            await anext(deltas)


async def test_an_attempt_that_nobody_saw_is_tried_again(
    server: CompletionsServer, make: Make
) -> None:
    server.script = [stub.status(503), stub.stream(end=False)]
    deltas = make().stream([1], max_tokens=2)
    assert "".join([delta.text async for delta in deltas]) == "<2><3>"
    assert len(server.bodies) == 3


async def test_tokens_of_two_attempts_are_never_spliced(
    server: CompletionsServer, make: Make
) -> None:
    async def break_later(
        here: CompletionsServer, request: stub.web.Request, body: dict[str, object]
    ) -> stub.web.StreamResponse:
        response = await stub.open_stream(request)
        await response.write(stub.event(stub.token_chunk(2, logprobs=False)))
        await server.go_on.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    server.script = [break_later]
    deltas = make().stream([1], max_tokens=2)
    assert (await anext(deltas)).text == "<2>"
    server.go_on.set()
    with pytest.raises(SamplingRequestError) as caught:
        await anext(deltas)
    assert (caught.value.attempts, caught.value.final_error_kind) == (1, "connection")
    assert len(server.bodies) == 1


async def test_a_failure_is_raised_by_the_iteration(server: CompletionsServer, make: Make) -> None:
    server.otherwise = stub.status(400)
    with pytest.raises(SamplingRequestError, match="400"):
        await anext(make(retries=quick(attempts=1)).stream([1]))


async def test_closing_the_sampler_ends_its_streams(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    sampler = either()
    deltas = sampler.stream([1])
    await anext(deltas)
    waiting = asyncio.ensure_future(anext(deltas))
    await asyncio.sleep(0)
    await sampler.aclose()
    with pytest.raises(SamplingClientClosedError):
        await waiting
    await asyncio.wait_for(server.idle.wait(), 5)


async def test_a_blocking_wait_on_the_stream_s_own_loop_is_refused(
    server: CompletionsServer, shared: Make
) -> None:
    server.otherwise = stub.hang_headers_only
    with pytest.raises(WrongLoop), shared().stream([1]) as deltas:
        next(deltas)
    await until(lambda: server.generating == 0)


async def test_a_slow_consumer_finds_deltas_merged(server: CompletionsServer, make: Make) -> None:
    sampler = make()
    deltas = sampler.stream([1], max_tokens=50, logprobs=True)
    first = await anext(deltas)
    await until(lambda: server.idle.is_set())
    await until(lambda: bool(sampler._context.metrics))
    rest = [delta async for delta in deltas]
    assert len(rest) <= 1
    assert first.text + "".join(delta.text for delta in rest) == deltas.completion.text


async def test_async_with_runs_the_sampler_on_this_loop(server: CompletionsServer) -> None:
    async with DeploymentSampler(server.url, MODEL, KEY) as sampler:
        await sampler.sample_with_prompt_tokens([1], max_tokens=1)
        assert sampler._context.transport.owner.bound is asyncio.get_running_loop()
