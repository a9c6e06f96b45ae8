"""Rows of the builders train every loss on the sampled tokens alone, over HTTP.

The judge is arithmetic: on policy every ratio is 1, so gspo and ppo have the gradient of
importance_sampling, and dro, whose penalty is then 0, that of reinforce.
"""

from __future__ import annotations

import pytest
import tinker

from fireworks_training import (
    DeploymentSampler,
    FiretitanServiceClient,
    completion_datum,
    rl_datum,
    rollout_datum,
)
from tests.conftest import RunningPlatform

ADVANTAGES = (1.0, -1.0, 0.5, 0.0)
STILL = tinker.AdamParams(learning_rate=0.0)


def bare(datum: tinker.Datum) -> tinker.Datum:
    """The row as another client sends it, without a mask."""
    kept = {name: t for name, t in datum.loss_fn_inputs.items() if name != "weights"}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=kept)


def row_of_two_turns(
    sampler: DeploymentSampler, prompt: list[int], advantage: float, seed: int
) -> tuple[tinker.Datum, int]:
    """An agent's row, two completions with tokens between them that nobody sampled; and how many
    tokens were."""
    tokens, logprobs, mask = [*prompt], [0.0] * len(prompt), [False] * len(prompt)
    for turn, length in enumerate((3 + seed, 6)):
        (completion,) = sampler.sample_with_prompt_tokens(
            tokens, max_tokens=length, logprobs=True, seed=seed + turn, ignore_eos=True
        ).result()
        assert completion.inference_logprobs is not None
        tokens += completion.completion_tokens
        logprobs += completion.inference_logprobs
        mask += [True] * completion.completion_len
        if turn == 0:
            tokens, logprobs, mask = (
                [*tokens, 9, 10, 11],
                [*logprobs, 0, 0, 0],
                [*mask, *[False] * 3],
            )
    row = rollout_datum(tokens, logprobs=logprobs, loss_mask=mask, advantages=advantage)
    return row, sum(mask)


def test_on_policy_rows_train_alike_with_a_mask_and_without(
    platform: RunningPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        tokenizer_model=platform.tokenizer if platform.as_cloud else None,
        snapshot_dtype="float32",
    ) as service:
        client = service.create_training_client()
        sampler = service.create_deployment_sampler()
        prompt = service.get_tokenizer().encode("Ann has 3 pens and gets 4 more. How many?")
        completions = sampler.sample_with_prompt_tokens(
            prompt, n=4, max_tokens=8, logprobs=True, seed=5
        ).result()
        sampled = sum(completion.completion_len for completion in completions)
        pairs = [*zip(completions, ADVANTAGES, strict=True)]
        rows = [completion_datum(completion, a) for completion, a in pairs]
        plain = [completion_datum(completion, a, mask=False) for completion, a in pairs]

        def step(data: list[tinker.Datum], loss: str) -> tuple[float, float]:
            metrics = client.forward_backward(data, loss).result().metrics
            assert metrics["num_loss_tokens:sum"] == sampled, loss
            norm = client.optim_step(
                STILL, grad_accumulation_normalization="num_loss_tokens"
            ).result()
            assert norm.metrics
            return metrics["loss:sum"], norm.metrics["grad_norm"]

        for names in (("importance_sampling", "ppo", "gspo", "dppo"), ("reinforce", "dro")):
            wanted = step(rows, names[0])
            for name in names:
                for data in (rows, plain, [*map(bare, rows)]):
                    assert step(data, name) == pytest.approx(wanted, rel=1e-4), name

        agents = [row_of_two_turns(sampler, prompt, a, seed) for seed, a in enumerate(ADVANTAGES)]
        rows, sampled = [row for row, _ in agents], sum(count for _, count in agents)
        for names in (("importance_sampling", "ppo", "gspo", "dppo"), ("reinforce", "dro")):
            wanted = step(rows, names[0])
            for name in names:
                for data in (rows, [*map(bare, rows)]):
                    assert step(data, name) == pytest.approx(wanted, rel=1e-4), name

        huge = rl_datum([5, 6], [7, 8], logprobs=[-1.0, -9999.0], advantages=1.0)
        client.forward_backward([huge], "ppo").result()  # one token is e^9990 too likely
        held = client.optim_step(STILL).result().metrics
        assert held
        assert 0 < held["grad_norm"] < 1e6
    said = [r.getMessage() for r in caplog.records if "came without 'weights'" in r.getMessage()]
    assert len(said) == 1
