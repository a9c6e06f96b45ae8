"""Agents over HTTP, the local platform's engine behind them, and training on what they leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import numpy as np
import pytest

from fireworks_training import (
    AdaptiveConcurrencyController,
    AsyncFiretitanServiceClient,
    ChatTemplateRenderer,
    TITOSidecar,
    check_alignment,
    rollout_datum,
)
from fireworks_training.tito import TITOTrajectoryEndpoint
from tests.async_.sampling.support import until
from tests.conftest import RunningPlatform
from tests.end_to_end.support import service_on

QUESTION = {"role": "user", "content": "Ann has 3 pens and buys 4. How many pens has she?"}
SECOND = {"role": "user", "content": "And if she gives one to Bob?"}


async def asked(endpoint: TITOTrajectoryEndpoint, body: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message, by plain HTTP."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=headers) as answer,
    ):
        if not body.get("stream"):
            whole = await answer.json()
            assert answer.status == 200, whole
            return dict(whole["choices"][0]["message"])
        assert answer.content_type == "text/event-stream"
        message: dict[str, Any] = {}
        events = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
        assert events[-1].strip() == b"[DONE]"
        for event in events[:-1]:
            for choice in json.loads(event)["choices"]:
                message.update(choice["delta"])
        return message


async def sidecar_on(service: AsyncFiretitanServiceClient, **options: Any) -> TITOSidecar:
    tokenizer = await service.get_tokenizer()
    sampler = await service.create_deployment_sampler(tokenizer=tokenizer)
    return TITOSidecar.from_deployment_sampler(
        sampler,
        renderer=ChatTemplateRenderer(tokenizer),
        max_context_tokens=512,
        max_output_tokens=24,
        **options,
    )


@pytest.mark.as_cloud
@pytest.mark.parametrize("mode", ["incremental", "full_history"])
async def test_two_turns_leave_the_engines_own_tokens_and_train(
    platform: RunningPlatform, mode: Any
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        async with await sidecar_on(service, prompt_mode=mode) as sidecar:
            endpoint = await sidecar.create_trajectory_async(metadata={"task": "pens"})
            messages = [QUESTION]
            for number, extra in enumerate([{}, {"stream": True}]):
                body = {"model": "policy", "messages": messages, "seed": number, **extra}
                messages = [*messages, await asked(endpoint, body), SECOND]
            artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)

        first, second = [turn for segment in artifact.segments for turn in segment.turns]
        sampler = await service.create_deployment_sampler()
        for turn, seed in ((first, 0), (second, 1)):
            (same,) = await sampler.sample_with_prompt_tokens(
                turn.exact_prompt_ids, max_tokens=24, seed=seed, logprobs=True
            )
            assert tuple(same.completion_tokens) == turn.exact_completion_ids
            assert turn.inference_logprobs == pytest.approx(same.inference_logprobs, abs=1e-5)
        if mode == "incremental":
            assert second.prompt_disposition == "append"
            assert second.exact_prompt_ids[: len(first.exact_checkpoint_ids)] == (
                first.exact_checkpoint_ids
            )
        assert [attempt.emission for attempt in artifact.response_attempts] == ["completed"] * 2

        data = [
            rollout_datum(
                segment.tokens,
                logprobs=segment.logprobs,
                loss_mask=segment.loss_mask,
                advantages=1.0,
            )
            for segment in artifact.segments
        ]
        trained = await client.forward_backward(data, "importance_sampling")
        assert check_alignment(data, trained.loss_fn_outputs) < 1e-3
        masked = sum(int(np.count_nonzero(d.loss_fn_inputs["advantages"].to_numpy())) for d in data)
        assert masked == sum(sum(segment.loss_mask) for segment in artifact.segments)
        if mode == "incremental":
            assert masked == sum(len(t.exact_completion_ids) for t in (first, second))


@pytest.mark.extension("min_tokens")
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_that_leaves_gives_its_slot_of_the_engine_back(
    platform: RunningPlatform, stream: bool
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        tokenizer = await service.get_tokenizer()
        sampler = await service.create_deployment_sampler(tokenizer=tokenizer)
        # Both go on for long; a cloud takes no min_tokens, but noise seldom ends a text either.
        long = {"temperature": 2.0} if platform.as_cloud else {"min_tokens": 2000}
        sidecar = TITOSidecar.from_deployment_sampler(
            sampler,
            renderer=ChatTemplateRenderer(tokenizer),
            max_context_tokens=2048,
            max_output_tokens=2000,
            sampling_defaults=long,
        )
        async with sidecar:
            endpoint = await sidecar.create_trajectory_async()
            body = {"messages": [QUESTION], "stream": stream}
            asking = asyncio.create_task(asked(endpoint, body))
            gate = sampler.concurrency_controller
            assert isinstance(gate, AdaptiveConcurrencyController)
            await until(lambda: gate.in_flight == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: gate.in_flight == 0)
            artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
            assert [call.outcome for call in artifact.calls] == ["cancelled"]

            async def alone() -> bool:
                """Whether a completion finds the engine free: it counts itself."""
                (one,) = await sampler.sample_with_prompt_tokens([5, 6, 7], max_tokens=1)
                return one.metrics.num_concurrent_requests == 1

            # What was cancelled would go on for 2,000 tokens.
            assert any([await alone() for _ in range(5)])
