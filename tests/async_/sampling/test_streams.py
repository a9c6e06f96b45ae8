"""Deltas while the server generates, and streams that end early or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fireworks_training._async.sampling.completion_stream import (
    Attempt,
    AttemptFailed,
    CompletionStream,
)
from fireworks_training._core.sse import ServerSentEvent, SseDecoder
from fireworks_training._wire.completions.request import sampling_request
from fireworks_training.errors import DeploymentSamplerTimeoutError, SamplingRequestError
from fireworks_training.models import TokenDelta
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import MODEL, Make, quick


def attempt_at(server: CompletionsServer, max_tokens: int = 3, **options: Any) -> Attempt:
    request = sampling_request(
        MODEL, max_tokens=max_tokens, temperature=1.0, options=options, decode_stop=None
    )
    return Attempt(
        url=server.url + "/inference/v1/completions",
        headers={},
        body=request.encode([1]).body(0),
        request=request,
        prompt_ids=[1],
        number=1,
        prompt_index=0,
        sample_index=0,
    )


async def test_deltas_arrive_while_the_server_generates(
    server: CompletionsServer, shared: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    sampler = shared()
    text, logprobs = "", list[float]()

    def tell(delta: TokenDelta) -> None:
        nonlocal text
        if not text:
            assert (delta.text, list(delta.logprobs)) == ("<2>", [-2 / 8])
            server.go_on.set()
        text += delta.text
        logprobs.extend(delta.logprobs)

    stream = CompletionStream(sampler._context.transport, attempt_at(server, logprobs=True))
    try:
        await stream.open()
        completion = await stream.read(tell)
    finally:
        stream.close()
    assert (completion.text, completion.inference_logprobs) == (text, logprobs)
    assert completion.metrics.client_ttft is not None
    assert completion.metrics.client_latency is not None
    assert completion.metrics.client_ttft < completion.metrics.client_latency


async def test_leaving_a_stream_early_stops_the_server(
    server: CompletionsServer, shared: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    sampler = shared()
    stream = CompletionStream(sampler._context.transport, attempt_at(server))
    await stream.open()
    first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(stream.read(lambda delta: first.set_result(delta.text)))
    assert await first == "<5>"
    reading.cancel()
    await asyncio.wait([reading])
    stream.close()
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 1


@pytest.mark.parametrize("cancelled_too", [False, True])
async def test_silence_before_the_headers_is_a_time_out_and_no_cancellation(
    server: CompletionsServer, shared: Make, cancelled_too: bool
) -> None:
    server.otherwise = stub.hang_before_headers
    stream = CompletionStream(shared()._context.transport, attempt_at(server))
    opening = asyncio.create_task(stream.open())
    await server.reached.wait()
    stream.fail(TimeoutError("silent"))
    if cancelled_too:
        opening.cancel()
    await asyncio.wait([opening])
    stream.close()
    assert opening.cancelled() is cancelled_too
    if not cancelled_too:
        failure = opening.exception()
        assert isinstance(failure, AttemptFailed)
        assert failure.kind == "timeout"
        assert opening.cancelling() == 0


async def test_a_frame_of_100_mb_is_refused_with_bounded_memory(
    server: CompletionsServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sent, size = 0, 0, 100 * 2**20

    class Counting(SseDecoder):
        def feed(self, data: bytes) -> list[ServerSentEvent]:
            nonlocal held
            held = max(held, len(data) + sum(map(len, self._line or ())))
            return super().feed(data)

    async def floods(*args: Any) -> Any:
        nonlocal sent
        response = await stub.open_stream(args[1])
        await response.write(b"data: ")
        piece = b"x" * 2**18
        while sent < size:
            await response.write(piece)
            sent += len(piece)
        return response

    monkeypatch.setattr("fireworks_training._async.sampling.completion_stream.SseDecoder", Counting)
    server.otherwise = floods
    with pytest.raises(SamplingRequestError, match="max_tokens tokens can have") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=2)
    assert caught.value.attempts == 1
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 1  # the client closed the connection under it
    assert held < 2 * 2**20  # a megabyte, and what one read may bring
    assert sent < size / 3


async def test_a_server_that_does_not_end_its_answer_costs_a_connection_only(
    server: CompletionsServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fireworks_training._async.sampling.completion_stream.END_TIMEOUT", 0.01)

    async def never_ends(*args: Any) -> Any:
        _, request, body = args
        response = await stub.open_stream(request)
        ids = stub.tokens_of(body)
        await response.write(stub.event(stub.last_chunk(body, ids)) + stub.event(b"[DONE]"))
        await server.hang()

    server.script = [never_ends]
    sampler = make()
    assert len(await sampler.sample_with_prompt_tokens([1], max_tokens=2)) == 1
    assert len(await sampler.sample_with_prompt_tokens([1], max_tokens=2)) == 1
    assert len(server.peers) == 2


async def test_a_stream_that_gave_all_and_goes_on_is_ended(
    server: CompletionsServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bytes that were asked for, and soon after the last token that was asked for."""
    monkeypatch.setattr("fireworks_training._async.sampling.completion_stream.GIVEN_TIMEOUT", 0.01)

    async def never_stops(*args: Any) -> Any:
        response = await stub.open_stream(args[1])
        while True:
            await response.write(stub.event({"choices": [{"text": "more" * 1000}]}))

    async def gives_all_and_hangs(*args: Any) -> Any:
        _, request, body = args
        response = await stub.open_stream(request)
        await response.write(stub.event(stub.last_chunk(body, stub.tokens_of(body))))
        return await server.hang()

    async def gives_the_tokens_and_hangs(*args: Any) -> Any:
        _, request, body = args
        response = await stub.open_stream(request)
        for token in stub.tokens_of(body):
            await response.write(stub.event(stub.token_chunk(token, logprobs=True)))
        return await server.hang()

    sampler = make(retries=quick(attempts=1))
    server.otherwise = never_stops
    with pytest.raises(SamplingRequestError, match="cut off"):
        await sampler.sample_with_prompt_tokens([1], max_tokens=2)
    server.otherwise = gives_all_and_hangs
    (one,) = await sampler.sample_with_prompt_tokens([1], max_tokens=2)
    assert one.completion_len == 2
    server.otherwise = gives_the_tokens_and_hangs
    with pytest.raises(SamplingRequestError, match="ended before the completion"):
        await sampler.sample_with_prompt_tokens([1], max_tokens=2, logprobs=True)
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 3


