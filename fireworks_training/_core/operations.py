"""The line of a training client: which operation may be sent, which must fail, and why.

A client's operations stand in one line; call order is execution order. The operations up to and
including an `optim_step` are one *step*, and a step is applied whole or not at all:

1. A failed or cancelled operation that adds gradients fails every later operation of its step that
   adds gradients or changes weights, up to and including its `optim_step`.
2. An `optim_step` that fails by itself takes the following step with it; a load that fails by
   itself takes the rest of its step.
3. Passes without gradients and saves fail alone, and are not touched by the failures of others.
4. Outcomes of operations that touch gradients or weights are handed out in line order, so each
   `PrecedingOperationFailed` can name its cause.

A server that speaks `step_protocol` enforces the same rules for what it has accepted; there the
client only withholds what it knows to be void, and sends a *discard* in the place of the withheld
`optim_step`. For any other server the client holds back an `optim_step` until the outcomes of its
step are known; when part of a failed step may have been added, it is *in doubt* from then on.

This module takes events and gives verdicts. It knows no loop, no clock and no wire. The trainer of
the local platform keeps the same rules by an implementation of its own
(`local.trainer.queue.line`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fireworks_training.errors import (
    GradientsInDoubt,
    OperationError,
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


@dataclass(eq=False, slots=True)
class Ticket:
    """The place of one operation in the line.

    Attributes:
        place: from 0, in call order.
        role: what the operation does.
        step: the step it belongs to, from 0.
        maybe_added: whether some of its gradients may have reached the server.
        done: whether its outcome is known.
        previous: the last operation before it that changes the model, while its outcome is unknown.
    """

    place: int
    role: Role
    step: int
    maybe_added: bool = False
    done: bool = False
    previous: Ticket | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send it."""


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

    error: OperationError
    discard: bool = False


Verdict = Send | WaitFor | Skip


@dataclass(slots=True)
class StepFailure:
    """The first failure of a step, and the place of the operation that failed."""

    place: int
    cause: BaseException


@dataclass(slots=True)
class OperationLine:
    """Judges the operations of one client, by what has become of those before.

    Attributes:
        step_protocol: whether the server enforces atomic steps.
        pipeline_steps: send an `optim_step` at once even where the server does not enforce them.
        doubt: why the server's gradients are in doubt, or None.
    """

    step_protocol: bool = False
    pipeline_steps: bool = False
    doubt: BaseException | None = None
    _places: int = 0
    _step: int = 0
    _failures: dict[int, StepFailure] = field(default_factory=dict[int, StepFailure])
    _added: set[int] = field(default_factory=set[int])
    _last_change: Ticket | None = None

    @property
    def steps(self) -> int:
        """How many `optim_step`s were issued."""
        return self._step

    def issue(self, role: Role) -> Ticket:
        """Give an operation the next place in the line."""
        ticket = Ticket(self._places, role, self._step)
        self._places += 1
        if role.changes_model:
            last = self._last_change
            ticket.previous = last if last is not None and not last.done else None
            self._last_change = ticket
        if role is Role.OPTIM:
            self._step += 1
        return ticket

    def verdict(self, ticket: Ticket, *, accept_partial: bool = False) -> Verdict:
        """Decide about the operation at the head of the line."""
        if not ticket.role.changes_model:
            return Send()
        failure = self.failure_before(ticket)
        if failure is not None:
            ends = ticket.role is Role.OPTIM
            return Skip(self.preceding_failed(failure), discard=ends and self.step_protocol)
        if ticket.role is not Role.OPTIM or self.step_protocol:
            return Send()
        if not self.pipeline_steps and ticket.previous is not None and not ticket.previous.done:
            return WaitFor(ticket.previous)
        if self.doubt is not None and not accept_partial:
            return Skip(
                GradientsInDoubt(
                    "the server may hold part of a step that failed, and does not offer to drop "
                    "it: this optim_step would apply that part too. Make a new model from a saved "
                    "state, or pass accept_partial=True to go on with what the server holds.",
                    cause=self.doubt,
                )
            )
        return Send()

    def failure_before(self, ticket: Ticket) -> BaseException | None:
        """The failure that voids an operation that changes the model, if one is known."""
        failure = self._failures.get(ticket.step)
        return failure.cause if failure is not None and failure.place < ticket.place else None

    @staticmethod
    def preceding_failed(cause: BaseException) -> PrecedingOperationFailed:
        """Make the error of an operation that `cause` voids."""
        return PrecedingOperationFailed(
            "not applied, since an operation before it in the same step failed: "
            f"{type(cause).__name__}: {str(cause).rstrip('.')}. The step's gradients are dropped. "
            "Its optim_step ends it, and fails too; what comes after that starts clean.",
            cause=cause,
        )

    def succeeded(self, ticket: Ticket) -> None:
        """Note that the server applied an operation."""
        self._end(ticket)
        if ticket.role is Role.GRADIENT:
            ticket.maybe_added = True
            self._note_added(ticket)
        elif ticket.role is Role.OPTIM:
            # What was in doubt was applied, knowingly; nothing is held any more.
            self.doubt = None
            self._forget(ticket.step)

    def will_fail(self, ticket: Ticket, error: BaseException) -> None:
        """Note that an operation fails, before its outcome is handed out.

        To be called before the next operation is judged.
        """
        if not ticket.role.changes_model or _of_another(error):
            return
        step = ticket.step + 1 if ticket.role is Role.OPTIM else ticket.step
        known = self._failures.get(step)
        if known is None or known.place > ticket.place:
            self._failures[step] = StepFailure(ticket.place, error)

    def failed(self, ticket: Ticket, error: BaseException) -> None:
        """Note that an operation failed or was cancelled, when its outcome is handed out."""
        self.will_fail(ticket, error)
        self._end(ticket)
        if not ticket.role.changes_model:
            return
        if ticket.maybe_added:
            self._note_added(ticket)
        if ticket.role is Role.OPTIM:
            if not _of_another(error) and ticket.step in self._added and not self.step_protocol:
                self.doubt = self.doubt or error  # its gradients were not applied, and lie there
            self._doubt_of(ticket.step)
            self._forget(ticket.step)

    def _end(self, ticket: Ticket) -> None:
        ticket.done = True
        ticket.previous = None

    def _note_added(self, ticket: Ticket) -> None:
        self._added.add(ticket.step)
        self._doubt_of(ticket.step)

    def _doubt_of(self, step: int) -> None:
        failure = self._failures.get(step)
        if failure is not None and step in self._added and not self.step_protocol:
            self.doubt = self.doubt or failure.cause

    def _forget(self, step: int) -> None:
        for old in [known for known in self._failures if known <= step]:
            del self._failures[old]
        self._added = {added for added in self._added if added > step}


def _of_another(error: BaseException) -> bool:
    """Whether an operation failed only because of the ones before it."""
    return isinstance(error, (PrecedingOperationFailed, GradientsInDoubt))
