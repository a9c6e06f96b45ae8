"""Replicas and exactness over HTTP: what `generate` says, whatever joins, leaves or dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch

from fireworks_training import (
    AsyncControlPlane,
    DeploymentSampler,
    FireworksTrainingError,
    FixedConcurrencyController,
    SampledCompletion,
)
from fireworks_training.local.model.model import load_model, round_parameters_
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, model_folder, service_on

EVERYTHING_BY = 30.0
"""Seconds within which every completion has to have returned or failed."""


def plane_of(platform: RunningPlatform) -> AsyncControlPlane:
    """The platform's control plane."""
    return AsyncControlPlane.connect(api_key=platform.api_key, base_url=platform.base_url)


@asynccontextmanager
async def deployed(
    platform: RunningPlatform, plane: AsyncControlPlane, name: str, replicas: int = 1
) -> AsyncIterator[DeploymentSampler]:
    """A deployment of the shipped model without a trainer, and a sampler of it."""
    body = {"baseModel": platform.model, "maxReplicaCount": replicas}
    await plane.create_deployment(name, body)
    await eventually(lambda: whole(plane, name, replicas))
    async with DeploymentSampler(
        platform.base_url,
        f"accounts/local/deployments/{name}",
        platform.api_key,
        concurrency_controller=FixedConcurrencyController(256),
        integer_stops=True,
    ) as sampler:
        yield sampler
    await plane.delete_deployment(name)


async def whole(plane: AsyncControlPlane, name: str, replicas: int) -> bool:
    """Whether all replicas of a deployment run."""
    info = await plane.get_deployment(name)
    assert info is not None
    assert info.state != "FAILED", info.message
    return (info.state, info.replica_count) == ("READY", replicas)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts of 3 to 60 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(4, 328, int(n)).tolist() for n in random.integers(3, 61, count)]


@torch.inference_mode()
def reference_steps(model: Any, completion: SampledCompletion) -> torch.Tensor:
    """`[completion_len, V]` logits that the model itself gives along the completion."""
    ids = torch.tensor([list(completion.full_tokens)])
    logits: torch.Tensor = model(input_ids=ids).logits[0, completion.prompt_len - 1 : -1]
    return logits


@pytest.mark.slow
async def test_greedy_is_generate_and_a_seed_is_a_seed(platform: RunningPlatform) -> None:
    """200 prompts in a crowd that joins, leaves and is cancelled, against the model alone."""
    async with plane_of(platform) as plane, deployed(platform, plane, "exact") as sampler:
        noise = [
            asyncio.ensure_future(
                sampler.sample_with_prompt_tokens([prompt], n=2, max_tokens=5 + index % 90)
            )
            for index, prompt in enumerate(prompts(60, 9))
        ]
        asked = prompts(200, 1)
        greedy = asyncio.ensure_future(
            sampler.sample_with_prompt_tokens(
                asked, max_tokens=40, temperature=0.0, logprobs=True, ignore_eos=True
            )
        )
        await noise[0]
        for task in noise[1::3]:
            task.cancel()
        found = await greedy
        await asyncio.gather(*noise, return_exceptions=True)
        seeded = {"max_tokens": 40, "seed": 7, "temperature": 1.1, "ignore_eos": True}
        alone = [await sampler.sample_with_prompt_tokens([p], **seeded) for p in asked[:20]]
        # One call each: within a call every sample has a seed of its own.
        crowd = await asyncio.gather(
            *(sampler.sample_with_prompt_tokens([p], **seeded) for p in asked)
        )
    model: Any = load_model(model_folder())
    round_parameters_(model, "bfloat16")
    model.generation_config.eos_token_id = None
    ended_in_a_tie, worst = 0, 0.0
    for prompt, completion in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
        )[0, len(prompt) :].tolist()
        got = list(completion.full_tokens)[len(prompt) :]
        logits = reference_steps(model, completion)
        logprobs = logits.log_softmax(-1)[torch.arange(40), torch.tensor(got)]
        assert completion.inference_logprobs is not None
        error = (logprobs - torch.tensor(list(completion.inference_logprobs))).abs().max()
        worst = max(worst, float(error))
        if got != expected:
            first = next(i for i in range(40) if got[i] != expected[i])
            best, second = logits[first].topk(2).values.tolist()
            assert best - second < 1e-4, f"token {first} of a prompt differs without a tie"
            ended_in_a_tie += 1
    assert worst < 1e-4
    assert ended_in_a_tie <= 4
    different = sum(
        list(one.full_tokens) != list(many.full_tokens)
        for (one,), (many,) in zip(alone, crowd[:20], strict=True)
    )
    assert different <= 1, "a seed gives its tokens whatever the batch"


# -- someone leaves -------------------------------------------------------------------------------


