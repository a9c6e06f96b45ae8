"""Reads the prompts of a call: conversations or token ids, and the tokenizer between them.

It knows how the field spells prompts, and that fast tokenizers refuse use from two threads at once.
It sends nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from fireworks_training._wire.completions.request import token_ids
from fireworks_training.errors import InvalidArgument
from fireworks_training.options import Conversation, Tokenizer

Ids: TypeAlias = tuple[int, ...]
"""The token ids of a prompt. The garbage collector walks lists of integers, not tuples of them."""


_locks: weakref.WeakKeyDictionary[Tokenizer, threading.Lock] = weakref.WeakKeyDictionary()
_lock_of_others = threading.Lock()


def lock_of(tokenizer: Tokenizer) -> threading.Lock:
    """Return the one lock of a tokenizer, whoever uses it.

    Tokenizers that can't be looked up (without hash or weak reference) share one.
    """
    try:
        return _locks.setdefault(tokenizer, threading.Lock())
    except TypeError:
        return _lock_of_others


class LockedTokenizer:
    """Uses a tokenizer in one thread at a time, however many samplers share it.

    Attributes:
        tokenizer: the user's own object.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._lock = lock_of(tokenizer)

    def apply_template(self, conversations: Sequence[Conversation]) -> list[Ids]:
        """Turn conversations into token ids, with a generation prompt each; too slow for a loop."""
        with self._lock:
            return [
                self._template_ids(conversation, f"conversation {index} of {len(conversations)}")
                for index, conversation in enumerate(conversations)
            ]

    def _template_ids(self, conversation: Conversation, which: str) -> Ids:
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in conversation],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
        except Exception as error:
            raise InvalidArgument(
                f"the chat template failed on {which} (counted from 0): {type(error).__name__}. "
                "Its own words stand in the error behind this one (`cause`); check the roles and "
                "contents of the messages",
                cause=error,
            ) from error
        return token_ids(f"the chat template's result for {which}", _named_ids(ids))

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        """Turn token ids into text.

        Raises:
            InvalidArgument: the tokenizer fails on them.
        """
        with self._lock:
            try:
                return str(self.tokenizer.decode(list(ids), **options))
            except Exception as error:
                raise InvalidArgument(
                    f"the tokenizer could not decode {len(ids)} token ids "
                    f"({type(error).__name__}): is it the tokenizer of this model?",
                    cause=error,
                ) from error

    def without_echo(self, text: str, ids: Sequence[int]) -> str:
        """Cut the text of echoed prompt tokens off the beginning of a text.

        Servers echo special tokens as text, or leave them out; a beginning that is neither stays.
        """
        for special in (False, True):
            echo = self.decode(ids, skip_special_tokens=not special)
            if text.startswith(echo):
                return text[len(echo) :]
        return text

    def stop_texts(self, ids: Sequence[int]) -> list[str]:
        """Turn stop token ids into strings.

        Raises:
            InvalidArgument: one has no text of its own (a piece of a character, a special token
                that decodes to nothing).
        """
        texts = [self.decode([token]) for token in ids]
        for token, text in zip(ids, texts, strict=True):
            if not text or "\ufffd" in text:
                raise InvalidArgument(
                    f"stop holds token id {token}, which has no text of its own, and this server "
                    "takes strings only: it would stop elsewhere, or never"
                )
        return texts


def _named_ids(encoding: Any) -> Any:
    """Return the `input_ids` of an encoding that has its parts by name; anything else as it is."""
    if not isinstance(encoding, Mapping):
        return encoding
    parts = cast(Mapping[str, Any], encoding)
    return parts.get("input_ids", parts)


def conversations_of(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Return one conversation or several as a list of conversations, checked.

    Raises:
        InvalidArgument: there is no conversation, an empty one, a mixture, or something else.
    """
    wanted = 'pass [{"role": "user", "content": "..."}], or a list of such lists'
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        what = "is empty" if not messages else f"is a {type(messages).__name__}"
        raise InvalidArgument(f"messages {what}; {wanted}")
    items = list(messages)
    if all(isinstance(item, Mapping) for item in items):
        conversations = [cast(Conversation, items)]
    elif any(isinstance(item, (str, bytes)) or not isinstance(item, Sequence) for item in items):
        raise InvalidArgument(f"messages mixes messages with something else; {wanted}")
    else:
        conversations = cast(list[Conversation], items)
    for index, conversation in enumerate(conversations):
        if not conversation or not all(
            isinstance(message, Mapping) and "role" in message
            for message in cast(Sequence[object], conversation)
        ):
            raise InvalidArgument(
                f"conversation {index} is empty, or holds something that has no role; {wanted}"
            )
    return conversations


def prompts_of(prompt_token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Ids]:
    """Return one prompt or several as a list of prompts, checked.

    An encoding that has `input_ids` by name, as tokenizers of `transformers` return it, is taken
    for these.
    """
    if isinstance(prompt_token_ids, (str, bytes)):
        raise InvalidArgument(
            "prompt_token_ids takes token ids, not text; for text, sample_with_tokens takes "
            'messages=[{"role": "user", "content": "..."}]'
        )
    prompt_token_ids = _named_ids(prompt_token_ids)
    if getattr(prompt_token_ids, "ndim", 1) == 2:  # rows of an array, of one token even
        return [
            token_ids(f"prompt {index}", cast(Sequence[int], item))
            for index, item in enumerate(prompt_token_ids)
        ]
    try:
        return [token_ids("prompt_token_ids", cast(Sequence[int], prompt_token_ids))]
    except InvalidArgument as error:
        if not isinstance(error.__cause__, TypeError):
            raise  # integers, and wrong ones
    items = list(prompt_token_ids)
    nested = [_is_row(item) for item in items]
    if nested and all(nested):
        return [
            token_ids(f"prompt {index}", cast(Sequence[int], _named_ids(item)))
            for index, item in enumerate(items)
        ]
    if any(nested):
        raise InvalidArgument("prompt_token_ids mixes token ids with lists of token ids")
    return [token_ids("prompt_token_ids", cast(Sequence[int], items))]


def one_prompt(prompt_token_ids: Sequence[Any]) -> list[Ids]:
    """Return a list of one prompt, for calls that take no more."""
    given = _named_ids(prompt_token_ids)
    prompts = prompts_of(given)
    if len(prompts) != 1 or getattr(given, "ndim", 1) != 1 or _is_row(given[0]):
        raise InvalidArgument(
            "this call takes one prompt, as a list of token ids; for several prompts use "
            "sample_with_prompt_tokens"
        )
    return prompts


def _is_row(item: object) -> bool:
    """Whether an item of a prompt is a prompt itself; a scalar of numpy or torch is none."""
    return hasattr(item, "__len__") and getattr(item, "ndim", None) != 0


def is_conversation(prompt: object) -> bool:
    """Whether a prompt consists of messages."""
    if isinstance(prompt, Mapping):
        return False  # an encoding
    items = cast(Sequence[object], prompt)
    return len(items) > 0 and isinstance(items[0], Mapping)
