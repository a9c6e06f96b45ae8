"""Reads the figures that servers report about a request, by name: from headers and from streams.

Knows how servers spell the names, and the units; `models.ServerMetrics` holds the figures. It knows
neither requests nor answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

REQUEST_ID_HEADERS = ("x-request-id", "x-fireworks-request-id", "cf-ray")

_SECONDS = {
    "prefill-queue-duration": "prefill_queue_duration",
    "generation-queue-duration": "generation_queue_duration",
    "server-time-to-first-token": "server_ttft",
    "server-processing-time": "server_processing_time",
    "tokenizer-queue-duration": "tokenizer_queue_duration",
    "tokenizer-duration": "tokenizer_duration",
    "prefill-duration": "prefill_duration",
    "generation-duration": "generation_duration",
}
_COUNTS = {
    "num-concurrent-requests": "num_concurrent_requests",
    "cached-prompt-tokens": "cached_prompt_tokens",
    "prompt-tokens": "prompt_tokens",
}
_NAMES = {
    "backend-host": "backend_host",
    "deployment": "deployment",
    "pod-template-hash": "pod_template_hash",
}


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """Find the server's id of a request in the headers of its answer, lower-case names."""
    for name in REQUEST_ID_HEADERS:
        if value := headers.get(name):
            return value[:256]
    return None


@lru_cache(maxsize=1024)
def _field_of(key: str) -> tuple[str, Callable[[Any], Any]] | None:
    """Find the field that a server's name stands for, and the function that reads its value.

    Cached, since a server sends the same names with every answer.
    """
    name = key.lower().removeprefix("fireworks-")
    if name in _SECONDS:
        return _SECONDS[name], _seconds
    if name in _COUNTS:
        return _COUNTS[name], _count
    return (_NAMES[name], _label) if name in _NAMES else None


def _seconds(value: Any) -> float | None:
    try:
        figure = float(value)
    except (TypeError, ValueError):
        return None
    # A NaN or a negative time would poison the moving average of the window.
    return figure if math.isfinite(figure) and figure >= 0 else None


def _count(value: Any) -> int | None:
    figure = _seconds(value)
    return None if figure is None else int(figure)


def _label(value: Any) -> str | None:
    return str(value)[:256] or None


def measured(source: Mapping[str, Any], figures: dict[str, Any]) -> None:
    """Add the figures of a source to `figures` by field; names have the prefix or not."""
    for key, value in source.items():
        if (known := _field_of(key)) is None or value is None:
            continue
        name, read = known
        if (figure := read(value)) is not None:
            figures[name] = figure
