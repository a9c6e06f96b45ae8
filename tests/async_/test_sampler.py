"""The sampler against a real HTTP server: what comes back, what is retried, what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fireworks_training._async import sampling_run
from fireworks_training._async.completion_stream import Attempt, AttemptFailed, CompletionStream
from fireworks_training._async.gate import AdaptiveConcurrencyController, FixedConcurrencyController
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.sampler import DeploymentSampler
from fireworks_training._async.sampling_run import RetryPolicy
from fireworks_training._async.transport import Transport
from fireworks_training._core.backoff import Backoff
from fireworks_training._wire.completions import sampling_request
from fireworks_training.errors import (
    ApiError,
    AuthenticationFailed,
    ClientClosed,
    ConnectionFailed,
    DeploymentSamplerTimeoutError,
    InvalidArgument,
    NotFound,
    SamplingClientClosedError,
    SamplingRequestError,
    UnknownOption,
)
from fireworks_training.models import SampledCompletion, ServerMetrics
from tests import stub_completions as stub
from tests.stub_completions import CompletionServer

MODEL = "accounts/a/deployments/d"
KEY = "fw_secretkey"
PROMPT = [987001, 987002]


class RecordedBackoff(Backoff):
    """A budget that waits for nothing, and tells how long it would have."""

    def __init__(self, delays: list[float], **options: Any) -> None:
        super().__init__(**options)
        self._delays = delays

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        delay = super().next_delay(error, now=now)
        if delay is None:
            return None
        self._delays.append(delay)
        return 0.0


def quick(delays: list[float] | None = None, *, attempts: int = 7) -> RetryPolicy:
    """The usual budgets without their waiting."""
    seen = [] if delays is None else delays
    usual = RetryPolicy()
    assert usual.hot_load()._attempts == 11
    return RetryPolicy(
        transient=lambda: RecordedBackoff(seen, attempts=attempts, uniform=lambda: 0.0),
        hot_load=lambda: RecordedBackoff(
            seen, attempts=11, base=0.5, cap=8.0, retryable=sampling_run.is_hot_load
        ),
    )


def endless() -> RetryPolicy:
    """Back-off that does not end within a test."""
    return RetryPolicy(transient=lambda: Backoff(base=3600.0, cap=3600.0, uniform=lambda: 0.0))


Make = Callable[..., DeploymentSampler]


@pytest.fixture
async def server() -> AsyncIterator[CompletionServer]:
    async with stub.serving() as running:
        yield running


@pytest.fixture
async def make(server: CompletionServer) -> AsyncIterator[Make]:
    """Makes samplers of the server that live on the portal, and closes them."""
    async with contextlib.AsyncExitStack() as stack:

        def maker(**options: Any) -> DeploymentSampler:
            url = options.pop("url", server.url)
            sampler = DeploymentSampler(url, MODEL, KEY, **{"retries": quick(), **options})
            stack.push_async_callback(sampler.aclose)
            return sampler

        yield maker


@pytest.fixture
async def shared(server: CompletionServer) -> AsyncIterator[Make]:
    """Makes samplers of the server on the test's own loop, as a service does."""
    owner = OwnerLoop()
    owner.get()
    transport = Transport(owner=owner, base_url=server.url, api_key=KEY)

    def maker(**options: Any) -> DeploymentSampler:
        retries = options.pop("retries", quick())
        sampler = DeploymentSampler._shared(
            transport=transport,
            inference_url=options.pop("url", server.url),
            model=MODEL,
            tokenizer=None,
            **{"concurrency_controller": AdaptiveConcurrencyController(), **options},
        )
        sampler._retries = retries
        return sampler

    yield maker
    await transport.close()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    for _ in range(4000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


class CharacterTokenizer:
    """One token a character; notes the threads that it is used in."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> list[int]:
        assert kwargs == {"tokenize": True, "return_dict": False}
        self.threads.add(threading.get_ident())
        text = "".join(f"{m['role']}:{m['content']};" for m in messages)
        return [ord(letter) for letter in text + ("a:" if add_generation_prompt else "")]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) if token < 1000 else "\ufffd" for token in ids)


# -- what comes back -------------------------------------------------------------------------------


async def test_n_completions_of_one_prompt(server: CompletionServer, make: Make) -> None:
    sampler = make()
    found = await sampler.sample_with_prompt_tokens([1, 2], n=3, max_tokens=4, logprobs=True)
    assert [(one.prompt_index, one.sample_index) for one in found] == [(0, 0), (0, 1), (0, 2)]
    for one in found:
        assert one.text == "<3><4><5><6>"
        assert one.full_tokens == [1, 2, 3, 4, 5, 6]
        assert (one.prompt_len, one.completion_len, one.finish_reason) == (2, 4, "length")
        assert one.inference_logprobs == array("d", [-3 / 8, -4 / 8, -5 / 8, -6 / 8])
        assert one.sampling_logprobs == array("d", [-3 / 16, -4 / 16, -5 / 16, -6 / 16])
        assert one.metrics.http_status_code == 200
        assert one.metrics.prefill_queue_duration == 0.0
        assert one.metrics.client_ttft is not None
        assert one.metrics.client_latency is not None
        assert 0 < one.metrics.client_ttft <= one.metrics.client_latency
    assert len(server.bodies) == 3


async def test_prompts_come_back_in_order(server: CompletionServer, make: Make) -> None:
    found = await make().sample_with_prompt_tokens([[10], [20], [30]], n=2, max_tokens=1)
    assert [one.full_tokens for one in found] == [[10, 11]] * 2 + [[20, 21]] * 2 + [[30, 31]] * 2
    indices = [(one.prompt_index, one.sample_index) for one in found]
    assert indices == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


async def test_what_goes_over_the_wire(server: CompletionServer, make: Make) -> None:
    sampler = make(additional_headers={"X-Team": "blue"})
    call = sampler.sample_with_prompt_tokens(
        [1], n=2, max_tokens=2, temperature=0.5, seed=11, additional_headers_snapshot={"X-A": "b"}
    )
    await call
    assert [sent["seed"] for sent in server.bodies] == [11, 12]
    for sent, headers in zip(server.bodies, server.headers, strict=True):
        assert (sent["model"], sent["prompt"], sent["n"]) == (MODEL, [1], 1)
        assert (sent["temperature"], sent["top_p"], sent["top_k"]) == (0.5, 1.0, 0)
        assert headers["X-API-Key"] == KEY
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert headers["Accept-Encoding"] == "identity"
        assert (headers["X-Team"], headers["X-A"]) == ("blue", "b")
    ids = {headers["X-Request-Id"] for headers in server.headers}
    assert len(ids) == 2


async def test_conversations_go_through_the_chat_template(
    server: CompletionServer, make: Make
) -> None:
    tokenizer = CharacterTokenizer()
    sampler = make(tokenizer=tokenizer)
    hello = [{"role": "u", "content": "hi"}]
    (one,) = await sampler.sample_with_tokens(hello, max_tokens=1)
    assert "".join(map(chr, one.prompt_tokens)) == "u:hi;a:"
    both = await sampler.sample_with_tokens(messages=[hello, hello + hello], max_tokens=1)
    assert [one.prompt_len for one in both] == [7, 12]
    loop = sampler._transport.owner.bound
    assert loop is not None

    async def where() -> int:
        return threading.get_ident()

    portal = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(where(), loop))
    assert not tokenizer.threads & {portal, threading.get_ident()}
    assert sampler.tokenizer is tokenizer


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        {"role": "u", "content": "hi"},
        ["hi"],
        [[]],
        [[{"role": "u", "content": "hi"}], []],
        [[{"role": "u", "content": "hi"}], {"role": "u", "content": "hi"}],
        [{"content": "hi"}],
        [[{"content": "hi"}]],
        [3],
    ],
)
async def test_other_messages_are_refused_at_the_call(make: Make, messages: Any) -> None:
    sampler = make(tokenizer=CharacterTokenizer())
    with pytest.raises(InvalidArgument, match="role"):
        sampler.sample_with_tokens(messages)


@pytest.mark.parametrize("prompt", [[], [[]], [1, [2]], [[1], 2], "text", [1.5], [[1], ["x"]]])
async def test_other_prompts_are_refused_at_the_call(make: Make, prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="prompt"):
        make().sample_with_prompt_tokens(prompt)


async def test_wrong_arguments_are_refused_at_the_call(make: Make) -> None:
    sampler = make()
    for wrong in ({"n": 0}, {"n": 1.0}, {"max_tokens": 0}, {"temperature": -1}, {"max_seq_len": 0}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            sampler.sample_with_prompt_tokens([1], **wrong)  # type: ignore[arg-type]
    with pytest.raises(UnknownOption, match="top_p"):
        sampler.sample_with_prompt_tokens([1], top_pp=0.5)  # type: ignore[call-arg]
    with pytest.raises(InvalidArgument, match="tokenizer="):
        sampler.sample_with_tokens([{"role": "user", "content": "hi"}])


async def test_a_string_is_one_stop(server: CompletionServer, make: Make) -> None:
    await make().sample_with_prompt_tokens([1], max_tokens=1, stop="END")
    assert server.bodies[0]["stop"] == ["END"]


async def test_stop_ids_become_text_only_where_the_server_needs_it(
    server: CompletionServer, make: Make
) -> None:
    tokenizer = CharacterTokenizer()
    await make(integer_stops=True).sample_with_prompt_tokens([1], max_tokens=1, stop=[65])
    await make(tokenizer=tokenizer).sample_with_prompt_tokens([1], max_tokens=1, stop=[65])
    assert [sent["stop"] for sent in server.bodies] == [[65], ["A"]]
    with pytest.raises(InvalidArgument, match="no text of its own"):
        make(tokenizer=tokenizer).sample_with_prompt_tokens([1], stop=[5000])
    with pytest.raises(InvalidArgument, match="tokenizer="):
        make().sample_with_prompt_tokens([1], stop=[65])


async def test_max_seq_len(
    server: CompletionServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = make()
    assert await sampler.sample_with_prompt_tokens([1, 2, 3], max_seq_len=3) == []
    assert server.bodies == []
    prompts = [[1], [1, 2], [1, 2, 3]]
    found = await sampler.sample_with_prompt_tokens(prompts, max_tokens=2, max_seq_len=3)
    assert [(one.prompt_index, len(one.full_tokens)) for one in found] == [(0, 3)]
    assert len(server.bodies) == 2
    assert "1 of 3 prompts have max_seq_len (3)" in caplog.text
    assert "1 of 2 completions are longer than max_seq_len (3)" in caplog.text


async def test_a_call_gives_its_result_again(server: CompletionServer, make: Make) -> None:
    call = make().sample_with_prompt_tokens([1], max_tokens=1)
    first = await call
    assert await call is first
    assert len(server.bodies) == 1


def test_a_plain_function_and_twenty_runs_use_one_connection() -> None:
    with (
        stub.serving_in_a_thread() as server,
        DeploymentSampler(
            server.url, MODEL, KEY, concurrency_controller=FixedConcurrencyController(1)
        ) as sampler,
    ):
        assert len(sampler.sample_with_prompt_tokens([1], n=2, max_tokens=2).result()) == 2
        for _ in range(20):
            call = sampler.sample_with_prompt_tokens([1], n=3, max_tokens=2)
            assert len(asyncio.run(call)) == 3
        assert len(server.peers) == 1
        assert server.peak == 1


async def test_a_long_prompt_is_sent_without_a_warning(
    server: CompletionServer, make: Make
) -> None:
    prompt = list(range(100_000, 300_000))
    (one,) = await make().sample_with_prompt_tokens(prompt, max_tokens=1)
    assert one.prompt_len == 200_000


async def test_the_window_bounds_what_is_in_flight(server: CompletionServer, make: Make) -> None:
    gate = FixedConcurrencyController(3)
    found = await make(concurrency_controller=gate).sample_with_prompt_tokens(
        [1], n=20, max_tokens=1
    )
    assert len(found) == 20
    assert server.peak <= 3
    assert (gate.in_flight, gate.waiting) == (0, 0)
    assert len(server.peers) <= 3


async def test_any_controller_with_the_protocol_will_do(
    server: CompletionServer, make: Make
) -> None:
    class Counting:
        window_size = 2

        def __init__(self) -> None:
            self.acquired = 0
            self.released: list[ServerMetrics | None] = []

        async def acquire(self) -> None:
            self.acquired += 1

        def release(self, metrics: ServerMetrics | None = None) -> None:
            self.released.append(metrics)

        def step_completed(self) -> dict[str, float]:
            return {}

    controller = Counting()
    server.script = [stub.status(503), stub.status(500)]
    sampler = make(concurrency_controller=controller)
    await sampler.sample_with_prompt_tokens([1], max_tokens=1)
    assert controller.acquired == 3
    busy, unclear, done = controller.released
    assert busy is not None
    assert busy.http_status_code == 503
    assert unclear is None  # a 500 says nothing about how crowded the server is
    assert done is not None
    assert (done.http_status_code, done.retry_attempt) == (200, 3)
    with pytest.raises(InvalidArgument, match="step_completed"):
        sampler.concurrency_controller = object()  # type: ignore[assignment]


async def test_metrics_are_kept_until_drained(server: CompletionServer, make: Make) -> None:
    sampler = make()
    server.script = [stub.status(503, x_request_id="r9")]
    await sampler.sample_with_prompt_tokens([1], max_tokens=3)
    failed, done = sampler.drain_metrics()
    assert (failed.http_status_code, failed.retry_attempt, failed.request_id) == (503, 1, "r9")
    assert (done.http_status_code, done.retry_attempt, done.completion_tokens) == (200, 2, 3)
    assert sampler.drain_metrics() == []


async def test_raw_logprobs_stand_in_with_one_notice(
    server: CompletionServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = stub.token_chunk(8, logprobs=True, sampling_logprob=None)
    whole = stub.stream(chunk, stub.last_chunk({"prompt": [1]}, [8]), stub.event(b"[DONE]"))
    server.otherwise = whole
    found = await make().sample_with_prompt_tokens([1], n=3, logprobs=True)
    assert all(one.sampling_logprobs == one.inference_logprobs for one in found)
    assert caplog.text.count("no sampling logprobs") == 1


# -- streaming -------------------------------------------------------------------------------------


async def test_deltas_arrive_while_the_server_generates(
    server: CompletionServer, shared: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    sampler = shared()
    request = sampling_request(
        MODEL, max_tokens=3, temperature=1.0, options={"logprobs": True}, decode_stop=None
    )
    attempt = Attempt(
        url=server.url + "/inference/v1/completions",
        headers={},
        body=request.encode([1]).body(0),
        request=request,
        prompt_ids=[1],
        number=1,
        prompt_index=0,
        sample_index=0,
    )
    text, logprobs = "", array("d")
    async with CompletionStream(sampler._transport, attempt) as deltas:
        async for delta in deltas:
            if not text:
                assert (delta.text, list(delta.logprobs)) == ("<2>", [-2 / 8])
                assert deltas.completion is None
                server.go_on.set()
            text += delta.text
            logprobs.extend(delta.logprobs)
    completion = deltas.completion
    assert completion is not None
    assert (completion.text, completion.inference_logprobs) == (text, logprobs)
    assert completion.metrics.client_ttft is not None
    assert completion.metrics.client_latency is not None
    assert completion.metrics.client_ttft < completion.metrics.client_latency


async def test_leaving_a_stream_early_stops_the_server(
    server: CompletionServer, shared: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    sampler = shared()
    request = sampling_request(MODEL, max_tokens=3, temperature=1.0, options={}, decode_stop=None)
    attempt = Attempt(
        url=server.url + "/inference/v1/completions",
        headers={},
        body=request.encode([1]).body(0),
        request=request,
        prompt_ids=[1],
        number=1,
        prompt_index=0,
        sample_index=0,
    )
    async with CompletionStream(sampler._transport, attempt) as deltas:
        assert (await anext(deltas)).text == "<5>"
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 1


async def test_a_server_that_does_not_end_its_answer_costs_a_connection_only(
    server: CompletionServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fireworks_training._async.completion_stream.END_TIMEOUT", 0.01)

    async def never_ends(*args: Any) -> Any:
        _, request, body = args
        response = await stub.open_stream(request)
        ids = stub.tokens_of(body)
        await response.write(stub.event(stub.last_chunk(body, ids)) + stub.event(b"[DONE]"))
        await server.until_the_client_leaves()

    server.script = [never_ends]
    sampler = make()
    assert len(await sampler.sample_with_prompt_tokens([1], max_tokens=2)) == 1
    assert len(await sampler.sample_with_prompt_tokens([1], max_tokens=2)) == 1
    assert len(server.peers) == 2


# -- faults ----------------------------------------------------------------------------------------

TOKEN = stub.token_chunk(2, logprobs=False)
PARTLY = stub.event(TOKEN)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (stub.status(503), "http_status"),
        (stub.status(500, b"<html>oops</html>"), "http_status"),
        (stub.status(408), "http_status"),
        (stub.status(504), "http_status"),
        (stub.stream(PARTLY), "sse_truncation"),
        (stub.stream(PARTLY[:-7]), "sse_truncation"),
        (stub.stream(PARTLY, stub.event(b"[DONE]")), "sse_truncation"),
        (stub.stream(), "sse_truncation"),
        (stub.stream(PARTLY, end=False), "connection"),
        (
            stub.stream(PARTLY, stub.event({"error": {"status": 503}}, kind="error")),
            "upstream_stream",
        ),
        (stub.stream(PARTLY, {"error": {"status_code": 429, "code": "x"}}), "upstream_stream"),
    ],
)
async def test_a_passing_fault_costs_one_attempt(
    server: CompletionServer, make: Make, fault: stub.Behaviour, kind: str
) -> None:
    server.script = [fault]
    gate = FixedConcurrencyController(2)
    (one,) = await make(concurrency_controller=gate).sample_with_prompt_tokens([1], max_tokens=2)
    assert one.text == "<2><3>"  # nothing of the broken attempt is in it
    assert len(server.bodies) == 2
    assert len({headers["X-Request-Id"] for headers in server.headers}) == 1
    assert gate.in_flight == 0

    server.script = [fault] * 2
    with pytest.raises(SamplingRequestError) as caught:
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1], max_tokens=2)
    assert (caught.value.final_error_kind, caught.value.attempts) == (kind, 2)
    assert caught.value.retry_budget_exhausted


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (stub.status(400, {"error": {"message": "no such field"}}), "http_status", "no such field"),
        (stub.status(401), "http_status", "Check the API key"),
        (stub.status(302), "http_status", "inference URL"),
        (stub.stream(b"data: {not json\n\n"), "upstream_stream", "not JSON"),
        (stub.stream({"error": {"type": "x"}}), "upstream_stream", "error"),
        (stub.stream(stub.event({"status": 400}, kind="error")), "upstream_stream", "400"),
        (
            stub.stream(
                {"choices": [{"text": "", "finish_reason": "stop"}]}, stub.event(b"[DONE]")
            ),
            "upstream_stream",
            "completion_token_ids",
        ),
        (
            stub.stream(stub.last_chunk({"prompt": [1]}, [7]), b"data: x\n\n"),
            "upstream_stream",
            "not JSON",
        ),
        (stub.stream(b"data: " + b"x" * 17_000_000), "upstream_stream", "16,777,216 bytes"),
        (stub.status(200, {"text": "hello"}), "upstream_stream", "event stream"),
    ],
)
async def test_a_fault_that_no_retry_mends_is_raised_at_once(
    server: CompletionServer, make: Make, fault: stub.Behaviour, kind: str, says: str
) -> None:
    server.otherwise = fault
    with pytest.raises(SamplingRequestError, match=says) as caught:
        await make().sample_with_prompt_tokens(PROMPT, max_tokens=2, sampling_context={"step": 3})
    error = caught.value
    assert (error.final_error_kind, error.attempts) == (kind, 1)
    assert not error.retry_budget_exhausted
    assert "[step 3]" in str(error)
    assert len(server.bodies) == 1


async def test_errors_hold_neither_prompt_nor_key_and_pickle(
    server: CompletionServer, make: Make
) -> None:
    message = f"bad: {PROMPT + PROMPT} {KEY}"
    server.otherwise = stub.status(401, {"error": {"message": message, "code": "X"}})
    with pytest.raises(SamplingRequestError) as caught:
        await make().sample_with_prompt_tokens(PROMPT)
    error = caught.value
    for text in (str(error), repr(error), str(error.cause), str(error.as_error_record())):
        assert "987001" not in text
        assert KEY not in text
    assert isinstance(error.cause, AuthenticationFailed)
    assert error.as_error_record() == {
        "type": "SamplingRequestError",
        "logical_request_id": server.headers[0]["X-Request-Id"],
        "model": MODEL,
        "attempts": 1,
        "final_status": 401,
        "final_error_kind": "http_status",
        "request_id": server.headers[0]["X-Request-Id"],
        "retry_budget_exhausted": False,
    }
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_seven_attempts_and_their_delays(server: CompletionServer, make: Make) -> None:
    delays: list[float] = []
    server.otherwise = stub.status(503)
    gate = AdaptiveConcurrencyController()
    with pytest.raises(SamplingRequestError, match="after 7 attempts"):
        await make(retries=quick(delays), concurrency_controller=gate).sample_with_prompt_tokens(
            [1]
        )
    assert len(server.bodies) == 7
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert gate.step_completed()["retry_exhaustions"] == 1.0


async def test_retry_after_is_a_floor(server: CompletionServer, make: Make) -> None:
    delays: list[float] = []
    date = {"Date": "Tue, 15 Nov 1994 08:12:31 GMT", "Retry_After": "Tue, 15 Nov 1994 08:12:41 GMT"}
    server.script = [
        stub.status(503, Retry_After="7"),
        stub.status(429, **date),
        stub.status(429, Retry_After="3600"),
    ]
    await make(retries=quick(delays)).sample_with_prompt_tokens([1], max_tokens=1)
    assert delays == [7.0, 10.0, 30.0]


@pytest.mark.parametrize("hang", [stub.hang_before_headers, stub.hang_headers_only])
async def test_silence_is_a_timeout(
    server: CompletionServer, make: Make, hang: stub.Behaviour
) -> None:
    server.script = [hang]
    sampler = make()
    (one,) = await sampler.sample_with_prompt_tokens([1], max_tokens=1, http_timeout=0.05)
    assert one.metrics.retry_attempt == 2
    assert sampler.drain_metrics()[0].transport_error == "RequestTimedOut"
    server.otherwise = hang
    with pytest.raises(DeploymentSamplerTimeoutError, match="http_timeout") as caught:
        await make(retries=quick(attempts=1)).sample_with_prompt_tokens([1], http_timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.final_error_kind == "timeout"
    await asyncio.wait_for(server.idle.wait(), 5)


async def test_a_stall_mid_stream_is_a_timeout(server: CompletionServer, make: Make) -> None:
    server.otherwise = stub.hang_mid_stream
    with pytest.raises(DeploymentSamplerTimeoutError):
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1], http_timeout=0.05)
    assert len(server.bodies) == 2


async def test_a_504_counts_as_a_timeout(server: CompletionServer, make: Make) -> None:
    server.otherwise = stub.status(504)
    with pytest.raises(DeploymentSamplerTimeoutError):
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1])


async def test_nobody_listens(make: Make, unused_tcp_port: int) -> None:
    sampler = make(url=f"http://127.0.0.1:{unused_tcp_port}", retries=quick(attempts=2))
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1])
    assert caught.value.final_error_kind == "connection"
    assert isinstance(caught.value.cause, ConnectionFailed)


async def test_a_name_that_does_not_resolve(make: Make) -> None:
    sampler = make(url="http://no-such-host.invalid", retries=quick(attempts=1))
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1])
    assert caught.value.final_error_kind == "connection"


@pytest.mark.parametrize(
    "loading",
    [
        stub.status(425),
        stub.status(404),
        stub.status(404, {"error": {"object": "error", "code": "NOT_FOUND", "message": "x"}}),
    ],
)
async def test_a_hot_load_is_waited_for(
    server: CompletionServer, make: Make, loading: stub.Behaviour
) -> None:
    server.script = [loading] * 10
    assert len(await make().sample_with_prompt_tokens([1], max_tokens=1)) == 1
    assert len(server.bodies) == 11
    server.otherwise = loading
    with pytest.raises(SamplingRequestError, match="did not become ready") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=1)
    assert caught.value.attempts == 11


async def test_an_unknown_model_is_not_waited_for(server: CompletionServer, make: Make) -> None:
    server.otherwise = stub.status(404, {"error": {"message": "x", "code": "NOT_FOUND"}})
    with pytest.raises(SamplingRequestError, match="no such deployment") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=1)
    assert isinstance(caught.value.cause, NotFound)
    assert len(server.bodies) == 1


async def test_the_first_failure_takes_its_siblings_with_it(
    server: CompletionServer, make: Make
) -> None:
    async def fail_once_the_others_are_there(*args: Any) -> Any:
        await until(lambda: server.generating == 4)
        return await stub.status(400)(*args)

    server.script = [stub.hang_mid_stream, stub.hang_before_headers, fail_once_the_others_are_there]
    server.otherwise = stub.hang_headers_only
    gate = FixedConcurrencyController(4)
    with pytest.raises(SamplingRequestError, match="400"):
        await make(concurrency_controller=gate).sample_with_prompt_tokens([1], n=6)
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 3
    assert len(server.bodies) == 4  # those that waited for a slot were never sent
    assert (gate.in_flight, gate.waiting) == (0, 0)


# -- cancellation ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def nothing_left(gate: FixedConcurrencyController) -> AsyncIterator[None]:
    """No slot, no waiter and no task of ours is left behind."""
    yield
    await until(lambda: (gate.in_flight, gate.waiting) == (0, 0))

    def ours() -> list[str]:
        names = [task.get_name() for task in asyncio.all_tasks()]
        return [name for name in names if name.startswith("fireworks_training")]

    await until(lambda: not ours())


@pytest.fixture(params=["loop", "portal"])
def either(request: pytest.FixtureRequest, make: Make, shared: Make) -> Make:
    return make if request.param == "portal" else shared


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "hang", [stub.hang_before_headers, stub.hang_headers_only, stub.hang_mid_stream]
)
async def test_cancelled_while_the_server_works(
    server: CompletionServer, either: Make, hang: stub.Behaviour
) -> None:
    server.otherwise = hang
    gate = FixedConcurrencyController(8)
    sampler = either(concurrency_controller=gate)
    async with nothing_left(gate):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=5, max_tokens=2))
        await until(lambda: server.generating == 5)
        await server.reached.wait()
        await cancel(task)
        await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 5


async def test_cancelled_while_it_waits_for_a_slot(server: CompletionServer, either: Make) -> None:
    gate = FixedConcurrencyController(1)
    sampler = either(concurrency_controller=gate)
    await gate.acquire()
    async with nothing_left(gate):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=3))
        await until(lambda: gate.waiting == 3)
        await cancel(task)
        await until(lambda: gate.waiting == 0)
        assert gate.in_flight == 1
        gate.release()
    assert server.bodies == []


async def test_cancelled_while_it_connects(either: Make) -> None:
    reached, left = asyncio.Event(), asyncio.Event()

    async def never_shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        reached.set()
        await reader.read()
        left.set()
        writer.close()

    silent = await asyncio.start_server(never_shake_hands, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    gate = FixedConcurrencyController(2)
    sampler = either(url=f"https://127.0.0.1:{port}", concurrency_controller=gate)
    async with nothing_left(gate):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1]))
        await reached.wait()
        await cancel(task)
        await asyncio.wait_for(left.wait(), 5)
    silent.close()
    await silent.wait_closed()


async def test_cancelled_in_back_off_which_holds_no_slot(
    server: CompletionServer, either: Make
) -> None:
    server.otherwise = stub.status(503)
    gate = FixedConcurrencyController(2)
    sampler = either(concurrency_controller=gate, retries=endless())
    async with nothing_left(gate):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=4))
        await until(lambda: len(server.bodies) == 4 and gate.in_flight == 0)
        await cancel(task)
    assert len(server.bodies) == 4


async def test_only_the_last_waiter_takes_the_request_with_it(
    server: CompletionServer, either: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    gate = FixedConcurrencyController(2)
    call = either(concurrency_controller=gate).sample_with_prompt_tokens([1], max_tokens=2)
    first, second = asyncio.ensure_future(_wait(call)), asyncio.ensure_future(_wait(call))
    await server.reached.wait()
    await cancel(first)
    server.go_on.set()
    assert len(await second) == 1
    assert (server.left, len(server.bodies)) == (0, 1)


async def _wait(call: Any) -> list[SampledCompletion]:
    found: list[SampledCompletion] = await call
    return found


async def test_a_time_limit_around_a_call_cancels_it(
    server: CompletionServer, either: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    gate = FixedConcurrencyController(2)
    async with nothing_left(gate):
        with pytest.raises(TimeoutError):
            call = either(concurrency_controller=gate).sample_with_prompt_tokens([1])
            await asyncio.wait_for(call, 0.05)
        if server.bodies:
            await asyncio.wait_for(server.idle.wait(), 5)


# -- closing ---------------------------------------------------------------------------------------


async def test_closing_ends_what_is_under_way(server: CompletionServer, either: Make) -> None:
    server.otherwise = stub.hang_mid_stream
    gate = FixedConcurrencyController(4)
    sampler = either(concurrency_controller=gate)
    async with nothing_left(gate):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=2))
        await until(lambda: server.generating == 2)
        await sampler.aclose()
        with pytest.raises(SamplingClientClosedError, match="safe to ask"):
            await task
        await asyncio.wait_for(server.idle.wait(), 5)
    await sampler.aclose()
    with pytest.raises(ClientClosed):
        sampler.sample_with_prompt_tokens([1])


async def test_a_sampler_of_a_service_leaves_the_connections_open(
    server: CompletionServer, shared: Make
) -> None:
    first, second = shared(), shared()
    await first.sample_with_prompt_tokens([1], max_tokens=1)
    await first.aclose()
    await second.sample_with_prompt_tokens([1], max_tokens=1)
    assert len(server.peers) == 1


async def test_a_call_made_before_the_close_does_not_start_after_it(make: Make) -> None:
    sampler = make()
    call = sampler.sample_with_prompt_tokens([1])
    sampler.close()
    with pytest.raises(ClientClosed):
        await call


def test_the_portal_s_thread_goes_with_the_last_sampler() -> None:
    with stub.serving_in_a_thread() as server:
        before = set(threading.enumerate())
        with DeploymentSampler(server.url, MODEL, KEY) as sampler:
            sampler.sample_with_prompt_tokens([1], max_tokens=1).result()
        assert set(threading.enumerate()) == before


# -- construction and talk -------------------------------------------------------------------------


def test_max_concurrency_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match=r"FixedConcurrencyController\(7\)"):
        sampler = DeploymentSampler("http://h", MODEL, KEY, max_concurrency=7)
    assert isinstance(sampler.concurrency_controller, FixedConcurrencyController)
    assert sampler.concurrency_controller.window_size == 7
    with (
        pytest.warns(DeprecationWarning, match="max_concurrency"),
        pytest.raises(InvalidArgument, match="not both"),
    ):
        DeploymentSampler(
            "http://h", MODEL, KEY, None, FixedConcurrencyController(1), max_concurrency=7
        )


@pytest.mark.parametrize(
    "wrong", [("h", MODEL, KEY), ("http://h", "", KEY), ("http://h", MODEL, "")]
)
def test_senseless_construction_is_refused(wrong: tuple[str, str, str]) -> None:
    with pytest.raises(InvalidArgument):
        DeploymentSampler(*wrong)


def test_what_it_tells_of_itself() -> None:
    sampler = DeploymentSampler("http://h/", MODEL, KEY)
    assert (sampler.model, sampler.inference_url) == (MODEL, "http://h")
    assert sampler.current_snapshot is None
    sampler._set_snapshot("step-1")
    assert sampler.current_snapshot == "step-1"
    assert isinstance(sampler.concurrency_controller, AdaptiveConcurrencyController)
    assert KEY not in repr(sampler)
    sampler.close()


async def test_a_long_wait_says_what_it_waits_for(
    server: CompletionServer,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sampling_run, "FIRST_REPORT", 0.01)
    server.script = [stub.complete]
    server.otherwise = stub.hang_mid_stream
    sampler = make(concurrency_controller=FixedConcurrencyController(2))
    with caplog.at_level(logging.WARNING):
        call = sampler.sample_with_prompt_tokens(
            [1], n=4, max_tokens=1, sampling_context={"step": 7}
        )
        task = asyncio.create_task(call)
        says = "sampling: 1 of 4 done, window 2, 2 in flight, 1 waiting for a slot, 0 waiting to"
        await until(lambda: says in caplog.text)
        await cancel(task)
    said = len(caplog.records)
    assert "[step 7]" in caplog.text
    await asyncio.sleep(0.05)
    assert len(caplog.records) == said


def test_an_attempt_s_failure_stays_inside() -> None:
    assert not issubclass(AttemptFailed, ApiError)
