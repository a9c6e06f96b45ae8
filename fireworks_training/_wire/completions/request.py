"""Checks the options of a sampling call and encodes its requests to the completions route.

The prompt is turned into JSON once, however many samples are asked for; a seed is the only thing in
which the samples' bodies differ. `n` is always 1 on the wire: n samples are n requests. `chunks.py`
reads the answers.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import orjson

from fireworks_training._checks import integer, number
from fireworks_training.errors import InvalidArgument, NotSupported, UnknownOption
from fireworks_training.options import SamplingOptions

MAX_TOKEN_ID: Final = 2**31 - 1
"""Largest token id: vocabularies are far smaller, and trainers hold ids in 32 bits at times."""

PATH: Final = "/inference/v1/completions"
DEFAULT_HTTP_TIMEOUT: Final = 600.0
ANSWER_BYTES: Final = 2**20
"""Bytes of an answer beside those of its tokens: figures, names, keep-alives."""

TOKEN_BYTES: Final = 4096
"""Bytes that a token may take: a chunk of its own, with names, figures and logprobs."""

ALTERNATIVE_BYTES: Final = 512
"""Bytes that each of a token's likeliest alternatives may take."""

ID_BYTES: Final = 16
"""Bytes that the id of a prompt's token may take."""

LABELS: Final = ("session", "run", "checkpoint", "step", "group", "item")


_OPTIONS: Final = tuple(SamplingOptions.__annotations__)
_NAMED: Final = ("messages", "prompt_token_ids", "n", "max_tokens", "temperature", "max_seq_len")
_SDK_OWNED: Final = ("model", "prompt", "stream", "perf_metrics_in_response")
_REFUSED: Final = {
    "images": "vision inputs are not supported",
    "return_token_ids": "vision inputs are not supported; token ids are always returned",
    "include_routing_matrix": "router replay is not supported",
    "routing_matrix_format": "router replay is not supported",
    "r3_ttl_seconds": "router replay is not supported",
    "top_sampling_logprobs": "sampling references need a shared store, which is not supported",
    "top_sampling_format": "sampling references need a shared store, which is not supported",
    "sampling_mask": "sampling references need a shared store, which is not supported",
}


def check_names(options: Iterable[str]) -> None:
    """Refuse options that this call does not know.

    Raises:
        UnknownOption: there is no such option, or the SDK sets it itself; names the near ones.
        NotSupported: the official SDK has it, this version refuses it.
    """
    for name in options:
        if name in _REFUSED:
            raise NotSupported(f"{name}: {_REFUSED[name]}")
        if name in _SDK_OWNED:
            raise UnknownOption(f"{name} is set by the SDK itself; leave it out")
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, (*_OPTIONS, *_NAMED), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_OPTIONS)}"
            raise UnknownOption(f"unknown sampling option {name!r}; {hint}")


def _instance(kind: type[Any], what: str) -> Callable[[str, object], Any]:
    def check(name: str, value: object) -> Any:
        if not isinstance(value, kind):
            raise InvalidArgument(f"{name} must be {what}, got {type(value).__name__}")
        return value

    return check


def _logit_bias(value: object) -> dict[str, float]:
    """Return a bias for each token id, the ids as the text that JSON has for keys."""
    if not isinstance(value, Mapping):
        raise InvalidArgument(
            f"logit_bias must be a mapping of token ids to numbers, got {type(value).__name__}"
        )
    biases: dict[str, float] = {}
    for key, bias in cast(Mapping[object, object], value).items():
        token = int(key) if isinstance(key, str) and _DIGITS.fullmatch(key) else key
        number_of = str(integer("a token id of logit_bias", token, 0, MAX_TOKEN_ID))
        biases[number_of] = number(f"logit_bias[{number_of}]", bias, -math.inf)
    return biases


def _true(name: str, value: object) -> None:
    if value is not True:
        raise InvalidArgument(
            f"{name}={value!r}: completions without their token ids can't be trained on, and so "
            "raw_output is always asked for; leave it out, or pass True"
        )


def _without_neutral(passed: dict[str, Any]) -> dict[str, Any]:
    """Leave out options at the value where they do nothing: not every server knows each field."""
    kept = {
        name: value
        for name, value in passed.items()
        if value is not False and not (name in _NEUTRAL and value == _NEUTRAL[name])
    }
    if kept.get("echo_last") == 0 and "echo" not in kept:
        del kept["echo_last"]  # beside an echo it turns that off
    return kept


_NEUTRAL: Final[Mapping[str, object]] = {
    "min_p": 0.0,
    "min_tokens": 0,
    "top_logprobs": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
}
"""Values of options at which they do nothing."""

