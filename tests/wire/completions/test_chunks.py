"""What is made of the answers of the completions route: completions, metrics, errors."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._perf_metrics import request_id_of
from fireworks_training._wire.completions.chunks import (
    CompletionAssembler,
    server_metrics,
)
from fireworks_training._wire.completions.errors import status_error, stream_error
from fireworks_training._wire.completions.request import (
    SamplingRequest,
    sampling_request,
)
from fireworks_training.errors import (
    ApiStatusError,
    AuthenticationFailed,
    NotFound,
    ProtocolError,
    RateLimited,
    ServerFailed,
)
from fireworks_training.models import SampledCompletion, ServerMetrics

MODEL = "accounts/a/deployments/d"


def request(
    max_tokens: int = 16, temperature: float = 1.0, *, ids: bool = True, **options: Any
) -> SamplingRequest:
    return sampling_request(
        MODEL,
        max_tokens=max_tokens,
        temperature=temperature,
        options=options,  # type: ignore[arg-type]
        decode_stop=None if ids else lambda stops: [f"<{stop}>" for stop in stops],
    )


# -- answers ---------------------------------------------------------------------------------------

PROMPT = [1, 2, 3]


def rows(*logprobs: float | None, sampling: list[float | None] | None = None) -> dict[str, Any]:
    given = list(logprobs) if sampling is None else sampling
    return {
        "content": [
            {"token_id": i, "logprob": a, "sampling_logprob": b}
            for i, (a, b) in enumerate(zip(logprobs, given, strict=True))
        ]
    }


def last(ids: object, reason: str | None = "stop", **choice: Any) -> dict[str, Any]:
    raw_output = {"completion_token_ids": ids}
    return {"choices": [{"finish_reason": reason, "raw_output": raw_output, "text": ""} | choice]}


def assembled(asked: SamplingRequest, *chunks: dict[str, Any]) -> Any:
    assembler = CompletionAssembler(asked, PROMPT)
    for chunk in chunks:
        assembler.feed(orjson.dumps(chunk))
    return assembler.completion(prompt_index=4, sample_index=5, metrics=ServerMetrics())


def test_a_completion_from_its_chunks() -> None:
    completion: SampledCompletion = assembled(
        request(logprobs=True),
        {"choices": [{"text": "a", "logprobs": rows(-0.5)}]},
        {"choices": [{"text": "bc", "logprobs": rows(-0.25, -1.0, sampling=[-0.2, -0.9])}]},
        last([10, 11, 12], "length"),
    )
    assert (completion.text, completion.finish_reason) == ("abc", "length")
    assert completion.full_tokens == [1, 2, 3, 10, 11, 12]
    assert (completion.prompt_len, completion.completion_len) == (3, 3)
    assert (completion.prompt_tokens, completion.completion_tokens) == ([1, 2, 3], [10, 11, 12])
    assert completion.inference_logprobs == [-0.5, -0.25, -1.0]
    assert completion.sampling_logprobs == [-0.5, -0.2, -0.9]
    assert (completion.prompt_index, completion.sample_index) == (4, 5)
    assert not completion.logprobs_echoed
    assert pickle.loads(pickle.dumps(completion)) == completion


def test_logprobs_are_left_out_unless_asked_for() -> None:
    completion = assembled(request(), {"choices": [{"logprobs": rows(-0.5)}]}, last([10]))
    assert completion.inference_logprobs is None
    assert completion.sampling_logprobs is None


def test_a_completion_of_another_prompt_is_refused() -> None:
    assert assembled(request(), last([10], prompt_token_ids=[*PROMPT])).full_tokens[:3] == PROMPT
    for other in ([9, 9, 9], [1, 2], [-9], "x", {}):
        with pytest.raises(ProtocolError, match="another prompt"):
            assembled(request(), last([10], prompt_token_ids=other))
        inside = last([10])
        inside["choices"][0]["raw_output"]["prompt_token_ids"] = other
        with pytest.raises(ProtocolError, match="another prompt"):
            assembled(request(), inside)


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**63, 2**64 - 1, True, 1.0, "1", None])
def test_token_ids_are_such(wrong: object) -> None:
    with pytest.raises(ProtocolError, match="not token ids"):
        assembled(request(), last([7, wrong]))
    entry = {"token_id": wrong, "logprob": -1.0, "sampling_logprob": -1.0}
    top = {**rows(-1.0)["content"][0], "top_logprobs": [{"token_id": wrong, "logprob": -1.0}]}
    asked = request(logprobs=True, top_logprobs=1)
    with pytest.raises(ProtocolError):
        assembled(asked, {"choices": [{"logprobs": {"content": [top]}}]}, last([7]))
    if wrong is not None:  # that a stream lacks ids is allowed
        streamed = CompletionAssembler(request(logprobs=True), PROMPT, keep_tokens=True)
        with pytest.raises(ProtocolError):
            streamed.feed(orjson.dumps({"choices": [{"logprobs": {"content": [entry]}}]}))


@pytest.mark.parametrize("wrong", [5.0, 0.01, 1e308, "-1", [1]])
def test_logprobs_are_such(wrong: Any) -> None:
    asked = request(logprobs=True, top_logprobs=1)
    good = {"token_id": 7, "logprob": -1.0, "sampling_logprob": -1.0}
    good["top_logprobs"] = [{"token_id": 7, "logprob": -1.0}]  # type: ignore[assignment]
    bad_top = {**good, "top_logprobs": [{"token_id": 7, "logprob": wrong}]}
    for bad in ({**good, "logprob": wrong}, {**good, "sampling_logprob": wrong}, bad_top):
        with pytest.raises(ProtocolError):
            assembled(asked, {"choices": [{"logprobs": {"content": [bad]}}]}, last([7]))
    streamed = CompletionAssembler(request(logprobs=True), PROMPT, keep_tokens=True)
    bad = {**good, "logprob": wrong}
    with pytest.raises(ProtocolError):
        streamed.feed(orjson.dumps({"choices": [{"logprobs": {"content": [bad]}}]}))
    rounded = assembled(
        asked, {"choices": [{"logprobs": {"content": [{**good, "logprob": 1e-6}]}}]}, last([7])
    )
    assert rounded.inference_logprobs == [1e-6]


def test_a_logprob_beyond_every_double_is_refused() -> None:
    asked = CompletionAssembler(request(logprobs=True), PROMPT)
    chunk = b'{"choices": [{"logprobs": {"content": [{"logprob": -1e999}]}}]}'
    with pytest.raises(ProtocolError):
        asked.feed(chunk)
        asked.feed(orjson.dumps(last([7])))
        asked.completion(prompt_index=0, sample_index=0, metrics=ServerMetrics())


def test_max_tokens_bounds_what_is_taken() -> None:
    assert assembled(request(2), last([7, 8])).completion_len == 2
    with pytest.raises(ProtocolError, match="max_tokens"):
        assembled(request(2), last(list(range(1000))))
    asked = CompletionAssembler(request(2, logprobs=True), PROMPT)
    with pytest.raises(ProtocolError, match="max_tokens"):  # at once, not at the end
        asked.feed(orjson.dumps({"choices": [{"logprobs": rows(-1.0, -1.0, -1.0)}]}))
    echoes = request(2, logprobs=True, echo=True)
    chunk = {"choices": [{"logprobs": rows(-1.0, -1.0, -1.0, -1.0, -1.0)}]}
    assert assembled(echoes, chunk, last([1, 2, 3, 7, 8])).completion_len == 2


def test_the_bytes_of_an_answer_follow_from_what_was_asked() -> None:
    small, large = request(2), request(2, logprobs=True, echo=True, top_logprobs=5)
    assert small.answer_limit(10) < 2 * 2**20
    assert large.answer_limit(100_000) > 100_000 * (200 + 5 * 200)  # an honest echo in one event
    assert small.answer_limit(100_000) < 4 * 2**20


def test_a_second_choice_is_not_spliced_into_the_first() -> None:
    asked = CompletionAssembler(request(), PROMPT)
    two = [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]
    with pytest.raises(ProtocolError):
        asked.feed(orjson.dumps({"choices": two}))


def test_what_proxies_do_to_a_stream_is_taken() -> None:
    asked = CompletionAssembler(request(), PROMPT)
    asked.feed_messages([b"", b"  ", orjson.dumps(last([7])), b" [DONE] "])
    assert asked.done
    assert asked.completion(prompt_index=0, sample_index=0, metrics=ServerMetrics()).text == ""
    assert asked.events == 2  # the answer and its end
    after = CompletionAssembler(request(), PROMPT)
    after.feed_messages([orjson.dumps(last([7])), b"[DONE]", b"junk"])
    assert after.done


def test_logprobs_that_the_server_does_not_send_are_none() -> None:
    asked = request(logprobs=True, top_logprobs=2)
    none = assembled(asked, {"choices": [{"text": "hi", "logprobs": None}]}, last([7]))
    assert (none.inference_logprobs, none.sampling_logprobs, none.top_logprobs) == (None,) * 3
    without_top = assembled(asked, {"choices": [{"logprobs": rows(-1.0)}]}, last([7]))
    assert (without_top.inference_logprobs, without_top.top_logprobs) == ([-1.0], None)


def test_a_stream_without_token_ids_has_none_in_its_deltas() -> None:
    asked = CompletionAssembler(request(logprobs=True), PROMPT, keep_tokens=True)
    mark = asked.mark()
    entry = {"logprob": -1.0, "sampling_logprob": -1.0}
    asked.feed(orjson.dumps({"choices": [{"text": "hi", "logprobs": {"content": [entry]}}]}))
    delta = asked.since(mark)
    assert (delta.text, delta.tokens, delta.logprobs) == ("hi", (), [-1.0])


def test_what_is_returned_is_lists() -> None:
    one = assembled(
        request(logprobs=True), {"choices": [{"text": "a", "logprobs": rows(-0.5)}]}, last([7])
    )
    for value in (one.full_tokens, one.inference_logprobs, one.sampling_logprobs):
        assert type(value) is list
    assert orjson.dumps(one.inference_logprobs or [], default=list) == b"[-0.5]"


def test_flawed_is_what_another_attempt_may_mend() -> None:
    for chunks in ([last([7], "abort")], [{"choices": [{"logprobs": rows(None)}]}, last([7])]):
        asked = CompletionAssembler(request(logprobs=True), PROMPT)
        for chunk in chunks:
            asked.feed(orjson.dumps(chunk))
        with pytest.raises(ProtocolError):
            asked.completion(prompt_index=0, sample_index=0, metrics=ServerMetrics())
        assert asked.flawed
    sound = CompletionAssembler(request(), PROMPT)
    sound.feed(orjson.dumps(last([-1])))
    with pytest.raises(ProtocolError):
        sound.completion(prompt_index=0, sample_index=0, metrics=ServerMetrics())
    assert not sound.flawed


def test_top_logprobs() -> None:
    chunk = {"choices": [{"text": "a", "logprobs": rows(-0.5, -0.6)}]}
    content: list[dict[str, Any]] = chunk["choices"][0]["logprobs"]["content"]  # type: ignore[index]
    for entry in content:
        entry["top_logprobs"] = [{"token_id": 3, "logprob": -0.1}, {"token_id": 4, "logprob": -2.0}]
    asked = request(logprobs=True, top_logprobs=2)
    assert assembled(asked, chunk, last([1, 2])).top_logprobs == [{3: -0.1, 4: -2.0}] * 2
    content[1]["top_logprobs"] = []
    assert assembled(asked, chunk, last([1, 2])).top_logprobs is None


@pytest.mark.parametrize("reason", ["content_filter", "error"])
def test_other_finish_reasons_are_errors(reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        assembled(request(), last([10], reason))


@pytest.mark.parametrize("ids", [None, "abc", [1.5], [None]])
def test_a_completion_without_token_ids_is_refused(ids: object) -> None:
    with pytest.raises(ProtocolError, match="completion_token_ids"):
        assembled(request(), last(ids))


def test_lengths_are_checked() -> None:
    with pytest.raises(ProtocolError, match="1 logprobs for 2 tokens"):
        assembled(request(logprobs=True), {"choices": [{"logprobs": rows(-1.0)}]}, last([1, 2]))
    with pytest.raises(ProtocolError, match="without a logprob"):
        assembled(request(logprobs=True), {"choices": [{"logprobs": rows(None)}]}, last([1]))


def test_missing_sampling_logprobs() -> None:
    chunk = {"choices": [{"logprobs": rows(-0.5, -0.6, sampling=[None, None])}]}
    same = assembled(request(logprobs=True), chunk, last([1, 2]))
    assert same.sampling_logprobs == same.inference_logprobs
    assert same.sampling_logprobs is not same.inference_logprobs
    for option in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}):
        other = assembled(request(logprobs=True, **option), chunk, last([1, 2]))
        assert other.sampling_logprobs is None
        assert other.inference_logprobs is not None
    partly = {"choices": [{"logprobs": rows(-0.5, -0.6, sampling=[None, -0.4])}]}
    with pytest.raises(ProtocolError, match="some tokens only"):
        assembled(request(logprobs=True), partly, last([1, 2]))


def test_an_echo_gives_training_aligned_logprobs() -> None:
    chunk = {
        "choices": [
            {
                "logprobs": rows(
                    None, -0.2, -0.3, -0.4, -0.5, sampling=[None, None, None, -4.0, -5.0]
                )
            }
        ]
    }
    completion = assembled(request(logprobs=True, echo=True), chunk, last([1, 2, 3, 10, 11]))
    assert completion.full_tokens == [1, 2, 3, 10, 11]
    assert (completion.prompt_len, completion.completion_len) == (3, 2)
    assert completion.inference_logprobs == [-0.2, -0.3, -0.4, -0.5]
    # Prompt tokens were not sampled: there the raw value stands.
    assert completion.sampling_logprobs == [-0.2, -0.3, -4.0, -5.0]
    assert completion.logprobs_echoed
    assert completion.echoed_prompt_logprob_count == 2


def test_an_echo_of_the_last_prompt_tokens_has_no_first_row_to_drop() -> None:
    chunk = {"choices": [{"logprobs": rows(-0.2, -0.3, -0.4)}]}
    completion = assembled(request(logprobs=True, echo_last=2), chunk, last([2, 3, 10]))
    assert completion.full_tokens == [1, 2, 3, 10]
    assert len(completion.inference_logprobs) == 3
    assert completion.echoed_prompt_logprob_count == 2
    whole = {"choices": [{"logprobs": rows(0.0, -0.2, -0.3, -0.4)}]}
    longer = assembled(request(logprobs=True, echo_last=99), whole, last([1, 2, 3, 10]))
    assert longer.echoed_prompt_logprob_count == 2
    assert list(longer.inference_logprobs) == [-0.2, -0.3, -0.4]


def test_an_echo_that_differs_from_the_prompt_is_refused() -> None:
    with pytest.raises(ProtocolError, match="echoed"):
        assembled(request(echo=True), last([1, 2, 4, 10]))


def test_the_snapshot_it_came_from() -> None:
    plain = last([10]) | {"perf_metrics": {"snapshot-identity": "s2"}}
    completion = assembled(request(), plain)
    assert (completion.snapshot_identity, completion.snapshot_identity_first) == ("s2", "s2")
    assert completion.snapshot_switch_index is None
    switched = last([10]) | {
        "snapshot-identity": "s2",
        "snapshot-identity-first": "s1",
        "snapshot-switch-index": 3,
    }
    completion = assembled(request(), switched)
    assert (completion.snapshot_identity, completion.snapshot_identity_first) == ("s2", "s1")
    assert completion.snapshot_switch_index == 3
    assert assembled(request(), last([10])).snapshot_identity is None


def test_truncation() -> None:
    assembler = CompletionAssembler(request(), PROMPT)
    truncated = [assembler.truncated]
    assembler.feed(orjson.dumps({"choices": [{"text": "a", "finish_reason": "stop"}]}))
    truncated.append(assembler.truncated)  # no token ids yet, and no [DONE]
    assembler.feed(b"[DONE]")
    truncated.append(assembler.truncated)
    assert truncated == [True, True, False]
    unfinished = CompletionAssembler(request(), PROMPT)
    unfinished.feed(b"[DONE]")
    assert unfinished.truncated


@pytest.mark.parametrize("kind", ["ping", "heartbeat", "keepalive"])
def test_keep_alives_need_not_be_json(kind: str) -> None:
    CompletionAssembler(request(), PROMPT).feed(b"still here", kind)


@pytest.mark.parametrize(
    "chunk",
    [
        b"{",
        b"not json",
        b"[]",
        b"3",
        b'{"choices": [3]}',
        b'{"choices": 3}',
        b'{"choices": [{"logprobs": {"content": [{}]}}]}',
        b'{"choices": [{"logprobs": {"content": [{"logprob": "x"}]}}]}',
        b'{"choices": [{"raw_output": 3}]}',
        b'{"perf_metrics": 3}',
        b'{"usage": 3}',
    ],
)
def test_malformed_chunks_are_protocol_errors(chunk: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        CompletionAssembler(request(logprobs=True), PROMPT).feed(chunk)
    assert "not json" not in str(caught.value)


def whole() -> dict[str, Any]:
    """A completion of one token in one chunk, with all that a chunk may hold."""
    perf = {"snapshot-identity": "s", "snapshot-identity-first": "r", "snapshot-switch-index": 0}
    return {
        "id": "c",
        "choices": [
            {
                "index": 0,
                "text": "ab",
                "logprobs": rows(-1.0, sampling=[-1.0]),
                "finish_reason": "stop",
                "raw_output": {"completion_token_ids": [1], "prompt_token_ids": [*PROMPT]},
            }
        ],
        "usage": {"completion_tokens": 1},
        "perf_metrics": {**perf, "prefill-queue-duration": 0.1, "prompt-tokens": 3},
    }


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("wrong", [5, "x", [1], {"a": 1}, True, None, 1.5, -1, [None], ["x"]])
def test_a_wrong_value_anywhere_is_a_protocol_error_or_does_no_harm(wrong: object) -> None:
    for path in places(whole()):
        chunk = whole()
        node = chunk
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = wrong
        assembler = CompletionAssembler(request(logprobs=True), PROMPT, keep_tokens=True)
        mark = assembler.mark()
        try:
            assembler.feed_messages([orjson.dumps(chunk), b"[DONE]"])
            assembler.since(mark)
            metrics = server_metrics(
                {}, assembler.perf_metrics, completion_tokens=assembler.completion_tokens
            )
            completion = assembler.completion(prompt_index=0, sample_index=0, metrics=metrics)
        except ProtocolError:
            continue
        assert isinstance(completion.text, str)
        assert isinstance(metrics.completion_tokens, int | None)
        assert isinstance(completion.snapshot_switch_index, int | None)


def test_errors_in_the_stream() -> None:
    assembler = CompletionAssembler(request(), PROMPT)
    with pytest.raises(ServerFailed, match=r"503 \(overloaded\)"):
        assembler.feed(b'{"error": {"status_code": 503, "code": "overloaded"}}', "error")
    with pytest.raises(RateLimited):
        assembler.feed(b'{"status": 429}', "error")
    with pytest.raises(ProtocolError, match=r"error \(server_error\) mid-stream"):
        assembler.feed(b'{"error": {"type": "server_error", "message": "prompt [1, 2, 3]"}}')
    with pytest.raises(ProtocolError):
        assembler.feed(b"boom", "error")
    assert isinstance(stream_error("text"), ProtocolError)
    assert isinstance(stream_error({"status": 200}), ProtocolError)


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_deltas_add_up_to_the_completion(tokens: list[int], cuts: list[int]) -> None:
    assembler = CompletionAssembler(request(logprobs=True), PROMPT)
    borders = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    text, logprobs = "", list[float]()
    for start, end in itertools.pairwise(borders):
        mark = assembler.mark()
        for token in tokens[start:end]:
            choice = {"text": str(token), "logprobs": rows(-float(token))}
            assembler.feed(orjson.dumps({"choices": [choice]}))
        delta = assembler.since(mark)
        text += delta.text
        logprobs.extend(delta.logprobs)
    assembler.feed(orjson.dumps(last(tokens)))
    whole = assembler.completion(prompt_index=0, sample_index=0, metrics=ServerMetrics())
    assert (whole.text, whole.inference_logprobs) == (text, logprobs)


# -- metrics and errors ----------------------------------------------------------------------------


def test_metrics_from_headers_and_the_stream() -> None:
    headers = {
        "fireworks-prompt-tokens": "20",
        "cached-prompt-tokens": "19",
        "fireworks-server-time-to-first-token": "0.5",
        "x-request-id": "r1",
    }
    perf = {"prefill-queue-duration": 0.25, "fireworks-num-concurrent-requests": "7"}
    perf["server-time-to-first-token"] = "0.4"
    metrics = server_metrics(headers, perf)
    assert (metrics.prompt_tokens, metrics.cached_prompt_tokens) == (20, 19)
    assert (metrics.prefill_queue_duration, metrics.server_ttft) == (0.25, 0.4)
    assert (metrics.num_concurrent_requests, metrics.request_id) == (7, "r1")
    assert metrics.generation_queue_duration is None


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon", [], None])
def test_senseless_figures_are_left_out(value: object) -> None:
    assert server_metrics({}, {"prefill-queue-duration": value}).prefill_queue_duration is None


def test_request_ids() -> None:
    assert request_id_of({"cf-ray": "c", "x-fireworks-request-id": "f"}) == "f"
    assert request_id_of({}) is None


def error_of(status: int, payload: object) -> Any:
    data = payload if isinstance(payload, bytes) else orjson.dumps(payload)
    return status_error(status, data, retry_after=2.0, request_id="r1")


def test_error_answers() -> None:
    error = error_of(429, {"error": {"message": "slow down", "code": "RESOURCE_EXHAUSTED"}})
    assert isinstance(error, RateLimited)
    assert (error.error_class, error.retry_after) == ("RESOURCE_EXHAUSTED", 2.0)
    assert str(error) == "the server answered 429: slow down (request r1)"
    assert isinstance(error_of(401, {"error": "bad key"}), AuthenticationFailed)
    assert isinstance(error_of(400, {"message": "bad"}), ApiStatusError)
    assert isinstance(error_of(302, b""), ProtocolError)


def test_bodies_that_are_no_json_are_not_repeated() -> None:
    error = error_of(502, b"<html>secret prompt</html>")
    assert isinstance(error, ServerFailed)
    assert error.message == "the server answered 502"


def test_errors_hold_no_tokens_and_no_keys() -> None:
    message = "bad prompt [101, 202, 303, 404] for key fw_3ZabcDEF99 sent as Bearer abc.def"
    text = str(error_of(400, {"error": {"message": message}}))
    for secret in ("101", "303", "fw_3Z", "abc.def"):
        assert secret not in text
    assert "bad prompt" in text


def test_an_unknown_model_is_told_from_one_that_loads() -> None:
    ours = error_of(404, {"error": {"message": "no such deployment", "code": "NOT_FOUND"}})
    assert isinstance(ours, NotFound)
    assert ours.error_class == "NOT_FOUND"
    cloud = {"object": "error", "code": "NOT_FOUND", "message": "not found or not deployed"}
    assert error_of(404, {"error": cloud}).error_class is None


def test_headers_make_metrics_by_themselves() -> None:
    found = ServerMetrics.from_headers(
        {
            "Fireworks-Tokenizer-Duration": "0.5",
            "fireworks-prompt-tokens": 7,
            "num-concurrent-requests": "many",
            "prefill-duration": "nan",
            "Backend-Host": "pod-1",
            "fireworks-deployment": "accounts/a/deployments/d",
            "X-Request-Id": "r-1",
        },
        client_ttft=0.25,
        http_status_code=503,
        retry_attempt=2,
    )
    assert found == ServerMetrics(
        tokenizer_duration=0.5,
        prompt_tokens=7,
        backend_host="pod-1",
        deployment="accounts/a/deployments/d",
        request_id="r-1",
        client_ttft=0.25,
        http_status_code=503,
        retry_attempt=2,
    )
    assert (found.error, found.response_request_id) == ("HTTP 503", "r-1")
    assert ServerMetrics(transport_error="ConnectionFailed").error == "ConnectionFailed"
    assert ServerMetrics.from_headers({}, http_status_code=200).error is None
