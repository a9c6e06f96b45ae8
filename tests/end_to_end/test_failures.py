"""A failed step leaves no trace: the next one equals that step alone on the unchanged weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
import tinker
import torch

from fireworks_training import (
    FireworksTrainingError,
    GradientsInDoubt,
    InvalidArgument,
    InvalidDatum,
    LossFailed,
    PrecedingOperationFailed,
    RequestFailed,
)
from fireworks_training._async.training import client_config
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, part, relative, saved_state, service_on

Break = Callable[[Any], Any]

LONG = 200
"""Tokens of a datum that fills a request."""


def with_inputs(datum: tinker.Datum, **changes: list[Any]) -> tinker.Datum:
    inputs = {**datum.loss_fn_inputs, **changes}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def outside_the_vocabulary(length: int = 12) -> tinker.Datum:
    datum = datums(1, length=length)[0]
    return with_inputs(datum, target_tokens=[999_999] * datum.model_input.length)


def nan_weights(client: Any) -> Any:
    datum = datums(1)[0]
    broken = with_inputs(datum, weights=[math.nan] * datum.model_input.length)
    return client.forward_backward([broken], "cross_entropy")


def loss_that_raises(client: Any) -> Any:
    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        raise KeyError("reward")

    return client.forward_backward_custom(datums(2), loss)


def refused_by_the_server(client: Any) -> Any:
    return client.forward_backward([outside_the_vocabulary()], "cross_entropy")


def that_can_not_be_written(client: Any) -> Any:
    unwritable = {"option": "\ud800"}  # no text that UTF-8 can hold
    return client.forward_backward(datums(2), "cross_entropy", unwritable)


def refused_in_the_second_of_three_chunks(client: Any) -> Any:
    first, last = datums(2, seed=77, length=LONG)
    return client.forward_backward([first, outside_the_vocabulary(LONG), last], "cross_entropy")


def infinite_on_the_server(client: Any) -> Any:
    datum = datums(1)[0]
    length = datum.model_input.length
    huge = with_inputs(datum, logprobs=[-3e38] * length, advantages=[1e38] * length)
    inputs = {k: v for k, v in huge.loss_fn_inputs.items() if k != "weights"}
    return client.forward_backward(
        [tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)],
        "importance_sampling",
    )


@pytest.fixture(scope="module")
def alone(platform: RunningPlatform) -> dict[str, torch.Tensor]:
    """The masters after one step alone."""

    async def step() -> dict[str, torch.Tensor]:
        async with service_on(platform) as service:
            client = await service.create_training_client()
            await client.forward_backward(datums(4, seed=9), "cross_entropy")
            await client.optim_step(ADAM)
            await client.save_state("alone")
            return part(saved_state(platform, service.trainer_job_id or "", "alone"), "master")

    return asyncio.run(step())


@pytest.mark.extension("step_protocol", "discard_gradients")
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "after-an-applied-one"])
@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (nan_weights, InvalidDatum),
        (loss_that_raises, LossFailed),
        (refused_by_the_server, RequestFailed),
        (that_can_not_be_written, InvalidArgument),
        (refused_in_the_second_of_three_chunks, RequestFailed),
        (infinite_on_the_server, RequestFailed),
    ],
)
async def test_a_failed_step_leaves_no_trace(
    platform: RunningPlatform,
    alone: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    break_it: Break,
    kind: type[FireworksTrainingError],
    earlier: bool,
) -> None:
    """A server that can't drop what the step had added is not trusted to: nothing is applied."""
    # What was computed before the failure stays where it can't be discarded.
    in_doubt = platform.as_cloud and (earlier or break_it is refused_in_the_second_of_three_chunks)
    if break_it is refused_in_the_second_of_three_chunks:
        # Three long datums make three requests; the short ones of the other steps still make one.
        monkeypatch.setattr(client_config, "MAX_BYTES", 3000)
    async with service_on(platform) as service:
        client = await service.create_training_client()
        before = client.save_state("before")
        applied = client.forward_backward(datums(3), "cross_entropy") if earlier else None
        broken = break_it(client)
        step = client.optim_step(ADAM)
        unchanged = client.save_state("unchanged")
        following = client.forward_backward(datums(4, seed=9), "cross_entropy")
        next_step = client.optim_step(ADAM)
        if applied is not None:
            await applied
        with pytest.raises(kind) as failure:
            await broken
        with pytest.raises(PrecedingOperationFailed) as preceding:
            await step
        assert preceding.value.cause is failure.value
        await before
        await unchanged
        await following
        if in_doubt:
            with pytest.raises(GradientsInDoubt, match="accept_partial=True"):
                await next_step
        else:
            await next_step
        await client.save_state("after")
        job = service.trainer_job_id or ""
        start, held, after = (
            part(saved_state(platform, job, name), "master")
            for name in ("before", "unchanged", "after")
        )
        assert all(torch.equal(start[name], held[name]) for name in start)
        if in_doubt:
            assert all(torch.equal(start[name], after[name]) for name in start)
        else:
            assert relative(after, alone) < 1e-6


async def test_the_check_sees_a_step_that_was_applied(
    platform: RunningPlatform, alone: dict[str, torch.Tensor]
) -> None:
    """The negative control: gradients that are not dropped show."""
    async with service_on(platform) as service:
        client = await service.create_training_client()
        await client.forward_backward(datums(3), "cross_entropy")
        await client.forward_backward(datums(4, seed=9), "cross_entropy")
        await client.optim_step(ADAM)
        await client.save_state("after")
        job = service.trainer_job_id or ""
        assert relative(part(saved_state(platform, job, "after"), "master"), alone) > 1e-6


@pytest.mark.as_cloud
async def test_close_raises_the_failure_that_nobody_asked_about_and_cleans_up_all_the_same(
    platform: RunningPlatform,
) -> None:
    service = service_on(platform)
    client = await service.create_training_client()
    job = service.trainer_job_id or ""
    refused_by_the_server(client)
    saved = client.save_state("accepted")
    with pytest.raises(RequestFailed, match="vocabulary"):
        await service.close()
    assert (await saved).path == "accepted"  # accepted operations are finished first
    await service.close()
    async with service_on(platform) as other:
        plane = await other._on_owner(other._platform.open, "test")
        gone = await plane.get_job(job)
        assert gone is None or gone.state == "JOB_STATE_DELETED"


@pytest.mark.as_cloud
async def test_close_does_not_cover_an_error_that_is_on_its_way(platform: RunningPlatform) -> None:
    with pytest.raises(ZeroDivisionError):
        async with service_on(platform) as service:
            client = await service.create_training_client()
            refused_by_the_server(client)
            raise ZeroDivisionError
