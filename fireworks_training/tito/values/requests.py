"""Reads an agent's chat request and the model's answer as messages in normalized form.

It knows OpenAI's chat request. It decides nothing about tokens: `turns.lineage` and the renderer
do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from fireworks_training.tito.values import openai_fields
from fireworks_training.tito.values.errors import invalid
from fireworks_training.tito.values.messages import (
    canonical_message,
    plain_json,
    template_message,
)


@dataclass(frozen=True)
class TITOParsedAssistant:
    """Holds an assistant's message that a renderer has parsed from sampled tokens.

    Args:
        message: as an OpenAI message: role, content, tool_calls.
        output_kind: such as "text" or "tool_calls"; "malformed:CODE" of an output that could not be
            parsed, with the reason code of its `TITOParseError`.
        parser_fallback: whether the output could not be parsed, and was taken as plain text.

    Attributes:
        message: the normalized message; later histories are compared with it.
        response_message: the message as the agent gets it.
    """

    message: Mapping[str, Any]
    output_kind: str = "text"
    parser_fallback: bool = False
    response_message: Mapping[str, Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        response: dict[str, Any] = plain_json(self.message)
        for call in response.get("tool_calls") or ():
            function: Any = call.get("function") or {}
            if not isinstance(function.get("arguments", ""), str):
                # In the order in which the model wrote them: the agent sends them back so.
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        canonical, _ = canonical_message(self.message)
        object.__setattr__(self, "response_message", MappingProxyType(response))
        object.__setattr__(self, "message", MappingProxyType(canonical))

    @property
    def fallback_reason(self) -> str | None:
        """Reason code for which the output was taken as plain text, such as "tool_call_json"."""
        return self.output_kind.removeprefix("malformed:") if self.parser_fallback else None


@dataclass(frozen=True)
class TITOChatRequest:
    """Holds a chat request in normalized form, and beside it the request as it was received.

    Args:
        messages: the conversation; at least one message, each with a role.
        tools: OpenAI's tool definitions.
        model: the agent's spelling; the sidecar's sampler decides which model is sampled.
        max_tokens: tokens of the completion at most; None for the sidecar's limit.
        temperature: 0 is greedy.
        sampling_fields: further options of the request, such as `top_p` and `stop`.
        adapter_metadata: the request's `_tito` field, for a `call_classifier`.
        wire_request, wire_request_body: the request as received, decoded and as text.
        normalization_steps: the changes made, such as `messages[3].content:blank_to_empty`.

    Attributes:
        template_messages: `messages` as chat templates take them: the arguments of tool calls are
            mappings, with their keys in the order in which they came.

    Raises:
        TITOError: the request can't succeed without a change (400).
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    model: str = "policy"
    max_tokens: int | None = None
    temperature: float = 1.0
    sampling_fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter_metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    wire_request: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    wire_request_body: str | None = field(default=None, compare=False, repr=False)
    normalization_steps: tuple[str, ...] = field(default=(), compare=False)
    template_messages: tuple[Mapping[str, Any], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise invalid("messages is empty: send at least one message")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise invalid(f"max_tokens must be at least 1, got {self.max_tokens}")
        steps = list(self.normalization_steps)
        messages: list[Mapping[str, Any]] = []
        for place, message in enumerate(self.messages):
            canonical, changed = canonical_message(message)
            messages.append(MappingProxyType(canonical))
            steps += [f"messages[{place}].{change}" for change in changed]
        self._set("template_messages", tuple(template_message(one) for one in self.messages))
        self._set("messages", tuple(messages))
        self._set("tools", tuple(MappingProxyType(plain_json(tool)) for tool in self.tools))
        for name in ("sampling_fields", "adapter_metadata", "wire_request"):
            value = getattr(self, name)
            self._set(name, None if value is None else MappingProxyType(plain_json(value)))
        self._set("normalization_steps", tuple(dict.fromkeys(steps)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_openai(
        cls, payload: Mapping[str, Any], *, wire_request_body: str | None = None
    ) -> TITOChatRequest:
        """Read the request of an OpenAI client.

        Raises:
            TITOError: fields of the wrong kind, or ones that are not supported: a `tool_choice`
                other than "auto" and "none", `parallel_tool_calls` false, `store` true, `n` over 1,
                a `response_format` other than text (400).
        """
        openai_fields.refuse_unmet(payload)
        asked = payload.get("max_completion_tokens")
        asked = payload.get("max_tokens") if asked is None else asked
        temperature = payload.get("temperature")
        whole, number = openai_fields.whole, openai_fields.number
        return cls(
            messages=openai_fields.objects(payload, "messages"),
            tools=openai_fields.objects(payload, "tools"),
            model=str(payload.get("model") or "policy"),
            max_tokens=None if asked is None else whole("max_tokens", asked),
            temperature=1.0 if temperature is None else number("temperature", temperature),
            sampling_fields=openai_fields.sampling_options(payload),
            adapter_metadata=openai_fields.an_object(payload, "_tito"),
            wire_request=payload,
            wire_request_body=wire_request_body,
        )

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which the agent wants the answer to end."""
        return openai_fields.stops(self.sampling_fields)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer is to hold the logprobs of its tokens."""
        return self.sampling_fields.get("logprobs") is True

    @property
    def takes_calls(self) -> bool:
        """Whether tool calls in the answer are read as such: with tools, unless refused."""
        return bool(self.tools) and self.sampling_fields.get("tool_choice") != "none"

    def continuing(self, before: TITOChatRequest, answer: TITOParsedAssistant) -> Self:
        """Copy the request, with earlier messages as the templates saw and the model wrote them.

        Args:
            before: the request of the turn before, whose messages and answer begin this one.
        """
        answered = template_message(answer.response_message)
        known = (*before.template_messages, MappingProxyType(answered))
        made = copy.copy(self)
        made._set("template_messages", (*known, *self.template_messages[len(known) :]))
        return made

    def canonical_value(self) -> dict[str, Any]:
        """Give the fields on which the prompt depends: messages, tools, model."""
        return {
            "messages": [dict(message) for message in self.messages],
            "tools": [dict(tool) for tool in self.tools],
            "model": self.model,
        }

    def wire_value(self) -> dict[str, Any] | None:
        """Give the request as it was received; None for one that was made in this process."""
        return None if self.wire_request is None else plain_json(self.wire_request)

    def sampling_value(self) -> dict[str, Any]:
        """Give the fields on which the sampling depends: `max_tokens`, `temperature`, options."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            **plain_json(self.sampling_fields),
        }
