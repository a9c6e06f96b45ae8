"""The rules of the line, one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireworks_training._core.operations import (
    OperationLine,
    Role,
    Send,
    Skip,
    Ticket,
    WaitFor,
)
from fireworks_training.errors import GradientsInDoubt, PrecedingOperationFailed, RequestFailed

BROKEN = RequestFailed("broken", category="user")


def sent(line: OperationLine, *roles: Role) -> list[Ticket]:
    """Places for operations that are all sent at once."""
    tickets = [line.issue(role) for role in roles]
    for ticket in tickets:
        assert isinstance(line.verdict(ticket), Send)
    return tickets


def skipped(line: OperationLine, ticket: Ticket) -> Skip:
    verdict = line.verdict(ticket)
    assert isinstance(verdict, Skip)
    return verdict


def test_steps_end_with_their_optim_step() -> None:
    line = OperationLine(step_protocol=True)
    roles = [Role.GRADIENT, Role.FORWARD, Role.OPTIM, Role.SAVE, Role.GRADIENT, Role.OPTIM]
    assert [line.issue(role).step.number for role in roles] == [0, 0, 0, 1, 1, 1]
    assert line.steps == 2


def test_a_failed_gradient_voids_the_rest_of_its_step_and_no_more() -> None:
    line = OperationLine(step_protocol=True)
    (first,) = sent(line, Role.GRADIENT)
    second, save, forward, optim, following = map(
        line.issue,
        [Role.GRADIENT, Role.SAVE, Role.FORWARD, Role.OPTIM, Role.GRADIENT],
    )
    line.failed(first, BROKEN)
    verdict = skipped(line, second)
    assert isinstance(verdict.error, PrecedingOperationFailed)
    assert verdict.error.cause is BROKEN
    assert not verdict.discard
    assert line.verdict(save) == Send()
    assert line.verdict(forward) == Send()
    assert skipped(line, optim).discard
    assert line.verdict(following) == Send()


def test_a_step_of_which_nothing_was_sent_needs_no_discard() -> None:
    line = OperationLine(step_protocol=True)
    gradient, optim = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    line.failed(gradient, BROKEN)
    assert not skipped(line, optim).discard


def test_a_failure_counts_before_its_outcome_is_handed_out() -> None:
    line = OperationLine(step_protocol=True)
    gradient, optim = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    line.will_fail(gradient, BROKEN)
    skipped(line, optim)


def test_after_a_failure_was_seen_a_new_step_begins_and_the_old_one_is_dropped() -> None:
    line = OperationLine(step_protocol=True)
    good, bad = sent(line, Role.GRADIENT, Role.GRADIENT)
    line.succeeded(good)
    line.failed(bad, BROKEN)
    unseen = line.issue(Role.GRADIENT)  # in the old step, since nobody has seen it
    line.saw(bad)
    gradient, optim = line.issue(Role.GRADIENT), line.issue(Role.OPTIM)
    assert gradient.gives_up is good.step
    assert gradient.step.given_up == 1
    skipped(line, unseen)
    assert line.verdict(gradient) == Send(discard=True)
    assert line.verdict(optim) == Send()


def test_seeing_is_of_what_the_failure_caused_too_and_of_nothing_else() -> None:
    line = OperationLine(step_protocol=True)
    bad, voided, forward = sent(line, Role.GRADIENT, Role.GRADIENT, Role.FORWARD)
    line.failed(forward, BROKEN)
    line.saw(forward)
    line.failed(bad, BROKEN)
    assert line.issue(Role.GRADIENT).step is bad.step
    line.failed(voided, line.preceding_failed(BROKEN))
    line.saw(voided)
    assert line.issue(Role.GRADIENT).step is not bad.step


def test_an_optim_step_on_an_emptied_step_fails_alone_and_names_the_failure() -> None:
    line = OperationLine(step_protocol=True)
    (bad,) = sent(line, Role.GRADIENT)
    line.failed(bad, BROKEN)
    line.saw(bad)
    optim, following = line.issue(Role.OPTIM), line.issue(Role.GRADIENT)
    verdict = skipped(line, optim)
    assert verdict.discard
    assert verdict.error.cause is BROKEN
    assert line.verdict(following) == Send()


@pytest.mark.parametrize("protocol", [True, False])
def test_the_failure_of_an_optim_step_drops_its_own_step_alone(protocol: bool) -> None:
    line = OperationLine(step_protocol=protocol)
    (gradient,) = sent(line, Role.GRADIENT)
    line.succeeded(gradient)
    (optim,) = sent(line, Role.OPTIM)
    line.failed(optim, BROKEN)
    following, ending = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    assert line.verdict(following) == Send()
    line.succeeded(following)
    if protocol:
        assert line.verdict(ending) == Send()
    else:  # what it had to apply lies there
        assert isinstance(skipped(line, ending).error, GradientsInDoubt)


@pytest.mark.parametrize(("count", "fits"), [(1, False), (2, True), (3, False)])
def test_an_optim_step_may_name_the_number_of_its_passes(count: int, fits: bool) -> None:
    line = OperationLine(step_protocol=True)
    sent(line, Role.GRADIENT, Role.GRADIENT)
    verdict = line.verdict(line.issue(Role.OPTIM, passes=count))
    assert isinstance(verdict, Send if fits else Skip)
    assert isinstance(verdict, Send) or verdict.discard


def test_a_micro_batch_that_was_lost_is_named_by_the_number_of_passes() -> None:
    line = OperationLine(step_protocol=True)
    (bad,) = sent(line, Role.GRADIENT)
    line.failed(bad, BROKEN)
    line.saw(bad)
    good = line.issue(Role.GRADIENT)
    assert line.verdict(good) == Send(discard=True)
    verdict = skipped(line, line.issue(Role.OPTIM, passes=2))
    assert verdict.error.cause is BROKEN


def test_a_load_opens_a_step_and_one_that_fails_takes_the_rest_of_it() -> None:
    line = OperationLine(step_protocol=True)
    (bad,) = sent(line, Role.GRADIENT)
    line.failed(bad, BROKEN)
    load, gradient, optim, after = map(
        line.issue, [Role.LOAD, Role.GRADIENT, Role.OPTIM, Role.GRADIENT]
    )
    assert line.verdict(load) == Send()
    line.failed(load, BROKEN)
    skipped(line, gradient)
    skipped(line, optim)
    assert line.verdict(after) == Send()


def test_a_step_is_discarded_by_hand() -> None:
    line = OperationLine(step_protocol=True)
    (gradient,) = sent(line, Role.GRADIENT)
    line.succeeded(gradient)
    discard, again, following = map(line.issue, [Role.DISCARD, Role.DISCARD, Role.GRADIENT])
    assert discard.gives_up is gradient.step
    assert line.verdict(discard) == Send(discard=True)
    assert line.verdict(again) == Send()
    assert line.verdict(following) == Send()


def test_a_server_without_discards_is_in_doubt_after_one() -> None:
    line = OperationLine()
    (gradient,) = sent(line, Role.GRADIENT)
    discard = line.issue(Role.DISCARD)
    assert line.verdict(discard) == WaitFor(gradient)
    line.succeeded(gradient)
    assert isinstance(skipped(line, discard).error, GradientsInDoubt)


def test_a_pass_is_withdrawn_while_its_optim_step_is_not_on_its_way() -> None:
    line = OperationLine(step_protocol=True)
    (gradient,) = sent(line, Role.GRADIENT)
    assert line.withdraw(gradient, BROKEN)
    following, optim = line.issue(Role.GRADIENT), line.issue(Role.OPTIM)
    assert line.verdict(following) == Send(discard=True)
    assert line.verdict(optim) == Send()
    assert not line.withdraw(following, BROKEN)
    assert line.verdict(line.issue(Role.GRADIENT)) == Send()


def test_forward_and_save_fail_alone() -> None:
    line = OperationLine(step_protocol=True)
    forward, save, gradient, optim = map(
        line.issue, [Role.FORWARD, Role.SAVE, Role.GRADIENT, Role.OPTIM]
    )
    line.failed(forward, BROKEN)
    line.failed(save, BROKEN)
    assert line.verdict(gradient) == Send()
    assert line.verdict(optim) == Send()


def test_without_the_protocol_an_optim_step_waits_for_its_step() -> None:
    line = OperationLine()
    gradient, optim = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    assert line.verdict(optim) == WaitFor(gradient)
    line.succeeded(gradient)
    assert line.verdict(optim) == Send()


def test_pipeline_steps_does_not_wait() -> None:
    line = OperationLine(pipeline_steps=True)
    _, optim = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    assert line.verdict(optim) == Send()


def test_a_part_of_a_failed_step_puts_later_steps_in_doubt() -> None:
    line = OperationLine()
    first, second, optim, later = map(
        line.issue, [Role.GRADIENT, Role.GRADIENT, Role.OPTIM, Role.OPTIM]
    )
    line.succeeded(first)
    line.failed(second, BROKEN)
    ending = line.verdict(optim)
    assert isinstance(ending, Skip)
    assert not ending.discard  # such a server offers none
    line.failed(optim, ending.error)
    doubt = line.verdict(later)
    assert isinstance(doubt, Skip)
    assert isinstance(doubt.error, GradientsInDoubt)
    assert line.verdict(later, accept_partial=True) == Send()
    line.succeeded(later)
    assert line.verdict(line.issue(Role.OPTIM)) == Send()


def test_a_failed_step_of_which_nothing_was_added_leaves_no_doubt() -> None:
    line = OperationLine()
    gradient, optim, later = map(line.issue, [Role.GRADIENT, Role.OPTIM, Role.OPTIM])
    line.failed(gradient, BROKEN)
    line.failed(optim, line.preceding_failed(BROKEN))
    assert line.verdict(later) == Send()


def test_an_optim_step_that_fails_leaves_its_gradients_in_doubt() -> None:
    line = OperationLine()
    gradient, optim, voided, later = map(
        line.issue, [Role.GRADIENT, Role.OPTIM, Role.OPTIM, Role.OPTIM]
    )
    line.succeeded(gradient)
    line.failed(optim, BROKEN)
    error = skipped(line, voided).error
    assert isinstance(error, GradientsInDoubt)
    line.failed(voided, error)
    assert isinstance(skipped(line, later).error, GradientsInDoubt)
    assert OperationLine(accept_partial=True).verdict(later) == Send()


def test_what_was_partly_added_by_one_operation_is_in_doubt_too() -> None:
    line = OperationLine()
    gradient, optim, later = map(line.issue, [Role.GRADIENT, Role.OPTIM, Role.OPTIM])
    gradient.maybe_added = True  # one of its chunks was taken, another failed
    line.failed(gradient, BROKEN)
    line.failed(optim, line.preceding_failed(BROKEN))
    assert isinstance(line.verdict(later), Skip)


# -- any history against a trainer that enforces steps ---------------------------------------------

CHANGES = [Role.GRADIENT, Role.GRADIENT, Role.OPTIM, Role.LOAD, Role.DISCARD, Role.FORWARD]
events = st.one_of(
    st.tuples(st.sampled_from(CHANGES), st.sampled_from(["works", "works", "early", "late"])),
    st.sampled_from(["send", "end", "see", "cancel"]),
)


class Trainer:
    """Runs what arrives, by the rules of the platform's trainer, and keeps what is applied."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.failed = False
        self.applied: list[tuple[int, ...]] = []

    def discard(self) -> None:
        self.held, self.failed = [], False

    def run(self, ticket: Ticket, fate: str) -> bool:
        if ticket.role is Role.LOAD:
            self.held, self.failed = [], fate != "works"
        elif ticket.role is Role.GRADIENT and not self.failed:
            self.held = [*self.held, ticket.place] if fate == "works" else []
            self.failed = fate != "works"
            return fate == "works"
        elif ticket.role is Role.OPTIM:
            works = fate == "works" and not self.failed
            if works:
                self.applied.append(tuple(self.held))
            self.discard()
            return works
        return fate == "works" and not self.failed


