"""Normalizes chat messages, so that messages of equal meaning are equal values.

Agents replay the history with every call, and their libraries write it anew: other spaces in
arguments, null instead of an empty text, fields that only streams have. None of that may count as
an edited history. It compares no token ids: a message never stands for the tokens sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fireworks_training.tito.values.errors import TITOError, invalid

Message = Mapping[str, Any]

DEEPEST = 128
"""Levels of lists and objects in a request, at most."""


def plain_json(value: Any, depth: int = 0) -> Any:
    """Copy JSON-like data into lists and dictionaries, in the order it had.

    Args:
        depth: levels of lists and objects around `value`.

    Raises:
        TITOError: it holds a value that JSON lacks or UTF-8 can't encode, or is nested deeper than
            `DEEPEST`.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    if depth >= DEEPEST:
        raise invalid(f"the request is nested deeper than {DEEPEST} levels")
    if isinstance(value, Mapping):
        items = cast(Mapping[object, Any], value).items()
        return {_text(str(name)): plain_json(item, depth + 1) for name, item in items}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, depth + 1) for item in cast(Sequence[Any], value)]
    raise invalid(f"the request holds a value that JSON has not: a {type(value).__name__}")


def _text(value: str) -> str:
    if not _encodable(value):
        raise invalid("a text holds half of a surrogate pair: cut texts between characters")
    return value


def _encodable(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_text(value: Any) -> str:
    """Write JSON with sorted keys and no spaces: equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def json_hash(value: Any) -> str:
    """Compute the SHA-256 of `json_text`, in hex."""
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def normalize_openai_tool_arguments(value: Any) -> str:
    """Write the arguments of a function call as JSON text, equal for equal values.

    Text that is not JSON, or can't be written again, stays as it is: the renderer decides about it.
    """
    if not isinstance(value, str):
        return json_text(value)
    try:
        made = json_text(json.loads(value))
    except (ValueError, RecursionError):
        return value
    return made if _encodable(made) else value


def template_message(message: Message) -> dict[str, Any]:
    """Normalize a message for a chat template, which takes the arguments of calls as mappings.

    Their keys keep the order in which they came, since a template writes them in that order. Text
    that is no JSON object stays text.

    Raises:
        TITOError: the same errors as `canonical_message`.
    """
    made, _ = canonical_message(message)
    came = _tool_calls(message.get("tool_calls") or []) if made["role"] == "assistant" else []
    for call, sent in zip(made.get("tool_calls") or (), came, strict=False):
        function: Any = sent.get("function") or {}
        call["function"]["arguments"] = _as_mapping(function.get("arguments", ""))
    return made


def _as_mapping(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return plain_json(cast(Mapping[str, Any], arguments))
    try:
        decoded = json.loads(arguments)
        return plain_json(decoded) if isinstance(decoded, dict) else arguments
    except (ValueError, TypeError, RecursionError, TITOError):
        return arguments


def canonical_message(message: Message) -> tuple[dict[str, Any], list[str]]:
    """Normalize a message; gives the result and the list of changes.

    Raises:
        TITOError: it has no role, or content that is not text.
    """
    made: dict[str, Any] = plain_json(message)
    changed: list[str] = []
    if not isinstance(made.get("role"), str):
        raise invalid("every message needs a role, a string")
    content = made.get("content")
    if isinstance(content, list):
        made["content"] = _joined_text(content)
        changed.append("content:text_parts_joined")
    if made["role"] != "assistant":
        return made, changed
    return _canonical_assistant(made, changed)


def _canonical_assistant(
    made: dict[str, Any], changed: list[str]
) -> tuple[dict[str, Any], list[str]]:
    # Client libraries send back every field of their own message class, most of them null.
    empty = [name for name, value in made.items() if name != "content" and value in (None, [], {})]
    if made.get("provider_specific_fields") == {"refusal": None}:
        empty.append("provider_specific_fields")
    for name in empty:
        del made[name]
        changed.append(f"{name}:empty_removed")
    calls = _tool_calls(made.get("tool_calls") or [])
    for place, call in enumerate(calls):
        if call.pop("index", None) is not None:
            changed.append(f"tool_calls[{place}].index:stream_index_removed")
        function = dict(call.get("function") or {})
        sent = function.get("arguments", "")
        function["arguments"] = normalize_openai_tool_arguments(sent)
        if function["arguments"] != sent:
            changed.append(f"tool_calls[{place}].function.arguments:canonical_json")
        call["function"] = function
    content = made.get("content")
    blank = content is None or (isinstance(content, str) and not content.strip())
    if content is None or (calls and blank and content != ""):
        made["content"] = ""
        changed.append("content:blank_to_empty")
    return made, changed


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    calls = cast(list[object], value) if isinstance(value, list) else [value]
    for item in calls:
        call = cast(dict[str, object], item) if isinstance(item, dict) else None
        if call is None or not isinstance(call.get("function") or {}, dict):
            raise invalid("tool_calls must be a list of objects, each with a function, an object")
    return cast(list[dict[str, Any]], calls)


def _joined_text(parts: Any) -> str:
    texts: list[str] = []
    for item in parts:
        part = cast(dict[str, object], item) if isinstance(item, dict) else dict[str, object]()
        if part.get("type") != "text":
            raise invalid(
                "content holds a part of another type than 'text': vision inputs are not supported"
            )
        texts.append(str(part.get("text", "")))
    return "".join(texts)
