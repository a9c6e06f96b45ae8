"""When a call that takes long is logged."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import pytest

from fireworks_training._async.sampling.progress import Progress
from tests.async_.sampling.support import until


@dataclass(eq=False)
class Call:
    labels: str
    started: float
    total: int = 1
    done: int = 0


async def test_the_oldest_call_is_logged_at_doubling_intervals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = asyncio.get_running_loop().time
    first, second = Call(" [step 1]", clock()), Call(" [step 2]", clock())
    progress = Progress(lambda: 1, first_report=0.02)
    with caplog.at_level(logging.WARNING):
        progress.begin(first)
        progress.begin(second)
        await until(lambda: len(caplog.records) == 3)
        assert "step 2" not in caplog.text
        times = [record.created for record in caplog.records]
        progress.end(first)
        await until(lambda: "step 2" in caplog.text)
    progress.end(second)
    assert times[1] - times[0] > 0.03
    assert times[2] - times[1] > 0.06


async def test_what_waits_to_retry_is_logged_with_the_reason() -> None:
    progress = Progress(lambda: 1)
    call = Call("", 0.0)
    progress.begin(call)
    progress.failed("the server answered 503")
    assert "503" not in progress.describe(call, 1.0)
    progress.backing_off(1)
    assert "1 waiting to retry (last failure: the server answered 503)" in progress.describe(
        call, 1.0
    )
    progress.backing_off(-1)
    progress.end(call)
