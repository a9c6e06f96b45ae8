"""Holds the losses of others against the published objectives, by `losses.conformance`.

    OMP_NUM_THREADS=1 python benchmarks/court_of_others.py [--trl SITE]
    PYTHONPATH=. PYTHON benchmarks/court_of_others.py --only cookbook --cookbook DIR

SITE: the site-packages of an environment with TRL, looked up after our own; DIR: a checkout of the
vendor's cookbook; PYTHON: an interpreter with the SDK that it needs. A side that is not given is
left out.
TRL's is `GRPOTrainer._compute_loss`, with a trainer that holds settings alone and a model whose
logprobs are those of the court. The cookbook's are its `make_*_loss_fn`. Tinker's are formulas of
its documentation, written out here: they name no mask, so advantages are 0 where nothing counts.
Settings that the paper leaves open are those of the other side.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fireworks_training.losses import Totals, conformance
from fireworks_training.losses.conformance import Objective, objectives

Loss = Callable[[Sequence[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]


class Case(NamedTuple):
    """One loss of another side: whose, what it is called there, and what it is held against."""

    side: str
    name: str
    loss: Loss
    objective: Objective
    spread: Callable[[Totals], Loss] | None = None


class Inexpressible(Exception):
    """The other side's arguments have no way to say what the court asks."""


def array(datum: Any, name: str, like: Tensor) -> Tensor:
    return torch.tensor(datum.loss_fn_inputs[name].to_numpy()).to(like)


def start_of(datum: Any) -> int:
    """The first target that counts; the number of targets where none does."""
    mask = datum.loss_fn_inputs["weights"].to_numpy()
    return int(np.argmax(mask > 0)) if mask.any() else len(mask)


# -- tinker, by its documentation -----------------------------------------------------------------


