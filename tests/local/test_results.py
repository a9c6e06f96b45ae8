"""Batch polling: its requests and the log of what ended."""

from __future__ import annotations

import asyncio

import pytest

from fireworks_training.local.results import (
    MAX_BODY_BYTES,
    MAX_IDS,
    MAX_INLINE_BYTES,
    PAGE,
    BadPoll,
    FinishedRequests,
    RequestOutcome,
    answer,
    parse_poll,
)

TARGET = b'"target": {"type": "model", "model_id": "m"}'


def test_a_log_goes_on_where_its_reader_was() -> None:
    log = FinishedRequests(kept=PAGE + 2)
    assert log.after(0) == ([], 0)
    for index in range(PAGE + 4):
        log.add(str(index))
    first, cursor = log.after(0)
    # The two oldest are not kept any more.
    assert (first[0], len(first), cursor) == ("2", PAGE, PAGE + 2)
    assert log.after(cursor) == ([str(PAGE + 2), str(PAGE + 3)], PAGE + 4)
    assert log.after(PAGE + 4) == ([], PAGE + 4)
    # The same cursor again: the answer may have been lost.
    assert log.after(cursor)[0] == [str(PAGE + 2), str(PAGE + 3)]


async def test_who_waits_is_woken_by_news_alone() -> None:
    log = FinishedRequests()
    waits = asyncio.create_task(log.wait(1, 30.0))
    await asyncio.sleep(0)
    log.add("a")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waits.done()
    log.add("b")
    await waits
    await log.wait(2, 0.0)  # over at once


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{}", "target"),
        (b'{"target": {"type": "other"}}', "target"),
        (b'{%s, "prev_cursor": -1}' % TARGET, "prev_cursor"),
        (b'{%s, "timeout": -1}' % TARGET, "timeout"),
        (b'{%s, "more": 1}' % TARGET, "more"),
        (b'{%s, "inline_bytes": %d}' % (TARGET, MAX_INLINE_BYTES + 1), "inline_bytes"),
        (
            b'{%s, "retrieved_request_ids": [%s]}' % (TARGET, b", ".join([b'"a"'] * (MAX_IDS + 1))),
            "retrieved_request_ids",
        ),
        (b" " * (MAX_BODY_BYTES + 1), "bytes"),
        (b"[", "body"),
    ],
)
def test_what_is_no_poll(body: bytes, words: str) -> None:
    with pytest.raises(BadPoll, match=words):
        parse_poll(body)


def test_a_poll_is_held_for_as_long_as_it_says() -> None:
    assert parse_poll(b"{%s}" % TARGET).hold_s(30.0) == 30.0
    assert parse_poll(b'{%s, "timeout": null}' % TARGET).hold_s(30.0) == 30.0
    assert parse_poll(b'{%s, "timeout": 0}' % TARGET).hold_s(30.0) == 0.0
    assert parse_poll(b'{%s, "timeout": 3600.0}' % TARGET).hold_s(30.0) == 30.0


def test_small_results_come_along() -> None:
    ended = [
        RequestOutcome("a", False, b"{}"),
        RequestOutcome("b", True, b"[]"),
        RequestOutcome("c", False, b"x" * 9),
    ]
    assert answer(ended, 3, 0)["completions"] == [
        {"state": "finished", "request_id": "a", "response_payload_uncompressed_size": 2},
        {"state": "failed", "request_id": "b"},
        {"state": "finished", "request_id": "c", "response_payload_uncompressed_size": 9},
    ]
    inline = answer(ended, 3, 4)
    completions = inline["completions"]
    assert isinstance(completions, list)
    assert [row.get("payload") for row in completions] == ["e30=", "W10=", None]
    # All together they are bounded.
    large = [RequestOutcome(str(n), False, b"x" * (MAX_INLINE_BYTES // 2)) for n in range(3)]
    rows = answer(large, 3, MAX_INLINE_BYTES)["completions"]
    assert isinstance(rows, list)
    assert ["payload" in row for row in rows] == [True, True, False]
