"""States and snapshots are kept on purpose: listed, deleted, thinned out, given a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from click.testing import CliRunner

from fireworks_training import (
    AsyncFiretitanServiceClient,
    Conflict,
    InvalidArgument,
    NotSupported,
    RequestFailed,
)
from fireworks_training.cli import main
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, service_on, told

DATA = datums(3, seed=3)
STEP = tinker.AdamParams(learning_rate=1e-2)


async def train(client: Any, *, steps: int = 1) -> None:
    for seed in range(steps):
        await client.forward_backward(datums(4, seed=seed), "cross_entropy")
        await client.optim_step(STEP)


async def logprobs(client: Any) -> Any:
    outputs = (await client.forward(DATA)).loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])


async def ids(service: AsyncFiretitanServiceClient) -> list[str]:
    return [row.checkpoint_id for row in await service.list_checkpoints()]


def states_of(platform: RunningPlatform, service: AsyncFiretitanServiceClient) -> Path:
    return platform.state_dir / "jobs" / (service.trainer_job_id or "-") / "states"


async def test_states_are_deleted_and_thinned_out_and_their_disk_is_freed(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        for number in range(5):
            await client.save_state(f"s{number}")
        folder = states_of(platform, service)
        await service.delete_checkpoint("s0")
        await service.delete_checkpoint("s0")  # it is no error if it is gone
        assert await ids(service) == ["s1", "s2", "s3", "s4"]
        with pytest.raises(InvalidArgument, match="nothing was deleted"):
            await service.keep_checkpoints(1, keep=["best"])
        planned = await service.keep_checkpoints(1, keep=["s2"], dry_run=True)
        assert [row.checkpoint_id for row in planned] == ["s3", "s1"]
        assert len(await ids(service)) == 4
        gone = await service.keep_checkpoints(1, keep=["s2"])
        assert gone == planned
        assert await ids(service) == ["s2", "s4"]
        assert sorted(path.name for path in folder.iterdir()) == ["s2", "s4"]
        await client.load_state("s2")
        with pytest.raises(RequestFailed, match="no state"):
            await client.load_state("s3")
        for wrong in ("last", -1, True):
            with pytest.raises(InvalidArgument, match="last"):
                await service.keep_checkpoints(wrong)  # type: ignore[arg-type]


async def test_what_is_served_or_built_upon_stays(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        first = (await client.weight_sync("one")).identity
        await train(client)
        second = (await client.save_weights_for_sampler("two", checkpoint_type="delta")).snapshot
        chained = second.kind == "delta"
        with pytest.raises(Conflict, match="served"):
            await service.delete_checkpoint(first)
        if chained:
            await service.hotload_sampler_snapshot(second.identity)
            with pytest.raises(Conflict, match="difference"):
                await service.delete_checkpoint(first)
        assert first in await ids(service)
        await service.keep_checkpoints(0)
        live = second.identity if chained else first
        assert live in await ids(service)  # it is served


@pytest.mark.as_cloud
async def test_a_time_to_live_is_kept(platform: RunningPlatform) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        await client.save_state("short", ttl_seconds=3600)
        await client.save_state("long")
        by_id = {row.checkpoint_id: row for row in await service.list_checkpoints()}
        assert by_id["short"].expire_time is not None
        assert by_id["long"].expire_time is None
        folder = states_of(platform, service)
        (folder / "short" / "expires_at").write_text("1.0")  # its time is over
        await client.save_state("after")
        assert sorted(path.name for path in folder.iterdir()) == ["after", "long"]
        (folder / "after" / "expires_at").write_text("1.0")
        assert await ids(service) == ["long"]
        saved = await client.save_weights_for_sampler("timed", ttl_seconds=60)
        by_id = {row.checkpoint_id: row for row in await service.list_checkpoints()}
        assert by_id[saved.path].expire_time is not None
        for wrong in (0, -1, 1.5, True, "60"):
            with pytest.raises(InvalidArgument, match="ttl_seconds"):
                client.save_state("x", ttl_seconds=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora_rank", [0, 4])
async def test_a_reference_begins_at_a_saved_state(
    platform: RunningPlatform, lora_rank: int
) -> None:
    async with service_on(platform, lora_rank=lora_rank) as service:
        policy = await service.create_training_client()
        before = await logprobs(policy)
        await train(policy, steps=2)
        tuned = await logprobs(policy)
        state = (await policy.save_state("tuned")).path
        await train(policy, steps=2)
        reference = await service.create_reference_client(model_path=state)
        assert np.abs(tuned - before).max() > 1e-3
        assert np.abs(await logprobs(reference) - tuned).max() < 1e-5
        assert np.abs(await logprobs(policy) - tuned).max() > 1e-3
        assert await service.create_reference_client(model_path=state) is reference
        for refused in (
            lambda: reference.optim_step(ADAM),
            lambda: reference.load_state(state),
            lambda: reference.forward_backward(DATA, "cross_entropy"),
        ):
            with pytest.raises(NotSupported, match="reference client"):
                refused()
        base = await service.create_reference_client()
        assert np.abs(await logprobs(base) - before).max() < 1e-5
        assert np.abs(await logprobs(reference) - tuned).max() < 1e-5
        with pytest.raises(RequestFailed, match="no state"):
            await service.create_reference_client(model_path="never-saved")
        await service.release_references()
        again = await service.create_reference_client(model_path=state)
        assert again is not reference
        assert np.abs(await logprobs(again) - tuned).max() < 1e-5


@pytest.mark.as_cloud
async def test_the_commands_delete_and_keep(platform: RunningPlatform) -> None:
    environment = {
        "FIREWORKS_BASE_URL": platform.base_url,
        "FIREWORKS_API_KEY": platform.api_key,
        "COLUMNS": "240",
    }

    def run(*words: str) -> str:
        result = CliRunner().invoke(main, ["checkpoints", *words], env=environment)
        assert result.exit_code == 0, result.output
        return result.output

    async with service_on(platform) as service:
        client = await service.create_training_client()
        for number in range(3):
            await client.save_state(f"s{number}")
        rows = await service.list_checkpoints()
        job = service.trainer_job_id or "-"
        assert "deleted" in run("delete", rows[0].name)
        assert "s1" in run("keep", job, "--last", "1", "--dry-run")
        assert len(await ids(service)) == 2
        assert "s1" in run("keep", job, "--last", "1", "--kind", "state")
        assert await ids(service) == ["s2"]
        assert "nothing to delete" in run("keep", job, "--last", "1")


@pytest.mark.extension("perf_metrics")
async def test_a_second_service_loads_the_chain_that_it_did_not_save(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform) as first:
        client = await first.create_training_client()
        saved = []
        for number in range(3):
            kind = "base" if number == 0 else "delta"
            saved.append(await client.save_weights_for_sampler(f"c{number}", checkpoint_type=kind))
            small = tinker.AdamParams(learning_rate=1e-6)
            await client.forward_backward(datums(2, seed=number), "cross_entropy")
            await client.optim_step(small)
        assert saved[-1].snapshot.kind == "delta"
        async with service_on(
            platform,
            create_deployment=True,
            trainer_job_id=first.trainer_job_id,
            cleanup_trainer_on_close=False,
        ) as second:
            sampler = await second.create_deployment_sampler(saved[-1].path)
            (completion,) = await sampler.sample_with_prompt_tokens([10, 11], max_tokens=2)
            assert completion.snapshot_identity == told(platform, saved[-1].path)


@pytest.mark.extension("perf_metrics")
async def test_samplers_of_several_snapshots_at_once_are_right_or_refused(
    platform: RunningPlatform,
) -> None:
    import asyncio

    from fireworks_training import HotLoadFailed

    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        paths = []
        for number in range(4):
            saved = await client.save_weights_for_sampler(f"s{number}", checkpoint_type="base")
            paths.append(saved.path)
            await train(client)

        async def sampled(path: str) -> str | None:
            sampler = await service.create_deployment_sampler(path)
            (completion,) = await sampler.sample_with_prompt_tokens([10, 11], max_tokens=2)
            return sampler.current_snapshot if platform.as_cloud else completion.snapshot_identity

        outcomes = await asyncio.gather(*map(sampled, paths), return_exceptions=True)
        for path, outcome in zip(paths, outcomes, strict=True):
            assert outcome == path or isinstance(outcome, HotLoadFailed), (path, outcome)
        assert outcomes[-1] == paths[-1]
        newest = client.weight_sync("newest")
        await service.hotload_sampler_snapshot(paths[1])
        await newest
        assert await sampled(paths[1]) == paths[1]


@pytest.mark.extension("perf_metrics")
async def test_the_distance_of_a_snapshot_counts_its_own_models_steps(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, create_deployment=True, max_lora_rank=8) as service:

        async def distances(path: str, steps: int) -> None:
            sampler = await service.create_deployment_sampler(path)
            (completion,) = await sampler.sample_with_prompt_tokens([10, 11], max_tokens=2)
            assert completion.metrics.snapshot_distance == (None if platform.as_cloud else steps)

        first = await service.create_training_client(lora_rank=4)
        await train(first, steps=3)
        of_first = (await first.save_weights_for_sampler("a")).path
        await distances(of_first, 0)
        second = await service.create_training_client(lora_rank=4)
        await distances(of_first, 0)
        await train(second, steps=2)
        of_second = (await second.save_weights_for_sampler("b")).path
        await distances(of_second, 0)
        await distances(of_first, 0)
        await train(first)
        await distances(of_first, 1)
        again = (await first.weight_sync("c")).optimizer_step
        assert again == 4
