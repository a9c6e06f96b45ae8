"""`CompletionAssembler`: builds a completion and its metrics from the chunks of its stream.

It knows what a chunk may hold and what a completion must have; it knows neither sockets nor
retries. Nothing is taken on trust: a completion has at most as many tokens as were asked for, of
the prompt that was sent, with ids and logprobs that can be such. Logprobs go into arrays of doubles
as they arrive, eight bytes a token, and into lists at the end.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, cast

import orjson

from fireworks_training._perf_metrics import measured, request_id_of
from fireworks_training._wire.completions.errors import named, object_in, stream_error
from fireworks_training._wire.completions.request import MAX_TOKEN_ID, SamplingRequest
from fireworks_training.errors import ProtocolError
from fireworks_training.models import FinishReason, SampledCompletion, ServerMetrics, TokenDelta

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}
MAX_LOGPROB = 1e-3
"""Largest log probability; over 0 by what rounding may do."""

NAME_LENGTH = 256
"""Characters of a server's names for things that are kept at most."""

KEEP_ALIVES = frozenset({"ping", "heartbeat", "keepalive"})
_DONE = b"[DONE]"
_SWITCH_INDEX = "snapshot-switch-index"
_SNAPSHOT_FIELDS = frozenset({"snapshot-identity", "snapshot-identity-first", _SWITCH_INDEX})
_SELDOM = _SNAPSHOT_FIELDS | {"error", "usage", "perf_metrics"}
_LAST = frozenset({"raw_output", "prompt_token_ids"})


def server_metrics(
    headers: Mapping[str, str], perf_metrics: Mapping[str, Any], **client: Any
) -> ServerMetrics:
    """Build the metrics of an attempt; `perf_metrics` of the stream win over headers.

    Args:
        client: the fields that this client measured.
    """
    figures: dict[str, Any] = {}
    measured(headers, figures)
    measured(perf_metrics, figures)
    return ServerMetrics(**figures, request_id=request_id_of(headers), **client)


