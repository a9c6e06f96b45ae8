"""`FiretitanSamplingClient`: Tinker's calls over a sampler, its handle, and its drain."""

from __future__ import annotations

import asyncio
import base64
import inspect
import pickle
import threading
import time

import pytest
from tinker import ModelInput, SamplingParams
from tinker.lib.retry_handler import RetryConfig

from fireworks_training import (
    AdaptiveConcurrencyController,
    ClientClosed,
    DeploymentSampler,
    DeploymentSamplerTimeoutError,
    FiretitanSamplingClient,
    InvalidArgument,
    NotSupported,
    SamplingClientClosedError,
    SamplingError,
    SamplingRequestError,
)
from fireworks_training._async.sampling.concurrency import FixedConcurrencyController
from fireworks_training._async.sampling.retry_config import retries_of, window_of
from fireworks_training.errors import for_status
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, CharacterTokenizer, Make, until

PARAMS = SamplingParams(max_tokens=3, temperature=1.0, seed=5, stop=["END"], top_k=-1)
PROMPT = ModelInput.from_ints([1, 2])


async def test_samples_come_as_tinker_s(server: CompletionsServer, either: Make) -> None:
    client = FiretitanSamplingClient(either())
    response = await client.sample(PROMPT, 2, PARAMS)
    first, second = response.sequences
    assert (first.tokens, first.stop_reason) == ([3, 4, 5], "length")
    assert first.logprobs == [-3 / 16, -4 / 16, -5 / 16]
    assert first.sequence_id != second.sequence_id
    assert response.prompt_logprobs is None
    assert sorted(body["seed"] for body in server.bodies) == [5, 6]
    assert server.bodies[0]["stop"] == ["END"]
    assert server.bodies[0]["top_k"] == 0


def echo(server: CompletionsServer) -> None:
    chunks = [stub.token_chunk(token, logprobs=True) for token in (1, 2, 3)]
    server.otherwise = stub.stream(*chunks, stub.last_chunk({"prompt": [1, 2]}, [1, 2, 3]))


async def test_prompt_logprobs_begin_with_none(server: CompletionsServer, make: Make) -> None:
    echo(server)
    client = FiretitanSamplingClient(make())
    response = await client.sample_async(PROMPT, 1, PARAMS, include_prompt_logprobs=True)
    assert response.prompt_logprobs == [None, -2 / 8]
    assert response.sequences[0].tokens == [3]
    assert response.sequences[0].logprobs == [-3 / 16]
    assert await client.compute_logprobs(PROMPT) == [None, -2 / 8]
    assert await client.compute_logprobs_async(PROMPT) == [None, -2 / 8]
    assert server.bodies[-1]["max_tokens"] == 1


async def test_a_prompt_that_fills_the_context_is_scored_without_a_token(
    server: CompletionsServer, make: Make
) -> None:
    full = {"error": {"message": "prompt and max_tokens are over the context length"}}
    chunks = [stub.token_chunk(token, logprobs=True) for token in (1, 2)]
    whole = stub.stream(*chunks, stub.last_chunk({"prompt": [1, 2]}, [1, 2]))
    server.script = [stub.status(400, full), whole]
    client = FiretitanSamplingClient(make())
    assert await client.compute_logprobs(PROMPT) == [None, -2 / 8]
    assert [body["max_tokens"] for body in server.bodies] == [1, 0]
    server.script = [stub.status(400, full), stub.status(400, {"error": {"message": "no zero"}})]
    with pytest.raises(SamplingRequestError, match="context length"):
        await client.compute_logprobs(PROMPT)
    server.script = [stub.status(401)]
    with pytest.raises(SamplingRequestError, match="API key"):
        await client.compute_logprobs(PROMPT)


def test_what_was_accepted_before_the_close_finishes() -> None:
    with stub.CompletionsServer() as server:
        for _ in range(30):
            client = FiretitanSamplingClient.create(
                inference_url=server.url, model=MODEL, api_key=KEY
            )
            with client:
                future = client.sample(PROMPT, 2, PARAMS)
                scored = client.sample(PROMPT, 1, PARAMS)
            with pytest.raises(ClientClosed):
                client.sample(PROMPT, 1, PARAMS)
            assert len(future.result(10).sequences) == 2
            assert len(scored.result(10).sequences) == 1