def of_tinker() -> Iterator[Case]:
    def summed(term: Callable[..., Tensor]) -> Loss:
        def loss(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            terms = []
            for datum, lp in zip(data, leaves, strict=True):
                a = array(datum, "advantages", lp) * array(datum, "weights", lp)
                terms.append(term(lp, array(datum, "logprobs", lp), a).sum())
            return torch.stack(terms).sum(), {}

        return loss

    def cross_entropy(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        pairs = zip(data, leaves, strict=True)
        return torch.stack([-(array(d, "weights", lp) * lp).sum() for d, lp in pairs]).sum(), {}

    def ratio(lp: Tensor, q: Tensor) -> Tensor:
        return torch.exp(lp - q)

    def ppo(lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
        return -torch.min(ratio(lp, q) * a, ratio(lp, q).clamp(0.8, 1.2) * a)

    def cispo(lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
        return -ratio(lp, q).clamp(0.8, 1.2).detach() * lp * a

    def dro(lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
        return -(lp * a - 0.5 * 0.05 * (lp - q) ** 2)

    held = objectives
    yield Case("tinker", "cross_entropy", cross_entropy, held.sft(reduction="sum"))
    named: dict[str, tuple[Callable[..., Tensor], Objective]] = {
        "importance_sampling": (
            lambda lp, q, a: -ratio(lp, q) * a,
            held.reinforce(importance=True),
        ),
        "ppo": (ppo, held.grpo(reduction="sum")),
        "cispo": (cispo, held.cispo(min_weight=0.8, max_weight=1.2, reduction="sum")),
        "dro": (dro, held.dro(beta=0.05)),
    }
    for name, (term, objective) in named.items():
        yield Case("tinker", name, summed(term), objective)


# -- TRL ------------------------------------------------------------------------------------------


def padded(data: Sequence[Any], leaves: list[Tensor], name: str) -> Tensor:
    """An array of all rows, `[B, T]`, 0 behind their ends."""
    rows = [array(datum, name, lp) for datum, lp in zip(data, leaves, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trl_loss(trainer: Any, totals: Totals | None = None, **settings: Any) -> Loss:
    """`GRPOTrainer._compute_loss` with these settings.

    Args:
        totals: of the batch that the call is a part of; None for a whole one.
    """
    arguments = {
        "delta": None,
        "use_bias_correction_kl": False,
        "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
    }
    defaults: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, **_: x,
            num_processes=1,
            device="cpu",
        ),
    }
    given = {key: settings.pop(key) for key in [*settings] if key in arguments}

    def loss(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        logprobs = torch.nn.utils.rnn.pad_sequence(leaves, batch_first=True)
        mask = padded(data, leaves, "weights")
        empty = torch.zeros(len(data), 0)
        inputs = {
            "prompt_ids": empty,
            "prompt_mask": empty,
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": padded(data, leaves, "advantages"),
            "old_per_token_logps": padded(data, leaves, "logprobs"),
            "num_items_in_batch": mask.sum() if totals is None else torch.tensor(totals.tokens),
        }
        if settings.get("beta"):
            inputs["ref_per_token_logps"] = padded(data, leaves, "ref_logprobs")
        held = SimpleNamespace(**(defaults | settings), args=SimpleNamespace(**(arguments | given)))
        held._get_per_token_logps_and_entropies = lambda *_, **__: (
            logprobs,
            torch.zeros_like(mask),
            None,
        )
        held._metrics = defaultdict(lambda: defaultdict(list))
        return trainer._compute_loss(held, None, inputs), {}

    return loss


def of_trl() -> Iterator[Case]:
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    held = objectives

    def case(name: str, objective: Objective, *, spread: bool = False, **settings: Any) -> Case:
        over = (lambda totals: trl_loss(trainer, totals, **settings)) if spread else None
        return Case("TRL", name, trl_loss(trainer, **settings), objective, over)

    yield case("grpo", held.grpo(), loss_type="grpo")
    yield case("dr_grpo", held.dr_grpo(8), loss_type="dr_grpo")
    yield case("dapo", held.dapo(), spread=True, loss_type="dapo", epsilon_high=0.28)
    yield case("bnpo", held.grpo(reduction="per_token"), loss_type="bnpo")
    yield case("cispo", held.cispo(), spread=True, loss_type="cispo", epsilon_high=5.0)
    yield case("sapo", held.sapo(), loss_type="sapo")
    sequence = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    yield case("grpo, sequence level", held.gspo(), loss_type="grpo", **sequence)
    with_kl = held.grpo(kl="k3", kl_coef=0.1, kl_cap=float("inf"))
    yield case("grpo, beta=0.1", with_kl, loss_type="grpo", beta=0.1)
    corrected = {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True}
    yield case("grpo, beta=0.1, bias corrected", with_kl, **corrected)


# -- the vendor's cookbook ------------------------------------------------------------------------


def rl_loss(make: Callable[..., Any], prompt: str = "prompt_len", **settings: Any) -> Loss:
    """A policy loss of the cookbook, made for each batch, as its recipes do."""

    def loss(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        sampled = [d.loss_fn_inputs["logprobs"].to_numpy().tolist() for d in data]
        reference = sampled
        if "ref_logprobs" in data[0].loss_fn_inputs:
            reference = [d.loss_fn_inputs["ref_logprobs"].to_numpy().tolist() for d in data]
        advantages = []
        for datum in data:
            kept = datum.loss_fn_inputs["weights"].to_numpy() > 0
            given = datum.loss_fn_inputs["advantages"].to_numpy()[kept]
            if len({*given.tolist()}) > 1:
                # The field takes a number a row; what it is added to takes a tensor as well.
                whole = datum.loss_fn_inputs["advantages"].to_numpy()[start_of(datum) :]
                advantages.append(torch.tensor(whole))
            else:
                advantages.append(float(given[0]) if len(given) else 0.0)
        made = make(
            advantages=advantages,
            ref_logprobs=reference,
            inf_logprobs=sampled,
            old_policy_logprobs=sampled,
            **{prompt: [start_of(d) + 1 for d in data]},
            **settings,
        )
        return made(list(data), leaves)

    return loss


def starts_of(data: Sequence[Any]) -> list[int]:
    """The one start of each pair that the cookbook's preference losses take."""
    pairs = [(start_of(c), start_of(r)) for c, r in zip(data[0::2], data[1::2], strict=True)]
    if any(c != r for c, r in pairs):
        raise Inexpressible("it takes one start for both rows of a pair")
    return [c + 1 for c, _ in pairs]


def of_cookbook() -> Iterator[Case]:
    def rl(name: str) -> Any:
        return importlib.import_module(f"training.utils.rl.{name}")

    held, plain = objectives, importlib.import_module("training.utils.losses")

    def case(name: str, loss: Loss, objective: Objective) -> Case:
        return Case("cookbook", name, loss, objective)

    grpo = rl("grpo").make_grpo_loss_fn
    yield case("grpo, kl_beta=0", rl_loss(grpo, kl_beta=0.0), held.grpo(reduction="sum"))
    with_kl = held.grpo(reduction="sum", kl="k3", kl_coef=0.1, kl_cap=float("inf"))
    yield case("grpo, kl_beta=0.1", rl_loss(grpo, kl_beta=0.1), with_kl)
    yield case("dapo", rl_loss(rl("dapo").make_dapo_loss_fn), held.dapo(reduction="sum"))
    bounded = held.cispo(min_weight=0.8, max_weight=1.28, reduction="sum")
    yield case("cispo", rl_loss(rl("cispo").make_cispo_loss_fn), bounded)
    sequence = held.gspo(clip_low=0.2, clip_high=0.2, reduction="sum")
    yield case("gspo", rl_loss(rl("gspo").make_gspo_loss_fn), sequence)
    dro = rl_loss(rl("dro").make_dro_loss_fn, dro_config=rl("dro").DROConfig(beta=0.05))
    yield case("dro", dro, held.dro())
    importance = held.reinforce(importance=True)
    yield case("importance_sampling", rl_loss(rl("is_loss").make_is_loss_fn), importance)
    reinforce = rl("reinforce").make_reinforce_loss_fn
    yield case("reinforce", rl_loss(reinforce, "prompt_lens"), importance)
    yield case(
        "reinforce, kl_beta=0.1",
        rl_loss(reinforce, "prompt_lens", kl_beta=0.1),
        held.reinforce(importance=True, kl="k1_in_reward", kl_coef=0.1),
    )

    def sft(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return plain.make_batch_weighted_sft_loss_fn()(list(data), leaves)

    def dpo(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        reference = [d.loss_fn_inputs["ref_logprobs"].to_numpy().tolist() for d in data]
        made = plain.make_batch_dpo_loss_fn(
            reference[0::2], reference[1::2], starts_of(data), beta=0.1
        )
        return made(list(data), leaves)

    def orpo(data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        made = plain.make_batch_orpo_loss_fn(starts_of(data), orpo_lambda=1.0)
        return made(list(data), leaves)

    yield case("sft, weighted", sft, held.sft())
    yield case("dpo", dpo, held.dpo())
    yield case("orpo", orpo, held.orpo(lam=1.0, reduction="sum"))


def main() -> None:
    """Hold every side that is given, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", help="site-packages with TRL")
    parser.add_argument("--cookbook", help="a checkout of the vendor's cookbook")
    parser.add_argument("--only", choices=("tinker", "trl", "cookbook"))
    parser.add_argument("--laws", action="store_true", help="print every table of laws")
    options = parser.parse_args()
    # The cookbook's package `training` goes before the benchmark of that name.
    sys.path[:0] = [options.cookbook] if options.cookbook else []
    sys.path += [options.trl] if options.trl else []
    given = {"tinker": True, "trl": options.trl, "cookbook": options.cookbook}
    sides = [
        side
        for name, side in (("tinker", of_tinker), ("trl", of_trl), ("cookbook", of_cookbook))
        if given[name] and options.only in (None, name)
    ]
    print("| side | loss | held against | laws kept | found |\n|---|---|---|---|---|")
    for side in sides:
        for each in side():
            result = conformance.check(each.loss, each.objective, spread=each.spread)
            judged = [law for law in result.laws if law.ok is not None]
            kept = sum(law.ok is True for law in judged)
            found = "; ".join(f"*{law.name}*: {law.sentence}" for law in result.broken) or "-"
            reduction = each.objective.reduction.name
            print(
                f"| {each.side} | {each.name} | {each.objective.name}, {reduction} | "
                f"{kept} of {len(judged)} | {found} |",
                flush=True,
            )
            if options.laws:
                print(result)


if __name__ == "__main__":
    main()
