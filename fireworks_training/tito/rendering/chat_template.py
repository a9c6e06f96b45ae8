"""Renders conversations by a tokenizer's chat template: a renderer for every model that has one.

It renders whole conversations, and joins new messages to exact tokens: it finds the text that the
template writes *after* an answer, and cuts it off at the token that ends the answer, so that the
answer itself is never decoded and tokenized again. It knows nothing of trajectories.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.rendering.renderers import TITOIncrementalPrompt
from fireworks_training.tito.values.errors import TITOParseError
from fireworks_training.tito.values.messages import json_hash
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant

logger = logging.getLogger("fireworks_training.tito")

_CLOSING_TOKENS = 2
"""Tokens that a template writes behind an end of turn at most, such as a newline."""

_MARKER = "@@answer-0f6c2d@@"
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class TemplateTokenizer(Protocol):
    """Names what the renderer needs of a tokenizer; those of `transformers` have it."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Turns messages into token ids or text."""
        ...

    @property
    def encode(self) -> Callable[..., Any]:
        """Turns text into token ids."""
        ...

    @property
    def decode(self) -> Callable[..., Any]:
        """Turns token ids into text."""
        ...

    @property
    def all_special_ids(self) -> Any:
        """Ids of special tokens."""
        ...


class ChatTemplateRenderer:
    """Renders conversations by a tokenizer's chat template, in both prompt modes.

    Answers are plain text; where the request has tools, `<tool_call>{"name", "arguments"}
    </tool_call>` blocks in them become tool calls.

    Args:
        tokenizer: the model's, as `service.get_tokenizer()` gives it.
        stop: strings that end an answer, beside the model's own end-of-turn token.
        **template_options: further arguments of the template, such as `enable_thinking=False`.

    Raises:
        InvalidArgument: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: TemplateTokenizer,
        *,
        stop: Sequence[str] | None = None,
        **template_options: Any,
    ) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise InvalidArgument("the tokenizer has no chat template: pass the model's own one")
        self._tokenizer = tokenizer
        self._stop = list(stop or ())
        self._options = template_options
        # Fast tokenizers refuse use from two threads at once.
        self._lock = threading.Lock()
        self._tools_seen = False
        self.renderer_id = f"chat-template-{json_hash([template, template_options])[:16]}"

    def render_conversation_tokens(self, request: TITOChatRequest) -> list[int]:
        """Render all messages into token ids, with a generation prompt."""
        ids = self._ids(request, request.template_messages)
        if request.tools and not self._tools_seen:
            self._tools_seen = True
            if ids == self._ids(request, request.template_messages, tools=None):
                logger.warning(
                    "the chat template writes nothing of the %d tools of a request: the model does "
                    "not learn of them; describe them in a system message, or pass a tokenizer "
                    "whose chat_template uses `tools`",
                    len(request.tools),
                )
        return ids

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Decode tokens one by one, for the logprobs of an answer."""
        with self._lock:
            return [str(self._tokenizer.decode([token])) for token in token_ids]

    def parse_assistant(
        self,
        request: TITOChatRequest,
        completion_ids: Sequence[int],  # noqa: ARG002 - of the protocol; the text is enough here
        completion_text: str,
        finish_reason: str,  # noqa: ARG002
    ) -> TITOParsedAssistant:
        """Parse an answer into a message.

        Raises:
            TITOParseError: the request has tools, and a tool call is not JSON with a name, or is
                not closed. The endpoint then gives the answer as plain text, or discards the
                trajectory: `TITOSidecar(malformed_answers=...)`.
        """
        if not request.takes_calls or "<tool_call>" not in completion_text:
            return TITOParsedAssistant({"role": "assistant", "content": completion_text})
        blocks = _TOOL_CALL.findall(completion_text)
        rest = _TOOL_CALL.sub("", completion_text)
        if "<tool_call>" in rest:
            raise TITOParseError("a tool call is not closed", reason_code="tool_call_open")
        calls = [
            _tool_call(block, len(request.messages), place) for place, block in enumerate(blocks)
        ]
        return TITOParsedAssistant(
            {"role": "assistant", "content": rest.strip(), "tool_calls": calls},
            output_kind="tool_calls",
        )

    def render_contract_id(self, request: TITOChatRequest) -> str:
        """Name the rendering: the name changes with the template, its options and the tools."""
        return f"{self.renderer_id}-{json_hash([dict(tool) for tool in request.tools])[:16]}"

    def stop_sequences(self, request: TITOChatRequest) -> list[str] | None:  # noqa: ARG002
        """Give the strings passed to the constructor; None without any."""
        return self._stop or None

    def prepare_incremental_prompt(
        self,
        request: TITOChatRequest,
        stored_messages: Sequence[Mapping[str, Any]],
        appended_messages: Sequence[Mapping[str, Any]],  # noqa: ARG002 - they end request's own
        exact_checkpoint_ids: Sequence[int],
    ) -> TITOIncrementalPrompt | None:
        """Append to the tokens so far what the template writes after the answer.

        None where that is not safe: the template changes the answer, or what follows it does not
        start with a special token, at which tokens can be cut.
        """
        kept = len(stored_messages)
        stored, appended = request.template_messages[:kept], request.template_messages[kept:]
        end = exact_checkpoint_ids[-1]
        with self._lock:
            special = {int(i) for i in self._tokenizer.all_special_ids}
        if stored[-1].get("tool_calls"):
            # What follows a call may depend on it, such as the name in a tool's result.
            suffix = self._after_call(request, stored, appended, end) if end in special else None
        else:
            suffix = self._after_text(request, stored, appended)
        if not suffix or suffix[0] not in special:
            return None
        sampled_end = end == suffix[0]
        return TITOIncrementalPrompt(
            (*exact_checkpoint_ids, *suffix[1 if sampled_end else 0 :]),
            contract_id=self.render_contract_id(request),
            junction_kind="sampled_end_of_turn" if sampled_end else "added_end_of_turn",
        )

    def _after_text(
        self,
        request: TITOChatRequest,
        stored: Sequence[Mapping[str, Any]],
        appended: Sequence[Mapping[str, Any]],
    ) -> list[int] | None:
        """Find what follows an answer of text, by rendering a marker in its place."""
        marked = [*stored[:-1], {"role": "assistant", "content": _MARKER}]
        text = self._templated(request, [*marked, *appended], tokenize=False)
        before, marker, after = str(text).partition(_MARKER)
        if not before or not marker or _MARKER in after:
            return None
        with self._lock:
            return [int(i) for i in self._tokenizer.encode(after, add_special_tokens=False)]

    def _after_call(
        self,
        request: TITOChatRequest,
        stored: Sequence[Mapping[str, Any]],
        appended: Sequence[Mapping[str, Any]],
        end: int,
    ) -> list[int] | None:
        """Find what follows an answer with tool calls, from the token `end` of the answer on.

        The conversation is rendered with and without the new messages; where one begins as the
        other, the last `end` in the shorter one is that of the answer.
        """
        before = self._ids(request, stored, add_generation_prompt=False)
        whole = self._ids(request, [*stored, *appended])
        if end not in before:
            return None
        place = len(before) - 1 - before[::-1].index(end)
        if len(before) - 1 - place > _CLOSING_TOKENS or whole[: place + 1] != before[: place + 1]:
            return None
        return whole[place:]

    def _ids(
        self, request: TITOChatRequest, messages: Sequence[Mapping[str, Any]], **how: Any
    ) -> list[int]:
        ids = self._templated(request, messages, tokenize=True, return_dict=False, **how)
        return [int(token) for token in cast(Sequence[int], ids)]

    def _templated(
        self, request: TITOChatRequest, messages: Sequence[Mapping[str, Any]], **how: Any
    ) -> object:
        options: dict[str, Any] = {"add_generation_prompt": True, **self._options, **how}
        if request.tools:
            options.setdefault("tools", [dict(tool) for tool in request.tools])
        with self._lock:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], **options
            )


def _tool_call(block: str, turn: int, place: int) -> dict[str, Any]:
    try:
        called: Any = json.loads(block)
        name, arguments = called["name"], called.get("arguments", {})
        if not (isinstance(name, str) and name and isinstance(arguments, (dict, str))):
            raise TypeError("a name is a text, and arguments are an object")
        # The same call in the same place has the same id, however often it is parsed.
        digest = json_hash([turn, place, called])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TITOParseError(
            "a tool call is not a JSON object with a name", reason_code="tool_call_json"
        ) from error
    return {
        "id": f"call_{digest[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
