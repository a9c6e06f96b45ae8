"""Settings, inputs, totals, metrics and refusals of the losses."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fireworks_training import losses
from fireworks_training.errors import (
    InvalidArgument,
    InvalidDatum,
    NotSupported,
    UnknownOption,
)
from tests.losses.support import leaf, random_batch, row

ALL: dict[str, losses.BatchLoss] = {
    "sft": losses.sft(),
    "dpo": losses.dpo(),
    "ipo": losses.ipo(),
    "orpo": losses.orpo(),
    "grpo": losses.grpo(kl="k3", kl_coef=0.04),
    "dr_grpo": losses.dr_grpo(64),
    "dapo": losses.dapo(correction="tis"),
    "gspo": losses.gspo(),
    "cispo": losses.cispo(correction="icepop"),
    "dppo": losses.dppo(kl="k2", kl_coef=0.1),
    "sapo": losses.sapo(correction="sequence_mask"),
    "dro": losses.dro(),
    "reinforce": losses.reinforce(kl="k1_in_reward", kl_coef=0.1),
    "distill": losses.distill(),
}


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> np.ndarray:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return np.concatenate(
        [np.zeros(len(x)) if g is None else g.numpy() for g, x in zip(found, leaves, strict=True)]
    )


@pytest.mark.parametrize("name", ALL)
def test_any_split_of_a_batch_has_the_same_gradient(name: str) -> None:
    loss, (data, leaves) = ALL[name], random_batch(3)
    unit = 2 if isinstance(loss, losses.PreferenceLoss) else 1
    whole = gradients(loss(data, leaves)[0], leaves)
    part = loss.over(losses.totals(data))
    for seed in range(10):
        draw = np.random.default_rng(seed)
        units = draw.permutation(len(data) // unit)
        cuts = np.sort(draw.choice(np.arange(1, len(units)), size=3, replace=False))
        summed = np.zeros_like(whole)
        for chosen in np.split(units, cuts):
            places = [unit * at + k for at in chosen for k in range(unit)]
            loss_of_part = part([data[i] for i in places], [leaves[i] for i in places])[0]
            summed += gradients(loss_of_part, leaves)
        assert np.abs(summed - whole).max() <= 1e-6 * np.abs(whole).max()


def test_a_mean_over_parts_without_totals_would_differ() -> None:
    data, leaves = random_batch(3)
    whole = gradients(losses.sft()(data, leaves)[0], leaves)
    halves = [(data[a:b], leaves[a:b]) for a, b in ((0, 3), (3, 12))]
    parts = sum(gradients(losses.sft()(rows, own)[0], own).sum() for rows, own in halves)
    assert not math.isclose(parts, whole.sum(), rel_tol=1e-3)


def test_a_loss_says_whether_it_needs_totals() -> None:
    assert losses.grpo().needs_totals
    assert not losses.reinforce().needs_totals
    assert not losses.grpo().over(losses.Totals(4, 10)).needs_totals
    with pytest.raises(InvalidArgument, match="totals"):
        losses.grpo().over(4)  # type: ignore[arg-type]


def test_more_than_the_totals_is_refused() -> None:
    data, leaves = random_batch(1)
    small = losses.totals(data[:3])
    for loss in (losses.grpo(), losses.dapo(), losses.dr_grpo(9), losses.dpo()):
        with pytest.raises(InvalidArgument, match="more than the totals"):
            loss.over(small)(data, leaves)


def test_totals_count_what_the_masks_say() -> None:
    data = [row(3, weights=[0, 1, 1]), row(2, weights=[0, 0]), row(4)]
    assert losses.totals(data) == losses.Totals(2, 6.0)
    with pytest.raises(InvalidArgument, match="no token counts"):
        losses.totals([row(2, weights=[0, 0])])


# -- masks -----------------------------------------------


def test_rows_without_a_mask_count_what_has_an_advantage_or_a_logprob() -> None:
    arrays = {"logprobs": [0, -1, -2], "advantages": [0, 0, 0]}
    assert losses.totals([row(3, weights=None, **arrays)]).tokens == 2
    arrays = {"logprobs": [0, 0, -2], "advantages": [0, 1, 1]}
    assert losses.totals([row(3, weights=None, **arrays)]).tokens == 2
    assert losses.totals([row(3, weights=None)]).tokens == 3
    blank = row(2, weights=None, logprobs=[0, 0], advantages=[0, 0])
    with pytest.raises(InvalidDatum, match="'weights'"):
        losses.totals([blank])


@pytest.mark.parametrize("name", ["loss_mask", "mask", "sequence_ratio_mask"])
def test_other_names_of_a_mask_are_taken(name: str) -> None:
    other: Any = {name: [0, 1, 1]}
    assert losses.totals([row(3, weights=None, **other)]).tokens == 2
    assert losses.totals([row(3, weights=[0, 1, 1], **other)]).tokens == 2
    with pytest.raises(InvalidDatum, match="differ"):
        losses.totals([row(3, **other)])


@pytest.mark.parametrize("bad", [[1, -1], [1, math.nan], [1, math.inf]])
def test_a_mask_is_finite_and_not_negative(bad: list[float]) -> None:
    with pytest.raises(InvalidDatum, match="weights"):
        losses.totals([row(2, weights=bad)])


def test_a_weight_between_counts_in_part() -> None:
    data, leaves = [row(3, weights=[0, 0.5, 1])], [leaf(-1, -2, -4)]
    loss, metrics = losses.sft()(data, leaves)
    assert loss.item() == pytest.approx(5 / 1.5)
    assert metrics == {"nll": pytest.approx(5 / 1.5), "tokens": 1.5, "sequences": 1.0}


def test_arrays_have_the_length_of_their_row() -> None:
    data = [row(3, logprobs=[-1, -1, -1], advantages=[1, 1])]
    with pytest.raises(InvalidDatum, match="'advantages' has the shape"):
        losses.grpo()(data, [leaf(-1, -1, -1)])
    with pytest.raises(InvalidArgument, match="2 logprob tensors for 1 datums"):
        losses.sft()([row(1)], [leaf(-1), leaf(-1)])
    with pytest.raises(InvalidDatum, match="1 of 2 datums have 'advantages'"):
        losses.reinforce()([row(1, advantages=[1]), row(1)], [leaf(-1), leaf(-1)])
    with pytest.raises(InvalidDatum, match="no token of the batch counts"):
        losses.sft()([row(1, weights=[0])], [leaf(-1)])


def test_a_row_of_no_length_takes_no_part() -> None:
    data = [row(0), row(2), row(0)]
    loss, metrics = losses.sft()(data, [leaf(), leaf(-1, -3), leaf()])
    assert loss.item() == 2.0
    assert metrics["sequences"] == 1.0


# -- what a loss needs -----------------------------------------------


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        (losses.grpo(), "'logprobs'"),
        (losses.dpo(), "'ref_logprobs'"),
        (losses.reinforce(kl="k2", kl_coef=1), "'ref_logprobs'"),
        (losses.distill(), "'logprobs'"),
        (losses.reinforce(correction="tis"), "'logprobs'"),
    ],
)
def test_what_is_missing_is_named(loss: losses.BatchLoss, missing: str) -> None:
    data = [row(2, advantages=[1, 1])] * 2
    with pytest.raises(InvalidDatum, match=missing):
        loss(data, [leaf(-1, -1), leaf(-1, -1)])


def test_a_correction_needs_the_trainers_own_logprobs() -> None:
    data = [row(2, advantages=[1, 1], logprobs=[-1, -2])]
    with pytest.raises(InvalidDatum, match="'old_logprobs'"):
        losses.grpo(correction="tis")(data, [leaf(-1, -1)])
    _, metrics = losses.grpo(correction="tis", old="current")(data, [leaf(-1, -1)])
    assert metrics["correction/weight_mean"] == pytest.approx(1.5)
    assert metrics["correction/capped"] == 0.5
    assert metrics["ratio/mean"] == 1.0


def test_attach_adds_arrays_and_leaves_the_datums_alone() -> None:
    data = [row(2), row(1)]
    made = losses.attach(data, ref_logprobs=[[-1, -2], [-3]])
    assert made[1].loss_fn_inputs["ref_logprobs"].to_numpy().tolist() == [-3.0]
    assert "ref_logprobs" not in data[0].loss_fn_inputs
    with pytest.raises(InvalidDatum, match="entries"):
        losses.attach(data, ref_logprobs=[[-1], [-3]])
    with pytest.raises(InvalidDatum, match="NaN"):
        losses.attach(data, ref_logprobs=[[-1, math.nan], [-3]])
    with pytest.raises(InvalidArgument, match="1 arrays"):
        losses.attach(data, ref_logprobs=[[-1, -2]])
    with pytest.raises(InvalidArgument, match="allowed are"):
        losses.attach(data, reference=[[-1, -2], [-3]])


def test_samples_of_a_part_of_the_vocabulary_need_their_kept_mass() -> None:
    arrays = {"advantages": [1.0, 1.0], "logprobs": [math.log(0.5), math.log(0.25)]}
    leaves = [leaf(math.log(0.4), math.log(0.2))]
    for settings in ({"top_p": 0.8}, {"top_k": 20}):
        with pytest.raises(InvalidDatum, match="kept_mass"):
            losses.grpo(**settings)([row(2, **arrays)], leaves)
        data = [row(2, **arrays, kept_mass=[0.8, 0.8])]
        assert losses.grpo(**settings)(data, leaves)[1]["ratio/mean"] == pytest.approx(1.0)
        with pytest.raises(InvalidDatum, match="probability"):
            losses.grpo(**settings)([row(2, **arrays, kept_mass=[0.0, 1.0])], leaves)
    # Without a ratio nothing is compared.
    losses.reinforce(top_p=0.8)([row(2, **arrays)], leaves)


def test_pairs_are_whole() -> None:
    with pytest.raises(InvalidDatum, match="no pairs"):
        losses.orpo()([row(1)] * 3, [leaf(-1)] * 3)
    with pytest.raises(InvalidDatum, match="datum 1: no token"):
        losses.orpo()([row(1), row(1, weights=[0])], [leaf(-1), leaf(-1)])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: losses.grpo(kl="k1", kl_coef=0.1), InvalidArgument, "zero in expectation"),  # type: ignore[arg-type]
        (lambda: losses.grpo(kl="k4", kl_coef=0.1), InvalidArgument, "allowed are"),  # type: ignore[arg-type]
        (lambda: losses.grpo(kl="k2"), InvalidArgument, "kl_coef"),
        (lambda: losses.grpo(kl_coef=0.1), InvalidArgument, "no effect"),
        (lambda: losses.grpo(kl_coeff=0.1), UnknownOption, "kl_coeff"),  # type: ignore[call-arg]
        (lambda: losses.grpo(reduction="mean"), InvalidArgument, "per_token"),
        (lambda: losses.grpo(reduction="constant"), InvalidArgument, "losses.constant"),
        (lambda: losses.grpo(clip_low=1.5), InvalidArgument, "clip_low"),
        (lambda: losses.grpo(clip_high=math.nan), InvalidArgument, "clip_high"),
        (lambda: losses.grpo(dual_clip=1.0), InvalidArgument, "dual_clip"),
        (lambda: losses.grpo(correction="mis"), InvalidArgument, "allowed are"),  # type: ignore[arg-type]
        (lambda: losses.grpo(top_p=1.5), InvalidArgument, "top_p"),
        (lambda: losses.grpo(old="ref"), InvalidArgument, "allowed are"),  # type: ignore[arg-type]
        (lambda: losses.cispo(max_weight=0.2), InvalidArgument, "1 \\+ epsilon"),
        (lambda: losses.sapo(tau_positive=0.0), InvalidArgument, "above 0"),
        (lambda: losses.dr_grpo(0), InvalidArgument, "above 0"),
        (lambda: losses.dpo(beta=0.0), InvalidArgument, "above 0"),
        (lambda: losses.dpo(label_smoothing=0.7), InvalidArgument, "label_smoothing"),
        (lambda: losses.dpo(reduction="per_token"), InvalidArgument, "per_pair"),
        (lambda: losses.tis(0.0), InvalidArgument, "keep no weight"),
        (lambda: losses.icepop(2.0, 1.0), InvalidArgument, "keep no weight"),
    ],
)
def test_settings_without_sense_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# -- metrics -----------------------------------------------


def test_metrics_of_a_clipped_loss() -> None:
    arrays = {"logprobs": [-1, -1, -1, -1], "advantages": [1, 1, -1, 1]}
    leaves = [leaf(-1, -0.5, -2, -1.01)]
    _, metrics = losses.grpo()([row(4, **arrays)], leaves)
    ratios = [1, math.exp(0.5), math.exp(-1), math.exp(-0.01)]
    assert metrics == pytest.approx(
        {
            "ratio/mean": sum(ratios) / 4,
            "ratio/max_log": 0.5,
            "clip_ratio/low": 0.25,
            "clip_ratio/high": 0.25,
            "tokens": 4,
            "sequences": 1,
        }
    )


def test_what_is_not_known_is_absent_and_what_is_known_is_there() -> None:
    data = [row(2, advantages=[1, 1])]
    _, metrics = losses.reinforce()(data, [leaf(-1, -1)])
    assert metrics.keys() == {"tokens", "sequences"}
    data = [row(1, advantages=[1], logprobs=[-2], old_logprobs=[-1.5], ref_logprobs=[-3])]
    _, metrics = losses.grpo()(data, [leaf(-1)])
    assert metrics["kl/k1"] == pytest.approx(2.0)
    assert metrics["kl/k3"] == pytest.approx(math.exp(-2) + 2 - 1)
    assert metrics["mismatch/k1"] == pytest.approx(-0.5)


def test_an_infinite_metric_is_absent_and_the_loss_is_right() -> None:
    data = [row(2, advantages=[1, 1], logprobs=[-9999, -1])]
    leaves = [leaf(-1, -1, kind=torch.float32)]
    loss, metrics = losses.grpo()(data, leaves)
    assert loss.item() == pytest.approx(-(1.2 + 1) / 2)
    assert gradients(loss, leaves).tolist() == pytest.approx([0.0, -0.5])
    assert "ratio/mean" not in metrics
    assert metrics["ratio/max_log"] == pytest.approx(9998)
    assert metrics["clip_ratio/high"] == 0.5


def test_metrics_of_pairs() -> None:
    data = [row(2, ref_logprobs=[-2, -2]), row(1, ref_logprobs=[-1])]
    loss, metrics = losses.dpo(beta=0.5)(data, [leaf(-1, -1), leaf(-2)])
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 3)))
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 1.0,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.5,
            "rewards/accuracies": 1.0,
            "logps/chosen": -2.0,
            "logps/rejected": -2.0,
            "pairs": 1.0,
            "tokens": 3.0,
        }
    )


def test_a_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    data = [row(2, advantages=[-1, -1], logprobs=[-200, -2])]
    leaves = [leaf(-1, -1, kind=torch.float32)]
    loss, _ = losses.grpo(dual_clip=3.0, reduction="sum")(data, leaves)
    assert loss.item() == pytest.approx(3.0 + math.e)
    assert gradients(loss, leaves).tolist() == pytest.approx([0.0, math.e])


# -- the built-in twin -----------------------------------------------


def test_builtin_is_the_servers_name_and_settings() -> None:
    assert losses.sft(reduction="sum").builtin == ("cross_entropy", {})
    assert losses.reinforce().builtin == ("reinforce", {})
    assert losses.dro(beta=0.1).builtin == ("dro", {"beta": 0.1})
    name, settings = losses.grpo(reduction="sum", clip_high=0.3).builtin
    assert (name, settings) == ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.3})


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (losses.grpo(), "per_sequence"),
        (losses.sapo(reduction="sum"), "no built-in has its terms"),
        (losses.dpo(), "no built-in has its terms"),
        (losses.reinforce(kl="k2", kl_coef=0.1), "KL"),
        (losses.reinforce(correction="tis"), "as they are"),
        (losses.grpo(reduction="sum", dual_clip=3.0), "no built-in"),
    ],
)
def test_builtin_says_why_there_is_none(loss: losses.BatchLoss, why: str) -> None:
    with pytest.raises(NotSupported, match=why):
        _ = loss.builtin


# -- the package -----------------------------------------------


def test_every_public_name_loads_and_importing_loads_no_torch() -> None:
    for name in losses.__all__:
        assert getattr(losses, name) is not None
    assert dir(losses) == losses.__all__
    with pytest.raises(AttributeError, match="ppo"):
        losses.ppo  # type: ignore[attr-defined]  # noqa: B018
    code = (
        "import sys; from fireworks_training import losses;"
        "losses.advantages.group_mean([1, 2]); losses.conformance.objectives; losses.totals;"
        "losses.icepop(); assert not {'torch', 'tinker'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
