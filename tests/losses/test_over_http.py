"""A loss and its built-in twin, on the same rows over HTTP: one value, one gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinker

from fireworks_training import FiretitanServiceClient, losses, rollout_datum, supervised_datum
from fireworks_training._async.training.custom_loss import SpreadMeans
from tests.conftest import RunningPlatform

STILL = tinker.AdamParams(learning_rate=0.0)
RL: list[losses.BatchLoss] = [
    losses.reinforce(),
    losses.reinforce(importance=True),
    losses.grpo(reduction="sum"),
    losses.cispo(reduction="sum", max_weight=1.3),
    losses.gspo(reduction="sum", clip_low=0.02, clip_high=0.02),
    losses.dppo(reduction="sum", delta_low=0.01),
    losses.dro(),
]


def rows(service: FiretitanServiceClient, client: Any) -> list[tinker.Datum]:
    """Rows of several turns, near the policy, whose last one differs in length."""
    draw = np.random.default_rng(4)
    tokenizer = service.get_tokenizer()
    texts = ["Ann has 3 pens and gets 4 more.", "How many pens does Ann have? 7", "Bob: 2 + 2 = 4."]
    ids = [tokenizer.encode(text) for text in texts]
    plain = [supervised_datum(tokens, [1.0] * len(tokens)) for tokens in ids]
    found = client.forward(plain, "cross_entropy").result().loss_fn_outputs
    made = []
    for tokens, output, advantage in zip(ids, found, (1.0, -0.7, 0.4), strict=True):
        own = output["logprobs"].to_numpy()
        moved = np.minimum(own + 0.3 * draw.standard_normal(len(own)), 0.0)
        mask = [place >= 3 and place % 4 != 0 for place in range(len(tokens))]
        made.append(
            rollout_datum(tokens, logprobs=[0.0, *moved], loss_mask=mask, advantages=advantage)
        )
    return made


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["full", "LoRA"])
@pytest.mark.parametrize("dialect", ["protobuf", "json"])
def test_a_twin_has_the_same_loss_and_gradient(
    platform: RunningPlatform,
    dialect: str,
    lora: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        snapshot_dtype="float32",
        create_deployment=False,
        dialect=dialect,
        **lora,
    ) as service:
        client = service.create_training_client()
        data = rows(service, client)

        def step(submit: Any) -> tuple[float, float]:
            passed = submit.result().metrics
            stepped = client.optim_step(STILL).result().metrics
            return passed["loss:sum"], stepped["grad_norm"]

        for loss in [losses.sft(reduction="sum"), *RL]:
            given = data
            if loss.name == "sft":  # cross_entropy takes no advantages
                bare = [
                    {k: v for k, v in d.loss_fn_inputs.items() if k in ("weights", "target_tokens")}
                    for d in data
                ]
                given = [
                    tinker.Datum(model_input=d.model_input, loss_fn_inputs=b)
                    for d, b in zip(data, bare, strict=True)
                ]
            custom = step(client.forward_backward_custom(given, loss))
            built_in = step(client.forward_backward(given, *loss.builtin))
            assert custom == pytest.approx(built_in, rel=1e-5), loss.name
            assert built_in[1] > 0

        # A mean over calls: without totals it is said once, with them nothing is said.
        caplog.clear()
        for _ in range(2):
            for some in (data[:1], data[1:]):
                client.forward_backward_custom(some, losses.grpo()).result()
            client.optim_step(STILL).result()
        said = [r.getMessage() for r in caplog.records if "losses.totals" in r.getMessage()]
        assert len(said) == 1
        assert said[0].startswith("the loss 'grpo' takes the mean of each call")

        # The totals make two parts the same step as one call.
        loss = losses.grpo(kl="k2", kl_coef=0.1)
        known = client.forward(data, "cross_entropy").result().loss_fn_outputs
        given = losses.attach(data, ref_logprobs=[o["logprobs"].to_numpy() - 0.2 for o in known])
        whole = step(client.forward_backward_custom(given, loss))
        part = loss.over(losses.totals(given))
        futures = [client.forward_backward_custom(some, part) for some in (given[:1], given[1:])]
        stepped = client.optim_step(STILL).result().metrics
        assert sum(f.result().metrics["loss:sum"] for f in futures) == pytest.approx(
            whole[0], rel=1e-5
        )
        assert stepped["grad_norm"] == pytest.approx(whole[1], rel=1e-5)


def test_ten_random_splits_of_a_batch_make_the_same_step(platform: RunningPlatform) -> None:
    draw = np.random.default_rng(7)
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        snapshot_dtype="float32",
        create_deployment=False,
    ) as service:
        client = service.create_training_client()
        data = rows(service, client) * 3
        for name in ("grpo", "dapo", "gspo", "dr_grpo", "sft"):
            loss = losses.dr_grpo(max_tokens=32) if name == "dr_grpo" else getattr(losses, name)()
            part = loss.over(losses.totals(data))
            client.forward_backward_custom(data, part)
            whole = client.optim_step(STILL).result().metrics
            assert whole is not None
            for _ in range(2):
                order = [data[i] for i in draw.permutation(len(data))]
                cuts = sorted(draw.choice(np.arange(1, len(data)), 3, replace=False).tolist())
                for first, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                    client.forward_backward_custom(order[first:end], part)
                split = client.optim_step(STILL).result().metrics
                assert split is not None
                assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5), name


def test_one_call_a_step_and_two_losses_a_step_are_no_spread_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    means = SpreadMeans()
    for step in range(3):
        means.note(step, losses.grpo())
    means.note(2, losses.sft())
    means.note(2, losses.reinforce())
    means.note(3, losses.grpo().over(losses.Totals(3, 9)))
    means.note(3, losses.grpo().over(losses.Totals(3, 9)))
    means.note(3, lambda data, outputs: None)
    assert not caplog.records
    means.note(4, losses.sft())
    means.note(4, losses.sft())
    assert len(caplog.records) == 1