@pytest.mark.extension("load")
async def test_cancelling_32_of_64_streams_frees_their_slots(platform: RunningPlatform) -> None:
    """Counted by the engine; who stays is not disturbed, and who comes finds the slots free."""
    async with (
        plane_of(platform) as plane,
        deployed(platform, plane, "cancelled") as sampler,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {platform.api_key}"}) as http,
    ):
        url = f"{platform.base_url}/hot_load/v1/models/hot_load"
        name = {"fireworks-deployment": "accounts/local/deployments/cancelled"}

        async def load() -> dict[str, int]:
            async with http.get(url, headers=name) as response:
                found: dict[str, int] = (await response.json())["replicas"][0]["load"]
            return found

        async def active(count: int) -> bool:
            if platform.as_cloud:  # a replica does not say how busy it is; a completion does
                (one,) = await sampler.sample_with_prompt_tokens([5, 6, 7], max_tokens=1)
                return one.metrics.num_concurrent_requests == count + 1
            return await load() == {"slots": slots, "active": count, "waiting": 0}

        slots = 0 if platform.as_cloud else (await load())["slots"]
        asked = prompts(64, 5)
        running = [
            asyncio.ensure_future(
                sampler.sample_with_prompt_tokens([prompt], max_tokens=tokens, ignore_eos=True)
            )
            # Those who leave would not have ended by themselves in this test's time.
            for prompt, tokens in zip(asked, [1900, 400] * 32, strict=True)
        ]
        await eventually(lambda: active(64))
        for task in running[::2]:
            task.cancel()
        await eventually(lambda: active(32))
        late = await sampler.sample_with_prompt_tokens([asked[0]], max_tokens=1, ignore_eos=True)
        assert (late[0].metrics.num_concurrent_requests or 64) <= 33
        stayed = await asyncio.gather(*running[1::2])
        assert [found[0].completion_len for found in stayed] == [400] * 32
        assert await active(0)
        assert all(task.cancelled() for task in running[::2])


# -- someone dies ---------------------------------------------------------------------------------


def parents() -> dict[int, int]:
    """The parent of each process."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
    return found


def workers(platform: RunningPlatform, name: str) -> list[int]:
    """Living processes of the platform: `fwt-engine`, `fwt-trainer`, or a module of it."""
    tree = parents()
    found: list[int] = []
    for pid in tree:
        above = pid
        while above in tree and above != platform.process.pid:
            above = tree[above]
        if above != platform.process.pid:
            continue
        with contextlib.suppress(OSError):
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            module = command[command.index("-m") + 1] if "-m" in command else ""
            if name == comm or (name == module and not comm.startswith("fwt-")):
                found.append(pid)
    assert found, f"no {name}"
    return sorted(found)


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Asks again until it holds, for `EVERYTHING_BY` seconds."""
    async with asyncio.timeout(EVERYTHING_BY):
        while not await check():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.1)


async def under_load(
    sampler: DeploymentSampler, kill: Callable[[], None]
) -> list[SampledCompletion | BaseException]:
    """64 streams of 150 tokens, and a kill once all of them run."""
    calls = [
        asyncio.ensure_future(
            sampler.sample_with_prompt_tokens([prompt], max_tokens=150, ignore_eos=True)
        )
        for prompt in prompts(64, 3)
    ]
    await asyncio.sleep(0.5)
    kill()
    async with asyncio.timeout(EVERYTHING_BY):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    return [one if isinstance(one, BaseException) else one[0] for one in ended]


async def train_until(stop: asyncio.Event, trainer: Any) -> FireworksTrainingError | None:
    """Steps until told to stop; the typed error that ended them, if one did."""
    while not stop.is_set():
        try:
            trainer.forward_backward(datums(4), "cross_entropy")
            await trainer.optim_step(ADAM)
        except FireworksTrainingError as error:
            return error
    return None


VICTIMS = ["fwt-engine", "fwt-trainer", "fireworks_training.local.gateway"]
VICTIMS.append("fireworks_training.local.processes.template")


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
async def test_kill_9_of_any_process_under_load(victim: str, own_platform: Any) -> None:
    """Every completion returns or fails typed, and the platform is whole again."""
    with own_platform() as platform:
        async with service_on(
            platform, deployment_id="killed", create_deployment=True, replica_count=2
        ) as service:
            trainer = await service.create_training_client()
            trainer.forward_backward(datums(4), "cross_entropy")
            await trainer.optim_step(ADAM)
            saved = await trainer.save_weights_for_sampler("served")
            sampler = await service.create_deployment_sampler(
                model_path=saved.path, concurrency_controller=FixedConcurrencyController(64)
            )
            stop = asyncio.Event()
            training = asyncio.ensure_future(train_until(stop, trainer))
            engines = workers(platform, "fwt-engine")
            assert len(engines) == 2
            pid = workers(platform, victim)[0]
            ended = await under_load(sampler, lambda: os.kill(pid, signal.SIGKILL))
            stop.set()
            async with asyncio.timeout(EVERYTHING_BY):
                error = await training
            failed = [one for one in ended if isinstance(one, BaseException)]
            assert all(isinstance(one, FireworksTrainingError) for one in failed)
            assert not failed, "a truncation is retried"
            assert (error is not None) == (victim == "fwt-trainer")

            async with plane_of(platform) as plane:
                await eventually(lambda: whole(plane, "killed", 2))
            identities = {
                one.snapshot_identity
                for one in await sampler.sample_with_prompt_tokens(prompts(16, 5), max_tokens=4)
            }
            assert len(identities) == 1, "a new replica serves the current snapshot"
            assert identities != {None}
