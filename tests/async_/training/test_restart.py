"""A trainer's server that goes away under a running client and comes back: operations go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tinker
from aiohttp import web

from fireworks_training import supervised_datum
from fireworks_training.testing import TrainerServer
from tests.async_.conftest import Connect


@pytest.mark.parametrize("lost", [[], [2], [1, 2]], ids=["none", "one", "two"])
async def test_operations_wait_for_a_trainer_that_restarts(
    connect: Connect, lost: list[int]
) -> None:
    """Open requests are sent again under their numbers; each is executed once, and in order."""
    trainer, gone = TrainerServer(lost_answers=set(lost)), asyncio.Event()

    async def unreachable(path: str, body: dict[str, Any]) -> web.StreamResponse | None:
        if body["seq_id"] >= 3 and not gone.is_set():
            gone.set()
        return web.Response(status=503) if gone.is_set() and not back else None

    back: list[bool] = []
    trainer.before_submit = unreachable
    async with connect(trainer) as client:
        operations = [
            operation
            for _ in range(3)
            for operation in (
                client.forward_backward([supervised_datum([1, 2, 3], [0, 1, 1])], "cross_entropy"),
                client.optim_step(tinker.AdamParams()),
            )
        ]
        await gone.wait()
        await trainer.restart()
        back.append(True)
        for operation in operations:
            await operation
    assert [seq_id for _, seq_id in trainer.applied] == [1, 2, 3, 4, 5, 6]
    assert trainer.steps == [1, 1, 1]
