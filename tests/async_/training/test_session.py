"""A session with a trainer: its heartbeat, and models whose making was cut short. Over HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from fireworks_training import FiretitanProvisioningConfig, RequestFailed, TrainerLost
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training import session
from fireworks_training._async.training.data_plane import DataPlane
from fireworks_training._async.training.model import RemoteModel
from fireworks_training._async.training.operations import save_state
from fireworks_training._async.training.session import Heartbeat, TrainerSession
from fireworks_training._core import patience
from fireworks_training._core.waits.reports import ReportSchedule
from fireworks_training.errors import ConnectionFailed
from fireworks_training.testing import TrainerServer

CONFIG = FiretitanProvisioningConfig(base_model="accounts/test/models/stub")
OTHER = FiretitanProvisioningConfig(base_model="accounts/test/models/stub", seed=3)


@asynccontextmanager
async def opened(
    stub: TrainerServer, job_ended: Callable[[], Awaitable[str | None]] | None = None
) -> AsyncIterator[TrainerSession]:
    async with stub:
        owner = OwnerLoop()
        owner.get()

        def make(loop: OwnerLoop) -> Transport:
            return Transport(owner=loop, base_url=stub.url, api_key="tml-test")

        transport = make(owner)
        session = TrainerSession(transport, make, stub.url, job_ended=job_ended)
        try:
            await session.open(None)
            yield session
        finally:
            await session.close()
            await transport.close()
            owner.release()


def owner_of(session: TrainerSession) -> OwnerLoop:
    return session.plane._transport.owner


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


class DeadBehindAProxy(TrainerServer):
    """A trainer whose proxy answers for it with one status, once it is `lost`."""

    status = 503

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.lost:
            return web.Response(status=self.status)
        return await super().handle(request)


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOOK_AFTER", 0.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.002)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("status", [404, 410, 500, 502, 503, 504])
@pytest.mark.parametrize("stage", ["make", "submit", "poll"])
async def test_a_trainer_whose_job_has_ended_is_lost_whatever_is_answered_for_it(
    status: int, stage: str
) -> None:
    stub = DeadBehindAProxy(step_protocol=False)
    stub.status = status

    async def job_ended() -> str | None:
        return "its job is in JOB_STATE_FAILED" if stub.lost else None

    async with opened(stub, job_ended) as session:
        if stage == "make":
            stub.lost = True
            with pytest.raises(TrainerLost, match="JOB_STATE_FAILED"):
                await session.create_model(CONFIG)
            return
        model = RemoteModel(
            session, await session.create_model(CONFIG), CONFIG, owner=owner_of(session)
        )
        stub.executing, stub.lost = False, stage == "submit"
        saving = model.queue.submit(save_state(model, "kept", None, overwrite=False))
        if stage == "poll":
            await stub.until(lambda: len(stub.submitted) == 1)
            stub.lost = True
            await stub.die()
        with pytest.raises(TrainerLost, match="JOB_STATE_FAILED"):
            await saving
        await model.close(drain=False)


@pytest.mark.usefixtures("_hasty")
async def test_a_trainer_whose_job_runs_is_waited_for_and_one_look_serves_all() -> None:
    """The negative control: the same failures, and the state says that they will pass."""
    stub, looks = DeadBehindAProxy(step_protocol=False), list[int]()

    async def job_ended() -> str | None:
        looks.append(1)
        if len(looks) == 3:
            stub.lost = False
        return None

    async with opened(stub, job_ended) as session:
        model = RemoteModel(
            session, await session.create_model(CONFIG), CONFIG, owner=owner_of(session)
        )
        stub.lost = True
        saves = [
            model.queue.submit(save_state(model, f"s{number}", None, overwrite=False))
            for number in range(10)
        ]
        assert [(await saved).path for saved in saves] == [f"s{number}" for number in range(10)]
        await model.close(drain=True)
    assert 3 <= len(looks) < 20


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