@pytest.mark.parametrize("alive", [b": still here\n\n", b"\n", b"data:\n\n", b": no end"])
async def test_keep_alives_alone_are_silence(
    server: CompletionsServer, make: Make, alive: bytes
) -> None:
    async def only_keeps_alive(*args: Any) -> Any:
        response = await stub.open_stream(args[1])
        while True:
            await response.write(alive)
            await asyncio.sleep(0.005)

    server.otherwise = only_keeps_alive
    with pytest.raises(DeploymentSamplerTimeoutError, match="no byte"):
        await make(retries=quick(attempts=1)).sample_with_prompt_tokens([1], http_timeout=0.05)


async def test_keep_alives_between_tokens_harm_nobody(
    server: CompletionsServer, make: Make
) -> None:
    async def keeps_alive(*args: Any) -> Any:
        _, request, body = args
        response = await stub.open_stream(request)
        for token in stub.tokens_of(body):
            await response.write(b": still here\n\ndata:\n\n")
            await response.write(stub.event(stub.token_chunk(token, logprobs=False)))
        last = stub.last_chunk(body, stub.tokens_of(body))
        await response.write(stub.event(last) + b"data: [DONE] \n\n")
        return response

    server.otherwise = keeps_alive
    (one,) = await make().sample_with_prompt_tokens([1], max_tokens=3)
    assert one.text == "<2><3><4>"
