"""Reads the fields of an OpenAI chat request, and refuses those that can't be met.

It knows their names, kinds and neutral values; `requests` makes the request of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fireworks_training.tito.values.errors import invalid

_NO_OPTIONS = frozenset(
    {"messages", "tools", "model", "max_tokens", "max_completion_tokens", "temperature"}
    | {"stream", "stream_options", "tool_choice", "parallel_tool_calls", "store", "_tito"}
    | {"response_format", "user", "metadata", "safety_identifier"}
)
"""Fields of a chat request that are no options of sampling; of the last, all stay in the record."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Values at which a field asks for nothing; clients send them as their defaults."""

_FARTHEST = 10**18


def refuse_unmet(payload: Mapping[str, Any]) -> None:
    if payload.get("tool_choice") not in (None, "auto", "none"):
        raise invalid(
            "tool_choice: only 'auto' and 'none' are supported; nothing constrains the sampling"
        )
    if payload.get("parallel_tool_calls") is False:
        raise invalid("parallel_tool_calls=false is not supported: nothing constrains the sampling")
    if payload.get("store") not in (None, False):
        raise invalid("store=true is not supported: nothing is kept but the trajectory")
    if payload.get("n") not in (None, 1):
        raise invalid("n: a trajectory goes one way; make one trajectory for each sample")
    wanted = an_object(payload, "response_format").get("type", "text")
    if wanted != "text":
        raise invalid(
            f"response_format: only the type 'text' is supported, got {wanted!r:.40}; nothing "
            "constrains the sampling"
        )


def sampling_options(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the fields on which the sampling depends, without those that ask for nothing.

    Raises:
        TITOError: `stop`, `logprobs` or `top_logprobs` is of the wrong kind (400).
    """
    options = {
        name: value
        for name, value in payload.items()
        if name not in _NO_OPTIONS and value is not None and value not in _NEUTRAL.get(name, ())
    }
    if "stop" in options:
        options["stop"] = list(stops(options))
    if not isinstance(options.get("logprobs", False), bool):
        raise invalid("logprobs must be true or false; top_logprobs is a number")
    if "top_logprobs" in options:
        options["top_logprobs"] = whole("top_logprobs", options["top_logprobs"])
        if "logprobs" not in options:
            raise invalid("top_logprobs needs logprobs=true")
    if payload.get("tool_choice") == "none":
        options["tool_choice"] = "none"
    return options


def stops(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Read `stop`: a string, or a list of them.

    Raises:
        TITOError: it is neither, or holds an empty string (400).
    """
    given: object = options.get("stop") or ()
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, Sequence):
        raise invalid("stop must be a string, or a list of strings")
    texts = [one for one in cast(Sequence[object], found) if isinstance(one, str) and one]
    if len(texts) != len(cast(Sequence[object], found)):
        raise invalid("stop must hold strings that are not empty")
    return tuple(texts)


def objects(payload: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    value: object = payload.get(name) or []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise invalid(f"{name} must be a list of objects, got a {type(value).__name__}")
    items = cast(Sequence[object], value)
    for item in items:
        if not isinstance(item, Mapping):
            raise invalid(f"{name} must hold objects, and holds a {type(item).__name__}")
    return tuple(cast(Sequence[Mapping[str, Any]], items))


def an_object(payload: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value: object = payload.get(name) or {}
    if not isinstance(value, Mapping):
        raise invalid(f"{name} must be an object, got a {type(value).__name__}")
    return cast(Mapping[str, Any], value)


def whole(name: str, value: Any) -> int:
    found = number(name, value)
    if not found.is_integer():
        raise invalid(f"{name} must be a whole number, got {value!r}")
    return int(found)


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(f"{name} must be a number, got a {type(value).__name__}")
    if not -_FARTHEST < value < _FARTHEST:
        raise invalid(f"{name} is out of every range")
    return float(value)