class Client:
    """Carries a line out: what is sent has an outcome in the trainer at once, told later."""

    def __init__(self) -> None:
        self.line = OperationLine(step_protocol=True)
        self.trainer = Trainer()
        self.waiting: list[tuple[Ticket, str]] = []
        self.running: list[tuple[Ticket, BaseException | None]] = []
        self.failures: list[Ticket] = []
        self.good: set[int] = set()

    def send(self) -> None:
        ticket, fate = self.waiting.pop(0)
        error: BaseException | None = None
        if fate == "cancelled":
            error = BROKEN
        else:
            verdict = self.line.verdict(ticket)
            assert not isinstance(verdict, WaitFor)
            if verdict.discard:
                self.trainer.discard()
            if isinstance(verdict, Skip):
                error = verdict.error
            elif fate == "early" and ticket.role is Role.GRADIENT:
                error = BROKEN  # while it is encoded: nothing of it goes out
            elif ticket.role.changes_model and not self.trainer.run(ticket, fate):
                error = BROKEN
        if error is not None and fate in ("early", "cancelled"):
            self.line.will_fail(ticket, error)
        self.running.append((ticket, error))

    def end(self) -> None:
        ticket, error = self.running.pop(0)
        voided = self.line.failure_before(ticket) if ticket.role.changes_model else None
        if voided is not None:
            error = self.line.preceding_failed(voided)
        if error is None:
            self.line.succeeded(ticket)
            self.good.add(ticket.place)
        else:
            self.line.failed(ticket, error)
            self.failures.append(ticket)

    def see(self) -> None:
        if self.failures:
            self.line.saw(self.failures[-1])

    def cancel(self) -> None:
        if self.waiting and self.waiting[-1][1] != "cancelled":
            ticket, _ = self.waiting.pop()
            self.line.cancelled(ticket, BROKEN)
            self.waiting.append((ticket, "cancelled"))


@settings(deadline=None, max_examples=400)
@given(st.lists(events, max_size=40))
def test_what_is_applied_is_whole_and_said_to_be(history: list[Any]) -> None:
    client = Client()
    issued: list[Ticket] = []
    for event in history:
        if isinstance(event, tuple):
            issued.append(client.line.issue(event[0]))
            client.waiting.append((issued[-1], event[1]))
        elif event == "send" and client.waiting:
            client.send()
        elif event == "end" and client.running:
            client.end()
        elif event == "see":
            client.see()
        elif event == "cancel":
            client.cancel()
    while client.waiting:
        client.send()
    while client.running:
        client.end()
    passes = {id(t.step): list[int]() for t in issued}
    for ticket in issued:
        if ticket.role is Role.GRADIENT:
            passes[id(ticket.step)].append(ticket.place)
    ends = [t for t in issued if t.role is Role.OPTIM and t.place in client.good]
    # Each optim_step that says so applied all passes of its step, and none of another.
    assert client.trainer.applied == [tuple(passes[id(end.step)]) for end in ends]
    for end in ends:
        assert client.good.issuperset(passes[id(end.step)])
