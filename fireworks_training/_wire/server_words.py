"""Reads what a server says of an error, and takes out what no message may repeat.

Servers put what they were sent into their errors: a key from a header, the tokens of a prompt, the
whole input that did not pass a check. Errors reach logs and trackers, so every text of a server
passes `scrubbed` before it stands in one. A text that may be anything is repeated in part; of an
object without a message only the names of its fields are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import orjson

LONGEST_TEXT = 2000
"""Characters of a server's text that a message repeats."""

LARGEST_BODY = 1 << 20
"""Bytes of an error's body that are read; a larger one is no explanation."""

_NAMES = ("message", "msg", "error", "detail", "reason", "title", "description")
_ENTRIES = 5
_SHORTEST_SECRET = 6  # a shorter value would be found in plain words
_CODE = re.compile(r"[\w.:/ -]{1,60}", re.ASCII)

_NUMBER = r"[-+]?\d++(?:\.\d++)?(?:[eE][-+]?\d++)?"
_GAP = r"[\s\[\](){}]*+"
_LISTS = re.compile(
    rf"(?<![\d.]){_NUMBER}(?:{_GAP}[,;]{_GAP}{_NUMBER}){{2,}}"
    rf"|(?<![\d.]){_NUMBER}(?:\s++{_NUMBER}){{4,}}"
)
_KEYS = re.compile(
    r"(?i)\b(?:bearer|basic)\s+[^\s\"',;]+|\b(?:fw|sk|tml|key|hf|rk|pk)[-_]\w[\w-]{4,}"
    r"|(?<=x-api-key)[\"']?\s*[:=]\s*[\"']?[^\s\"',;}]+"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)")
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"?|'(?:[^'\\]|\\.)*'?"
_INPUTS = re.compile(
    rf"(?i)([\"']?\b(?:prompt|input|input_value|text|content|messages|api_?key|authorization)\b"
    rf"[\"']?\s*[:=]\s*)\\?(?:{_QUOTED})"
)


def scrubbed(text: str, secrets: Iterable[str] = (), *, limit: int = LONGEST_TEXT) -> str:
    """Take lists of numbers, quoted inputs and what looks like a key out of a text.

    Args:
        text: a server's words, or a library's.
        secrets: values that are known to be secret; those of fewer than six characters are passed
            over.
        limit: characters that are kept.
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    # Cut with room to spare: what is taken out may stand across the limit.
    text = text[: 4 * limit]
    text = _LOGIN.sub("***", _KEYS.sub("***", _INPUTS.sub(r"\1***", text)))
    return _LISTS.sub("...", text)[:limit]


def words_of(body: bytes, secrets: Iterable[str] = ()) -> tuple[str, str | None]:
    """Read an error's body: the server's message, scrubbed, and its own name for the error."""
    if len(body) > LARGEST_BODY:
        return f"(a body of {len(body)} bytes)", None
    try:
        payload: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body[: 4 * LONGEST_TEXT].decode("utf-8", "replace").strip()
        return scrubbed(text, secrets, limit=500) or "(no body)", None
    told = _told(payload)
    code: object = None
    if isinstance(payload, dict):
        fields = cast(dict[str, Any], payload)
        inner: object = fields.get("error", fields.get("detail"))
        code = fields.get("error_class")
        if code is None and isinstance(inner, dict):
            named = cast(dict[str, Any], inner)
            code = named.get("error_class") or named.get("code")
    return scrubbed(told, secrets), _code(code, secrets)


def _told(value: object, depth: int = 0) -> str:
    match value:
        case str():
            return value or "(no words)"
        case bool() | int() | float() | None:
            return "(no words)"
        case dict():
            fields = cast(dict[str, object], value)
            if depth < 4:
                if "loc" in fields and "msg" in fields:  # FastAPI's; its `input` is the request
                    return f"{_place(fields['loc'])}: {_told(fields['msg'], 4)}"
                for name in _NAMES:
                    if isinstance(fields.get(name), (str, dict, list)):
                        return _told(fields[name], depth + 1)
            names = ", ".join(str(name)[:40] for name in list(fields)[:_ENTRIES])
            return f"(an object with the fields {names})" if names else "(an empty object)"
        case list():
            entries = cast(list[object], value)
            told = [
                _told(cast(object, entry), depth + 1)
                for entry in entries[:_ENTRIES]
                if isinstance(entry, Mapping) and depth < 4
            ]
            more = "" if len(entries) <= _ENTRIES else f" (and {len(entries) - _ENTRIES} more)"
            return "; ".join(told) + more if told else f"(a list of {len(entries)})"
        case _:
            return "(no words)"


def _place(loc: object) -> str:
    if not isinstance(loc, list):
        return "?"
    return ".".join(str(part)[:40] for part in cast(list[object], loc)[:8])


def _code(code: object, secrets: Iterable[str]) -> str | None:
    if isinstance(code, bool) or not isinstance(code, (str, int)):
        return None
    text = scrubbed(str(code), secrets, limit=60)
    return text if _CODE.fullmatch(text) else None
