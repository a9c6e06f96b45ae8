"""A request to sample from the model: its fields, their checks, and its random numbers.

Knows the `add` control. Does not know torch or sockets.

The gateway validates what users send; the checks here only keep a faulty gateway from reaching the
tensors, and refuse the one request rather than the connection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MAX_TOP_LOGPROBS = 20

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class RequestRefused(ValueError):
    """Raised for a request that can't be sampled; the message names the field and the reason."""


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """Describes one completion to sample.

    Attributes:
        stream: id that the gateway gave it, unique while the stream lives.
        prompt: token ids, at least one.
        max_tokens: tokens to sample at most; 0 only reads the prompt.
        key: 64-bit key of the stream's random numbers.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: 0 is off.
        min_tokens: stop tokens can't be sampled before this many.
        stop_ids: tokens that end the stream; they are part of it.
        top_logprobs: how many most likely tokens to report, 0 to 20.
        echo: how many prompt tokens, from the end, to report logprobs of. The first token of a
            prompt has none.
        targets: for each of those tokens, other tokens to report logprobs of at its place, the same
            number for each; -1 is none. Empty = none at all.
        draws: how many tokens to draw from the model's distribution at each of those places.
        arrived: when the gateway sent it, seconds of the machine's monotonic clock. (What arrives
            during a decode step is read after it, and that wait counts too.)
    """

    stream: int
    prompt: tuple[int, ...]
    max_tokens: int
    key: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    top_logprobs: int = 0
    echo: int = 0
    targets: tuple[tuple[int, ...], ...] = ()
    draws: int = 0
    arrived: float = 0.0

    @property
    def first_echo(self) -> int:
        """Index of the first prompt token whose logprob is reported."""
        return max(1, len(self.prompt) - self.echo)

    @property
    def total(self) -> int:
        """Tokens that it can come to hold in the key/value cache."""
        return len(self.prompt) + self.max_tokens


def mix64(value: int) -> int:
    """Spreads a 64-bit counter over all bits: the finaliser of splitmix64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of_seed(seed: int) -> int:
    """Makes the key of a request with a seed: nearby seeds give unrelated keys."""
    return mix64(seed + _GOLDEN)


def uniforms(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Computes uniform numbers in [0, 1): splitmix64 of each key at each counter.

    A stream's numbers depend on its key and its own token count alone, so a seed gives the same
    tokens whatever shares the batch.

    Args:
        keys: uint64 `[n]`.
        counters: uint64 `[n]`, tokens that each stream has sampled so far.

    Returns:
        float64 `[n]`, multiples of 2^-52.
    """
    x: npt.NDArray[np.uint64] = keys + (counters + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform: npt.NDArray[np.float64] = (x >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return uniform


def parse_add(
    message: Mapping[str, object],
    *,
    vocab_size: int,
    max_context: int,
    eos_ids: frozenset[int],
    fresh_key: int,
    now: float,
) -> StreamRequest:
    """Reads and checks the request in an `add` control.

    Args:
        message: the control.
        vocab_size: ids from here on are refused.
        max_context: tokens that prompt and completion may have together.
        eos_ids: the model's own end tokens, stop tokens unless `ignore_eos`.
        fresh_key: the key where the message has no seed.
        now: seconds of the monotonic clock; the time of arrival where `sent` is missing.

    Raises:
        RequestRefused: a field is missing, of a wrong type, or out of range.
    """
    prompt = _ids(message, "prompt", vocab_size)
    if not prompt:
        raise RequestRefused("prompt: at least one token")
    max_tokens = _integer(message, "max_tokens", None, 0, max_context)
    if len(prompt) + max_tokens > max_context:
        raise RequestRefused(
            f"prompt ({len(prompt)}) and max_tokens ({max_tokens}) are over the context of "
            f"{max_context} tokens"
        )
    stops = frozenset(_ids(message, "stop_ids", vocab_size))
    if not message.get("ignore_eos"):
        stops |= eos_ids
    min_tokens = _integer(message, "min_tokens", 0, 0, max_context)
    if min_tokens and len(stops) >= vocab_size:
        raise RequestRefused("min_tokens: every token is a stop token")
    seed = message.get("seed")
    if seed is not None and not isinstance(seed, int):
        raise RequestRefused("seed: an integer")
    echo = _integer(message, "echo", 0, 0, len(prompt))
    return StreamRequest(
        stream=_integer(message, "stream", None, 0, 2**32 - 1),
        prompt=prompt,
        max_tokens=max_tokens,
        key=fresh_key if seed is None else key_of_seed(seed),
        temperature=_number(message, "temperature", 1.0, 0.0, 1e6),
        top_p=_number(message, "top_p", 1.0, 1e-9, 1.0),
        top_k=_integer(message, "top_k", 0, 0, 2**31 - 1),
        min_tokens=min_tokens,
        stop_ids=stops,
        top_logprobs=_integer(message, "top_logprobs", 0, 0, min(MAX_TOP_LOGPROBS, vocab_size)),
        echo=echo,
        targets=_targets(message, len(prompt) - max(1, len(prompt) - echo), vocab_size),
        draws=_integer(message, "draws", 0, 0, MAX_TOP_LOGPROBS),
        arrived=min(now, _number(message, "sent", now, 0.0, math.inf)),
    )


def _integer(
    message: Mapping[str, object], name: str, default: int | None, low: int, high: int
) -> int:
    value = message.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestRefused(f"{name}: an integer from {low} to {high}")
    return value


def _number(
    message: Mapping[str, object], name: str, default: float, low: float, high: float
) -> float:
    value = message.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RequestRefused(f"{name}: a number from {low} to {high}")
    return float(value)


def _targets(
    message: Mapping[str, object], rows: int, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    value = message.get("targets") or []
    if not isinstance(value, list) or (value and len(value) != rows):
        raise RequestRefused(f"targets: a list for each of the {rows} echoed tokens")
    for row in value:
        if not isinstance(row, list) or not len(row) == len(value[0]) <= MAX_TOP_LOGPROBS:
            raise RequestRefused(f"targets: lists of one length, at most {MAX_TOP_LOGPROBS}")
        for token in row:
            if not isinstance(token, int) or not -1 <= token < vocab_size:
                raise RequestRefused(f"targets: token ids from -1 to {vocab_size - 1}")
    return tuple(map(tuple, value))


def _ids(message: Mapping[str, object], name: str, vocab_size: int) -> tuple[int, ...]:
    value = message.get(name, [])
    if not isinstance(value, list):
        raise RequestRefused(f"{name}: a list of token ids")
    for token in value:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestRefused(f"{name}: token ids from 0 to {vocab_size - 1}")
    return tuple(value)
