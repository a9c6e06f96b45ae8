"""Mutated answers of the completions route: only typed errors, in bounded time and memory.

Each case takes a sound answer (a stream, or an error's body), breaks it at random as bytes or as
JSON, cuts it into pieces at random, and reads it as the sampler does. The seed is the case's
number, so that a case can be run again by itself.
"""

from __future__ import annotations

import copy
import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from fireworks_training._core.sse import SseDecoder
from fireworks_training._wire.completions.chunks import CompletionAssembler, server_metrics
from fireworks_training._wire.completions.errors import status_error
from fireworks_training._wire.completions.request import SamplingRequest, sampling_request
from fireworks_training.errors import ApiError
from fireworks_training.models import SampledCompletion

PROMPT = [5, 6, 7]
MAX_TOKENS = 4
NASTY: list[bytes] = [
    b"null", b"[]", b"{}", b"-1", b"1e999", b"-1e999", b"NaN", b"18446744073709551616",
    b'"\\ud800"', b"true", b'""', b"[[[[[[[[", b"9" * 400, b"0.5", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\r", b"\n\n", b"data: [DONE]\n\n", b"data:\n\n", b": x\n\n", b"event: error\n",
    b"event: ping\n", b'{"a":' * 40,
]  # fmt: skip
VALUES: list[object] = [
    None, True, -1, 2**31, 2**63, 1.5, 5.0, -1e308, 1e308, "", "x", "9" * 300, [], [None], [-1], {},
    {"a": 1}, [[1]], [PROMPT], list(range(500)),
]  # fmt: skip


def asked(rng: random.Random) -> SamplingRequest:
    options: Any = {}
    if rng.random() < 0.7:
        options["logprobs"] = True
        options["top_logprobs"] = rng.choice([0, 2])
    options["echo"] = rng.random() < 0.3
    return sampling_request(
        "m", max_tokens=MAX_TOKENS, temperature=1.0, options=options, decode_stop=None
    )


def sound(request: SamplingRequest) -> list[dict[str, Any]]:
    ids = [*PROMPT, 8, 9][len(PROMPT) - request.echoed(len(PROMPT)) :]
    chunks: list[dict[str, Any]] = []
    for token in ids:
        entry = {"token_id": token, "logprob": -0.5, "sampling_logprob": -0.25}
        entry["top_logprobs"] = [{"token_id": token, "logprob": -0.5}]  # type: ignore[assignment]
        choice = {"index": 0, "text": f"<{token}>", "logprobs": {"content": [entry]}}
        chunks.append({"id": "cmpl-1", "choices": [choice]})
    raw = {"prompt_token_ids": [*PROMPT], "completion_token_ids": ids}
    chunks.append(
        {
            "id": "cmpl-1",
            "choices": [{"index": 0, "text": "", "finish_reason": "stop", "raw_output": raw}],
            "usage": {"completion_tokens": len(ids)},
            "perf_metrics": {"prefill-queue-duration": 0.1, "snapshot-identity": "s"},
        }
    )
    return chunks


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutated(rng: random.Random, chunks: list[dict[str, Any]]) -> bytes:
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        node, key = rng.choice(list(places(chunks)))
        if rng.random() < 0.3 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    events = [b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks]
    if rng.random() < 0.2:
        rng.shuffle(events)
    stream = bytearray(b"".join(events) + b"data: [DONE]\n\n")
    for _ in range(rng.choice([0, 0, 1, 2, 8])):
        at = rng.randrange(len(stream) + 1)
        what = rng.random()
        if what < 0.4:
            stream[at:at] = rng.choice(NASTY)
        elif what < 0.7:
            del stream[at : at + rng.randrange(1, 40)]
        else:
            stream[at : at + 1] = rng.randbytes(1)
    return bytes(stream)


def read(rng: random.Random, request: SamplingRequest, stream: bytes) -> SampledCompletion:
    """Read a stream as the sampler does, cut into pieces at random."""
    decoder = SseDecoder(request.answer_limit(len(PROMPT)))
    assembler = CompletionAssembler(request, PROMPT, keep_tokens=rng.random() < 0.5)
    while stream and not assembler.done:
        size = rng.choice([1, 7, 100, 10_000])
        piece, stream = stream[:size], stream[size:]
        mark = assembler.mark()
        if (messages := decoder.plain(piece)) is not None:
            assembler.feed_messages(messages)
        else:
            for data, event in decoder.feed(piece):
                assembler.feed(data, event)
        assembler.since(mark)
    figures = server_metrics({}, assembler.perf_metrics)
    return assembler.completion(prompt_index=0, sample_index=0, metrics=figures)


def check(one: SampledCompletion) -> None:
    """What is taken for a completion is one that a loss can be made of."""
    assert one.prompt_tokens == PROMPT
    assert one.completion_len == len(one.completion_tokens) <= MAX_TOKENS
    assert all(type(token) is int and 0 <= token < 2**31 for token in one.full_tokens)
    for row in (one.inference_logprobs, one.sampling_logprobs):
        if row is not None:
            assert len(row) == one.completion_len + one.echoed_prompt_logprob_count
            assert all(-1e309 < value <= 1e-3 for value in row)


def case(number: int) -> bool:
    """Run one case; returns whether its answer was taken."""
    rng = random.Random(number)
    request = asked(rng)
    stream = mutated(rng, sound(request))
    status_error(rng.choice([200, 302, 400, 404, 503]), stream, retry_after=None, request_id=None)
    try:
        one = read(rng, request, stream)
    except ApiError as error:
        words = str(error)
    else:
        check(one)
        return True
    assert "8, 9" not in words  # no message repeats tokens
    return False


def run(first: int, cases: int) -> None:
    tracemalloc.start()
    taken, slowest = 0, 0.0
    try:
        for number in range(first, first + cases):
            began = time.process_time()
            try:
                taken += case(number)
            except Exception as error:
                raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
            slowest = max(slowest, time.process_time() - began)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20
    assert slowest < 5.0  # of processor time; a case takes about a millisecond
    assert cases / 20 < taken < cases  # both ends are reached


def test_mutated_answers_give_typed_errors_or_sound_completions() -> None:
    run(0, 1_000)


@pytest.mark.slow
def test_twenty_thousand_mutated_answers() -> None:
    run(1_000, 20_000)


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"[" * 200_000 + b"\n\n",
        b"data: " + b'{"a":' * 200_000 + b"\n\n",
        b"data: {}\n\n" * 50_000,
        b"\n" * 500_000,
        b"data: " + b"x" * 2**21,
        b"data: " + orjson.dumps({"choices": [{}] * 100_000}) + b"\n\n",
        b"data: " + orjson.dumps({"perf_metrics": {str(i): i for i in range(50_000)}}) + b"\n\n",
    ],
)
def test_floods_are_bounded(stream: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ApiError):
            read(random.Random(1), asked(random.Random(1)), stream)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
