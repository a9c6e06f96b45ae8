"""Builds datums from conversations, by the tokenizer's own chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fireworks_training._checks import integer
from fireworks_training.data.builders import supervised_datum
from fireworks_training.data.values import token_ids
from fireworks_training.errors import InvalidArgument, InvalidDatum

if TYPE_CHECKING:
    import tinker


class ChatTokenizer(Protocol):
    """A tokenizer as `chat_datum` needs it; those of `transformers` fit."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Turns messages into token ids."""
        ...


def chat_datum(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    train_on: Literal["last", "all"] = "last",
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_length: int | None = None,
) -> tinker.Datum:
    """Build a datum for cross_entropy on the assistant's messages of a conversation.

    Tokens come from the tokenizer's own chat template; weights are 1 on the tokens that it adds for
    an assistant's message after its generation prompt, up to the end-of-turn token and with it,
    else 0: what a template writes after that token (a line break, mostly) no model ever samples.
    Where the answer's first letters merge with the prompt's last ones into one token, prompt and
    answer are tokenized apart, as they are in sampling.

    Args:
        tokenizer: the model's, as `service.get_tokenizer()` gives it.
        messages: `[{"role": ..., "content": ...}, ...]`; the last one is the assistant's. Arguments
            of tool calls may be JSON text or mappings; templates get mappings.
        train_on: the "last" message only, or "all" of the assistant's.
        tools: the tools' schemas, for the template; None for none.
        max_length: tokens to keep, from the first on; None keeps all.

    Raises:
        InvalidArgument: the last message is not the assistant's, or an argument is of a wrong kind.
        InvalidDatum: the template fails on the messages; or it writes a message anew when others
            follow (as those do that drop earlier reasoning), so that its tokens can't be told:
            train on the last only; or `max_length` leaves nothing to train on.
    """
    import numpy as np

    if train_on not in ("last", "all"):
        raise InvalidArgument(f"train_on must be 'last' or 'all', got {train_on!r}")
    if max_length is not None:
        max_length = integer("max_length", max_length, least=2)
    chat = Conversation(tokenizer, messages, tools)
    places = range(len(messages)) if train_on == "all" else [len(messages) - 1]
    answers = [place for place in places if messages[place].get("role") == "assistant"]
    ids, trained = chat.tokens_and_mask(answers)
    if max_length is not None and len(ids) > max_length:
        ids, trained = ids[:max_length], trained[:max_length]
        if not any(trained[1:]):
            raise InvalidDatum(
                f"max_length={max_length} cuts off all that would be trained on: raise it, or "
                "leave the conversation out"
            )
    return supervised_datum(ids, np.asarray(trained, np.float32).tolist())


