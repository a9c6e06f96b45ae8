"""Silent sessions are ended with their models, unless one of their requests shows life."""

from __future__ import annotations

import asyncio

import pytest

from fireworks_training.local.trainer import service as service_module
from fireworks_training.local.trainer.run.hosted import CreateModel, Gone
from fireworks_training.local.trainer.service import LimitReached, TrainerService
from fireworks_training.local.trainer.wire.datums import ModelLimits
from fireworks_training.local.trainer.wire.json_codec import JSON, encode_failure
from fireworks_training.testing import ManualClock
from tests.local.trainer.trainer_driver import ADAM, Starter


def test_a_silent_session_is_ended_and_says_why() -> None:
    clock = ManualClock()
    service = TrainerService(JSON, encode_failure, clock, session_timeout_s=60.0)
    silent, alive = service.create_session(), service.create_session()
    clock.advance(60.0)
    service.heartbeat(alive)
    assert service.end_silent_sessions() == 15.0
    service.heartbeat(silent)  # not over yet
    clock.advance(60.0)
    service.heartbeat(alive)
    clock.advance(0.1)
    service.end_silent_sessions()
    with pytest.raises(Gone, match="no heartbeat for 60 s"):
        service.heartbeat(silent)
    service.heartbeat(alive)


def test_sessions_are_bounded_whoever_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_SESSIONS", 2)
    clock = ManualClock()
    service = TrainerService(JSON, encode_failure, clock, session_timeout_s=60.0)
    service.adopt_session("one")
    clock.advance(30.0)
    service.create_session()
    service.adopt_session("one")  # is there
    for make in (service.create_session, lambda: service.adopt_session("three")):
        with pytest.raises(LimitReached, match="2 live sessions"):
            make()
    clock.advance(31.0)  # the first was silent for too long
    service.adopt_session("three")
    service.heartbeat("three")


async def test_its_models_go_with_it(start: Starter, caplog: pytest.LogCaptureFixture) -> None:
    trainer = await start(session_timeout_s=0.05)
    async with asyncio.timeout(20):
        while "was silent for" not in caplog.text:  # noqa: ASYNC110 - a log line is no event
            await asyncio.sleep(0.002)
    status, answer = await trainer.post("session_heartbeat", {"session_id": trainer.session_id})
    assert (status, answer["error_class"]) == (410, "SessionGone")
    status, answer = await trainer.send("optim_step", adam_params=ADAM)
    assert (status, answer["error_class"]) == (410, "ModelUnloaded")


async def test_an_operation_is_a_sign_of_life(start: Starter) -> None:
    clock = ManualClock()
    service = TrainerService(JSON, encode_failure, clock, session_timeout_s=60.0)
    session_id = service.create_session()
    limits = ModelLimits(vocab_size=8, context_length=8, lora=False)
    request = CreateModel(b"", {}, lambda: pytest.fail("nothing runs here"), limits, None)
    model_id = service.create_model(session_id, 0, request)
    clock.advance(60.0)
    assert await service.result(f"{model_id}:create", hold_s=0.0) is None
    clock.advance(60.0)
    service.end_silent_sessions()
    service.heartbeat(session_id)
    clock.advance(60.1)
    service.end_silent_sessions()
    assert service.model(model_id).unloading
    with pytest.raises(Gone):
        service.create_model(session_id, 1, request)


def _request() -> CreateModel:
    limits = ModelLimits(vocab_size=8, context_length=8, lora=False)
    return CreateModel(b"", {}, lambda: pytest.fail("nothing runs here"), limits, None)


def test_the_model_that_was_silent_longest_makes_room() -> None:
    clock = ManualClock()
    service = TrainerService(JSON, encode_failure, clock, max_models=3)
    models: list[str] = []
    for _ in range(3):
        models.append(service.create_model(service.create_session(), 0, _request()))
        clock.advance(10.0)
    sessions = [model.partition(":")[0] for model in models]
    service.heartbeat(sessions[0])
    late = service.create_session()
    with pytest.raises(LimitReached, match=r"holds 3 models already.*--max-models"):
        service.create_model(late, 0, _request())  # the oldest of them is silent for 20 s
    clock.advance(10.0)
    service.create_model(late, 0, _request())
    assert [service.model(model).unloading for model in models] == [False, True, False]
    # A session that was finished has given its model back at once.
    service.finish_session(sessions[0])
    service.create_model(late, 1, _request())
    assert [service.model(model).unloading for model in models] == [True, True, False]
    with pytest.raises(LimitReached):
        service.create_model(late, 2, _request())


def test_memory_limits_the_models_too() -> None:
    clock = ManualClock()
    asked: list[int] = []

    def fits(more: int) -> bool:
        asked.append(more)
        return more <= 2

    service = TrainerService(JSON, encode_failure, clock, fits=fits)
    first = service.create_model(service.create_session(), 0, _request())
    second = service.create_model(service.create_session(), 0, _request())
    with pytest.raises(LimitReached, match="memory has no room"):
        service.create_model(service.create_session(), 0, _request())
    assert asked == [1, 2, 3]
    clock.advance(30.0)
    service.heartbeat(second.partition(":")[0])
    service.create_model(service.create_session(), 0, _request())
    assert [service.model(model).unloading for model in (first, second)] == [True, False]
