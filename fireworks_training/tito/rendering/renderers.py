"""What a renderer is: it turns conversations into tokens, and sampled tokens into messages.

Protocols, for renderers of one's own; `chat_template` has one for every tokenizer with a chat
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant


@runtime_checkable
class TITORenderer(Protocol):
    """Turns a whole conversation into a prompt. Its methods run in one worker thread, in turn."""

    renderer_id: str

    def render_conversation_tokens(self, request: TITOChatRequest) -> Sequence[int]:
        """Token ids of all messages and tools, with a generation prompt."""
        ...

    def parse_assistant(
        self,
        request: TITOChatRequest,
        completion_ids: Sequence[int],
        completion_text: str,
        finish_reason: str,
    ) -> TITOParsedAssistant:
        """The message in sampled tokens.

        Raises:
            TITOParseError: they are malformed; the trajectory is discarded.
        """
        ...

    def render_contract_id(self, request: TITOChatRequest) -> str:
        """Names how this request is rendered; another name starts a new segment."""
        ...

    def stop_sequences(self, request: TITOChatRequest) -> Sequence[str] | None:
        """Strings that end an answer, beside the model's own end of turn."""
        ...


@dataclass(frozen=True)
class TITOIncrementalPrompt:
    """A prompt made by putting tokens behind those that were sent and sampled.

    Attributes:
        prompt_ids: the exact tokens so far (without the trimmed ones), then the new ones.
        contract_id: names the way of joining.
        junction_kind: names this join, such as "sampled_end_of_turn".
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
        if self.checkpoint_trim_tokens < 0:
            raise InvalidArgument(
                f"checkpoint_trim_tokens must be at least 0, got {self.checkpoint_trim_tokens}"
            )


@runtime_checkable
class TITOIncrementalRenderer(Protocol):
    """A renderer that can also put new messages behind the exact tokens."""

    def prepare_incremental_prompt(
        self,
        request: TITOChatRequest,
        stored_messages: Sequence[Mapping[str, Any]],
        appended_messages: Sequence[Mapping[str, Any]],
        exact_checkpoint_ids: Sequence[int],
    ) -> TITOIncrementalPrompt | None:
        """The joined prompt; None where it can't be told, so that all is rendered instead.

        Args:
            stored_messages: the conversation up to the last answer, whose tokens are the
                checkpoint's.
            appended_messages: what the agent added.
            exact_checkpoint_ids: the tokens so far.
        """
        ...
