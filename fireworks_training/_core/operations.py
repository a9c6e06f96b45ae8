"""The line of a training client: which operation may be sent, which must fail, and why.

A client's operations stand in one line; call order is execution order. A *step* is what is issued
up to and including an `optim_step`, and is applied whole or not at all:

1. While a failure in a step has not been *seen*, everything of the step that adds gradients or
   changes weights fails with it as the cause, up to and including its `optim_step`.
2. A failure is seen when the caller has been handed it, or what it has caused in its step; a
   `cancel()` that succeeded is seen, too. The next operation with gradients or weights opens a new
   step, and the gradients of the old one are dropped. An `optim_step` that finds such a step empty
   fails alone.
3. An `optim_step` that fails drops its own step and nothing else. A load opens a new step, and one
   that fails takes the rest of that. Passes without gradients and saves fail alone.
4. Outcomes of operations that touch gradients or weights are handed out in line order, so each
   `PrecedingOperationFailed` can name its cause.

A server that speaks `step_protocol` enforces whole steps for what it has accepted; there the client
withholds what it knows to be void, and has a *discard* sent before the next operation that counts.
For any other server the client holds back an `optim_step` until the outcomes of its step are known;
when part of a step that failed may have been added, the gradients are *in doubt* from then on.

This module takes events and gives verdicts. It knows no loop, no clock and no wire, and is called
under its caller's lock. The trainer of the local platform keeps the same rules by an implementation
of its own (`local.trainer.queue.line`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fireworks_training.errors import (
    GradientsInDoubt,
    InvalidArgument,
    OperationCancelled,
    PrecedingOperationFailed,
)


class Role(Enum):
    """What an operation does to the model; client and trainer judge operations by it."""

    FORWARD = "computes without gradients"
    GRADIENT = "adds gradients"
    OPTIM = "ends the step"
    LOAD = "replaces the weights"
    SAVE = "saves the weights"
    DISCARD = "drops the step"
    OTHER = "stands outside of steps"

    @property
    def changes_model(self) -> bool:
        """Whether it adds gradients or changes weights, so that a failed step stops it."""
        return self in (Role.GRADIENT, Role.OPTIM, Role.LOAD)

    @property
    def stands_alone(self) -> bool:
        """Whether it fails alone, and concerns no other operation."""
        return self in (Role.FORWARD, Role.SAVE, Role.OTHER)


@dataclass(slots=True)
class StepFailure:
    """The first failure of a step, and the place of the operation that failed."""

    place: int
    cause: BaseException


@dataclass(eq=False, slots=True)
class LineStep:
    """What is issued up to and including an `optim_step`, or until it is given up.

    Attributes:
        number: how many `optim_step`s were issued before it.
        passes: the passes with gradients that were issued in it.
        succeeded: those that have succeeded.
        added: whether gradients of it may have reached the server.
        failure: its first failure, in line order.
        seen: whether the caller was handed that failure.
        applied: whether its `optim_step` was sent.
        emptied_by: the failure for which the step before it was given up.
        given_up: the passes that had succeeded in the steps given up just before it.
    """

    number: int
    passes: int = 0
    succeeded: int = 0
    added: bool = False
    failure: StepFailure | None = None
    seen: bool = False
    applied: bool = False
    emptied_by: BaseException | None = None
    given_up: int = 0


@dataclass(eq=False, slots=True)
class Ticket:
    """The place of one operation in the line.

    Attributes:
        place: from 0, in call order.
        role: what the operation does.
        step: the step it belongs to.
        maybe_added: whether some of its gradients may have reached the server.
        done: whether its outcome is known.
        previous: the last operation before it that changes the model, while its outcome is unknown.
        gives_up: the step that it puts an end to without an `optim_step`, or None.
        withdrawn: why the caller took it back after it was sent, or None.
        wanted_passes: how many passes its step must hold; None: any number.
    """

    place: int
    role: Role
    step: LineStep
    maybe_added: bool = False
    done: bool = False
    previous: Ticket | None = None
    gives_up: LineStep | None = None
    withdrawn: BaseException | None = None
    wanted_passes: int | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send it.

    Attributes:
        discard: send a discard before it, so that the server forgets a step that was given up.
    """

    discard: bool = False


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Wait, and ask again when `until` is done."""

    until: Ticket


@dataclass(frozen=True, slots=True)
class Skip:
    """Do not send it; it fails with `error`.

    Attributes:
        discard: send a discard in its place, so that the server forgets the step.
    """

    error: PrecedingOperationFailed | GradientsInDoubt | InvalidArgument
    discard: bool = False


Verdict = Send | WaitFor | Skip


class OperationLine:
    """Judges the operations of one client, by what has become of those before.

    Args:
        step_protocol: whether the server enforces whole steps.
        pipeline_steps: send an `optim_step` at once even where the server does not enforce them.
        accept_partial: apply what the server holds even where that is in doubt.

    Attributes:
        doubt: why the server's gradients are in doubt, or None.
        void_steps: the `optim_step`s that failed, so that the weights lack their steps.
    """

    def __init__(
        self,
        *,
        step_protocol: bool = False,
        pipeline_steps: bool = False,
        accept_partial: bool = False,
    ) -> None:
        self.step_protocol = step_protocol
        self.pipeline_steps = pipeline_steps
        self.accept_partial = accept_partial
        self.doubt: BaseException | None = None
        self.void_steps = 0
        self._places = 0
        self._steps = 0
        self._current = LineStep(0)
        self._last_change: Ticket | None = None
        self._held: LineStep | None = None  # of which something was sent, and no end of it yet

    @property
    def steps(self) -> int:
        """How many `optim_step`s were issued."""
        return self._steps

    # -- giving places -----------------------------------------------------------------------------

    def issue(self, role: Role, *, passes: int | None = None) -> Ticket:
        """Give an operation the next place in the line.

        Args:
            passes: how many passes the step of an `optim_step` must hold; None: any number.
        """
        gives_up = self._given_up_by(role)
        ticket = Ticket(self._places, role, self._current, gives_up=gives_up, wanted_passes=passes)
        self._places += 1
        if role.changes_model or role is Role.DISCARD:
            last, self._last_change = self._last_change, ticket
            ticket.previous = last if last is not None and not last.done else None
        if role is Role.GRADIENT:
            ticket.step.passes += 1
        elif role is Role.OPTIM:
            self._steps += 1
            self._current = LineStep(self._steps)
        return ticket

    def _given_up_by(self, role: Role) -> LineStep | None:
        """Open a new step where the operation begins one; return the step that this gives up."""
        old = self._current
        failed = old.failure is not None and old.seen
        if role in (Role.LOAD, Role.DISCARD):
            self._current = LineStep(self._steps)
        elif role.changes_model and failed:
            assert old.failure is not None
            given_up = old.given_up + old.succeeded
            cause = old.failure.cause
            self._current = LineStep(self._steps, emptied_by=cause, given_up=given_up)
        else:
            return None
        return old if old.passes or old.failure is not None else None

    def saw(self, ticket: Ticket) -> None:
        """Note that the caller was handed the failure of an operation."""
        if ticket.role.changes_model:
            ticket.step.seen = True

    def cancelled(self, ticket: Ticket, error: BaseException) -> None:
        """Note that the caller cancelled an operation before it was sent, and knows it."""
        self.will_fail(ticket, error)
        self.saw(ticket)

    def withdraw(self, ticket: Ticket, error: BaseException) -> bool:
        """Count a pass as failed and seen though it was sent; whether that could be done.

        It can't once its outcome is known, or the `optim_step` behind it is on its way.
        """
        if ticket.role is not Role.GRADIENT or ticket.done or ticket.step.applied:
            return False
        ticket.withdrawn = error
        self.cancelled(ticket, error)
        return True

    # -- judging -----------------------------------------------------------------------------------

    def verdict(self, ticket: Ticket, *, accept_partial: bool = False) -> Verdict:
        """Decide about the operation at the head of the line, and note it as sent if it may be."""
        if ticket.role is Role.DISCARD:
            return self._discard_by_hand(ticket)
        if not ticket.role.changes_model:
            return Send()
        failure = self.failure_before(ticket)
        if failure is not None:
            return self._skip(ticket, self.preceding_failed(failure))
        if ticket.role is Role.OPTIM:
            refusal = self._refusal(ticket)
            if refusal is not None:
                return self._skip(ticket, refusal)
            if not self.step_protocol:
                if not self.pipeline_steps and ticket.previous and not ticket.previous.done:
                    return WaitFor(ticket.previous)
                if self.doubt is not None and not (accept_partial or self.accept_partial):
                    return Skip(_in_doubt(self.doubt))
        return self._send(ticket)

    def _send(self, ticket: Ticket) -> Send:
        dead = self._held is not None and self._held is not ticket.step
        ticket.step.applied = ticket.role is Role.OPTIM
        self._held = None if ticket.role is Role.OPTIM else ticket.step
        # A load drops what is held by itself.
        return Send(discard=dead and self.step_protocol and ticket.role is not Role.LOAD)

    def _skip(self, ticket: Ticket, error: PrecedingOperationFailed | InvalidArgument) -> Skip:
        discard = ticket.role is Role.OPTIM and self.step_protocol and self._held is not None
        if discard:
            self._held = None
        return Skip(error, discard=discard)

    def _refusal(self, ticket: Ticket) -> PrecedingOperationFailed | InvalidArgument | None:
        """Why an `optim_step` in a step without a failure must not be sent, or None."""
        step, wanted = ticket.step, ticket.wanted_passes
        cause = step.emptied_by
        if cause is not None and not step.passes:
            return PrecedingOperationFailed(
                "not applied, since its step is empty: the passes before it were given up with a "
                f"failure, {_told(cause)}. What comes after this starts clean.",
                cause=cause,
            )
        if wanted is None or wanted == step.passes:
            return None
        holds = f"optim_step(passes={wanted}): its step holds {step.passes} passes, and is dropped"
        if cause is None:
            return InvalidArgument(f"{holds}. Nothing was applied; the next step starts clean.")
        return PrecedingOperationFailed(
            f"{holds}: others were given up with a failure, {_told(cause)}. Nothing was applied; "
            "the next step starts clean.",
            cause=cause,
        )

    def _discard_by_hand(self, ticket: Ticket) -> Verdict:
        if self.step_protocol:
            held, self._held = self._held, None
            return Send(discard=held is not None)
        if ticket.previous is not None and not ticket.previous.done:
            return WaitFor(ticket.previous)
        if ticket.gives_up is not None and ticket.gives_up.added:
            self.doubt = self.doubt or OperationCancelled("discard_step() gave the step up")
        return Send() if self.doubt is None else Skip(_in_doubt(self.doubt))

    def failure_before(self, ticket: Ticket) -> BaseException | None:
        """The failure that voids an operation that changes the model, if one is known."""
        failure = ticket.step.failure
        return failure.cause if failure is not None and failure.place < ticket.place else None

    @staticmethod
    def preceding_failed(cause: BaseException) -> PrecedingOperationFailed:
        """Make the error of an operation that `cause` voids."""
        return PrecedingOperationFailed(
            f"not applied, since an operation before it in the same step failed: {_told(cause)}. "
            "The step's gradients are dropped; what is issued from now on starts a clean step.",
            cause=cause,
        )

    # -- outcomes ----------------------------------------------------------------------------------

    def succeeded(self, ticket: Ticket) -> None:
        """Note that the server applied an operation."""
        self._end(ticket)
        if ticket.role is Role.GRADIENT:
            ticket.step.succeeded += 1
            ticket.step.added = True
            self._doubt_of(ticket.step)
        elif ticket.role is Role.OPTIM:
            # What was in doubt was applied, knowingly; nothing is held any more.
            self.doubt = None

    def will_fail(self, ticket: Ticket, error: BaseException) -> None:
        """Note that an operation fails, before its outcome is handed out.

        To be called before the next operation is judged.
        """
        if ticket.role not in (Role.GRADIENT, Role.LOAD) or _of_another(error):
            return
        known = ticket.step.failure
        if known is None or known.place > ticket.place:
            ticket.step.failure = StepFailure(ticket.place, error)

    def failed(self, ticket: Ticket, error: BaseException) -> None:
        """Note that an operation failed or was cancelled, when its outcome is handed out."""
        self.will_fail(ticket, error)
        self._end(ticket)
        step = ticket.step
        step.added = step.added or ticket.maybe_added
        self._doubt_of(step)
        if ticket.role is Role.OPTIM:
            self.void_steps += 1
            if step.added and not self.step_protocol:
                self.doubt = self.doubt or error  # its gradients were not applied, and lie there

    def _end(self, ticket: Ticket) -> None:
        ticket.done = True
        ticket.previous = None
        ticket.gives_up = None

    def _doubt_of(self, step: LineStep) -> None:
        if step.failure is not None and step.added and not self.step_protocol:
            self.doubt = self.doubt or step.failure.cause


def _in_doubt(cause: BaseException) -> GradientsInDoubt:
    return GradientsInDoubt(
        "the server may hold a part of a step that was given up, and offers no way to drop it: "
        "this optim_step would apply that part too. Make a new model from a saved state, or pass "
        "accept_partial=True, here or once to the service, to go on with what the server holds.",
        cause=cause,
    )


def _told(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {str(cause).rstrip('.')}"


def _of_another(error: BaseException) -> bool:
    """Whether an operation failed only because of the ones before it."""
    return isinstance(error, (PrecedingOperationFailed, GradientsInDoubt))