class CompletionAssembler:
    """Builds one completion from its chunks.

    Args:
        request: the options that were sent.
        prompt_ids: the prompt that was sent.
        keep_tokens: whether `since` returns token ids too.

    Attributes:
        done: whether `[DONE]` came.
        flawed: whether the completion lacks what another attempt may bring: it was aborted, or a
            token has no logprob.
        logprobs_missing: whether logprobs were asked for, and the completion has none at all.
        events: events of the stream taken so far, keep-alives not counted.
        given: whether all that was asked for has come; what may follow is the end of the stream.
        response_id: the first id that the chunks bore.
        finish_reason: the server's, once it came.
        perf_metrics: the server's own figures, once they came.
        completion_tokens: the server's own count; None if it gave none.
    """

    __slots__ = (
        "_logprobs",
        "_logprobs_wanted",
        "_most",
        "_prompt_ids",
        "_raw_nulls",
        "_raw_output",
        "_request",
        "_sampling",
        "_sampling_nulls",
        "_snapshot",
        "_text",
        "_tokens",
        "_top",
        "completion_tokens",
        "done",
        "events",
        "finish_reason",
        "flawed",
        "given",
        "logprobs_missing",
        "perf_metrics",
        "response_id",
    )

    def __init__(
        self,
        request: SamplingRequest,
        prompt_ids: Sequence[int],
        *,
        keep_tokens: bool = False,
    ) -> None:
        self._request = request
        self._tokens: list[int] | None = [] if keep_tokens else None
        self._logprobs_wanted = request.logprobs
        self._prompt_ids = prompt_ids
        self._most = request.max_tokens + request.echoed(len(prompt_ids))
        self._text: list[str] = []
        self._logprobs = array("d")
        self._sampling = array("d")
        self._raw_nulls = 0
        self._sampling_nulls = 0
        self._top: list[dict[int, float]] | None = [] if request.top_logprobs else None
        self._raw_output: Mapping[str, Any] | None = None
        self._snapshot: dict[str, Any] = {}
        self.done = False
        self.flawed = False
        self.logprobs_missing = False
        self.events = 0
        self.given = False
        self.response_id: str | None = None
        self.finish_reason: str | None = None
        self.perf_metrics: dict[str, Any] = {}
        self.completion_tokens: int | None = None

    @property
    def started(self) -> bool:
        """Whether anything of the completion has arrived."""
        return bool(self._text or self._logprobs or self.finish_reason)

    @property
    def truncated(self) -> bool:
        """Whether the stream, if it ended here, ended too early."""
        return self.finish_reason is None or not (self.done or self._raw_output)

    def mark(self) -> tuple[int, int]:
        """Return the present end of the completion, for `since`."""
        return len(self._text), len(self._logprobs)

    def since(self, mark: tuple[int, int]) -> TokenDelta:
        """Return what was added after a mark."""
        start = mark[1]
        return TokenDelta(
            "".join(self._text[mark[0] :]),
            () if self._tokens is None else self._tokens[start:],
            self._logprobs[start:].tolist(),
            self._sampling[start:].tolist(),
        )

    def feed(self, data: bytes, event: str = "message") -> None:
        """Take the data and the type of one event of the stream.

        Raises:
            ApiError: the stream reports an error, or is not one that the contract allows.
        """
        if event == "error":
            raise stream_error(_error_in(data))
        if event in KEEP_ALIVES and _decoded(data) is None:
            return
        self.feed_messages((data,))

    def feed_messages(self, messages: Sequence[bytes]) -> None:
        """Take events of the usual type: the data of each.

        This is where the client spends its time. So each chunk is decoded, taken and let go of
        before the next, and what is seldom in a chunk is looked for all at once.

        Raises:
            ApiError: the stream reports an error, or is not one that the contract allows.
        """
        decode, texts, wanted = orjson.loads, self._text, self._logprobs_wanted
        data = b""
        self.events += len(messages)
        try:
            for data in messages:
                if data[:1] != b"{":
                    bare = data.strip()
                    if bare == _DONE:
                        self.done = True
                        return  # what follows is no part of the completion
                    if not bare:
                        self.events -= 1
                        continue  # proxies keep connections alive so
                chunk = decode(data)
                if not _SELDOM.isdisjoint(chunk):
                    self._take_seldom(chunk)
                for choice in chunk.get("choices") or ():
                    if choice.get("index"):
                        raise ValueError("index")  # one completion was asked for
                    if text := choice.get("text"):
                        if type(text) is not str:
                            raise TypeError("text")
                        texts.append(text)
                    if wanted and (logprobs := choice.get("logprobs")):
                        self._take_logprobs(logprobs.get("content") or ())
                    if reason := choice.get("finish_reason"):
                        if type(reason) is not str:
                            raise TypeError("finish_reason")
                        self.finish_reason = reason[:NAME_LENGTH]
                        self.given = True
                    if not _LAST.isdisjoint(choice):
                        self._take_ids(choice)
                if self.response_id is None and "id" in chunk:
                    self.response_id = str(chunk["id"])[:NAME_LENGTH]
        except orjson.JSONDecodeError as error:
            raise ProtocolError(
                f"the server sent a chunk that is not JSON ({len(data)} bytes)"
            ) from error
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"the server sent a chunk of another form than the contract's "
                f"({type(error).__name__})"
            ) from error

    def _take_seldom(self, chunk: dict[str, Any]) -> None:
        """Take the fields that few chunks have beside choices."""
        if (error := chunk.get("error")) is not None:
            raise stream_error(error)
        if usage := chunk.get("usage"):
            tokens = usage.get("completion_tokens")
            if type(tokens) is int and tokens >= 0:  # else it counts as not reported
                self.completion_tokens = tokens
        if perf_metrics := chunk.get("perf_metrics"):
            self.perf_metrics.update(perf_metrics)
            self._take_snapshot(perf_metrics)
        self._take_snapshot(chunk)

    def _take_ids(self, choice: dict[str, Any]) -> None:
        """Take the token ids of completion and prompt."""
        if raw_output := choice.get("raw_output"):
            self._raw_output = {**raw_output}
        if (prompt := choice.get("prompt_token_ids")) is not None:
            self._raw_output = {"prompt_token_ids": prompt, **(self._raw_output or {})}

    def _take_logprobs(self, content: Sequence[dict[str, Any]]) -> None:
        raw = [entry["logprob"] for entry in content]
        try:
            # The usual case; `fromlist` leaves the array as it was when a value does not fit.
            self._sampling.fromlist([entry["sampling_logprob"] for entry in content])
        except (KeyError, TypeError):
            sampling = [entry.get("sampling_logprob") for entry in content]
            self._sampling_nulls += sampling.count(None)
            self._sampling.extend(_doubles(sampling))
        try:
            self._logprobs.fromlist(raw)
        except TypeError:
            self._logprobs.extend(_doubles(raw))
            self._raw_nulls += raw.count(None)
        if len(self._logprobs) >= self._most:
            self.given = True
            if len(self._logprobs) > self._most:
                raise self._too_many(len(self._logprobs))
        if self._tokens is not None:
            self._take_streamed_ids(content, raw)
        if self._top is not None:
            self._top.extend(map(_top_row, content))

    def _take_streamed_ids(self, content: Sequence[dict[str, Any]], raw: list[Any]) -> None:
        """Take what a consumer gets before the completion is whole, and so was checked."""
        if not _are_logprobs([value for value in raw if value is not None]):
            raise ValueError("logprob")
        ids = [entry.get("token_id") for entry in content]
        if None in ids:
            self._tokens = None  # this server does not send them along
        elif not _is_ids(ids):
            raise ValueError("token_id")
        elif self._tokens is not None:
            self._tokens.extend(cast(list[int], ids))

    def _too_many(self, tokens: int) -> ProtocolError:
        return ProtocolError(
            f"the server sent {tokens:,} tokens or more, where {self._most:,} were asked for "
            "(max_tokens and an echo of the prompt): it does not keep to max_tokens"
        )

    def _take_snapshot(self, source: Mapping[str, Any]) -> None:
        for name in _SNAPSHOT_FIELDS:
            if (value := source.get(name)) is not None:
                switch = name == _SWITCH_INDEX
                self._snapshot[name] = int(value) if switch else str(value)[:NAME_LENGTH]

    def snapshot_identity(self) -> str | None:
        """Return the snapshot that sampled the last token; None if not reported."""
        return self._snapshot.get("snapshot-identity")

    def completion(
        self, *, prompt_index: int, sample_index: int, metrics: ServerMetrics
    ) -> SampledCompletion:
        """Check and return the completion; its text is as the server sent it, an echo included.

        Raises:
            ProtocolError: something that it must have is missing, or lengths disagree.
        """
        reason = FINISH_REASONS.get(self.finish_reason or "")
        if reason is None:
            self.flawed = True
            raise ProtocolError(
                "the server ended the completion with finish_reason "
                f"{named(self.finish_reason) or 'that is no name'}; known: "
                f"{', '.join(FINISH_REASONS)}"
            )
        prompt, answered = self._ids()
        if len(answered) > self._most:
            raise self._too_many(len(answered))
        echoed = self._request.echoed(len(prompt))
        if answered[:echoed] != prompt[len(prompt) - echoed :]:
            raise ProtocolError("the tokens that the server echoed are not those of the prompt")
        # The first token of a prompt has no logprob: nothing precedes it.
        dropped = 1 if echoed and echoed == len(prompt) else 0
        inference, sampling, top = self._token_arrays(len(answered), echoed, dropped)
        identity = self.snapshot_identity()
        first = self._snapshot.get("snapshot-identity-first", identity)
        return SampledCompletion(
            text="".join(self._text),
            full_tokens=prompt + answered[echoed:],
            prompt_len=len(prompt),
            finish_reason=reason,
            completion_len=len(answered) - echoed,
            inference_logprobs=inference,
            sampling_logprobs=sampling,
            logprobs_echoed=bool(echoed) and inference is not None,
            echoed_prompt_logprob_count=echoed - dropped if inference is not None else 0,
            top_logprobs=top,
            prompt_index=prompt_index,
            sample_index=sample_index,
            snapshot_identity=identity,
            snapshot_identity_first=first,
            snapshot_switch_index=self._snapshot.get(_SWITCH_INDEX),
            metrics=metrics,
            full_distribution=self._request.full_distribution,
        )

    def _ids(self) -> tuple[list[int], list[int]]:
        """Return prompt and answer as token ids."""
        raw_output = self._raw_output or {}
        answered = raw_output.get("completion_token_ids")
        if not _is_ids(answered):
            raise ProtocolError(
                "the answer has no raw_output.completion_token_ids, or they are not token ids: "
                "without the token ids a completion can't be trained on. Sample from a deployment "
                "that returns raw output."
            )
        used = raw_output.get("prompt_token_ids")
        prompt = list(self._prompt_ids)
        if used is not None and used != prompt:
            raise ProtocolError(
                "the answer's prompt_token_ids are not those that were sent: the completion is one "
                "of another prompt"
            )
        return prompt, cast(list[int], answered)

    def _token_arrays(
        self, answered: int, echoed: int, dropped: int
    ) -> tuple[list[float] | None, list[float] | None, list[dict[int, float]] | None]:
        """Return raw, sampling and top logprobs, of the positions that are trained on."""
        if not self._request.logprobs:
            return None, None, None
        if answered and not self._logprobs:
            self.logprobs_missing = True
            return None, None, None
        if len(self._logprobs) != answered:
            raise ProtocolError(
                f"the server sent {len(self._logprobs)} logprobs for {answered} tokens"
            )
        inference = self._logprobs[dropped:].tolist()
        self._check_rows(inference, "a token without a logprob")
        top = self._top[dropped:] if self._top and all(self._top[dropped:]) else None
        return inference, self._sampling_logprobs(inference, echoed - dropped, dropped), top

    def _check_rows(self, logprobs: list[float], missing: str) -> None:
        """Refuse logprobs that can't be such; null, which is NaN here, is what `missing` says."""
        if _are_logprobs(logprobs):
            return
        if any(map(math.isnan, logprobs)):
            self.flawed = True
            raise ProtocolError(f"the server sent {missing}")
        raise ProtocolError("the server sent a logprob that is over 0 or not finite")

    @property
    def sampling_substituted(self) -> bool:
        """Whether the server reports raw logprobs only, though the two kinds are the same."""
        return (
            self._request.full_distribution
            and bool(self._sampling)
            and self._sampling_nulls == len(self._sampling)
        )

    def _sampling_logprobs(
        self, inference: list[float], prompt_rows: int, dropped: int
    ) -> list[float] | None:
        if self._sampling_nulls == len(self._sampling):
            return inference.copy() if self._request.full_distribution else None
        sampling = self._sampling[dropped:].tolist()
        # Prompt tokens were not sampled: where a server leaves them empty, the raw value stands.
        for index in range(prompt_rows if self._sampling_nulls else 0):
            if math.isnan(sampling[index]):
                sampling[index] = inference[index]
        self._check_rows(sampling, "sampling logprobs for some tokens only")
        return sampling


