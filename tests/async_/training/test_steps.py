"""Whole steps, as their callers use them, against a scripted trainer over real HTTP.

The trainer counts datums: a pass of n datums adds n, and each applied step is such a sum. So what
was applied is read from its steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
import threading
from typing import Any

import pytest
from aiohttp import web

from fireworks_training import (
    APIFuture,
    FireworksTrainingError,
    GradientsInDoubt,
    InvalidArgument,
    OperationCancelled,
    OwnerLoopGone,
    PrecedingOperationFailed,
    RequestFailed,
)
from fireworks_training._portal import Lease, spawn_on
from fireworks_training.testing import TrainerServer
from tests.async_.conftest import connected
from tests.async_.training.support import ADAM, datum

ENFORCED = pytest.mark.parametrize("enforced", [True, False], ids=["enforced", "foreign"])
BAD = ("at the call", "in the encoding", "in the trainer", "refused", "lost answer")


def failing_marks(stub: TrainerServer) -> None:
    """Make datums of 5 tokens fail in the trainer, those of 6 be refused, and those of 7 have the
    connection cut after they were taken, once."""
    cut: set[int] = set()

    async def script(path: str, body: dict[str, Any]) -> web.Response | None:
        data = (body.get("forward_backward_input") or {}).get("data") or []
        length = len(data[0]["model_input"]["chunks"][0]["tokens"]) if data else 0
        if length == 6:
            return web.json_response({"error": "token 5 is outside the vocabulary"}, status=400)
        if length == 5:
            stub.failing.add(body["seq_id"])
        if length == 7 and body["seq_id"] not in cut:
            cut.add(body["seq_id"])
            stub.lost_answers.add(body["seq_id"])
        return None

    stub.before_submit = script


def batch(count: int, kind: str | None) -> list[Any]:
    """`count` datums, of which the first is bad in some way."""
    first = {
        None: datum(),
        "at the call": "no datum",
        "in the encoding": datum(weight=math.nan),
        "in the trainer": datum(5),
        "refused": datum(6),
        "lost answer": datum(7),
    }[kind]
    return [first, *[datum()] * (count - 1)]


@ENFORCED
@pytest.mark.parametrize("seed", range(3))
async def test_a_loop_that_logs_and_goes_on_loses_the_bad_batches_and_no_other(
    connect: Any, enforced: bool, seed: int
) -> None:
    chance = random.Random(seed)
    kinds = [chance.choice([None, None, *BAD]) for _ in range(24)]
    stub = TrainerServer(step_protocol=enforced)
    failing_marks(stub)
    lost: list[int] = []
    async with connect(stub) as client:
        for count, kind in enumerate(kinds, start=1):
            try:
                await client.forward_backward(batch(count, kind), "cross_entropy")
                await client.optim_step(ADAM)
            except FireworksTrainingError:
                lost.append(count)
    bad = [n for n, kind in enumerate(kinds, start=1) if kind not in (None, "lost answer")]
    assert lost == bad  # an answer that was lost is asked for again: that batch is not lost
    assert stub.steps == [n for n in range(1, 25) if n not in bad]


@ENFORCED
async def test_pipelined_steps_lose_the_bad_one(connect: Any, enforced: bool) -> None:
    stub = TrainerServer(step_protocol=enforced)
    failing_marks(stub)
    kinds = [None, "in the trainer", None, "refused", None]
    async with connect(stub) as client:
        issued = [
            (client.forward_backward(batch(n, kind), "cross_entropy"), client.optim_step(ADAM))
            for n, kind in enumerate(kinds, start=1)
        ]
        results = [await asyncio.gather(*pair, return_exceptions=True) for pair in issued]
    assert stub.steps == [1, 3, 5]
    for kind, (gradient, optim) in zip(kinds, results, strict=True):
        assert isinstance(gradient, RequestFailed) == (kind is not None)
        assert isinstance(optim, PrecedingOperationFailed) == (kind is not None)


async def test_micro_batches_gathered_are_whole_or_nothing(connect: Any) -> None:
    stub = TrainerServer()
    failing_marks(stub)
    async with connect(stub) as client:
        for kind in ("in the trainer", None):
            parts = [
                client.forward_backward(batch(n, kind if n == 2 else None), "cross_entropy")
                for n in (1, 2, 3)
            ]
            try:
                await asyncio.gather(*parts)
            except RequestFailed:
                continue
            await client.optim_step(ADAM)
    assert stub.steps == [6]


async def test_micro_batches_swallowed_one_by_one_are_counted(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stub = TrainerServer()
    failing_marks(stub)
    async with connect(stub) as client:

        async def micro_batches() -> None:
            for n, kind in ((1, None), (2, "in the trainer"), (3, None)):
                with contextlib.suppress(RequestFailed):
                    await client.forward_backward(batch(n, kind), "cross_entropy")

        await micro_batches()
        applied = await client.optim_step(ADAM)
        assert applied.metrics == {"grad_norm": 1.0, "given_up_passes": 1.0}
        await micro_batches()
        with pytest.raises(PrecedingOperationFailed, match="passes=3") as refused:
            await client.optim_step(ADAM, passes=3)
        assert isinstance(refused.value.cause, RequestFailed)
        await client.forward_backward([datum()] * 7, "cross_entropy")
        with pytest.raises(InvalidArgument, match="holds 1 passes"):
            await client.optim_step(ADAM, passes=2)
        await client.forward_backward([datum()] * 9, "cross_entropy")
        assert (await client.optim_step(ADAM, passes=1)).metrics == {"grad_norm": 1.0}
    assert stub.steps == [3, 9]
    warnings = [r.getMessage() for r in caplog.records if "a new step begins" in r.getMessage()]
    assert len(warnings) == 2
    assert all("1 passes of the step before" in warning for warning in warnings)


async def test_what_looks_at_a_failure_without_being_handed_it_has_not_seen_it(
    connect: Any,
) -> None:
    stub = TrainerServer()
    failing_marks(stub)
    async with connect(stub) as client:
        bad = client.forward_backward(batch(1, "in the trainer"), "cross_entropy")
        plain = bad.future()
        await client.forward([datum()])  # which the trainer ran after it
        voided = client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(PrecedingOperationFailed):
            await voided  # which is handed out, so that the next one begins a step
        await client.forward_backward([datum()] * 4, "cross_entropy")
        await client.optim_step(ADAM)
        assert isinstance(plain.exception(), RequestFailed)
    assert stub.steps == [4]


@pytest.mark.parametrize("way", ["exception", "result", "callback", "wrap_future"])
async def test_each_way_to_be_handed_a_failure_is_seeing_it(connect: Any, way: str) -> None:
    stub = TrainerServer()
    failing_marks(stub)
    async with connect(stub) as client:
        plain = client.forward_backward(batch(1, "in the trainer"), "cross_entropy").future()
        if way == "wrap_future":
            with pytest.raises(RequestFailed):
                await asyncio.wrap_future(plain)
        elif way == "callback":
            called = asyncio.Event()
            plain.add_done_callback(lambda _: called.set())
            await called.wait()
        elif way == "exception":
            assert await asyncio.to_thread(plain.exception, 5)
        else:
            with pytest.raises(RequestFailed):
                await asyncio.to_thread(plain.result, 5)
        await client.forward_backward([datum()] * 2, "cross_entropy")
        await client.optim_step(ADAM)
    assert stub.steps == [2]


async def test_a_pass_that_was_cancelled_is_a_failure_that_was_seen(connect: Any) -> None:
    release = asyncio.Event()

    async def hold(path: str, body: dict[str, Any]) -> None:
        if body["seq_id"] == 1:
            await release.wait()

    stub = TrainerServer(step_protocol=False, before_submit=hold)
    async with connect(stub) as client:
        client.save_state("first")  # holds the line
        cancelled = client.forward_backward([datum()], "cross_entropy")
        assert cancelled.cancel()
        assert cancelled.cancel()
        step = client.forward_backward([datum()] * 2, "cross_entropy"), client.optim_step(ADAM)
        release.set()
        with pytest.raises(OperationCancelled):
            await cancelled
        await asyncio.gather(*step)
    assert stub.steps == [2]


async def test_two_threads_share_one_mark(connect: Any) -> None:
    stub = TrainerServer()
    failing_marks(stub)
    async with connect(stub) as client:

        def first() -> None:
            with pytest.raises(RequestFailed):
                bad = batch(1, "in the trainer")
                client.forward_backward(bad, "cross_entropy").result(5)

        def second() -> None:
            client.forward_backward([datum()] * 2, "cross_entropy").result(5)
            client.optim_step(ADAM).result(5)

        await asyncio.to_thread(first)
        await asyncio.to_thread(second)
    assert stub.steps == [2]


@ENFORCED
async def test_an_optim_step_that_fails_drops_its_own_step(connect: Any, enforced: bool) -> None:
    stub = TrainerServer(step_protocol=enforced, failing={1, 3})
    async with connect(stub) as client:
        with pytest.raises(RequestFailed):
            await client.optim_step(ADAM)  # of an empty step
        await client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(RequestFailed):
            await client.optim_step(ADAM)
        await client.forward_backward([datum()] * 5, "cross_entropy")
        if enforced:
            await client.optim_step(ADAM)
        else:
            with pytest.raises(GradientsInDoubt, match="accept_partial"):
                await client.optim_step(ADAM)
    assert stub.steps == ([5] if enforced else [])


async def test_a_step_is_dropped_by_hand(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        await client.forward_backward([datum()], "cross_entropy")
        client.forward_backward([datum()] * 2, "cross_entropy")
        assert await client.discard_step() == 2
        await client.forward_backward([datum()] * 4, "cross_entropy")
        await client.optim_step(ADAM)
        assert await client.discard_step() == 0
    assert stub.steps == [4]


async def test_a_foreign_trainer_that_broke_in_a_pass_may_hold_a_part(connect: Any) -> None:
    stub = TrainerServer(step_protocol=False, failing={1}, category="server")
    async with connect(stub) as client:
        with pytest.raises(RequestFailed):
            await client.forward_backward([datum()], "cross_entropy")
        await client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(GradientsInDoubt):
            await client.optim_step(ADAM)


async def test_a_part_is_accepted_once_for_all(connect: Any) -> None:
    stub = TrainerServer(step_protocol=False, failing={1}, category="server")
    async with connect(stub, accept_partial=True) as client:
        with pytest.raises(RequestFailed):
            await client.forward_backward([datum()], "cross_entropy")
        await client.forward_backward([datum()] * 2, "cross_entropy")
        await client.optim_step(ADAM)
    assert stub.steps == [2]


async def test_time_outs_and_cancelled_waiters_withdraw_nothing(connect: Any) -> None:
    release = asyncio.Event()

    async def hold(request_id: str) -> None:
        if request_id == "r1":
            await release.wait()

    stub = TrainerServer(before_poll=hold)
    async with connect(stub) as client:
        gradient = client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(TimeoutError):
            await gradient.result_async(0)
        waiter = asyncio.ensure_future(gradient.coroutine())
        await asyncio.sleep(0)
        waiter.cancel()
        release.set()
        await client.optim_step(ADAM)
    assert stub.steps == [1]


def test_ctrl_c_in_the_wait_for_a_pass_withdraws_it() -> None:
    """The service's loop is another thread's, as with the blocking classes."""
    interrupted: list[str] = []

    async def script(request_id: str) -> None:
        if request_id == "r1" and not interrupted:
            interrupted.append(request_id)
            main = threading.main_thread().ident
            assert main is not None
            # By then the main thread waits for the result.
            asyncio.get_running_loop().call_later(0.3, signal.pthread_kill, main, signal.SIGINT)

    stub = TrainerServer(before_poll=script)
    stub.executing = False
    lease = Lease()
    held = connected(stub)
    try:
        client = spawn_on(lease.loop, held.__aenter__, label="connect").result(10)
        with pytest.raises(KeyboardInterrupt):
            client.forward_backward([datum()], "cross_entropy").result(20)
        stub.executing = True
        gradient = client.forward_backward([datum()] * 2, "cross_entropy")
        gradient.result(10)
        client.optim_step(ADAM).result(10)
        spawn_on(lease.loop, held.__aexit__, None, None, None, label="close").result(10)
    finally:
        lease.release()
    assert stub.steps == [2]


async def test_a_save_after_void_steps_says_how_many_its_weights_lack(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(TrainerServer(failing={1})) as client:
        with pytest.raises(RequestFailed):
            await client.optim_step(ADAM)
        await client.save_state("one")
        await client.save_state("two")
    said = [r for r in caplog.records if "lack" in r.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert "lack 1 steps" in said[0].getMessage()


async def test_a_failure_speaks_when_nobody_waits_for_it_and_once(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stub = TrainerServer(failing={1, 3})
    async with connect(stub) as client:
        with pytest.raises(RequestFailed):
            await client.forward_backward([datum()], "cross_entropy")
        assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
        client.forward_backward([datum()], "cross_entropy")
        await client.forward([datum()])
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1, errors
    assert "operation 2 (forward_backward) of step 1 failed" in errors[0]


# -- the end of the loop ---------------------------------------------------------------------------


def test_what_a_loop_leaves_behind_fails_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    stub = TrainerServer()
    stub.executing = False
    kept: list[Any] = []

    async def program() -> list[Any]:
        held = connected(stub)
        kept.append(held)
        client = await held.__aenter__()
        return [client.forward([datum()]) for _ in range(200)]

    futures = asyncio.run(program())
    for future in futures:
        with pytest.raises(OwnerLoopGone, match="async with"):
            future.result(1)
    said = [r for r in caplog.records if "failed: OwnerLoopGone" in r.getMessage()]
    assert len(said) == 1


def test_a_loop_that_is_closed_under_its_work_ends_the_waits() -> None:
    """No task is cancelled here: the waiters look at the loop themselves."""
    loop = asyncio.new_event_loop()

    async def never() -> None:
        await asyncio.Event().wait()

    outcomes = [spawn_on(loop, never, label="work") for _ in range(100)]
    plain = APIFuture(outcomes[-1]).future()
    loop.run_until_complete(asyncio.sleep(0))
    late = [spawn_on(loop, never, label="work") for _ in range(100)]  # lie in the inbox
    loop.close()
    for outcome in outcomes + late:
        with pytest.raises(OwnerLoopGone):
            APIFuture(outcome).result(5)
    assert isinstance(plain.exception(5), OwnerLoopGone)

    async def elsewhere() -> None:
        with pytest.raises(OwnerLoopGone):
            await APIFuture(await asyncio.to_thread(lambda: late[0]))

    asyncio.run(elsewhere())


async def test_waits_that_time_out_leave_nothing_behind(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        stub.executing = False
        future = client.forward([datum()])
        for _ in range(200):
            with pytest.raises(TimeoutError):
                await future.result_async(0)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(future.result, 0)
        assert len(future._outcome._callbacks or ()) < 5
        assert not future._outcome.is_waited_for
