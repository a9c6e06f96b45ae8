"""Completion streams in the ways that servers and proxies write them."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

TOKENS = [7, 8, 9]


def _chunk(body: dict[str, Any], style: str, reports_queue: bool) -> dict[str, Any]:
    """The one chunk that holds a whole completion."""
    choice: dict[str, Any] = {
        "index": 0,
        "text": "abc" if style != "unicode" else "é日本",
        "finish_reason": "stop",
        "raw_output": {"prompt_token_ids": body["prompt"], "completion_token_ids": TOKENS},
    }
    if body.get("logprobs") and style != "no_logprobs":
        choice["logprobs"] = {"content": [_entry(body, token, style) for token in TOKENS]}
    chunk: dict[str, Any] = {"id": "cmpl-1", "choices": [choice]}
    if style != "no_usage":
        chunk["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(TOKENS)}
    if reports_queue:
        chunk["perf_metrics"] = {"prefill-queue-duration": 0.0, "num-concurrent-requests": 1}
    if style == "text_metrics":
        chunk["perf_metrics"] = {"fireworks-prefill-queue-duration": "0.0"}
    return chunk


def _entry(body: dict[str, Any], token: int, style: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"logprob": -1.0, "sampling_logprob": -1.0, "token_id": token}
    if style == "no_token_id":
        del entry["token_id"]
    if style == "null_sampling_logprob":
        entry["sampling_logprob"] = None
    if body.get("top_logprobs") and style != "no_top_logprobs":
        entry["top_logprobs"] = [{"token_id": token, "logprob": -1.0}]
    return entry


def _split(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """The same completion in two chunks: the text and logprobs, then how it ended."""
    first, last = json.loads(json.dumps(chunk)), json.loads(json.dumps(chunk))
    del first["choices"][0]["finish_reason"], first["choices"][0]["raw_output"]
    first.pop("usage", None)
    last["choices"][0].pop("logprobs", None)
    last["choices"][0]["text"] = ""
    return [first, last]


def _written(chunk: dict[str, Any], style: str) -> list[bytes]:
    """The parts of the body, as they are written one after another."""
    text = json.dumps(chunk, ensure_ascii=False)
    whole = f"data: {text}\n\n"
    done = "data: [DONE]\n\n"
    two = "".join(f"data: {json.dumps(part)}\n\n" for part in _split(chunk))
    by_style = {
        "empty_data": f"data:\n\n{whole}data: \n\n{done}",
        "done_blank": f"{whole}data: [DONE] \n\n",
        "comments": f": ping\n\n{whole}: ping\n\n{done}",
        "named_ping": f"event: ping\ndata: now\n\n{whole}{done}",
        "crlf": (whole + done).replace("\n", "\r\n"),
        "no_space": (whole + done).replace("data: ", "data:"),
        "no_done": whole,
        "two_chunks": two + done,
        "empty_choices": f'{whole}data: {{"id": "cmpl-1", "choices": []}}\n\n{done}',
        "ids": f"id: 1\nretry: 10\n{whole}{done}",
    }
    body = by_style.get(style, whole + done).encode()
    if style == "bom":
        body = b"\xef\xbb\xbf" + body
    if style == "bytewise":
        return [body[at : at + 1] for at in range(len(body))]
    if style == "unicode":
        middle = body.index("日".encode()) + 1
        return [body[:middle], body[middle:]]
    return [body]


def _interrupted(style: str, attempt: int) -> bytes | None:
    """What a stream that goes wrong sends, where this attempt does."""
    if style == "cut_twice" and attempt <= 2:
        return b'data: {"id": "cmpl-1", "choices": [{"index": 0, "text": "a"}]}\n\n'
    error = b'data: {"error": {"message": "overloaded", "status_code": 503}}\n\n'
    if style == "error_chunk_twice" and attempt <= 2:
        return error
    if style == "error_event_twice" and attempt <= 2:
        return b"event: error\n" + error
    if style == "html_twice" and attempt <= 2:
        return b"<html>502 Bad Gateway</html>"
    if style == "error_400":
        return b'data: {"error": {"message": "no", "status_code": 400}}\n\n'
    return None


async def stream(
    request: web.Request, body: dict[str, Any], style: str, attempt: int, reports_queue: bool
) -> web.StreamResponse:
    """Answer a request for a completion, in one of the styles above."""
    if not body.get("stream"):
        return web.json_response({"choices": [{"text": "abc", "finish_reason": "stop"}]})
    headers = {"Content-Type": "text/event-stream", "x-request-id": f"r-{attempt}"}
    broken = _interrupted(style, attempt)
    if style == "html_twice" and broken is not None:
        headers["Content-Type"] = "text/html"
    answer = web.StreamResponse(headers=headers)
    await answer.prepare(request)
    parts = [broken] if broken is not None else _written(_chunk(body, style, reports_queue), style)
    for part in parts:
        await answer.write(part)
    if style == "cut_twice" and broken is not None and request.transport is not None:
        request.transport.abort()
    return answer
