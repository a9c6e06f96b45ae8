"""The court: it acquits the library and the trainer's functions, and convicts what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fireworks_training import losses
from fireworks_training.errors import InvalidArgument
from fireworks_training.local.model.losses import LOSSES
from fireworks_training.losses import conformance
from fireworks_training.losses.conformance import Objective, objectives
from fireworks_training.losses.conformance.runs import Implementation
from tests.losses.published_bugs import BUGS, Bug

Case = tuple[str, tuple[Any, ...], dict[str, Any]]

DEFAULTS: list[Case] = [
    *((name, (), {}) for name in ("sft", "dpo", "ipo", "orpo")),
    *((name, (), {}) for name in ("grpo", "dapo", "gspo", "cispo", "dppo", "sapo", "dro")),
    *((name, (), {}) for name in ("reinforce", "distill")),
    ("dr_grpo", (8,), {}),
]
SETTINGS: list[Case] = [
    ("sft", (), {"reduction": "sum"}),
    ("dpo", (), {"label_smoothing": 0.1, "beta": 2.0}),
    ("dpo", (), {"length_normalized": True, "reduction": "sum"}),
    ("reinforce", (), {"importance": True, "kl": "k1_in_reward", "kl_coef": 0.1}),
    *(("grpo", (), {"kl": kl, "kl_coef": 0.1}) for kl in ("k1_in_reward", "k2", "k3", "k3+")),
    ("distill", (), {"kl": "k3", "kl_coef": 0.1, "kl_cap": 2.0}),
    *(
        (name, (), {"correction": kind})
        for name in ("grpo", "gspo")
        for kind in ("tis", "icepop", "sequence_mask", "geometric", "decoupled")
    ),
    ("cispo", (), {"correction": losses.tis(1.1), "kl": "k2", "kl_coef": 0.2}),
    ("gspo", (), {"reduction": losses.constant(3), "clip_low": 0.2, "clip_high": 0.2}),
    ("sapo", (), {"reduction": "per_token"}),
    ("dppo", (), {"reduction": "per_sequence", "delta_low": 0.05}),
]


TRUNCATED = (
    (losses.grpo(top_p=0.9), objectives.grpo(truncated=True)),
    (
        losses.gspo(top_k=2, kl="k2", kl_coef=0.1),
        objectives.gspo(truncated=True, kl="k2", kl_coef=0.1),
    ),
    (losses.cispo(top_p=0.9, correction="tis"), objectives.cispo(truncated=True, correction="tis")),
    (losses.distill(top_p=0.9), objectives.distill(truncated=True)),
)


def named(case: Case) -> str:
    name, args, settings = case
    return " ".join([name, *map(str, args), *(f"{k}={v}" for k, v in settings.items())])


@pytest.mark.parametrize("case", [*DEFAULTS, *SETTINGS], ids=named)
def test_it_acquits_the_library(case: Case) -> None:
    name, args, settings = case
    loss = getattr(losses, name)(*args, **settings)
    result = conformance.check(loss, getattr(objectives, name)(*args, **settings))
    assert result.ok, str(result)
    assert all(law.ok for law in result.laws), str(result)
    measured = [law.error for law in result.laws if law.name != "float32"]
    assert max(measured) <= 1e-6


@pytest.mark.parametrize(("loss", "objective"), TRUNCATED, ids=lambda each: each.name)
def test_it_acquits_the_library_on_truncated_samples(
    loss: Implementation, objective: Objective
) -> None:
    result = conformance.check(loss, objective)
    assert result.ok, str(result)


def built_in(name: str) -> Implementation:
    """A loss function of the trainer on datums: the trainer reads them in its own way."""
    loss = LOSSES[name]

    def call(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        columns = {"weights", "logprobs", "advantages"} & {*loss.inputs}
        sizes = torch.tensor([len(leaf) for leaf in leaves])
        inputs = {
            column: torch.cat(
                [torch.tensor(d.loss_fn_inputs[column].to_numpy()).to(leaves[0]) for d in data]
            )
            for column in columns
        }
        inputs["sequence"] = torch.repeat_interleave(torch.arange(len(leaves)), sizes)
        return loss.per_token(torch.cat(leaves), inputs, loss.config).sum(), {}

    return call


BUILT_IN: dict[str, Objective] = {
    "cross_entropy": objectives.sft(reduction="sum"),
    "importance_sampling": objectives.reinforce(importance=True),
    "ppo": objectives.grpo(clip_low=0.2, clip_high=0.2, reduction="sum"),
    "cispo": objectives.cispo(min_weight=0.8, max_weight=1.2, reduction="sum"),
    "gspo": objectives.gspo(clip_low=0.2, clip_high=0.2, reduction="sum"),
    "dppo": objectives.dppo(reduction="sum"),
    "dro": objectives.dro(),
    "reinforce": objectives.reinforce(),
}


def test_every_function_of_the_trainer_is_judged() -> None:
    assert BUILT_IN.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", BUILT_IN)
def test_it_judges_the_trainers_functions(name: str) -> None:
    result = conformance.check(built_in(name), BUILT_IN[name])
    assert result.ok, str(result)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_it_convicts_what_was_published_wrong(bug: Bug) -> None:
    result = conformance.check(bug.loss, bug.objective, spread=bug.spread)
    assert not result.ok
    assert bug.law in {law.name for law in result.broken}, str(result)
    assert bug.reference.startswith("https://")


def test_twenty_bugs_at_least() -> None:
    assert len(BUGS) >= 20


def test_a_mean_that_takes_no_totals_is_not_judged_on_splits() -> None:
    def sft(data: Any, leaves: list[Tensor]) -> Any:
        loss, metrics = losses.sft()(data, leaves)
        return loss, metrics

    result = conformance.check(sft, objectives.sft())
    assert result.ok
    assert [law.name for law in result.laws if law.ok is None] == ["split"]


def test_the_table_names_the_broken_law_in_a_sentence() -> None:
    def half(data: Any, leaves: list[Tensor]) -> Any:
        loss, metrics = losses.sft()(data, leaves)
        return loss / 2, metrics

    text = str(conformance.check(half, objectives.sft()))
    assert "the gradient is 0.5 times the objective's, everywhere" in text
    assert text.startswith("sft: ")


def test_a_gradient_that_is_no_number_where_nothing_counts_is_seen() -> None:
    def spoilt(data: Any, leaves: list[Tensor]) -> Any:
        loss, metrics = losses.reinforce()(data, leaves)
        for leaf in leaves:
            leaf.register_hook(lambda slope: torch.where(slope == 0, torch.nan, slope))
        return loss, metrics

    result = conformance.check(spoilt, objectives.reinforce())
    assert "masked contents" in {law.name for law in result.broken}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda data, leaves: 1.0, "it returned float"),
        (lambda data, leaves: (torch.zeros(2), {}), "no scalar"),
        (lambda data, leaves: 1 / 0, "ZeroDivisionError"),
        (lambda data, leaves: (torch.zeros(()), {}), "there is no gradient"),
    ],
)
def test_what_is_no_loss_breaks_laws(loss: Any, words: str) -> None:
    result = conformance.check(loss, objectives.sft())
    assert not result.ok
    assert words in str(result)


def test_a_loss_must_be_callable() -> None:
    with pytest.raises(InvalidArgument, match="callable"):
        conformance.check(3, objectives.sft())  # type: ignore[arg-type]
