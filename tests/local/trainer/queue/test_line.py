"""The line: order, idempotency, atomic steps; against a model that applies the rules literally."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireworks_training._core.operations import Role
from fireworks_training.local.trainer.queue.line import (
    Closed,
    Expired,
    Failure,
    ModelLine,
    QueueLimits,
    Taken,
    TooFarAhead,
    UnknownPlace,
)

GRADIENT, OPTIM, SAVE, LOAD, DISCARD = (
    Role.GRADIENT,
    Role.OPTIM,
    Role.SAVE,
    Role.LOAD,
    Role.DISCARD,
)


@dataclass(frozen=True)
class Op:
    """`fate`: "works", "fails" when it runs, or "refused" when it is submitted."""

    role: Role
    fate: str


def put(line: ModelLine[Op, str], seq_id: int, op: Op, digest: bytes = b"x") -> bool:
    operation = Failure("refused") if op.fate == "refused" else op
    return line.submit(seq_id, digest, op.role, operation, 1)


class Weights:
    """What operations do to a trainer: which passes are accumulated, and which were applied."""

    def __init__(self) -> None:
        self.accumulated: list[int] = []
        self.applied: list[tuple[int, ...]] = []
        self.order: list[int] = []

    def drain(self, line: ModelLine[Op, str]) -> None:
        while (run := line.advance().run) is not None:
            self.order.append(run.seq_id)
            if run.drop_gradients:
                self.accumulated = []
            if run.operation.fate == "fails":
                line.fail(Failure(f"{run.seq_id} failed"))
                continue
            match run.operation.role:
                case Role.GRADIENT:
                    self.accumulated.append(run.seq_id)
                case Role.OPTIM:
                    self.applied.append(tuple(self.accumulated))
                    self.accumulated = []
                case Role.LOAD | Role.DISCARD:
                    self.accumulated = []
                case Role.FORWARD | Role.SAVE | Role.OTHER:
                    pass
            line.succeed("done")


def expected(ops: list[Op]) -> tuple[list[str], list[tuple[int, ...]]]:
    """Outcome of each operation and passes of each applied step, by the rules as they are put."""
    outcomes: list[str] = []
    applied: list[tuple[int, ...]] = []
    accumulated: list[int] = []
    broken = False
    for place, op in enumerate(ops, start=1):
        stopped = broken and op.role in (GRADIENT, OPTIM) and op.fate != "refused"
        outcomes.append("preceded" if stopped else "done" if op.fate == "works" else "failed")
        if stopped:
            if op.role is OPTIM:
                broken = False
            continue
        if op.fate != "works":
            if op.role in (GRADIENT, LOAD, OPTIM):
                broken, accumulated = op.role is not OPTIM, []
            continue
        if op.role is GRADIENT:
            accumulated.append(place)
        elif op.role is OPTIM:
            applied.append(tuple(accumulated))
            accumulated = []
        elif op.role in (LOAD, DISCARD):
            broken, accumulated = False, []
    return outcomes, applied


def outcome(line: ModelLine[Op, str], seq_id: int) -> str:
    result = line.result(seq_id)
    if isinstance(result, Failure):
        return "preceded" if result.error_class == "PrecedingOperationFailed" else "failed"
    return str(result)


operations = st.builds(
    Op, st.sampled_from(list(Role)), st.sampled_from(["works", "works", "fails", "refused"])
)


@settings(deadline=None)
@given(st.lists(operations, max_size=24), st.data())
def test_any_arrival_gives_the_outcome_of_the_line_in_order(
    ops: list[Op], data: st.DataObject
) -> None:
    line: ModelLine[Op, str] = ModelLine()
    weights = Weights()
    arrivals = data.draw(st.permutations(range(1, len(ops) + 1)))
    for seq_id in arrivals:
        assert put(line, seq_id, ops[seq_id - 1])
        if data.draw(st.booleans()):
            weights.drain(line)
        if data.draw(st.booleans()):
            again = data.draw(st.sampled_from(arrivals[: arrivals.index(seq_id) + 1]))
            assert not put(line, again, ops[again - 1])
            with pytest.raises(Taken):
                put(line, again, ops[again - 1], b"other")
    weights.drain(line)

    outcomes, applied = expected(ops)
    assert [outcome(line, seq_id) for seq_id in range(1, len(ops) + 1)] == outcomes
    assert weights.applied == applied
    assert weights.order == sorted(set(weights.order))
    assert line.idle


@settings(deadline=None)
@given(st.lists(operations, min_size=1, max_size=24))
def test_an_applied_step_holds_all_of_its_passes_or_is_not_applied(ops: list[Op]) -> None:
    line: ModelLine[Op, str] = ModelLine()
    weights = Weights()
    for seq_id, op in enumerate(ops, start=1):
        put(line, seq_id, op)
    weights.drain(line)
    start = 0
    applied = iter(weights.applied)
    for place, op in enumerate(ops, start=1):
        if op.role in (LOAD, DISCARD) and outcome(line, place) == "done":
            start = place
        if op.role is OPTIM:
            if outcome(line, place) == "done":
                passes = [p for p in range(start + 1, place) if ops[p - 1].role is GRADIENT]
                assert next(applied) == tuple(passes)
            start = place
    assert next(applied, None) is None


def outcomes_of(*ops: Op) -> list[str]:
    line: ModelLine[Op, str] = ModelLine()
    for seq_id, op in enumerate(ops, start=1):
        put(line, seq_id, op)
    Weights().drain(line)
    return [outcome(line, seq_id) for seq_id in range(1, len(ops) + 1)]


def test_a_failed_pass_takes_its_step_and_no_more() -> None:
    assert outcomes_of(
        Op(GRADIENT, "works"),
        Op(GRADIENT, "fails"),
        Op(SAVE, "works"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
    ) == ["done", "failed", "done", "preceded", "preceded", "done", "done"]


def test_a_load_begins_a_new_step() -> None:
    assert outcomes_of(
        Op(GRADIENT, "fails"),
        Op(LOAD, "works"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
        Op(LOAD, "fails"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
    ) == ["failed", "done", "done", "done", "failed", "preceded", "preceded"]


@pytest.mark.parametrize("fate", ["fails", "refused"])
def test_an_optim_step_that_fails_drops_its_own_step_alone(fate: str) -> None:
    assert outcomes_of(
        Op(GRADIENT, "works"),
        Op(OPTIM, fate),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
    ) == ["done", "failed", "done", "done", "done", "done"]


def test_a_refused_end_of_a_failed_step_ends_it() -> None:
    assert outcomes_of(
        Op(GRADIENT, "fails"),
        Op(OPTIM, "refused"),
        Op(GRADIENT, "works"),
        Op(OPTIM, "works"),
        Op(GRADIENT, "works"),
    ) == ["failed", "failed", "done", "done", "done"]


def test_discarding_begins_a_new_step() -> None:
    assert outcomes_of(
        Op(GRADIENT, "fails"), Op(GRADIENT, "works"), Op(DISCARD, "works"), Op(GRADIENT, "works")
    ) == ["failed", "preceded", "done", "done"]


def test_the_cause_is_the_first_failure_of_the_step() -> None:
    line: ModelLine[Op, str] = ModelLine()
    for seq_id, op in enumerate(
        [Op(GRADIENT, "works"), Op(GRADIENT, "fails"), Op(GRADIENT, "refused"), Op(OPTIM, "works")],
        start=1,
    ):
        put(line, seq_id, op)
    Weights().drain(line)
    failure = line.result(4)
    assert isinstance(failure, Failure)
    assert failure.cause == Failure("2 failed")
    assert failure.cause_seq_id == 2


def test_one_at_a_time_and_in_order() -> None:
    line: ModelLine[Op, str] = ModelLine()
    put(line, 2, Op(SAVE, "works"))
    assert line.advance().run is None
    assert line.waits_for == 1
    put(line, 1, Op(SAVE, "works"))
    first = line.advance().run
    assert first is not None
    assert first.seq_id == 1
    assert line.advance().run is None, "one is running"
    assert line.result(1) is None
    assert line.result(2) is None
    line.succeed("done")
    second = line.advance().run
    assert second is not None
    assert second.seq_id == 2


def test_bounds() -> None:
    line: ModelLine[Op, str] = ModelLine(QueueLimits(ahead=4, ahead_bytes=2, results=3, digests=4))
    works = Op(SAVE, "works")
    with pytest.raises(TooFarAhead):
        put(line, 5, works)
    put(line, 3, works)
    put(line, 4, works)
    with pytest.raises(TooFarAhead):
        put(line, 2, works)
    put(line, 1, works)  # the next to run is always taken
    weights = Weights()
    weights.drain(line)
    put(line, 2, works)
    weights.drain(line)
    assert [outcome(line, seq_id) for seq_id in (2, 3, 4)] == ["done"] * 3
    with pytest.raises(Expired):
        line.result(1)
    with pytest.raises(UnknownPlace):
        line.result(5)
    for seq_id in range(5, 10):
        put(line, seq_id, works)
        weights.drain(line)
    with pytest.raises(Taken, match="long ago"):
        put(line, 1, works)
    assert not put(line, 9, works)


def test_results_that_were_delivered_are_dropped_first() -> None:
    line: ModelLine[Op, str] = ModelLine(QueueLimits(results=3))
    for seq_id in range(1, 4):
        put(line, seq_id, Op(SAVE, "works"))
    Weights().drain(line)
    line.delivered(3)
    put(line, 4, Op(SAVE, "works"))
    Weights().drain(line)
    assert [outcome(line, seq_id) for seq_id in (1, 2, 4)] == ["done"] * 3
    with pytest.raises(Expired):
        line.result(3)


def test_a_large_result_stays_until_the_next_one() -> None:
    line: ModelLine[Op, str] = ModelLine(QueueLimits(result_bytes=10))
    put(line, 1, Op(SAVE, "works"))
    assert line.advance().run is not None
    line.succeed("large", 100)
    assert line.result(1) == "large"
    put(line, 2, Op(SAVE, "works"))
    assert line.advance().run is not None
    line.succeed("small", 1)
    assert line.result(2) == "small"
    with pytest.raises(Expired):
        line.result(1)


def test_a_closed_line_finishes_what_it_has() -> None:
    line: ModelLine[Op, str] = ModelLine()
    put(line, 1, Op(SAVE, "works"))
    line.close()
    assert not put(line, 1, Op(SAVE, "works"))
    with pytest.raises(Closed):
        put(line, 2, Op(SAVE, "works"))
    Weights().drain(line)
    assert outcome(line, 1) == "done"


def test_a_detached_operation_ends_later_and_holds_nobody_up() -> None:
    line: ModelLine[Op, str] = ModelLine()
    for seq_id, role in enumerate((SAVE, GRADIENT, SAVE), start=1):
        put(line, seq_id, Op(role, "works"))
    assert line.advance().run is not None
    assert line.detach() == 1
    assert line.result(1) is None
    run = line.advance().run
    assert run is not None
    assert run.seq_id == 2
    line.succeed("added")
    assert line.advance().run is not None
    assert line.detach() == 3
    line.settle(3, "second")
    line.settle(1, Failure("no room"))
    assert (outcome(line, 1), line.result(2), line.result(3)) == ("failed", "added", "second")
    # It concerns no other: the step goes on.
    put(line, 4, Op(OPTIM, "works"))
    assert line.advance().run is not None


def test_what_concerns_others_can_not_leave_the_line() -> None:
    line: ModelLine[Op, str] = ModelLine()
    put(line, 1, Op(GRADIENT, "works"))
    assert line.advance().run is not None
    with pytest.raises(RuntimeError, match="adds gradients"):
        line.detach()


@pytest.mark.parametrize("fate", ["fails", "refused"])
@pytest.mark.parametrize(("atomic", "applied"), [(True, [(5,)]), (False, [(1,), (5,)])])
def test_without_atomic_steps_only_what_failed_fails(
    fate: str, atomic: bool, applied: list[tuple[int, ...]]
) -> None:
    line, weights = ModelLine[Op, str](atomic_steps=atomic), Weights()
    works = "works"
    ops = [Op(GRADIENT, works), Op(GRADIENT, fate), Op(SAVE, works), Op(OPTIM, works)]
    for seq_id, op in enumerate([*ops, Op(GRADIENT, works), Op(OPTIM, works)], 1):
        put(line, seq_id, op)
    weights.drain(line)
    assert weights.applied == applied
