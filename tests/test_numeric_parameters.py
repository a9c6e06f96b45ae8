"""Every numeric parameter of the public names, found by its annotation: not finite is refused.

A new public name with a number among its parameters fails here until it stands in `MAKE`, or in
`RESULTS` with the other values that the SDK makes itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fireworks_training
from fireworks_training import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentSampler,
    FiretitanProvisioningConfig,
    FireworksTrainingError,
    FixedConcurrencyController,
)

SCALAR = re.compile(r"(int|float)( \| None)?")

RESULTS = {
    "AckEvent", "DeploymentInfo", "EvaluatedSample", "Event", "FailureEvent", "FinishEvent",
    "HeldResource", "LoopBlockedEvent", "ModelInfo", "Observation", "RetryEvent",
    "SampledCompletion", "SampledRequestResult", "SampledServerAttempt", "ServerMetrics",
    "Snapshot", "SubmitEvent", "SwapEvent", "SyncEvent", "TITOTrajectoryArtifact",
    "TrainerJobInfo", "TrainingProfile", "Usage", "WeightSyncResult", "WindowEvent",
}  # fmt: skip
"""Values that the SDK makes, of numbers that were checked where they arrived."""

ELSEWHERE = {
    "TITOSidecar": "starts a server; its settings are checked by tests/tito",
    "chat_datum": "needs a tokenizer; tests/test_data.py",
    "check_alignment": "needs outputs of a trainer; tests/test_data.py",
}


def config(**given: Any) -> object:
    base = {"base_model": "m", "lora_rank": 0 if "max_lora_rank" in given else 8}
    return FiretitanProvisioningConfig(**{**base, **given})


def deployment(**given: Any) -> object:
    return DeploymentConfig(**{"deployment_id": "d", "base_model": "m", **given})


def sampler(**given: Any) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return DeploymentSampler("http://127.0.0.1:1", "m", "k", None, **given)


MAKE: dict[str, Callable[..., object]] = {
    "AdaptiveConcurrencyController": AdaptiveConcurrencyController,
    "DeploymentConfig": deployment,
    "DeploymentSampler": sampler,
    "FiretitanProvisioningConfig": config,
    "FixedConcurrencyController": FixedConcurrencyController,
}

NOT_FINITE = [math.nan, math.inf, -math.inf]


def numeric(name: str) -> dict[str, inspect.Parameter]:
    thing = getattr(fireworks_training, name)
    if inspect.isclass(thing):
        if issubclass(thing, BaseException):
            return {}
        called: Any = thing.__init__
    elif inspect.isfunction(thing):
        called = thing
    else:
        return {}
    parameters = inspect.signature(called).parameters
    return {n: p for n, p in parameters.items() if SCALAR.fullmatch(str(p.annotation))}


FOUND = {name: found for name in fireworks_training.__all__ if (found := numeric(name))}
CASES = [(name, parameter) for name in MAKE for parameter in FOUND[name]]


def test_every_name_with_numbers_is_listed() -> None:
    assert set(FOUND) == set(MAKE) | RESULTS | set(ELSEWHERE)


def test_results_are_plain_values() -> None:
    """What is excused as a result is a dataclass: nothing there acts on its numbers."""
    assert all(dataclasses.is_dataclass(getattr(fireworks_training, name)) for name in RESULTS)


@pytest.mark.parametrize(("name", "parameter"), CASES)
@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor], ids=["float", "np", "torch"])
def test_what_is_not_finite_is_refused(name: str, parameter: str, kind: Any) -> None:
    for value in NOT_FINITE:
        with pytest.raises(FireworksTrainingError, match=parameter):
            MAKE[name](**{parameter: kind(value)})


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_scalars_of_numpy_and_torch_are_taken(name: str, parameter: str) -> None:
    annotation = str(FOUND[name][parameter].annotation)
    default = FOUND[name][parameter].default
    given = 1 if default in (None, inspect.Parameter.empty) else default
    if annotation.startswith("int"):
        kinds: list[Callable[[Any], Any]] = [np.int64, torch.tensor]
    else:
        kinds = [np.float64, lambda value: torch.tensor(float(value), dtype=torch.float64)]
    for kind in kinds:
        MAKE[name](**{parameter: kind(given)})