_DIGITS: Final = re.compile(r"\d{1,10}", re.ASCII)
_TINY = 1e-9
_PASSED: Final[dict[str, Callable[[str, object], Any]]] = {
    "top_p": lambda name, value: number(name, value, _TINY, 1.0),
    "top_k": lambda name, value: max(0, integer(name, value, -1)),
    "min_p": lambda name, value: number(name, value, 0.0, 1.0),
    "seed": lambda name, value: integer(name, value, -(2**63), 2**63 - 1),
    "ignore_eos": _instance(bool, "True or False"),
    "min_tokens": lambda name, value: integer(name, value, 0),
    "logprobs": _instance(bool, "True or False (how many alternatives: top_logprobs)"),
    "top_logprobs": lambda name, value: integer(name, value, 0),
    "echo": _instance(bool, "True or False"),
    "echo_last": lambda name, value: integer(name, value, 0),
    "frequency_penalty": lambda name, value: number(name, value, -2.0, 2.0),
    "presence_penalty": lambda name, value: number(name, value, -2.0, 2.0),
    "repetition_penalty": lambda name, value: number(name, value, _TINY),
    "logit_bias": lambda _, value: _logit_bias(value),
    "response_format": _instance(Mapping, "a mapping"),
    "user": _instance(str, "a string"),
    "prompt_cache_key": _instance(str, "a string"),
}


def normalise_stop(stop: object) -> list[str] | list[int] | None:
    """Return `stop` as a list of strings or of ids; None if not given, [] ignores end of text.

    A single string is one stop, never its characters.

    Raises:
        InvalidArgument: anything else: mixed kinds, empty strings, negative ids.
    """
    if stop is None:
        return None
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise InvalidArgument(
            f"stop must be a string, a list of strings or a list of token ids, got "
            f"{type(stop).__name__}"
        )
    items = list(cast(Sequence[object], stop))
    if all(isinstance(item, str) for item in items):
        if "" in items:
            raise InvalidArgument("stop contains an empty string, which would stop everywhere")
        return cast(list[str], items)
    if any(isinstance(item, str) for item in items):
        raise InvalidArgument("stop must hold strings or token ids, not a mixture")
    return [integer("a token id of stop", item, 0, MAX_TOKEN_ID) for item in items]


