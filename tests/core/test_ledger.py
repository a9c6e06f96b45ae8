"""The ledger's rules: what may be taken away, and what proves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.ledger import (
    INTENT_GRACE,
    NAME_LIMIT,
    AskPlatform,
    Close,
    Event,
    Leave,
    LedgerEntry,
    OpenClaim,
    Owner,
    Remove,
    annotations_carry,
    close,
    compact,
    decode,
    encode,
    fold,
    judge,
    judge_found,
    marked_name,
    name_carries,
)

OWNER = Owner("host", "boot", 7, "100")
OTHER = Owner("host", "boot", 8, "200")
NONCE = "0123456789ab"


def entry(event: Event = "created", **fields: Any) -> LedgerEntry:
    usual: dict[str, Any] = {
        "at": 1000.0,
        "kind": "trainer",
        "resource_id": "j",
        "account": "me",
        "base_url": "http://x",
        "nonce": NONCE,
        "owner": OWNER,
    }
    return LedgerEntry(event=event, **{**usual, **fields})


def living(*alive: Owner) -> Callable[[Owner], bool | None]:
    return lambda owner: None if owner.machine != "host" else owner in alive


def claim(event: Event = "created", **fields: Any) -> OpenClaim:
    (found,) = fold([entry(event, **fields)])
    return found


@given(
    st.text(max_size=80),
    st.text(alphabet="0123456789abcdef", min_size=12, max_size=12),
)
def test_a_marked_name_fits_and_carries_its_nonce_only(name: str, nonce: str) -> None:
    marked = marked_name(name, nonce)
    assert len(marked) <= NAME_LIMIT
    assert name_carries(marked, nonce)
    assert not name_carries(name, nonce) or name.endswith(f" ft-{nonce}")


def test_no_nonce_proves_nothing() -> None:
    assert not name_carries("anything ft-", "")
    assert not annotations_carry({"fireworks-training-run": ""}, "")
    assert not annotations_carry({}, NONCE)


@given(st.floats(0, 1e12), st.text(max_size=30), st.booleans())
def test_a_line_is_read_as_it_was_written(at: float, run: str, embedded: bool) -> None:
    written = entry(at=at, run=run, embedded=embedded)
    assert decode(encode(written)) == written


@pytest.mark.parametrize("cut", range(2, 200, 7))
def test_a_torn_line_is_no_entry(cut: int) -> None:
    assert decode(encode(entry())[:-cut]) is None


@pytest.mark.parametrize("line", [b"", b"[]", b"null", b'{"event":"created"}', b"\xff"])
def test_what_is_not_ours_is_no_entry(line: bytes) -> None:
    assert decode(line) is None


def test_a_claim_is_its_last_entry_and_ends_with_gone() -> None:
    entries = [entry("intent", at=1.0), entry("created", at=2.0)]
    (found,) = fold(entries)
    assert (found.last.event, found.since) == ("created", 1.0)
    assert fold([*entries, entry("gone", at=3.0)]) == []
    assert fold([*entries, entry("gone", nonce="b" * 12)]) == [found]  # another run's


def test_what_a_live_process_holds_is_left() -> None:
    mine = claim()
    assert isinstance(judge(mine, [mine], living(OWNER), now=2000.0), Leave)
    assert judge(mine, [mine], living(), now=2000.0) == AskPlatform()


@pytest.mark.parametrize("event", ["adopted", "created", "intent"])
def test_what_another_run_holds_is_left_whoever_made_it(event: Event) -> None:
    mine, theirs = claim("kept"), claim(event, nonce="b" * 12, owner=OTHER)
    held = judge(mine, [mine, theirs], living(OTHER), now=2000.0, kept=True)
    assert isinstance(held, Leave)
    assert "process 8" in held.reason
    elsewhere = replace(theirs.last, resource_id="k")
    assert judge(mine, fold([elsewhere]), living(OTHER), now=2000.0, kept=True) == AskPlatform()


def test_a_process_of_another_machine_is_not_judged() -> None:
    far = claim(owner=replace(OWNER, machine="far"))
    assert isinstance(judge(far, [far], living(), now=2000.0), Leave)
    assert judge(far, [far], living(), now=2000.0, elsewhere=True) == AskPlatform()


def test_what_was_kept_on_purpose_needs_the_word_for_it() -> None:
    kept = claim("kept")
    assert isinstance(judge(kept, [kept], living(OWNER), now=2000.0), Leave)
    assert judge(kept, [kept], living(OWNER), now=2000.0, kept=True) == AskPlatform()


def test_what_is_too_young_is_left() -> None:
    mine = claim()
    assert isinstance(judge(mine, [mine], living(), now=1500.0, older_than=600.0), Leave)
    assert judge(mine, [mine], living(), now=1600.0, older_than=600.0) == AskPlatform()


def test_what_ended_with_its_embedded_platform_is_closed() -> None:
    mine = claim(embedded=True)
    assert isinstance(judge(mine, [mine], living(), now=2000.0), Close)
    assert isinstance(judge(mine, [mine], living(OWNER), now=2000.0), Leave)


def test_what_was_only_found_is_closed() -> None:
    found = claim("adopted")
    assert isinstance(judge(found, [found], living(), now=2000.0), Close)


@pytest.mark.parametrize("event", ["created", "kept", "intent"])
def test_only_what_carries_the_nonce_is_removed(event: Event) -> None:
    mine = claim(event)
    assert judge_found(mine, present=True, carries=True, now=2000.0) == Remove()
    assert not isinstance(judge_found(mine, present=True, carries=False, now=2000.0), Remove)
    assert isinstance(judge_found(mine, present=False, carries=False, now=2000.0), Close)


def test_an_intent_may_still_take_effect_for_a_while() -> None:
    mine = claim("intent")
    soon, later = 1000.0 + INTENT_GRACE - 1, 1000.0 + INTENT_GRACE
    assert isinstance(judge_found(mine, present=False, carries=False, now=soon), Leave)
    assert isinstance(judge_found(mine, present=False, carries=False, now=later), Close)
    assert isinstance(judge_found(mine, present=True, carries=False, now=soon), Close)


def test_closing_ends_the_claim() -> None:
    mine = claim()
    assert fold([mine.last, close(mine, at=2000.0, owner=OTHER, note="reaped")]) == []


EVENTS = st.sampled_from(["intent", "created", "adopted", "kept", "gone"])


@given(st.lists(st.tuples(EVENTS, st.sampled_from("abc"), st.sampled_from([NONCE, "b" * 12]))))
def test_what_is_left_of_a_ledger_says_the_same(rows: list[tuple[Any, str, str]]) -> None:
    entries = [
        entry(event, at=float(at), resource_id=name, nonce=nonce)
        for at, (event, name, nonce) in enumerate(rows)
    ]
    lines = [encode(one).rstrip() for one in entries]
    left = compact(lines)
    assert fold(filter(None, map(decode, left))) == fold(entries)
    assert len(left) <= 2 * len(fold(entries))
    assert compact(left) == left


def test_a_line_of_another_version_is_kept_and_a_torn_one_is_not() -> None:
    newer = b'{"event":"lent","nonce":"1"}'
    assert compact([b'{"event":', newer, b"3"]) == [newer]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resource_id", ["x"]),
        ("resource_id", 5),
        ("base_url", []),
        ("account", None),
        ("nonce", {}),
        ("run", 1),
        ("note", None),
        ("embedded", "yes"),
        ("at", "soon"),
        ("at", float("inf")),
        ("at", None),
        ("event", ["gone"]),
        ("kind", {}),
        ("owner", []),
        ("owner", {"machine": 1, "boot": "b", "pid": 7, "started": "1"}),
        ("owner", {"machine": "m", "boot": "b", "pid": "7", "started": "1"}),
    ],
)
def test_a_line_with_a_field_of_another_kind_is_skipped(name: str, value: Any) -> None:
    sound = encode(LedgerEntry(1.0, "created", "trainer", "r", "a", "http://x", NONCE, OWNER))
    assert decode(sound) is not None
    assert decode(json.dumps({**json.loads(sound), name: value}).encode()) is None
