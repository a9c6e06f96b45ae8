"""A session with a trainer: its heartbeat, and models whose making was cut short. Over HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from fireworks_training import FiretitanProvisioningConfig, RequestFailed
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training import session
from fireworks_training._async.training.data_plane import DataPlane
from fireworks_training._async.training.session import Heartbeat, TrainerSession
from fireworks_training._core.waits.reports import ReportSchedule
from fireworks_training.errors import ConnectionFailed
from fireworks_training.testing import TrainerServer

CONFIG = FiretitanProvisioningConfig(base_model="accounts/test/models/stub")
OTHER = FiretitanProvisioningConfig(base_model="accounts/test/models/stub", seed=3)


@asynccontextmanager
async def opened(stub: TrainerServer) -> AsyncIterator[TrainerSession]:
    async with stub:
        owner = OwnerLoop()
        owner.get()

        def make(loop: OwnerLoop) -> Transport:
            return Transport(owner=loop, base_url=stub.url, api_key="tml-test")

        transport = make(owner)
        session = TrainerSession(transport, make, stub.url)
        try:
            await session.open(None)
            yield session
        finally:
            await session.close()
            await transport.close()
            owner.release()


@asynccontextmanager
async def cut_short() -> AsyncIterator[tuple[TrainerServer, TrainerSession]]:
    """A session in which the making of a model was cancelled while the trainer made it."""
    polled, answers = asyncio.Event(), asyncio.Event()

    async def hold(request_id: str) -> None:
        polled.set()
        await answers.wait()

    stub = TrainerServer(before_poll=hold)
    async with opened(stub) as session:
        making = asyncio.create_task(session.create_model(CONFIG))
        await polled.wait()
        making.cancel()
        await asyncio.wait([making])
        answers.set()
        yield stub, session


async def test_a_model_whose_making_was_cut_short_is_asked_for_again() -> None:
    async with cut_short() as (stub, session):
        await session.create_model(CONFIG)
        assert stub.models == [0, 0]  # one model, not two
        await session.create_model(OTHER)
        await session.create_model(CONFIG)
    assert stub.models == [0, 0, 1, 2]


async def test_another_model_than_the_one_that_was_cut_short_is_another() -> None:
    async with cut_short() as (stub, session):
        await session.create_model(OTHER)
        await session.create_model(CONFIG)
    assert stub.models == [0, 1, 0]


async def test_a_model_that_could_not_be_made_is_not_asked_for_again() -> None:
    failures: list[dict[str, Any]] = [{"error": "no memory", "category": "user"}]

    async def fail(request_id: str) -> web.Response | None:
        return web.json_response(failures.pop()) if failures else None

    stub = TrainerServer(before_poll=fail)
    async with opened(stub) as session:
        with pytest.raises(RequestFailed, match="no memory"):
            await session.create_model(CONFIG)
        await session.create_model(CONFIG)
    assert stub.models == [0, 1]


# -- heartbeat -------------------------------------------------------------------------------------


async def test_refused_heartbeats_are_told_of_at_once_and_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stub = TrainerServer(session_ended=True)
    async with stub:
        beat = Heartbeat(
            lambda owner: Transport(owner=owner, base_url=stub.url, api_key="tml-test"),
            stub.url,
            "session-1",
            period=0.001,
        )
        with caplog.at_level(logging.WARNING, "fireworks_training.trainer"):
            beat.start()
            await stub.until(lambda: stub.counts["session_heartbeat"] > 5)
            await beat.stop()
        (said,) = [record.getMessage() for record in caplog.records]
        assert "no heartbeat for 0 s" in said
        assert "the session has ended" in said


@pytest.mark.parametrize("first", [0.02, 30.0])
async def test_failing_heartbeats_are_logged_after_a_while_and_ever_more_rarely(
    first: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats: list[str] = []
    enough = threading.Event()

    async def fail(_: DataPlane, session_id: str) -> None:
        beats.append(session_id)
        if len(caplog.records) > 1 if first < 1.0 else len(beats) > 20:
            enough.set()
        raise ConnectionFailed("nobody listens")

    monkeypatch.setattr(session, "ReportSchedule", partial(ReportSchedule, first=first))
    monkeypatch.setattr(DataPlane, "beat", fail)
    beat = Heartbeat(
        lambda owner: Transport(owner=owner, base_url="http://127.0.0.1:9", api_key="tml-test"),
        "http://127.0.0.1:9",
        "session-1",
        period=0.001,
    )
    with caplog.at_level(logging.WARNING, "fireworks_training.trainer"):
        beat.start()
        assert await asyncio.to_thread(enough.wait, 10)
        await beat.stop()
    assert bool(caplog.records) == (first < 1.0)
    assert len(beats) > 2 * len(caplog.records)


async def test_a_cancelled_stop_gives_the_portal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[OwnerLoop] = []
    release = OwnerLoop.release

    def noted(owner: OwnerLoop) -> None:
        released.append(owner)
        release(owner)

    monkeypatch.setattr(OwnerLoop, "release", noted)
    stub = TrainerServer()
    async with stub:
        beat = Heartbeat(
            lambda owner: Transport(owner=owner, base_url=stub.url, api_key="tml-test"),
            stub.url,
            "session-1",
        )
        beat.start()
        stopping = asyncio.create_task(beat.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert released == [beat._owner]
