"""The rules of the line, one by one."""

from __future__ import annotations

from fireworks_training._core.operations import OperationLine, Role, Send, Skip, WaitFor
from fireworks_training.errors import GradientsInDoubt, PrecedingOperationFailed, RequestFailed

BROKEN = RequestFailed("broken", category="user")


def test_steps_end_with_their_optim_step() -> None:
    line = OperationLine(step_protocol=True)
    roles = [Role.GRADIENT, Role.FORWARD, Role.OPTIM, Role.SAVE, Role.GRADIENT, Role.OPTIM]
    assert [line.issue(role).step for role in roles] == [0, 0, 0, 1, 1, 1]


def test_a_failed_gradient_voids_the_rest_of_its_step_and_no_more() -> None:
    line = OperationLine(step_protocol=True)
    first, second, save, forward, optim, following = map(
        line.issue,
        [Role.GRADIENT, Role.GRADIENT, Role.SAVE, Role.FORWARD, Role.OPTIM, Role.GRADIENT],
    )
    line.failed(first, BROKEN)
    verdict = line.verdict(second)
    assert isinstance(verdict, Skip)
    assert isinstance(verdict.error, PrecedingOperationFailed)
    assert verdict.error.cause is BROKEN
    assert not verdict.discard
    assert line.verdict(save) == Send()
    assert line.verdict(forward) == Send()
    ending = line.verdict(optim)
    assert isinstance(ending, Skip)
    assert ending.discard
    assert line.verdict(following) == Send()


def test_a_failure_counts_before_its_outcome_is_handed_out() -> None:
    line = OperationLine(step_protocol=True)
    gradient, optim = map(line.issue, [Role.GRADIENT, Role.OPTIM])
    line.will_fail(gradient, BROKEN)
    assert isinstance(line.verdict(optim), Skip)


def test_the_failure_of_an_optim_step_takes_the_following_step_with_it() -> None:
    line = OperationLine(step_protocol=True)
    gradient, optim, next_gradient, next_optim, after = map(
        line.issue, [Role.GRADIENT, Role.OPTIM, Role.GRADIENT, Role.OPTIM, Role.GRADIENT]
    )
    line.succeeded(gradient)
    line.failed(optim, BROKEN)
    assert isinstance(line.verdict(next_gradient), Skip)
    ending = line.verdict(next_optim)
    assert isinstance(ending, Skip)
    assert ending.discard
    line.failed(next_gradient, line.preceding_failed(BROKEN))
    line.failed(next_optim, line.preceding_failed(BROKEN))
    assert line.verdict(after) == Send()


def test_an_optim_step_voided_by_its_step_spares_the_following_one() -> None:
    line = OperationLine(step_protocol=True)
    gradient, optim, following = map(line.issue, [Role.GRADIENT, Role.OPTIM, Role.OPTIM])
    line.failed(gradient, BROKEN)
    line.failed(optim, line.preceding_failed(BROKEN))
    assert line.verdict(following) == Send()


def test_a_failed_load_takes_the_rest_of_its_step() -> None:
    line = OperationLine(step_protocol=True)
    before, load, gradient, optim, after = map(
        line.issue, [Role.GRADIENT, Role.LOAD, Role.GRADIENT, Role.OPTIM, Role.GRADIENT]
    )
    line.failed(load, BROKEN)
    assert line.verdict(before) == Send()
    assert isinstance(line.verdict(gradient), Skip)
    assert isinstance(line.verdict(optim), Skip)
    assert line.verdict(after) == Send()


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
    line.failed(voided, line.preceding_failed(BROKEN))
    doubt = line.verdict(later)
    assert isinstance(doubt, Skip)
    assert isinstance(doubt.error, GradientsInDoubt)


def test_what_was_partly_added_by_one_operation_is_in_doubt_too() -> None:
    line = OperationLine()
    gradient, optim, later = map(line.issue, [Role.GRADIENT, Role.OPTIM, Role.OPTIM])
    gradient.maybe_added = True  # one of its chunks was taken, another failed
    line.failed(gradient, BROKEN)
    line.failed(optim, line.preceding_failed(BROKEN))
    assert isinstance(line.verdict(later), Skip)