class Conversation:
    """A conversation and what its chat template makes of it.

    Args:
        tokenizer, messages, tools: as for `chat_datum`.

    Raises:
        InvalidArgument: the messages are not a list of mappings that ends with the assistant's.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        given: object = messages
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
            raise InvalidArgument(
                f"messages must be a list of mappings with role and content, not a "
                f"{type(given).__name__}"
            )
        for place, message in enumerate(cast("Sequence[object]", given)):
            if not isinstance(message, Mapping):
                raise InvalidArgument(
                    f"message {place} is a {type(message).__name__}: each must be a mapping"
                )
        if not messages or messages[-1].get("role") != "assistant":
            raise InvalidArgument(
                "the last message must be the assistant's: it is what the datum trains on"
            )
        self._tokenizer = tokenizer
        self._messages = [_for_template(message) for message in messages]
        self._options: dict[str, Any] = {} if tools is None else {"tools": [*tools]}
        ends = {
            getattr(tokenizer, "eos_token_id", None),
            *getattr(tokenizer, "all_special_ids", ()),
        }
        self._ends = ends - {None}

    def tokens_and_mask(self, answers: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Find the token ids, and which of them the answers at these places are.

        Raises:
            InvalidDatum: the template fails, or writes an answer in a way that hides its tokens.
        """
        tokens = self._tokens(len(self._messages))
        trained = [False] * len(tokens)
        for place in answers:
            asked = self._tokens(place, generation_prompt=True)
            said = self._tokens(place + 1)
            if tokens[: len(said)] != said or said[: len(asked)] != asked:
                return self._in_pieces(answers)
            end = len(asked) + self._end_of_turn(said[len(asked) :])
            trained[len(asked) : end] = [True] * (end - len(asked))
        return tokens, trained

    def _in_pieces(self, answers: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Tokenize prompts and answers apart, as sampling does, where their tokens merge."""
        text, done = self._text(len(self._messages)), 0
        tokens: list[int] = []
        trained: list[bool] = []
        for place in answers:
            asked = self._text(place, generation_prompt=True)
            said = self._text(place + 1)
            if not text.startswith(said) or not said.startswith(asked):
                raise InvalidDatum(
                    f"message {place}: the chat template writes it differently when others "
                    "follow, or its generation prompt is no beginning of it. Pass "
                    "train_on='last', or tokens and weights of your own to supervised_datum"
                )
            before, answer = self._encode(text[done : len(asked)]), self._encode(said[len(asked) :])
            end, done = self._end_of_turn(answer), len(said)
            tokens += [*before, *answer]
            trained += [False] * len(before) + [True] * end + [False] * (len(answer) - end)
        rest = self._encode(text[done:])
        return tokens + rest, trained + [False] * len(rest)

    def _end_of_turn(self, answer: list[int]) -> int:
        """Count an answer's tokens up to its last special token; all, where it has none."""
        places = [place for place, token in enumerate(answer) if token in self._ends]
        return places[-1] + 1 if places else len(answer)

    def _encode(self, text: str) -> list[int]:
        encode = getattr(self._tokenizer, "encode", None)
        if encode is None:
            raise InvalidDatum(
                "an answer's first letters merge with what stands before it into one token, and "
                "the tokenizer has no encode() to tokenize them apart: pass tokens and weights of "
                "your own to supervised_datum"
            )
        return [int(token) for token in encode(text, add_special_tokens=False)]

    def _text(self, count: int, *, generation_prompt: bool = False) -> str:
        text: object = None
        cause: InvalidDatum | None = None
        try:
            text = self._apply(count, generation_prompt, tokenize=False)
        except InvalidDatum as error:
            cause = error
        if not isinstance(text, str):
            raise InvalidDatum(
                f"one of the first {count} messages: its tokens do not begin with those of its "
                "prompt, or others follow and it is written differently; and the chat template "
                "gives no text to tell which. Pass train_on='last', or tokens and weights of your "
                "own to supervised_datum"
            ) from cause
        return text

    def _tokens(self, count: int, *, generation_prompt: bool = False) -> list[int]:
        ids: Any = self._apply(count, generation_prompt, tokenize=True)
        return [int(token) for token in token_ids("the chat template's tokens", ids)]

    def _apply(self, count: int, generation_prompt: bool, *, tokenize: bool) -> object:
        """Apply the template to the first `count` messages; an error of it is an `InvalidDatum`.

        Its words are not repeated, since a template may quote the messages; they are the cause.
        """
        try:
            return self._tokenizer.apply_chat_template(
                self._messages[:count],
                tokenize=tokenize,
                add_generation_prompt=generation_prompt,
                return_dict=False,
                **self._options,
            )
        except Exception as error:
            raise InvalidDatum(
                f"the chat template failed on the first {count} messages of the conversation "
                f"({type(error).__name__}, the cause of this error): give each message what the "
                "template reads, mostly role and a content of text"
            ) from error


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message, with the arguments of its tool calls as mappings, which templates walk."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        return dict(message)
    return {**message, "tool_calls": [_decoded_call(call) for call in calls]}


def _decoded_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call  # text that is no JSON: the template gets it as it is
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