async def test_the_same_on_the_owner_s_own_loop(server: CompletionsServer, shared: Make) -> None:
    for _ in range(30):
        client = FiretitanSamplingClient(shared())
        with client:
            future = client.sample(PROMPT, 2, PARAMS)
        assert len((await future).sequences) == 2


def test_threads_that_race_with_the_close_are_refused_or_served() -> None:
    """Each call is told one of two things: refused at the call, or a result."""
    with stub.CompletionsServer() as server:
        client = FiretitanSamplingClient.create(inference_url=server.url, model=MODEL, api_key=KEY)
        client.sample(PROMPT, 1, PARAMS).result(10)
        told: list[str] = []

        def work() -> None:
            for _ in range(200):
                try:
                    future = client.sample(PROMPT, 1, PARAMS)
                except ClientClosed:
                    told.append("refused")
                    return
                told.append("ok" if len(future.result(10).sequences) == 1 else "?")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(told) < 8:
            time.sleep(0.001)
        client.close()
        for thread in threads:
            thread.join()
        assert set(told) <= {"ok", "refused"}
        assert told.count("refused") == 8


def test_a_plain_function_asks_for_results() -> None:
    with (
        stub.CompletionsServer() as server,
        FiretitanSamplingClient.create(
            inference_url=server.url, model=MODEL, api_key=KEY, tokenizer=CharacterTokenizer()
        ) as client,
    ):
        futures = [client.sample(PROMPT, 1, PARAMS) for _ in range(3)]
        assert [f.result(10).sequences[0].tokens for f in futures] == [[3, 4, 5]] * 3
        assert client.get_base_model() == MODEL
        assert isinstance(client.get_tokenizer(), CharacterTokenizer)


async def test_what_it_can_t_do_is_refused_at_the_call(make: Make) -> None:
    client = FiretitanSamplingClient(make())
    with pytest.raises(NotSupported, match="topk"):
        client.sample(PROMPT, 1, PARAMS, topk_prompt_logprobs=2)
    with pytest.raises(NotSupported, match="vision"):
        client.sample(PROMPT, 1, PARAMS, images=["data:"])
    with pytest.raises(InvalidArgument, match="n must"):
        client.sample(PROMPT, 0, PARAMS)
    with pytest.raises(InvalidArgument, match="tokenizer"):
        client.get_tokenizer()


async def test_logprobs_of_another_distribution_do_not_stand_in(
    server: CompletionsServer, make: Make
) -> None:
    chunk = stub.token_chunk(8, logprobs=True, sampling_logprob=None)
    server.otherwise = stub.stream(chunk, stub.last_chunk({"prompt": [1, 2]}, [8]))
    client = FiretitanSamplingClient(make())
    with pytest.raises(SamplingError, match="temperature 1"):
        await client.sample(PROMPT, 1, SamplingParams(max_tokens=1, temperature=0.5))


