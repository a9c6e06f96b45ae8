"""Thirty operations with a fault at every message, one at a time: each applied once, in order."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training._async.training import data_plane
from fireworks_training._core import patience
from fireworks_training.testing import TrainerServer
from tests.async_.conftest import connected
from tests.async_.training.support import ADAM, datum, good_loss
from tests.fault_proxy import FAULTS, FaultProxy


def thirty(client: Any) -> list[Any]:
    """28 operations, of which two are custom losses and count for two."""
    futures = [client.save_state("begin")]
    for index in range(7):
        futures.append(client.forward_backward([datum()] * (1 + index % 3), "cross_entropy"))
        futures.append(client.forward([datum()]))
        futures.append(client.optim_step(ADAM))
    futures.append(client.forward_backward_custom([datum()], good_loss))
    futures.append(client.forward_backward_custom([datum()], good_loss))
    futures.append(client.optim_step(ADAM))
    futures.append(client.save_weights_for_sampler("sampler"))
    futures.append(client.load_state_with_optimizer("begin"))
    futures.append(client.save_state("end"))
    return futures


async def run(spoil: dict[int, str], *, batch: bool = False) -> tuple[TrainerServer, FaultProxy]:
    stub, proxy = TrainerServer(client_config={}, batch_polls=batch), FaultProxy("", spoil)
    async with connected(stub, through=proxy) as client:
        for future in thirty(client):
            await future
    return stub, proxy


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(data_plane, "QUICK_POLL", 0.002)


async def test_a_fault_at_every_message_one_at_a_time() -> None:
    stub, proxy = await run({})
    wanted, messages = stub.applied, proxy.seen
    assert [seq_id for _, seq_id in wanted] == list(range(1, 31))
    assert messages >= 60
    for message in range(messages):
        fault = FAULTS[message % len(FAULTS)]
        stub, proxy = await run({message: fault})
        assert proxy.struck == [fault]
        assert (stub.applied, stub.steps) == (wanted, [1, 2, 3, 1, 2, 3, 1, 2]), (message, fault)


async def test_a_fault_at_every_message_with_batch_polls() -> None:
    stub, proxy = await run({}, batch=True)
    wanted, messages = stub.applied, proxy.seen - stub.counts["retrieve_futures"]
    assert [seq_id for _, seq_id in wanted] == list(range(1, 31))
    assert stub.counts["retrieve_future"] <= 1  # of the model's making
    for message in range(messages):  # how many more there are differs
        fault = FAULTS[message % len(FAULTS)]
        stub, proxy = await run({message: fault}, batch=True)
        assert proxy.struck == [fault]
        assert (stub.applied, stub.steps) == (wanted, [1, 2, 3, 1, 2, 3, 1, 2]), (message, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
async def test_each_fault_at_every_message(fault: str) -> None:
    stub, proxy = await run({})
    wanted, messages = stub.applied, proxy.seen
    for message in range(messages):
        stub, proxy = await run({message: fault})
        assert proxy.struck == [fault]
        assert (stub.applied, stub.steps) == (wanted, [1, 2, 3, 1, 2, 3, 1, 2]), message


async def test_the_proxy_does_spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with a client that does not send again, a cut answer is felt."""
    monkeypatch.setattr(patience, "UNDECIDED_SECONDS", 0.0)
    with pytest.raises(Exception, match=r"not known|not applied"):
        await run({3: "drop"})
