"""Reads an agent's chat request and the model's answer as messages in normalized form.

It knows OpenAI's chat request. It decides nothing about tokens: `turns.lineage` and the renderer
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from fireworks_training.tito.values.errors import invalid
from fireworks_training.tito.values.messages import canonical_message, json_text, plain_json

_OWN = frozenset(
    {"messages", "tools", "model", "max_tokens", "max_completion_tokens", "temperature"}
    | {"stream", "stream_options", "tool_choice", "parallel_tool_calls", "store", "_tito"}
)
"""Fields of a chat request that are no options of sampling."""

_FARTHEST = 10**18


@dataclass(frozen=True)
class TITOParsedAssistant:
    """Holds an assistant's message that a renderer has parsed from sampled tokens.

    Args:
        message: as an OpenAI message: role, content, tool_calls.
        output_kind: such as "text" or "tool_calls".
        parser_fallback: whether the renderer could not parse the output and took it as plain text.

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
                function["arguments"] = json_text(function["arguments"])
        canonical, _ = canonical_message(self.message)
        object.__setattr__(self, "response_message", MappingProxyType(response))
        object.__setattr__(self, "message", MappingProxyType(canonical))


@dataclass(frozen=True)
class TITOChatRequest:
    """Holds a chat request in normalized form, and beside it the request as it was received.

    Args:
        messages: the conversation; at least one message, each with a role.
        tools: OpenAI's tool definitions.
        model: the agent's spelling; the sidecar's sampler decides which model is sampled.
        max_tokens: tokens of the completion at most; None for the sidecar's limit.
        temperature: 0 is greedy.
        sampling_fields: further options of the request, such as `top_p`.
        adapter_metadata: the request's `_tito` field, for a `call_classifier`.
        wire_request, wire_request_body: the request as received, decoded and as text.
        normalization_steps: the changes made, such as `messages[3].content:blank_to_empty`.

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
                other than "auto", `parallel_tool_calls` false, `store` true, `n` over 1 (400).
        """
        _refuse_unmet(payload)
        asked = payload.get("max_completion_tokens")
        asked = payload.get("max_tokens") if asked is None else asked
        temperature = payload.get("temperature")
        options = {
            name: value
            for name, value in payload.items()
            if name not in _OWN and value is not None and (name, value) != ("n", 1)
        }
        return cls(
            messages=_objects(payload, "messages"),
            tools=_objects(payload, "tools"),
            model=str(payload.get("model") or "policy"),
            max_tokens=None if asked is None else _whole("max_tokens", asked),
            temperature=1.0 if temperature is None else _number("temperature", temperature),
            sampling_fields=options,
            adapter_metadata=_object(payload, "_tito"),
            wire_request=payload,
            wire_request_body=wire_request_body,
        )

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


def _refuse_unmet(payload: Mapping[str, Any]) -> None:
    if payload.get("tool_choice") not in (None, "auto"):
        raise invalid("tool_choice: only 'auto' is supported; nothing constrains the sampling")
    if payload.get("parallel_tool_calls") is False:
        raise invalid("parallel_tool_calls=false is not supported: nothing constrains the sampling")
    if payload.get("store") not in (None, False):
        raise invalid("store=true is not supported: nothing is kept but the trajectory")
    if payload.get("n") not in (None, 1):
        raise invalid("n: a trajectory goes one way; make one trajectory for each sample")


def _objects(payload: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    value: object = payload.get(name) or []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise invalid(f"{name} must be a list of objects, got a {type(value).__name__}")
    items = cast(Sequence[object], value)
    for item in items:
        if not isinstance(item, Mapping):
            raise invalid(f"{name} must hold objects, and holds a {type(item).__name__}")
    return tuple(cast(Sequence[Mapping[str, Any]], items))


def _object(payload: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value: object = payload.get(name) or {}
    if not isinstance(value, Mapping):
        raise invalid(f"{name} must be an object, got a {type(value).__name__}")
    return cast(Mapping[str, Any], value)


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise invalid(f"{name} must be a whole number, got {value!r}")
    return int(number)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(f"{name} must be a number, got a {type(value).__name__}")
    if not -_FARTHEST < value < _FARTHEST:
        raise invalid(f"{name} is out of every range")
    return float(value)
