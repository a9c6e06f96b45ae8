"""The answer of a completion, as JSON: in chunks of a stream, or whole.

Knows text streams, stop strings and the names of the fields; no engine, no HTTP. Rows of logprobs
go out with their tokens, text as soon as it is certain: a piece that could still turn out to be
half a character or the beginning of a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import orjson

from fireworks_training.local.engine_frames import Finish
from fireworks_training.local.gateway.inference.detokenize import StopMatcher, TextCodec
from fireworks_training.local.gateway.inference.engine_stream import Delta, TopLogprobs
from fireworks_training.local.gateway.web.problems import HttpProblem

Row = dict[str, object]

_no_rows = cast("Callable[[], list[Row]]", list)
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Holds what the request asked to see.

    Attributes:
        stop_texts: strings that end the text, without being part of it.
        min_tokens: before this many tokens no stop string counts.
        logprobs: rows of logprobs.
        top: rows hold the most likely tokens too.
        raw_output: token ids at the end.
        echo: prompt tokens, from the end, that stand before the completion.
    """

    stop_texts: Sequence[str] = ()
    min_tokens: int = 0
    logprobs: bool = False
    top: bool = False
    raw_output: bool = False
    echo: int = 0


@dataclass(slots=True)
class _Unsent:
    """Collects the text and the rows that no chunk has taken yet."""

    text: str = ""
    rows: list[Row] = field(default_factory=_no_rows)


class CompletionOutput:
    """Builds the answer of one completion while its tokens arrive.

    Args:
        head: fields of every chunk (`id`, `object`, `created`, `model`).
        prompt: the prompt's ids.
        options: parts of the answer that the request asked for.
        codec: the model's tokenizer.

    Attributes:
        tokens: sampled ids that belong to the completion, those of its stop included.
        finish_reason: "stop" or "length" once it has ended.
    """

    def __init__(
        self,
        head: Mapping[str, object],
        prompt: Sequence[int],
        options: OutputOptions,
        codec: TextCodec,
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._head = head
        self._prompt = prompt
        self._options = options
        self._codec = codec
        self._text = codec.stream()
        self._matcher = StopMatcher(options.stop_texts) if options.stop_texts else None
        self._unsent = _Unsent()

    def echo(self, logprobs: Sequence[float], top: Sequence[TopLogprobs]) -> None:
        """Puts the echoed end of the prompt first.

        Args:
            logprobs: raw, of the echoed tokens; one short where the prompt's first token is among
                them. That one depends on nothing: it stands as 0.
            top: the most likely tokens at the same places.
        """
        count = self._options.echo
        if not count:
            return
        echoed = self._prompt[len(self._prompt) - count :]
        self._unsent.text += self._codec.decode(echoed)
        if not self._options.logprobs:
            return
        first = len(echoed) - len(logprobs)
        for index, token in enumerate(echoed):
            known = index >= first
            value = logprobs[index - first] if known else 0.0
            best = top[index - first] if known else [(token, 0.0)]
            self._unsent.rows.append(self._row(token, value, None, best))

    def push(self, delta: Delta) -> None:
        """Takes the next tokens. After a stop string, what follows its last token is dropped."""
        if self._matcher is None:
            self._keep(delta, 0, len(delta.tokens))
            self._unsent.text += self._text.push(_spoken(delta))
        else:
            self._match(delta, self._matcher)
        if self.finish_reason is None and delta.finish is not Finish.RUNNING:
            self.finish_reason = "stop" if delta.finish is Finish.STOP else "length"
            rest = self._text.finish()
            if self._matcher is not None:
                certain, found = self._matcher.push(rest)
                rest = certain if found else certain + self._matcher.finish()
            self._unsent.text += rest

    def chunk(self, *, even_if_empty: bool = False) -> bytes:
        """Return the event for what is new; b"" if there is nothing to show yet."""
        if not self._unsent.text and not self._unsent.rows and not even_if_empty:
            return b""
        return _event({**self._head, "choices": [self._choice()]})

    def last_chunks(self, metrics: Mapping[str, object] | None, cached_tokens: int) -> bytes:
        """Return the final event and the end mark."""
        return _event(self.whole(metrics, cached_tokens)) + DONE

    def whole(self, metrics: Mapping[str, object] | None, cached_tokens: int) -> dict[str, object]:
        """Return the answer with everything that no chunk has taken yet.

        Args:
            metrics: `perf_metrics`, where asked for.
            cached_tokens: prompt tokens that were not computed for this request alone.
        """
        choice = self._choice()
        if self._options.raw_output:
            echoed = self._prompt[len(self._prompt) - self._options.echo :]
            choice["raw_output"] = {
                "completion_token_ids": [*echoed, *self.tokens],
                "prompt_token_ids": self._prompt,
            }
        answer = {**self._head, "choices": [choice]}
        answer["usage"] = {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": len(self.tokens),
            "total_tokens": len(self._prompt) + len(self.tokens),
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if metrics is not None:
            answer["perf_metrics"] = metrics
        return answer

    def _match(self, delta: Delta, matcher: StopMatcher) -> None:
        """Take the tokens one by one, so that it is known which one completed a stop string."""
        spoken = len(_spoken(delta))
        for index, token in enumerate(delta.tokens):
            self._keep(delta, index, index + 1)
            text = self._text.push([token] if index < spoken else [])
            if len(self.tokens) < self._options.min_tokens:
                self._unsent.text += text
                continue
            certain, found = matcher.push(text)
            self._unsent.text += certain
            if found:
                self.finish_reason = "stop"
                return

    def _keep(self, delta: Delta, start: int, end: int) -> None:
        self.tokens += delta.tokens[start:end]
        if self._options.logprobs:
            self._unsent.rows += map(
                self._row,
                delta.tokens[start:end],
                delta.logprobs[start:end],
                delta.sampling_logprobs[start:end],
                delta.top[start:end],
            )

    def _row(
        self, token: int, logprob: float, sampling_logprob: float | None, top: TopLogprobs
    ) -> Row:
        row: Row = {"token_id": token, "logprob": logprob, "sampling_logprob": sampling_logprob}
        if self._options.top:
            row["top_logprobs"] = [{"token_id": id_, "logprob": value} for id_, value in top]
        return row

    def _choice(self) -> dict[str, object]:
        unsent, self._unsent = self._unsent, _Unsent()
        return {
            "index": 0,
            "text": unsent.text,
            "logprobs": {"content": unsent.rows} if self._options.logprobs else None,
            "finish_reason": self.finish_reason,
        }


def error_event(problem: HttpProblem) -> bytes:
    """Return an event that ends a stream which has begun, where a status can't be sent any more."""
    error = {
        "status_code": problem.status,
        "code": problem.code,
        "message": problem.message,
    }
    return b"event: error\n" + _event({"error": error})


def _spoken(delta: Delta) -> list[int]:
    """Return the tokens that have text: a stop token ends it without being part of it."""
    return delta.tokens[:-1] if delta.finish is Finish.STOP else delta.tokens


def _event(data: Mapping[str, object]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"
