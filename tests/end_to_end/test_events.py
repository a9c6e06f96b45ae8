"""What an `on_event` hook hears of a whole run on a real platform."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training import (
    AckEvent,
    ApiStatusError,
    Event,
    FailureEvent,
    FinishEvent,
    FiretitanServiceClient,
    HotLoadFailed,
    PrecedingOperationFailed,
    RequestFailed,
    RetryEvent,
    SubmitEvent,
    SwapEvent,
    SyncEvent,
    supervised_datum,
)
from fireworks_training._core import patience
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, service_on
from tests.fault_proxy import FaultProxy


def of_kind(heard: list[Event], kind: str, *types: type[Event]) -> list[Any]:
    return [e for e in heard if isinstance(e, types) and getattr(e, "kind", kind) == kind]


async def test_a_step_a_sync_and_a_completion_are_told_in_order(platform: RunningPlatform) -> None:
    heard = list[Event]()
    async with service_on(platform, create_deployment=True, on_event=heard.append) as service:
        client = await service.create_training_client()
        await client.forward_backward(datums(2), "cross_entropy")
        await client.optim_step(ADAM)
        one = await client.weight_sync()
        sampler = await service.create_deployment_sampler()
        await sampler.sample_with_prompt_tokens([10, 11], max_tokens=2)
        await client.forward_backward(datums(2, seed=1), "cross_entropy")
        await client.optim_step(ADAM)
        two = await client.weight_sync()

    requests = of_kind(heard, "training", SubmitEvent, AckEvent, FinishEvent)
    lives = dict[str, list[Any]]()
    for event in requests:
        lives.setdefault(event.id, []).append(event)
    assert [life[0].what.split()[0] for life in lives.values()] == [
        "forward_backward",
        "optim_step",
        "save_weights_for_sampler",
        "forward_backward",
        "optim_step",
        "save_weights_for_sampler",
    ]
    for life in lives.values():
        assert [type(event) for event in life] == [SubmitEvent, AckEvent, FinishEvent]
        assert 0 <= life[1].seconds <= life[2].seconds

    stages = [(e.identity, e.stage) for e in heard if isinstance(e, SyncEvent)]
    for identity in (one.identity, two.identity):
        seen = [stage for name, stage in stages if name == identity]
        assert (seen[0], seen[1], seen[-1]) == ("saved", "loading", "live")
        assert set(seen[2:-1]) <= {"waiting"}
    swaps = [(e.previous, e.identity) for e in heard if isinstance(e, SwapEvent)]
    assert swaps == [(None, one.identity), (one.identity, two.identity)]

    sampled = of_kind(heard, "sampling", SubmitEvent, FinishEvent)
    *attempts, finished = sampled
    assert [event.attempt for event in attempts] == [*range(1, len(attempts) + 1)]
    assert {event.id for event in attempts} == {finished.id}
    # A cloud refuses the first completion after a load; here one attempt does.
    assert [type(event) for event in sampled] == [SubmitEvent] * len(attempts) + [FinishEvent]
    assert len(attempts) == (2 if platform.as_cloud else 1)
    assert not any(isinstance(event, FailureEvent) for event in heard)
    assert [event.at for event in heard] == sorted(event.at for event in heard)


@pytest.mark.as_cloud
async def test_faults_on_the_way_are_told_as_retries(
    platform: RunningPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    heard = list[Event]()
    proxy = FaultProxy(platform.base_url)
    async with (
        proxy.running() as url,
        service_on(platform, base_url=url, on_event=heard.append) as service,
    ):
        client = await service.create_training_client()
        proxy.restart({0: "500", 1: "drop"})
        await client.forward(datums(1))
        assert proxy.struck == ["500", "drop"]
    (submit,) = of_kind(heard, "training", SubmitEvent)  # one request, sent three times
    (ack,) = of_kind(heard, "training", AckEvent)
    # A cloud also has the making of the model sent again.
    retries = [e for e in of_kind(heard, "training", RetryEvent) if e.what == "forward"]
    server, network, *more = [e for e in retries if heard.index(e) < heard.index(ack)]
    assert platform.as_cloud or retries == [server, network]  # a cloud has faults of its own
    assert platform.as_cloud or not more
    assert isinstance(server.error, ApiStatusError)
    assert server.error.status == 500
    assert (server.failures, network.failures) == (1, 2)
    assert heard.index(submit) < heard.index(server) < heard.index(network) < heard.index(ack)


@pytest.mark.as_cloud
async def test_failures_are_told_with_what_the_caller_gets(platform: RunningPlatform) -> None:
    heard = list[Event]()
    async with service_on(platform, create_deployment=True, on_event=heard.append) as service:
        client = await service.create_training_client()
        wrong = [supervised_datum([10**6] * 12, [1.0] * 12)]  # far outside of the vocabulary
        failed = client.forward_backward(wrong, "cross_entropy")
        after = client.optim_step(ADAM)
        with pytest.raises(RequestFailed) as own:
            await failed
        with pytest.raises(PrecedingOperationFailed) as follows:
            await after
        with pytest.raises(HotLoadFailed) as sync:
            await service.create_deployment_sampler("accounts/local/nothing-of-that-name")
        told = [(e.kind, e.error) for e in heard if isinstance(e, FailureEvent)]
        assert told == [("training", own.value), ("training", follows.value), ("sync", sync.value)]


@pytest.mark.as_cloud
def test_a_blocking_service_takes_the_hook_too(platform: RunningPlatform) -> None:
    heard = list[Event]()
    with FiretitanServiceClient.from_firetitan_config(
        api_key=platform.api_key,
        base_url=platform.base_url,
        base_model=platform.model,
        create_deployment=False,
        cleanup_trainer_on_close=True,
        on_event=heard.append,
    ) as service:
        service.create_training_client().forward(datums(1)).result()
    kinds = [type(e) for e in of_kind(heard, "training", SubmitEvent, AckEvent, FinishEvent)]
    assert kinds == [SubmitEvent, AckEvent, FinishEvent]
