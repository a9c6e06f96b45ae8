"""Losses for `forward_backward_custom`: each with its paper's equation, its reduction, its metrics.

    from fireworks_training import losses

    loss = losses.grpo(kl="k2", kl_coef=0.001)
    client.forward_backward_custom(data, loss)

    whole = losses.totals(all_rows)            # a batch in parts: means are over all of it
    for part in parts:
        client.forward_backward_custom(part, loss.over(whole))

`loss.builtin` is the trainer's own loss of the same value, where there is one:
`client.forward_backward(data, *losses.reinforce().builtin)`. `losses.advantages` turns rewards into
advantages, and `losses.conformance` holds any loss, yours too, against exact arithmetic.

Importing this loads neither torch nor tinker; the first loss that is made loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireworks_training.losses import advantages, conformance
    from fireworks_training.losses.attached import attach
    from fireworks_training.losses.corrections import (
        Correction,
        decoupled,
        geometric,
        icepop,
        sequence_mask,
        tis,
    )
    from fireworks_training.losses.library.base import BatchLoss
    from fireworks_training.losses.library.policy import PolicyLoss, PolicyOptions
    from fireworks_training.losses.library.rl import (
        cispo,
        dapo,
        distill,
        dppo,
        dr_grpo,
        dro,
        grpo,
        gspo,
        reinforce,
        sapo,
    )
    from fireworks_training.losses.library.supervised import (
        PreferenceLoss,
        SupervisedLoss,
        dpo,
        ipo,
        orpo,
        sft,
    )
    from fireworks_training.losses.reductions import (
        Reduction,
        Totals,
        constant,
        per_sequence,
        per_token,
        plain_sum,
        totals,
    )

_HOMES = {
    "attached": ("attach",),
    "corrections": ("Correction", "decoupled", "geometric", "icepop", "sequence_mask", "tis"),
    "library.base": ("BatchLoss",),
    "library.policy": ("PolicyLoss", "PolicyOptions"),
    "library.rl": (
        "cispo",
        "dapo",
        "distill",
        "dppo",
        "dr_grpo",
        "dro",
        "grpo",
        "gspo",
        "reinforce",
        "sapo",
    ),
    "library.supervised": ("PreferenceLoss", "SupervisedLoss", "dpo", "ipo", "orpo", "sft"),
    "reductions": (
        "Reduction",
        "Totals",
        "constant",
        "per_sequence",
        "per_token",
        "plain_sum",
        "totals",
    ),
}
"""The modules of the names, which are loaded when one is first used."""

__all__ = [
    "BatchLoss",
    "Correction",
    "PolicyLoss",
    "PolicyOptions",
    "PreferenceLoss",
    "Reduction",
    "SupervisedLoss",
    "Totals",
    "advantages",
    "attach",
    "cispo",
    "conformance",
    "constant",
    "dapo",
    "decoupled",
    "distill",
    "dpo",
    "dppo",
    "dr_grpo",
    "dro",
    "geometric",
    "grpo",
    "gspo",
    "icepop",
    "ipo",
    "orpo",
    "per_sequence",
    "per_token",
    "plain_sum",
    "reinforce",
    "sapo",
    "sequence_mask",
    "sft",
    "tis",
    "totals",
]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in ("advantages", "conformance"):
            return importlib.import_module(f"{__name__}.{name}")
        for home, names in _HOMES.items():
            if name in names:
                try:
                    module = importlib.import_module(f"{__name__}.{home}")
                except ModuleNotFoundError as error:
                    if error.name != "torch":
                        raise
                    from fireworks_training.errors import MissingExtra

                    raise MissingExtra(
                        f"losses.{name} needs torch: pip install 'fireworks-training[torch]'",
                        cause=error,
                    ) from error
                globals()[name] = value = getattr(module, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
