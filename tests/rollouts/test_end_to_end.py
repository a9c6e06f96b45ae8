"""Pools over a real trainer, deployment and sampler, async and blocking, and agents' endpoints."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tinker

from fireworks_training import AsyncFiretitanServiceClient, FiretitanServiceClient
from fireworks_training.rollouts import Batch, Episode, RolloutContext, RolloutPool
from tests.conftest import RunningPlatform

pytestmark = pytest.mark.slow
ADAM = tinker.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8)
TASKS = [(2, 3), (3, 4), (4, 5), (2, 6), (3, 3), (5, 2)]


def config(platform: RunningPlatform) -> dict[str, Any]:
    return {
        "api_key": platform.api_key,
        "base_url": platform.base_url,
        "base_model": platform.model,
        "training_shape_id": platform.training_shape,
        "cleanup_trainer_on_close": True,
        "cleanup_deployment_on_close": "delete",
    }


def messages(task: tuple[int, int]) -> list[dict[str, str]]:
    a, b = task
    question = f"Ann has {a} pens and gets {b} more. How many pens does Ann have?"
    return [{"role": "user", "content": question}]


def right(episode: Episode, task: tuple[int, int]) -> float:
    return float(episode.text.split("####")[-1].strip() == str(sum(task)))


async def one_turn(task: tuple[int, int], ctx: RolloutContext) -> Any:
    (completion,) = await ctx.sampler.sample_with_tokens(messages(task), max_tokens=8)
    return completion


def check(batches: list[Batch], max_lag: int) -> None:
    assert [batch.number for batch in batches] == [0, 1, 2]
    assert [g.number for batch in batches for g in batch.groups] == list(range(6))
    assert all(batch.lag is not None and batch.lag <= max_lag for batch in batches)


async def test_three_batches_trained_published_and_evaluated(platform: RunningPlatform) -> None:
    make = AsyncFiretitanServiceClient.from_firetitan_config
    async with make(**config(platform)) as service:
        client = await service.create_training_client()
        await client.weight_sync()
        batches: list[Batch] = []
        live: list[str] = []
        async with RolloutPool(
            service, TASKS, one_turn, groups_per_batch=2, group_size=2, max_lag=1, reward=right
        ) as pool:
            async for batch in pool:
                client.forward_backward(batch.data(), "importance_sampling")
                client.optim_step(ADAM)
                live.append((await pool.publish(client)).identity)
                batches.append(batch)
            evaluated = await pool.evaluate(TASKS[:2])
        check(batches, 1)
        for batch in batches:
            for episode in batch.episodes:
                (row,) = episode.rows
                sampled = [s for s, m in zip(row.snapshots, row.loss_mask, strict=True) if m]
                assert all(sampled)
                assert len(row.logprobs) == len(row.tokens)
        assert len({s for batch in batches for s in batch.versions}) > 1  # weights moved
        assert {
            identity
            for group in evaluated
            for row in group.episodes[0].rows
            for identity in row.snapshots
            if identity
        } == {live[-1]}
        counts = pool.token_counts()
        assert counts.closes
        assert counts.sampled == counts.trained > 0


def test_the_same_loop_with_the_blocking_service(platform: RunningPlatform) -> None:
    def rollout(task: tuple[int, int], ctx: RolloutContext) -> Any:
        return ctx.sampler.sample_with_tokens(messages(task), max_tokens=8).result(), 1.0

    with FiretitanServiceClient.from_firetitan_config(**config(platform)) as service:
        client = service.create_training_client()
        client.weight_sync().result()
        batches: list[Batch] = []
        with RolloutPool(service, TASKS, rollout, groups_per_batch=2, group_size=1) as pool:
            for batch in pool:
                client.forward_backward(batch.data(), "importance_sampling")
                client.optim_step(ADAM)
                pool.publish(client).result()
                batches.append(batch)
        check(batches, 1)
        assert pool.token_counts().closes


async def test_an_agent_by_the_endpoint_gives_its_tokens_and_snapshots(
    platform: RunningPlatform,
) -> None:
    async def agent(task: tuple[int, int], ctx: RolloutContext) -> Any:
        said = messages(task)
        async with ctx.endpoint() as endpoint:
            headers = {"Authorization": f"Bearer {endpoint.api_key}"}
            async with aiohttp.ClientSession(headers=headers) as session:
                for _ in range(2):
                    body = {"model": "policy", "messages": said, "max_tokens": 8}
                    url = f"{endpoint.base_url}/chat/completions"
                    async with session.post(url, json=body) as answer:
                        answer.raise_for_status()
                        message = (await answer.json())["choices"][0]["message"]
                    said = [*said, message, {"role": "user", "content": "Once more?"}]
        return endpoint.artifact, 1.0

    make = AsyncFiretitanServiceClient.from_firetitan_config
    async with make(**config(platform)) as service:
        client = await service.create_training_client()
        first = await client.weight_sync()
        limits = {"max_context_tokens": 512, "max_output_tokens": 16}
        async with RolloutPool(
            service, TASKS[:2], agent, groups_per_batch=2, group_size=1, endpoint=limits
        ) as pool:
            batch = await anext(pool)
        assert len(batch.groups) == 2, [group.reason for group in batch.untrained]
        for episode in batch.episodes:
            for row in episode.rows:
                known = {s for s, m in zip(row.snapshots, row.loss_mask, strict=True) if m}
                assert known == {first.identity}
        assert batch.data()
        assert pool.token_counts().closes


async def test_the_snippet_of_the_readme_runs(platform: RunningPlatform) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {"tasks": [{"messages": messages(t), "answer": "5"} for t in TASKS]}
    exec(
        "async def main(service, client, adam):\n"
        + textwrap.indent(snippet, "    ")
        + "    return batch, pool",
        names,
    )
    make = AsyncFiretitanServiceClient.from_firetitan_config
    async with make(**config(platform)) as service:
        client = await service.create_training_client()
        batch, pool = await names["main"](service, client, ADAM)
    assert batch.number == 2
    assert pool.token_counts().closes
