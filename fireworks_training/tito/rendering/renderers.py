"""Defines the protocols of a renderer, which turns conversations into tokens and back.

Users may write renderers of their own; `chat_template` has one for every tokenizer with a chat
template. It knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fireworks_training._checks import integer
from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant


@runtime_checkable
class TITORenderer(Protocol):
    """Turns a whole conversation into a prompt. Its methods run in one worker thread, in turn."""

    renderer_id: str

    def render_conversation_tokens(self, request: TITOChatRequest) -> Sequence[int]:
        """Render all messages and tools into token ids, with a generation prompt."""
        ...

    def parse_assistant(
        self,
        request: TITOChatRequest,
        completion_ids: Sequence[int],
        completion_text: str,
        finish_reason: str,
    ) -> TITOParsedAssistant:
        """Parse sampled tokens into a message.

        Raises:
            TITOParseError: the tokens are malformed; the trajectory is discarded.
        """
        ...

    def render_contract_id(self, request: TITOChatRequest) -> str:
        """Name the way in which this request is rendered; another name starts a new segment."""
        ...

    def stop_sequences(self, request: TITOChatRequest) -> Sequence[str] | None:
        """Give the strings that end an answer, beside the model's own end of turn."""
        ...


@dataclass(frozen=True)
class TITOIncrementalPrompt:
    """Holds a prompt made by appending tokens to those that were sent and sampled.

    Attributes:
        prompt_ids: the exact tokens so far (without the trimmed ones), then the new ones.
        contract_id: name of the way of joining.
        junction_kind: name of this join, such as "sampled_end_of_turn".
        checkpoint_trim_tokens: tokens at the end of the last answer that were replaced.
    """

    prompt_ids: tuple[int, ...]
    contract_id: str
    junction_kind: str
    checkpoint_trim_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(map(int, self.prompt_ids)))
        if not (self.prompt_ids and self.contract_id and self.junction_kind):
            raise InvalidArgument("prompt_ids, contract_id and junction_kind must not be empty")
        integer("checkpoint_trim_tokens", self.checkpoint_trim_tokens, 0)


@runtime_checkable
class TITOIncrementalRenderer(Protocol):
    """Extends a renderer so that it can append new messages to the exact tokens."""

    def prepare_incremental_prompt(
        self,
        request: TITOChatRequest,
        stored_messages: Sequence[Mapping[str, Any]],
        appended_messages: Sequence[Mapping[str, Any]],
        exact_checkpoint_ids: Sequence[int],
    ) -> TITOIncrementalPrompt | None:
        """Join the prompt; None where that is not safe, so that all messages are rendered instead.

        Args:
            stored_messages: the conversation up to the last answer, whose tokens end the
                checkpoint.
            appended_messages: the messages that the agent added.
            exact_checkpoint_ids: the tokens so far.
        """
        ...
