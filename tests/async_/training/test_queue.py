"""What a queue keeps beside its operations: saved states, and failures that nobody has seen."""

from __future__ import annotations

from fireworks_training import RequestFailed
from fireworks_training._async.runtime.failure_log import FailureLog
from fireworks_training._core.saved_states import SavedStates
from fireworks_training._outcome import mark_retrieved


def failure(text: str) -> RequestFailed:
    return RequestFailed(text, category="user")


def test_the_first_failure_that_nobody_has_retrieved() -> None:
    failures, first, second = FailureLog("model"), failure("first"), failure("second")
    assert failures.first is None
    failures.note(first, "it", waited_for=True)
    failures.note(second, "it", waited_for=True)
    assert failures.first is first
    mark_retrieved(first)
    assert failures.first is second
    mark_retrieved(second)
    assert failures.first is None


def test_failures_that_were_retrieved_are_not_kept() -> None:
    failures, seen, unseen = FailureLog("model"), failure("seen"), failure("unseen")
    mark_retrieved(seen)
    failures.note(unseen, "it", waited_for=True)
    for _ in range(1000):
        failures.note(failure("again"), "it", waited_for=True)
        mark_retrieved(failures._errors[-1])
        failures.note(seen, "it", waited_for=True)
    assert len(failures._errors) < 200
    assert failures.first is unseen


def test_the_newest_state_is_the_one_saved_last_or_else_the_one_resumed_from() -> None:
    states = SavedStates()
    states.resumed("old")
    assert (states.newest, "old" in states) == ("old", False)
    states.saved("one", "path/one")
    assert (states.newest, "one" in states) == ("path/one", True)
    states.resumed("old")
    assert states.newest == "path/one"
