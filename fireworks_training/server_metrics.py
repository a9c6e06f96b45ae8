"""What a sampling attempt cost, and how servers spell it in headers and in streams.

It knows names and units of figures. Who asks, and what the figures are for, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """What one sampling attempt cost, as the server and the client saw it. Durations in seconds.

    Server values are None where the server does not report them; `retry_attempt` is 1 for the first
    attempt of a completion. `snapshot_distance` counts the optimizer steps that the service's
    training client had asked for, when the completion ended, since the snapshot that sampled its
    first token was saved. `backend_host`, `deployment` and `pod_template_hash` name what served it.
    """

    num_concurrent_requests: int | None = None
    prefill_queue_duration: float | None = None
    generation_queue_duration: float | None = None
    server_ttft: float | None = None
    cached_prompt_tokens: int | None = None
    prompt_tokens: int | None = None
    server_processing_time: float | None = None
    tokenizer_queue_duration: float | None = None
    tokenizer_duration: float | None = None
    prefill_duration: float | None = None
    generation_duration: float | None = None
    client_ttft: float | None = None
    client_latency: float | None = None
    completion_tokens: int | None = None
    http_status_code: int | None = None
    transport_error: str | None = None
    retry_attempt: int = 1
    request_id: str | None = None
    backend_host: str | None = None
    deployment: str | None = None
    pod_template_hash: str | None = None
    snapshot_identity: str | None = None
    snapshot_distance: int | None = None

    @property
    def error(self) -> str | None:
        """Why the attempt failed, such as "HTTP 503"; None if it did not."""
        if self.transport_error is not None:
            return self.transport_error
        status = self.http_status_code
        return f"HTTP {status}" if status is not None and status >= 400 else None

    @property
    def response_request_id(self) -> str | None:
        """`request_id`, by the name of the Fireworks SDK."""
        return self.request_id

    @staticmethod
    def from_headers(
        headers: Mapping[str, object],
        client_ttft: float | None = None,
        http_status_code: int | None = None,
        retry_attempt: int | None = None,
        client_latency: float | None = None,
        completion_tokens: int | None = None,
    ) -> ServerMetrics:
        """The figures in the headers of an answer; what is no figure counts as not reported.

        Args:
            headers: in any case, with or without the prefix `fireworks-`.
            client_ttft, client_latency: seconds that the client measured.
            http_status_code: of the answer.
            retry_attempt: from 1; None is 1.
            completion_tokens: as the answer's usage says.
        """
        figures: dict[str, Any] = {}
        measured(headers, figures)
        by_name = {name.lower(): str(value) for name, value in headers.items() if value}
        return ServerMetrics(
            **figures,
            client_ttft=client_ttft,
            http_status_code=http_status_code,
            retry_attempt=1 if retry_attempt is None else retry_attempt,
            client_latency=client_latency,
            completion_tokens=completion_tokens,
            request_id=request_id_of(by_name),
        )


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The server's id of a request, from the headers of its answer."""
    for name in REQUEST_ID_HEADERS:
        if value := headers.get(name):
            return value[:256]
    return None


@lru_cache(maxsize=1024)
def _field_of(key: str) -> tuple[str, Callable[[Any], Any]] | None:
    """The field that a server's name stands for, and what reads its value; None if for none.

    Remembered, since a server sends the same names with every answer.
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
    """Add the figures that a source has, by name, with or without prefix."""
    for key, value in source.items():
        if (known := _field_of(key)) is None or value is None:
            continue
        name, read = known
        if (figure := read(value)) is not None:
            figures[name] = figure
