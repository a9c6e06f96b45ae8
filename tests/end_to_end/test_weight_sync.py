"""Weight sync on a real platform: deltas, pipelining, drift, and what breaks a chain."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest

from fireworks_training import (
    FixedConcurrencyController,
    HotLoadFailed,
    InvalidArgument,
    WeightsDrifted,
)
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, curved_loss, datums, service_on, told

PROMPT = [40, 41, 42, 43]
SMALL = ADAM.model_copy(update={"learning_rate": 2e-5})


async def train(client: Any, seed: int) -> None:
    await client.forward_backward_custom(datums(4, seed=seed), curved_loss)
    await client.optim_step(SMALL)


def stored(platform: RunningPlatform, identity: str) -> Any:
    return platform.state_dir / "snapshots" / identity


def damage(platform: RunningPlatform, identity: str) -> None:
    """Flips a bit in the tensors of a snapshot."""
    (file,) = stored(platform, identity).glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.mark.extension("perf_metrics")
async def test_syncs_run_beside_training_and_engine_and_trainer_agree(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        sampler = await service.create_deployment_sampler()
        assert sampler.current_snapshot is None
        kinds = []
        for step in range(3):
            await train(client, step)
            sync = client.weight_sync(on_drift="raise", drift_bound=1e-3)
            training = asyncio.create_task(train(client, 100 + step))  # goes on meanwhile
            result = await sync
            await training
            kinds.append(result.snapshot.kind)
            assert result.loaded == (result.identity,)
            assert result.optimizer_step == 2 * step + 1
            assert result.drift is not None
            assert result.drift < 1e-3
            assert sampler.current_snapshot == result.identity == result.version
        assert kinds == ["base", "delta", "delta"]
        (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=2)
        identities = (completion.snapshot_identity_first, completion.snapshot_identity)
        assert identities == (told(platform, result.identity),) * 2
        assert completion.metrics.snapshot_distance == (None if platform.as_cloud else 1)
        assert (await service.weight_sync("again")).snapshot.kind == "delta"


async def test_the_probe_sees_weights_that_differ(platform: RunningPlatform) -> None:
    """The negative control: the trainer's answer is of other weights than the engine's."""
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        await client.weight_sync()
        forward = type(client).forward

        def of_later_weights(data: Any) -> Any:
            client.forward_backward_custom(datums(4), curved_loss)
            client.optim_step(ADAM)
            return forward(client, data)

        client.forward = of_later_weights
        with pytest.raises(WeightsDrifted, match="nats a token") as drifted:
            await client.weight_sync(on_drift="raise", drift_bound=1e-4)
        assert drifted.value.drift > 1e-4
        for wrong in ({"on_drift": "shout"}, {"drift_bound": 0.0}, {"probe_tokens": [1]}):
            with pytest.raises(InvalidArgument):
                client.weight_sync(**wrong)


async def test_syncs_that_wait_coalesce_into_the_newest(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        await client.weight_sync()
        syncs = []
        for step in range(4):
            training = asyncio.create_task(train(client, step))
            await training
            syncs.append(client.weight_sync())
        results = [await sync for sync in syncs]
        assert results[-1].identity == results[-1].snapshot.identity
        assert not results[-1].superseded
        for result in results:
            assert result.superseded == (result.identity != result.snapshot.identity)


@pytest.mark.extension("snapshot", "perf_metrics")
async def test_a_saved_snapshot_that_was_never_loaded_is_a_link_of_the_chain(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        first = await client.save_weights_for_sampler("a")
        await train(client, 1)
        skipped = await client.save_weights_for_sampler("b")
        await train(client, 2)
        result = await client.weight_sync("c", on_drift="raise")
        if platform.as_cloud:  # what was not loaded is not known to be a link: a whole one
            assert result.loaded == (result.identity,)
        else:
            assert result.loaded == (first.path, skipped.path, result.identity)
        # An older snapshot is no difference to what is loaded: the whole way again.
        await service.hotload_sampler_snapshot(skipped.path)
        sampler = await service.create_deployment_sampler()
        assert sampler.current_snapshot == skipped.path
        (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=1)
        assert completion.snapshot_identity == told(platform, skipped.path)


@pytest.mark.extension("perf_metrics")
async def test_a_difference_that_does_not_fit_makes_the_client_save_a_whole_snapshot(
    platform: RunningPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        await client.weight_sync("a")
        await train(client, 1)
        bad = await client.save_weights_for_sampler("b")
        assert bad.snapshot.kind == "delta"
        damage(platform, bad.path)
        sampler = await service.create_deployment_sampler()
        # By name it is refused, and what was served keeps serving.
        with pytest.raises(HotLoadFailed, match="checkpoint_type='base'"):
            await service.hotload_sampler_snapshot(bad.path)
        (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=1)
        assert completion.snapshot_identity == told(platform, sampler.current_snapshot or "")
        await train(client, 2)
        with caplog.at_level(logging.WARNING, "fireworks_training.weight_sync"):
            result = await client.weight_sync("c", on_drift="raise")
        assert result.snapshot.kind == "base"
        # Its chain led over the damaged one, or it was saved whole since that one was refused.
        assert result.identity == result.loaded[-1]
        assert sampler.current_snapshot == result.identity


async def test_a_foreign_snapshot_resets_the_chain(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as mine:
        client = await mine.create_training_client()
        await client.weight_sync()
        other = service_on(platform, deployment_id=mine.deployment_id, create_deployment=True)
        async with other:
            foreign = await other.create_training_client()
            theirs = await foreign.weight_sync("theirs")
            assert theirs.snapshot.kind == "base"
            await train(client, 1)
            result = await client.weight_sync("mine", on_drift="raise")
            assert result.snapshot.kind == "delta"
            assert len(result.loaded) == 2  # from its own whole snapshot on
            await train(foreign, 1)
            again = await foreign.weight_sync("theirs", on_drift="raise")
            assert again.loaded == (theirs.identity, again.identity)


async def _sample(sampler: Any, streams: int) -> Any:
    return await sampler.sample_with_prompt_tokens(
        PROMPT, n=streams, max_tokens=400, ignore_eos=True, logprobs=True
    )


@pytest.mark.slow
@pytest.mark.extension("perf_metrics")
@pytest.mark.parametrize("transition", ["ASYNC", "SYNC"])
async def test_streams_in_flight_are_kept(platform: RunningPlatform, transition: str) -> None:
    async with service_on(
        platform, create_deployment=True, hot_load_transition_type=transition
    ) as service:
        client = await service.create_training_client()
        first = await client.weight_sync()
        sampler = await service.create_deployment_sampler(
            concurrency_controller=FixedConcurrencyController(64)
        )
        sampling = asyncio.create_task(_sample(sampler, 64))
        await asyncio.sleep(0.5)
        await train(client, 1)
        second = await client.weight_sync()
        completions = await sampling
        assert len(completions) == 64
        assert all(c.completion_len == 400 for c in completions)
        switched = [c for c in completions if c.snapshot_switch_index is not None]
        if transition == "SYNC":
            assert not switched
            identities = {c.snapshot_identity for c in completions}
            assert identities <= {told(platform, one.identity) for one in (first, second)}
        else:
            for completion in switched:
                assert completion.snapshot_identity_first == first.identity
                assert completion.snapshot_identity == second.identity
                assert 0 < completion.snapshot_switch_index < 400
                assert np.isfinite(completion.inference_logprobs).all()
