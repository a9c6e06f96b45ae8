"""The sampler against a real HTTP server: what is sent, and what comes back."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fireworks_training._async.sampling import tasks as tasks_module
from fireworks_training._async.sampling.completion_stream import AttemptFailed
from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
)
from fireworks_training._async.sampling.progress import Progress
from fireworks_training._async.sampling.prompts import LockedTokenizer, lock_of
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training.errors import (
    ApiError,
    InvalidArgument,
    UnknownOption,
)
from fireworks_training.models import ServerMetrics
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, CharacterTokenizer, Make, cancel, until


async def test_n_completions_of_one_prompt(server: CompletionsServer, make: Make) -> None:
    sampler = make()
    found = await sampler.sample_with_prompt_tokens([1, 2], n=3, max_tokens=4, logprobs=True)
    assert [(one.prompt_index, one.sample_index) for one in found] == [(0, 0), (0, 1), (0, 2)]
    for one in found:
        assert one.text == "<3><4><5><6>"
        assert one.full_tokens == [1, 2, 3, 4, 5, 6]
        assert (one.prompt_len, one.completion_len, one.finish_reason) == (2, 4, "length")
        assert one.inference_logprobs == [-3 / 8, -4 / 8, -5 / 8, -6 / 8]
        assert one.sampling_logprobs == [-3 / 16, -4 / 16, -5 / 16, -6 / 16]
        assert one.metrics.http_status_code == 200
        assert one.metrics.prefill_queue_duration == 0.0
        assert one.metrics.client_ttft is not None
        assert one.metrics.client_latency is not None
        assert 0 < one.metrics.client_ttft <= one.metrics.client_latency
    assert len(server.bodies) == 3


async def test_prompts_come_back_in_order(server: CompletionsServer, make: Make) -> None:
    found = await make().sample_with_prompt_tokens([[10], [20], [30]], n=2, max_tokens=1)
    assert [one.full_tokens for one in found] == [[10, 11]] * 2 + [[20, 21]] * 2 + [[30, 31]] * 2
    indices = [(one.prompt_index, one.sample_index) for one in found]
    assert indices == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


async def test_what_goes_over_the_wire(server: CompletionsServer, make: Make) -> None:
    sampler = make(additional_headers={"X-Team": "blue"})
    call = sampler.sample_with_prompt_tokens(
        [1], n=2, max_tokens=2, temperature=0.5, seed=11, additional_headers_snapshot={"X-A": "b"}
    )
    await call
    assert sorted(sent["seed"] for sent in server.bodies) == [11, 12]
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
    server: CompletionsServer, make: Make
) -> None:
    tokenizer = CharacterTokenizer()
    sampler = make(tokenizer=tokenizer)
    hello = [{"role": "u", "content": "hi"}]
    (one,) = await sampler.sample_with_tokens(hello, max_tokens=1)
    assert "".join(map(chr, one.prompt_tokens)) == "u:hi;a:"
    both = await sampler.sample_with_tokens(messages=[hello, hello + hello], max_tokens=1)
    assert [one.prompt_len for one in both] == [7, 12]
    loop = sampler._context.transport.owner.bound
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
            sampler.sample_with_prompt_tokens([1], **wrong)
    with pytest.raises(UnknownOption, match="top_p"):
        sampler.sample_with_prompt_tokens([1], top_pp=0.5)  # type: ignore[call-arg]
    with pytest.raises(InvalidArgument, match="tokenizer="):
        sampler.sample_with_tokens([{"role": "user", "content": "hi"}])


async def test_a_string_is_one_stop(server: CompletionsServer, make: Make) -> None:
    await make().sample_with_prompt_tokens([1], max_tokens=1, stop="END")
    assert server.bodies[0]["stop"] == ["END"]


async def test_stop_ids_become_text_only_where_the_server_needs_it(
    server: CompletionsServer, make: Make
) -> None:
    tokenizer = CharacterTokenizer()
    await make(integer_stops=True).sample_with_prompt_tokens([1], max_tokens=1, stop=[65])
    await make(tokenizer=tokenizer).sample_with_prompt_tokens([1], max_tokens=1, stop=[65])
    assert [sent["stop"] for sent in server.bodies] == [[65], ["A"]]
    with pytest.raises(InvalidArgument, match="no text of its own"):
        make(tokenizer=tokenizer).sample_with_prompt_tokens([1], stop=[5000])
    with pytest.raises(InvalidArgument, match="tokenizer="):
        make().sample_with_prompt_tokens([1], stop=[65])


@pytest.mark.parametrize("text", ["#abNEW", "abNEW"])
async def test_an_echoed_prompt_is_no_part_of_the_text(
    server: CompletionsServer, make: Make, text: str
) -> None:
    ids = [*b"#ab", 78]
    chunk = {"choices": [{"text": text}]}
    server.otherwise = stub.stream(chunk, stub.last_chunk({"prompt": [*b"#ab"]}, ids))
    sampler = make(tokenizer=CharacterTokenizer())
    (one,) = await sampler.sample_with_prompt_tokens(list(b"#ab"), echo=True)
    assert (one.text, one.completion_tokens) == ("NEW", [78])


async def test_max_seq_len(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
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


async def test_a_call_gives_its_result_again(server: CompletionsServer, make: Make) -> None:
    call = make().sample_with_prompt_tokens([1], max_tokens=1)
    first = await call
    assert await call is first
    assert len(server.bodies) == 1


def test_a_plain_function_and_twenty_runs_use_one_connection() -> None:
    with (
        stub.CompletionsServer() as server,
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
    server: CompletionsServer, make: Make
) -> None:
    prompt = list(range(100_000, 300_000))
    (one,) = await make().sample_with_prompt_tokens(prompt, max_tokens=1)
    assert one.prompt_len == 200_000


async def test_the_window_bounds_what_is_in_flight(server: CompletionsServer, make: Make) -> None:
    controller = FixedConcurrencyController(3)
    found = await make(concurrency_controller=controller).sample_with_prompt_tokens(
        [1], n=20, max_tokens=1
    )
    assert len(found) == 20
    assert server.peak <= 3
    assert (controller.in_flight, controller.waiting) == (0, 0)
    assert len(server.peers) <= 3


async def test_any_controller_with_the_protocol_will_do(
    server: CompletionsServer, make: Make
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


async def test_metrics_are_kept_until_drained(server: CompletionsServer, make: Make) -> None:
    sampler = make()
    server.script = [stub.status(503, x_request_id="r9")]
    await sampler.sample_with_prompt_tokens([1], max_tokens=3)
    failed, done = sampler.drain_metrics()
    assert (failed.http_status_code, failed.retry_attempt, failed.request_id) == (503, 1, "r9")
    assert (done.http_status_code, done.retry_attempt, done.completion_tokens) == (200, 2, 3)
    assert sampler.drain_metrics() == []


async def test_raw_logprobs_stand_in_with_one_notice(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = stub.token_chunk(8, logprobs=True, sampling_logprob=None)
    whole = stub.stream(chunk, stub.last_chunk({"prompt": [1]}, [8]), stub.event(b"[DONE]"))
    server.otherwise = whole
    found = await make().sample_with_prompt_tokens([1], n=3, logprobs=True)
    assert all(one.sampling_logprobs == one.inference_logprobs for one in found)
    assert caplog.text.count("no sampling logprobs") == 1


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
    seen = [sampler.current_snapshot]
    sampler._context.current_snapshot = "step-1"
    seen.append(sampler.current_snapshot)
    assert seen == [None, "step-1"]
    assert isinstance(sampler.concurrency_controller, AdaptiveConcurrencyController)
    assert KEY not in repr(sampler)
    sampler.close()


async def test_a_long_wait_says_what_it_waits_for(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [stub.complete]
    server.otherwise = stub.hang_mid_stream
    sampler = make(concurrency_controller=FixedConcurrencyController(2))
    sampler._context.progress = Progress(lambda: 2, first_report=0.01)
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


async def test_a_hundred_blocking_callers_on_the_owner_loop_all_return(
    server: CompletionsServer,
) -> None:
    """Blocking callers fill the loop's default executor; no work of the sampler is behind them."""
    sampler = DeploymentSampler(server.url, MODEL, KEY, CharacterTokenizer())
    async with sampler:

        def ask(number: int) -> int:
            messages = [{"role": "user", "content": str(number)}]
            (one,) = sampler.sample_with_tokens(messages, max_tokens=1).result()
            return one.completion_len

        async with asyncio.timeout(30):
            lengths = await asyncio.gather(*(asyncio.to_thread(ask, i) for i in range(100)))
    assert len(lengths) == 100


