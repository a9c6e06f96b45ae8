"""Streams and Tinker's sampling client against the local platform's engine."""

from __future__ import annotations

import numpy as np
import pytest
import tinker

from fireworks_training import InvalidArgument
from tests.conftest import RunningPlatform
from tests.end_to_end.support import service_on

QUESTION = [{"role": "user", "content": "Ann has 3 pens and buys 4. How many pens has she?"}]


@pytest.mark.as_cloud
async def test_a_stream_and_a_tinker_sample_are_of_one_model(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_sampling_client()
        sampler = client.deployment_sampler
        assert sampler.concurrency_controller is (
            (await service.create_deployment_sampler()).concurrency_controller
        )
        text, tokens, logprobs = "", list[int](), list[float]()
        async with sampler.stream(QUESTION, 12, 0.0, logprobs=True, ignore_eos=True) as deltas:
            async for delta in deltas:
                text += delta.text
                tokens += delta.tokens
                logprobs.extend(delta.logprobs)
        one = deltas.completion
        assert (one.text, one.completion_tokens) == (text, tokens)
        assert one.inference_logprobs == logprobs
        assert len(tokens) == 12

        prompt = tinker.ModelInput.from_ints(list(one.prompt_tokens))
        params = tinker.SamplingParams(max_tokens=12, temperature=0.0, stop=[])
        response = await client.sample_async(prompt, 2, params, include_prompt_logprobs=True)
        assert [sequence.tokens for sequence in response.sequences] == [tokens, tokens]
        whole = tinker.ModelInput.from_ints(list(one.full_tokens))
        found = await client.compute_logprobs(whole)
        assert found[0] is None
        assert len(found) == len(one.full_tokens)
        measured = np.asarray(found[one.prompt_len :], dtype=float)
        np.testing.assert_allclose(measured, logprobs, atol=1e-4)
        assert response.prompt_logprobs is not None
        np.testing.assert_allclose(
            np.asarray(response.prompt_logprobs[1:], dtype=float),
            np.asarray(found[1 : one.prompt_len], dtype=float),
            atol=1e-4,
        )
        with pytest.raises(InvalidArgument, match="not both"):
            await service.create_sampling_client("step", "accounts/local/models/tiny-qwen3")
        await client.aclose()