def token_ids(what: str, prompt: Sequence[int]) -> tuple[int, ...]:
    """Return a prompt as plain integers; numpy arrays and their integers are accepted.

    Raises:
        InvalidArgument: it is empty, or holds something other than integers from 0 on.
    """
    if isinstance(prompt, Mapping):
        raise InvalidArgument(
            f"{what} is a {type(prompt).__name__}, a mapping: pass its token ids, "
            'such as encoding["input_ids"]'
        )
    try:
        ids = tuple(map(operator.index, prompt))
    except TypeError as error:
        raise InvalidArgument(f"{what} must be a list of token ids (integers)") from error
    if not ids:
        raise InvalidArgument(f"{what} is empty: a prompt has at least one token")
    if min(ids) < 0:
        raise InvalidArgument(f"{what} holds a negative token id")
    if max(ids) > MAX_TOKEN_ID:
        raise InvalidArgument(
            f"{what} holds a token id over {MAX_TOKEN_ID:,}: no vocabulary has it"
        )
    return ids


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Holds a checked sampling call, without its prompts.

    Attributes:
        fields: those of the body, but prompt and seed.
        max_tokens: tokens of the completion at most.
        seed: seed of sample 0; None lets the server choose.
        logprobs, top_logprobs, echo, echo_last: the options of these names.
        full_distribution: whether the model's own distribution is sampled (temperature 1, top_p 1,
            no top_k), so that both kinds of logprobs are the same.
        http_timeout: seconds without a byte after which an attempt counts as lost.
        labels: those of the call, as messages show them.
        headers: HTTP headers of this call.
        return_partial: whether completions that failed are left out of the result.
    """

    fields: Mapping[str, Any]
    max_tokens: int
    seed: int | None
    logprobs: bool
    top_logprobs: int
    echo: bool
    echo_last: int | None
    full_distribution: bool
    http_timeout: float
    labels: str
    headers: Mapping[str, str]
    return_partial: bool = False
    _head: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Encoded once, for however many prompts.
        object.__setattr__(self, "_head", orjson.dumps(self.fields)[:-1])

    def encode(
        self, prompt_ids: Sequence[int], *, index: int = 0, earlier: int = 0
    ) -> EncodedRequest:
        """Encode the bodies for one prompt.

        Args:
            index: place of the prompt in its call.
            earlier: completions of the call that come before this prompt's.
        """
        body = b'%b,"prompt":%b}' % (self._head, orjson.dumps(prompt_ids))
        seed = None if self.seed is None else self.seed + earlier
        return EncodedRequest(prompt_ids, index, body, seed)

    def echoed(self, prompt_len: int) -> int:
        """Return how many prompt tokens the answer repeats."""
        if self.echo_last is not None:
            return min(self.echo_last, prompt_len)
        return prompt_len if self.echo else 0

    def answer_limit(self, prompt_len: int) -> int:
        """Return how many bytes an honest answer has at most, generously."""
        tokens = self.max_tokens + self.echoed(prompt_len)
        per_token = TOKEN_BYTES + ALTERNATIVE_BYTES * self.top_logprobs
        return ANSWER_BYTES + tokens * per_token + ID_BYTES * prompt_len


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """Holds the request bodies of one prompt, and its place in the call."""

    ids: Sequence[int]
    index: int
    unseeded: bytes
    seed: int | None

    def body(self, sample_index: int) -> bytes:
        """Return the JSON body of one sample; without a seed the same object for all."""
        if self.seed is None:
            return self.unseeded
        return b'%b,"seed":%d}' % (self.unseeded[:-1], self.seed + sample_index)


def sampling_request(
    model: str,
    *,
    max_tokens: int,
    temperature: float,
    options: SamplingOptions,
    decode_stop: Callable[[list[int]], list[str]] | None,
) -> SamplingRequest:
    """Check the options of a call and make its request.

    Args:
        model: model string of the deployment.
        max_tokens: at least 1, or 0 with an echo.
        temperature: at least 0; 0 is greedy.
        options: the rest.
        decode_stop: turns stop token ids into strings for a server that takes no ids; None sends
            the ids as they are.

    Raises:
        UsageError: something is unknown, refused, out of range or without effect.
    """
    check_names(options)
    given = {name: value for name, value in options.items() if value is not None}
    if "raw_output" in given:
        _true("raw_output", given["raw_output"])
    passed = {name: check(name, given[name]) for name, check in _PASSED.items() if name in given}
    seed: int | None = passed.pop("seed", None)
    echo_last: int | None = passed.get("echo_last")
    echo = bool(passed.get("echo", False))
    logprobs = bool(passed.get("logprobs", False))
    top_logprobs = int(passed.get("top_logprobs", 0))
    if top_logprobs and not logprobs:
        raise InvalidArgument("top_logprobs has no effect without logprobs=True")
    echoes = echo if echo_last is None else echo_last > 0
    fields: dict[str, Any] = {
        "model": model,
        "n": 1,
        "max_tokens": integer("max_tokens", max_tokens, 0 if echoes else 1),
        "temperature": number("temperature", temperature, 0.0),
        "top_p": 1.0,
        "top_k": 0,
        "stream": True,
        "raw_output": True,
        "perf_metrics_in_response": True,
        **_without_neutral(passed),
    }
    fields |= _stop_fields(normalise_stop(given.get("stop")), decode_stop)
    return SamplingRequest(
        fields=fields,
        max_tokens=fields["max_tokens"],
        seed=seed,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        echo=echo,
        echo_last=echo_last,
        full_distribution=(
            fields["temperature"] == 1.0 and fields["top_p"] == 1.0 and fields["top_k"] == 0
        ),
        http_timeout=number("http_timeout", given.get("http_timeout", DEFAULT_HTTP_TIMEOUT), 1e-3),
        labels=_labels_text(given),
        headers=_headers(given.get("additional_headers_snapshot")),
        return_partial=bool(
            _instance(bool, "True or False")("return_partial", given.get("return_partial", False))
        ),
    )


def _stop_fields(
    stop: list[str] | list[int] | None, decode: Callable[[list[int]], list[str]] | None
) -> dict[str, Any]:
    if stop is None:
        return {}
    if not stop:
        return {"ignore_eos": True}
    integers = [item for item in stop if isinstance(item, int)]
    return {"stop": decode(integers) if integers and decode else stop}


def check_labels(labels: Mapping[str, object]) -> None:
    """Refuse labels that messages would not show.

    Raises:
        InvalidArgument: names the labels that there are.
    """
    _labels_text({"sampling_context": labels})


def _labels_text(given: Mapping[str, object]) -> str:
    labels: dict[str, object] = {}
    for option in ("sampling_context", "timeout_diagnostic_context"):
        value = given.get(option, {})
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"{option} must be a mapping, got {type(value).__name__}")
        labels.update(cast(Mapping[str, object], value))
    unknown = [key for key in labels if key not in LABELS]
    if unknown:
        raise InvalidArgument(
            f"sampling_context takes {', '.join(LABELS)}; got {', '.join(map(str, unknown))}"
        )
    return ", ".join(f"{key} {labels[key]}" for key in LABELS if key in labels)


def _headers(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgument(
            f"additional_headers_snapshot must be a mapping, got {type(value).__name__}"
        )
    headers = dict(cast(Mapping[str, str], value))
    for name, text in cast(Mapping[object, object], headers).items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise InvalidArgument("additional_headers_snapshot maps names to values, both strings")
        if not name or any(mark in name + text for mark in "\r\n\0"):
            raise InvalidArgument(
                "additional_headers_snapshot holds an empty name, or a line break in a header"
            )
    return headers