def test_one_tokenizer_has_one_lock_however_many_samplers_use_it() -> None:
    class Unhashable(CharacterTokenizer):
        __hash__ = None  # type: ignore[assignment]

    one, other = CharacterTokenizer(), CharacterTokenizer()
    assert lock_of(one) is lock_of(one)
    assert lock_of(one) is not lock_of(other)
    assert lock_of(Unhashable()) is lock_of(Unhashable())


def test_samplers_of_one_tokenizer_never_use_it_at_once() -> None:
    inside, most = 0, 0

    class Watched(CharacterTokenizer):
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> list[int]:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            inside -= 1
            return [1, 2]

    tokenizer = Watched()
    samplers = [LockedTokenizer(tokenizer) for _ in range(4)]
    threads = [
        threading.Thread(target=one.apply_template, args=([[{"role": "user"}]],))
        for one in samplers
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_two_first_calls_from_two_threads_register_one_exit_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks: list[str] = []

    def at_exit(what: str, clean_up: object) -> Callable[[], None]:
        time.sleep(0.02)  # as long as another thread needs to come here too
        hooks.append(what)
        return lambda: hooks.remove(what)

    monkeypatch.setattr(tasks_module, "at_exit", at_exit)
    with stub.CompletionsServer() as server:
        sampler = DeploymentSampler(server.url, MODEL, KEY)
        threads = [
            threading.Thread(target=lambda: sampler.sample_with_prompt_tokens([1]).result(10))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(hooks) == 1
        sampler.close()
        assert hooks == []


class Encoding(collections.UserDict[str, Any]):
    """A mapping of the parts of an encoding, as `transformers` returns one."""


async def test_an_encoding_is_taken_by_the_name_of_its_ids(
    server: CompletionsServer, make: Make
) -> None:
    sampler = make()
    encoding = Encoding(input_ids=[1, 2], attention_mask=[1, 1])
    for given in (encoding, Encoding(input_ids=np.array([[1, 2]])), [encoding]):
        (one,) = await sampler.sample_with_prompt_tokens(given, max_tokens=1)  # type: ignore[arg-type]
        assert one.prompt_tokens == [1, 2]
    (one,) = (await sampler.sample_with_prompt_tokens_result(encoding)).completions  # type: ignore[arg-type]
    assert one.prompt_tokens == [1, 2]
    async with sampler.stream(encoding) as deltas:  # type: ignore[arg-type]
        assert [delta async for delta in deltas]
    rows = await sampler.sample_with_prompt_tokens(np.array([[5], [6]]), max_tokens=1)  # type: ignore[arg-type]
    assert [one.prompt_tokens for one in rows] == [[5], [6]]
    with pytest.raises(InvalidArgument, match="input_ids"):
        sampler.sample_with_prompt_tokens(Encoding(ids=[1]))  # type: ignore[arg-type]


async def test_a_template_that_fails_says_on_which_conversation(
    server: CompletionsServer, make: Make
) -> None:
    class Picky(CharacterTokenizer):
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
            return Encoding(input_ids=[1, 2]) if messages[0]["content"] else messages[0]["text"]

    sampler = make(tokenizer=Picky())
    good, bad = [{"role": "user", "content": "hi"}], [{"role": "user", "content": ""}]
    with pytest.raises(InvalidArgument, match=r"conversation 1 of 2 .*KeyError") as caught:
        await sampler.sample_with_tokens([good, bad], max_tokens=1)
    assert isinstance(caught.value.cause, KeyError)
    (one,) = await sampler.sample_with_tokens(good, max_tokens=1)
    assert one.prompt_tokens == [1, 2]
