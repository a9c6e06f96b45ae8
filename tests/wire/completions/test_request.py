"""Requests to the completions route: what is sent for which call, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from fireworks_training._wire.completions.request import (
    SamplingRequest,
    normalise_stop,
    sampling_request,
    token_ids,
)
from fireworks_training.errors import (
    InvalidArgument,
    NotSupported,
    UnknownOption,
)

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


def body(*, sample: int = 0, **options: Any) -> dict[str, Any]:
    fields = orjson.loads(request(**options).encode([1, 2]).body(sample))
    assert isinstance(fields, dict)
    return fields


# -- requests --------------------------------------------------------------------------------------


def test_the_body_of_a_plain_call() -> None:
    assert body() == {
        "model": MODEL,
        "prompt": [1, 2],
        "n": 1,
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stream": True,
        "raw_output": True,
        "perf_metrics_in_response": True,
    }


def test_options_pass_and_client_options_do_not() -> None:
    sent = body(
        top_p=0.9,
        top_k=-1,
        logprobs=True,
        top_logprobs=3,
        echo_last=2,
        user="u",
        prompt_cache_key="k",
        min_tokens=1,
        logit_bias={"3": 1.0},
        http_timeout=5.0,
        sampling_context={"step": 3},
        additional_headers_snapshot={"X-A": "b"},
        seed=None,
    )
    assert {k: sent[k] for k in ("top_p", "top_k", "logprobs", "top_logprobs", "echo_last")} == {
        "top_p": 0.9,
        "top_k": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "echo_last": 2,
    }
    assert (sent["user"], sent["prompt_cache_key"], sent["min_tokens"]) == ("u", "k", 1)
    assert not sent.keys() & {
        "http_timeout",
        "sampling_context",
        "additional_headers_snapshot",
        "seed",
        "echo",
    }


def test_samples_differ_in_their_seed_only() -> None:
    encoded = request(seed=7).encode([1, 2])
    first, third = orjson.loads(encoded.body(0)), orjson.loads(encoded.body(2))
    assert (first.pop("seed"), third.pop("seed")) == (7, 9)
    assert first == third


def test_without_a_seed_all_samples_share_one_body() -> None:
    encoded = request().encode([1, 2])
    assert encoded.body(0) is encoded.body(5)


@pytest.mark.parametrize(
    ("stop", "normal"),
    [
        (None, None),
        ("END", ["END"]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([3, 4], [3, 4]),
        ([], []),
    ],
)
def test_stops(stop: object, normal: object) -> None:
    assert normalise_stop(stop) == normal


@pytest.mark.parametrize("stop", [["a", 1], [""], "", [True], [-1], [1.5], b"END", {"a"}, 3])
def test_senseless_stops_are_refused(stop: object) -> None:
    with pytest.raises(InvalidArgument, match="stop"):
        normalise_stop(stop)


def test_stops_on_the_wire() -> None:
    assert body(stop="END")["stop"] == ["END"]
    assert body(stop=[3])["stop"] == [3]
    assert body(stop=[3], ids=False)["stop"] == ["<3>"]
    assert body(stop=["x"], ids=False)["stop"] == ["x"]
    ignoring = body(stop=[])
    assert "stop" not in ignoring
    assert ignoring["ignore_eos"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1.0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"seed": 1.5},
        {"seed": 2**63},
        {"logprobs": 5},
        {"top_logprobs": 3},
        {"echo": "yes"},
        {"echo_last": -1},
        {"user": 3},
        {"http_timeout": 0},
        {"logit_bias": [1]},
        {"sampling_context": {"prompt": "x"}},
        {"sampling_context": "step 3"},
        {"additional_headers_snapshot": "X-A: b"},
        {"max_tokens": 0, "echo_last": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        request(**wrong)


def test_an_echo_needs_no_new_tokens() -> None:
    assert body(max_tokens=0, echo=True)["max_tokens"] == 0


def test_unknown_options_name_the_near_ones() -> None:
    with pytest.raises(UnknownOption, match="did you mean top_p"):
        request(topp=0.9)
    with pytest.raises(UnknownOption, match="known: top_p"):
        request(zzz=1)
    with pytest.raises(UnknownOption, match="set by the SDK"):
        request(stream=False)
    with pytest.raises(NotSupported, match="vision"):
        request(images=["data:"])


def test_token_ids_take_what_reads_as_integers() -> None:
    assert token_ids("p", np.array([1, 2], dtype=np.int32)) == (1, 2)  # type: ignore[arg-type]
    assert all(type(token) is int for token in token_ids("p", [np.int64(3)]))  # type: ignore[list-item]


@pytest.mark.parametrize("prompt", [[], [1.0], ["1"], [-1], [[1]], [None]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="p "):
        token_ids("p ", prompt)


def test_prompts_of_one_call_do_not_share_a_seed() -> None:
    """With one seed for all, the draws of different prompts would go together."""
    first, second = (request(seed=7).encode([1], earlier=earlier) for earlier in (0, 2))
    seeds = [orjson.loads(e.body(sample))["seed"] for e in (first, second) for sample in (0, 1)]
    assert seeds == [7, 8, 9, 10]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(kind: Any) -> None:
    asked = sampling_request(
        MODEL,
        max_tokens=np.int64(4),  # type: ignore[arg-type]
        temperature=kind(0.5),
        options={
            "top_p": kind(0.5),
            "min_p": kind(0.25),
            "frequency_penalty": kind(1.0),
            "top_k": np.int32(5),
            "seed": torch.tensor(3),
            "http_timeout": kind(2.0),
            "logit_bias": {np.int64(42): kind(5.0)},
            "stop": [np.int64(7)],
        },  # type: ignore[typeddict-item]
        decode_stop=None,
    )
    body = orjson.loads(asked.encode([1]).body(0))
    assert (body["temperature"], body["top_p"], body["min_p"]) == (0.5, 0.5, 0.25)
    assert (body["top_k"], body["seed"], body["max_tokens"]) == (5, 3, 4)
    assert (body["logit_bias"], body["stop"]) == ({"42": 5.0}, [7])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (option, value)
        for option in ("top_p", "min_p", "frequency_penalty", "presence_penalty")
        for value in (math.nan, math.inf, np.float32("nan"), "0.5", True, [0.5], np.array([0.5]))
    ]
    + [
        ("temperature", math.nan),
        ("repetition_penalty", math.inf),
        ("http_timeout", math.inf),
        ("seed", 1.0),
        ("top_k", np.float64(1.0)),
        ("logit_bias", {"42": math.nan}),
        ("logit_bias", {42: math.inf}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", [1.0]),
        ("stop", [1.5]),
        ("stop", [2**40]),
        ("raw_output", False),
        ("raw_output", 1),
        ("return_partial", 1),
        ("additional_headers_snapshot", {"X": 1}),
        ("additional_headers_snapshot", {"X": "a\r\nY: b"}),
    ],
)
def test_what_is_no_sound_value_is_refused_at_the_call(option: str, value: object) -> None:
    temperature: Any = value if option == "temperature" else 1.0
    options: Any = {} if option == "temperature" else {option: value}
    with pytest.raises(InvalidArgument, match=option):
        sampling_request(
            MODEL, max_tokens=1, temperature=temperature, options=options, decode_stop=None
        )


def test_options_where_they_do_nothing_are_not_sent() -> None:
    plain = request().encode([1]).body(0)
    neutral = request(
        min_p=0, min_tokens=0, frequency_penalty=0, presence_penalty=0.0, repetition_penalty=1,
        logit_bias={}, response_format={"type": "text"}, top_logprobs=0, echo=False, echo_last=0,
        raw_output=True,
    )  # fmt: skip
    assert neutral.encode([1]).body(0) == plain
    assert b'"frequency_penalty":0.5' in request(frequency_penalty=0.5).encode([1]).body(0)
    assert b'"echo_last":0' in request(echo=True, echo_last=0).encode([1]).body(0)


def test_ids_that_no_vocabulary_has_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no vocabulary"):
        token_ids("p", [2**31])
    with pytest.raises(InvalidArgument, match="input_ids"):
        token_ids("p", {"input_ids": [1]})  # type: ignore[arg-type]
