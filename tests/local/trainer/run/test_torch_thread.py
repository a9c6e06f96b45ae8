"""The torch thread: order, errors, callers that go away, and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from fireworks_training.local.trainer.run.torch_thread import TorchThread


@pytest.fixture
def torch_thread() -> Iterator[TorchThread]:
    thread = TorchThread()
    yield thread
    assert thread.stop(5.0)


async def test_it_runs_in_one_thread_with_one_torch_thread(torch_thread: TorchThread) -> None:
    idents = {await torch_thread.run(threading.get_ident) for _ in range(2)}
    assert len(idents) == 1
    assert idents != {threading.get_ident()}
    assert await torch_thread.run(torch.get_num_threads) == 1
    assert await torch_thread.run(torch.are_deterministic_algorithms_enabled)


async def test_an_error_reaches_the_caller(torch_thread: TorchThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await torch_thread.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="StopIteration"):  # which no future takes
        await asyncio.wait_for(torch_thread.run(lambda: next(iter(()))), 10)
    assert await torch_thread.run(lambda: 1) == 1


async def test_a_caller_that_goes_away_changes_nothing(torch_thread: TorchThread) -> None:
    go_on, ran = threading.Event(), threading.Event()

    def work() -> None:
        assert go_on.wait(5.0)
        ran.set()

    caller = asyncio.create_task(torch_thread.run(work))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    assert await torch_thread.run(ran.is_set)


async def test_stopping_does_not_wait_for_ever() -> None:
    thread = TorchThread()
    go_on = threading.Event()
    caller = asyncio.create_task(thread.run(lambda: go_on.wait(5.0)))
    await asyncio.sleep(0)
    assert not thread.stop(0.01)
    go_on.set()
    assert await caller
    assert thread.stop(5.0)
