"""Builds the JSON of the completions route from a sampled completion, for scripts that read it."""

from __future__ import annotations

import math
from typing import Any

from fireworks_training.models import SampledCompletion


def completion_body(completion: SampledCompletion, response_id: str | None) -> dict[str, Any]:
    """Build the body of an answer that is not streamed."""
    choice: dict[str, Any] = {
        "index": 0,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "raw_output": {
            "prompt_token_ids": list(completion.prompt_tokens),
            "completion_token_ids": list(completion.completion_tokens),
        },
    }
    if completion.inference_logprobs is not None:
        choice["logprobs"] = {"content": _content(completion)}
    body: dict[str, Any] = {
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.prompt_len,
            "completion_tokens": completion.completion_len,
            "total_tokens": completion.prompt_len + completion.completion_len,
        },
    }
    return body if response_id is None else {**body, "id": response_id}


def _content(completion: SampledCompletion) -> list[dict[str, Any]]:
    """Build an entry for each position that has logprobs: the last tokens of the row."""
    logprobs = completion.inference_logprobs or ()
    tokens = list(completion.full_tokens)[len(completion.full_tokens) - len(logprobs) :]
    entries: list[dict[str, Any]] = [
        {"token_id": token, "logprob": logprob}
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]
    sampling = completion.sampling_logprobs
    for entry, value in zip(entries, sampling or (), strict=False):
        entry["sampling_logprob"] = None if math.isnan(value) else value
    top = completion.top_logprobs or ()
    # With an echo, entries of the prompt stand before those of the completion.
    for entry, row in zip(entries[len(entries) - len(top) :], top, strict=False):
        entry["top_logprobs"] = [
            {"token_id": token, "logprob": value} for token, value in row.items()
        ]
    return entries