async def test_a_handle_holds_no_credentials(
    server: CompletionsServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make(
        additional_headers={"X-Team": "blue", "X-Api-Token": "s3cret"},
        concurrency_controller=FixedConcurrencyController(3),
    )
    client = FiretitanSamplingClient(sampler)
    handle = client.get_sampler_handle()
    for text in (base64.urlsafe_b64decode(handle), pickle.dumps(client)):
        assert KEY.encode() not in text
        assert b"s3cret" not in text
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    with pytest.raises(InvalidArgument, match="brings no credentials"):
        pickle.loads(pickle.dumps(client))
    monkeypatch.setenv("FIREWORKS_API_KEY", "another")
    copy: FiretitanSamplingClient = pickle.loads(pickle.dumps(client))
    assert len((await copy.sample(PROMPT, 1, PARAMS)).sequences) == 1
    assert server.headers[-1]["X-Api-Key"] == "another"
    assert server.headers[-1]["X-Team"] == "blue"
    assert copy.deployment_sampler.concurrency_controller.window_size == 3
    await copy.aclose()
    with pytest.raises(InvalidArgument, match="no sampler handle"):
        FiretitanSamplingClient.from_sampler_handle("nonsense")


async def test_closing_lets_what_is_under_way_finish(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    client = FiretitanSamplingClient(either())
    future = client.sample(PROMPT, 1, PARAMS)
    await server.reached.wait()
    client.close()
    with pytest.raises(ClientClosed):
        client.sample(PROMPT, 1, PARAMS)
    server.go_on.set()
    assert (await future).sequences[0].tokens == [3, 4, 5]


async def test_a_drain_ends_at_its_limit(server: CompletionsServer, either: Make) -> None:
    server.otherwise = stub.hang_mid_stream
    client = FiretitanSamplingClient(either())
    future = client.sample(PROMPT, 1, PARAMS)
    await server.reached.wait()
    await client.aclose(drain_timeout_s=0.01)
    with pytest.raises(SamplingClientClosedError, match="safe to ask"):
        await future
    await asyncio.wait_for(server.idle.wait(), 5)


async def test_cancelling_the_awaited_form_cancels_the_request(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    client = FiretitanSamplingClient(either())
    task = asyncio.create_task(client.sample_async(PROMPT, 2, PARAMS))
    await until(lambda: server.generating == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 2


def configured(server: CompletionsServer, config: RetryConfig) -> FiretitanSamplingClient:
    return FiretitanSamplingClient.create(
        inference_url=server.url, model=MODEL, api_key=KEY, retry_config=config
    )


async def test_tinker_s_retries_go_on_for_as_long_as_it_says(server: CompletionsServer) -> None:
    server.script.extend([stub.status(503)] * 12)
    config = RetryConfig(retry_delay_base=0.001, retry_delay_max=0.002)
    client = configured(server, config)
    assert (await client.sample(PROMPT, 1, PARAMS)).sequences[0].tokens == [3, 4, 5]
    assert len(server.bodies) == 13  # the sampler's own budget has seven
    await client.aclose()


async def test_without_retries_there_is_one_attempt(server: CompletionsServer) -> None:
    server.otherwise = stub.status(503)
    client = configured(server, RetryConfig(enable_retry_logic=False))
    with pytest.raises(SamplingRequestError, match="after 1 attempt") as raised:
        await client.sample(PROMPT, 1, PARAMS)
    assert raised.value.final_status == 503
    assert len(server.bodies) == 1
    await client.aclose()


async def test_calls_that_make_no_progress_are_given_up(server: CompletionsServer) -> None:
    server.otherwise = stub.hang_mid_stream
    client = configured(server, RetryConfig(progress_timeout=0.05))
    calls = [client.sample(PROMPT, 1, PARAMS) for _ in range(3)]
    for call in calls:
        with pytest.raises(DeploymentSamplerTimeoutError, match="no call of this client"):
            await call
    await asyncio.wait_for(server.idle.wait(), 5)
    await client.aclose()


async def test_a_call_of_a_patient_client_can_be_cancelled(server: CompletionsServer) -> None:
    server.otherwise = stub.hang_mid_stream
    client = configured(server, RetryConfig())
    task = asyncio.create_task(client.sample_async(PROMPT, 1, PARAMS))
    await server.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.idle.wait(), 5)
    await client.aclose()


def test_tinker_s_connections_bound_the_window() -> None:
    window = window_of(retries_of(RetryConfig(max_connections=5)), None)
    assert window is not None
    assert window.window_size == 5
    for config in (RetryConfig(), RetryConfig(max_connections=None)):
        assert window_of(retries_of(config), None) is None
    with pytest.raises(InvalidArgument, match="pass one of them"):
        window_of(retries_of(RetryConfig(max_connections=5)), FixedConcurrencyController(2))


def test_tinker_s_delays() -> None:
    config = RetryConfig(retry_delay_base=2.0, retry_delay_max=9.0, jitter_factor=0.5)
    retries = retries_of(config)
    assert retries is not None
    budget = retries.policy.transient()
    busy = for_status(503, "busy")
    for ceiling in (2.0, 4.0, 8.0, 9.0, 9.0):
        delay = budget.next_delay(busy, now=0.0)
        assert delay is not None
        assert ceiling / 2 <= delay <= ceiling
    assert budget.next_delay(busy, now=config.progress_timeout) is None


@pytest.mark.parametrize(
    ("config", "error", "names"),
    [
        (RetryConfig(enable_stuck_detection=False), NotSupported, "progress_timeout"),
        (RetryConfig(retryable_exceptions=(OSError,)), NotSupported, "retryable_exceptions"),
        (RetryConfig(progress_timeout=0.0), InvalidArgument, "progress_timeout"),
        (RetryConfig(jitter_factor=2.0), InvalidArgument, "spread"),
        (object(), InvalidArgument, "RetryConfig"),
    ],
)
def test_what_a_retry_config_can_t_have_is_refused(
    config: RetryConfig, error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        retries_of(config)


HEADERS = {
    "X-Team": "blue",
    "X-Auth": "s3cret-1",
    "X-Password": "s3cret-2",
    "X-Goog-IAP-JWT-Assertion": "s3cret-3",
    "CF-Access-Client-Id": "s3cret-4",
    "CF-Access-Client-Secret": "s3cret-5",
    "Proxy-Authorization": "s3cret-6",
    "X-Api-Key": "s3cret-7",
    "Cookie": "s3cret-8",
    "X-Odd": "Bearer s3cret-9",
    "X-Odder": "eyJhbGciOiJI.s3cret",
    "X-Amz-Signature": "s3cret-10",
}


def test_no_header_that_proves_who_asks_is_in_a_handle() -> None:
    client = FiretitanSamplingClient.create(
        inference_url="http://host/base", model=MODEL, api_key=KEY,
        additional_headers=HEADERS,
    )  # fmt: skip
    handle = base64.urlsafe_b64decode(client.get_sampler_handle())
    assert b"s3cret" not in handle
    assert b"blue" in handle  # the control: what is no credential travels
    with pytest.raises(InvalidArgument, match="password"):
        FiretitanSamplingClient.create(
            inference_url="http://me:s3cret@host", model=MODEL, api_key=KEY
        )


def test_a_sampler_travels_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub.CompletionsServer() as server:
        with DeploymentSampler(
            server.url, MODEL, KEY, CharacterTokenizer(), FixedConcurrencyController(3),
            additional_headers=HEADERS,
        ) as sampler:  # fmt: skip
            text = pickle.dumps(sampler)
        assert KEY.encode() not in text
        assert b"s3cret" not in text
        monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
        with pytest.raises(InvalidArgument, match="FIREWORKS_API_KEY"):
            pickle.loads(text)
        monkeypatch.setenv("FIREWORKS_API_KEY", "fw_of_this_process")
        with pickle.loads(text) as again:
            messages = [{"role": "user", "content": "hi"}]
            (one,) = again.sample_with_tokens(messages, max_tokens=2).result(10)
            assert one.completion_len == 2
            assert again.concurrency_controller.window_size == 3
        assert server.headers[-1]["Authorization"].endswith("fw_of_this_process")


def test_controllers_travel_by_their_settings_and_what_runs_says_that_it_does_not() -> None:
    fixed = pickle.loads(pickle.dumps(FixedConcurrencyController(3)))
    assert fixed.window_size == 3
    adaptive = AdaptiveConcurrencyController(initial_window=5, max_window=7)
    again = pickle.loads(pickle.dumps(adaptive))
    assert (again.window_size, again._settings) == (5, adaptive._settings)
    sampler = DeploymentSampler("http://localhost:1", MODEL, KEY)
    call = sampler.sample_with_prompt_tokens([1])
    stream = sampler.stream([1])
    for running, says in ((call, "send its result"), (stream, "completion")):
        with pytest.raises(NotSupported, match=says):
            pickle.dumps(running)
    call.close()


def test_the_signature_lists_the_options() -> None:
    for method in (DeploymentSampler.sample_with_tokens, DeploymentSampler.stream):
        shown = inspect.signature(method).parameters
        assert {"top_p", "stop", "return_partial", "sampling_context"} <= shown.keys()
        assert shown["top_p"].kind is inspect.Parameter.KEYWORD_ONLY
        assert "options" not in shown