def _doubles(values: list[Any]) -> array[float]:
    """Turn numbers into an array of doubles; null becomes NaN."""
    return array("d", [math.nan if value is None else value for value in values])


def _is_ids(value: object) -> bool:
    """Whether a value is a list of token ids."""
    if not isinstance(value, list) or not set(map(type, cast(list[object], value))) <= {int}:
        return False
    ids = cast(list[int], value)
    return not ids or (min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID)


def _are_logprobs(values: Sequence[float]) -> bool:
    """Whether all are finite log probabilities."""
    return not values or (math.isfinite(sum(values)) and max(values) <= MAX_LOGPROB)


def _top_row(entry: dict[str, Any]) -> dict[int, float]:
    """Return the likeliest tokens of one position; empty if there are none."""
    tops = cast(Sequence[dict[str, Any]], entry.get("top_logprobs") or ())
    row = {top["token_id"]: top["logprob"] for top in tops}
    # The sum of anything but numbers is a TypeError.
    if not (_is_ids(list(row)) and _are_logprobs(list(row.values()))):
        raise ValueError("top_logprobs")
    return {token: float(logprob) for token, logprob in row.items()}


def _decoded(data: bytes) -> object:
    """Decode JSON; None if the data is not JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _error_in(data: bytes) -> object:
    """Return the error in an event of type "error"."""
    fields = object_in(_decoded(data))
    return fields.get("error") or fields
