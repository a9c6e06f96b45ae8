"""Datums, a loss and parameters for tests of the training client, and its dialects."""

from __future__ import annotations

from typing import Any

import pytest
import tinker
import torch

ADAM = tinker.AdamParams(learning_rate=0.1)

DIALECTS = pytest.mark.parametrize("wire", [[], ["json", "protobuf"]], ids=["json", "protobuf"])
"""Once with a trainer that takes JSON alone, once with one that takes both dialects."""


def datum(length: int = 3, weight: float = 1.0) -> tinker.Datum:
    """A datum whose targets have the same weight."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(range(length))),
        loss_fn_inputs={"target_tokens": [1] * length, "weights": [weight] * length},
    )


def good_loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The sum of the negative logprobs, and a metric."""
    loss = torch.stack([-values.sum() for values in logprobs]).sum()
    return loss, {"mine": 7.0}
