"""Where each option of `from_firetitan_config` goes: into a request, or to who carries it out.

A new option fails here until it says where; one that is taken and used nowhere fails for good.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
import pytest

import fireworks_training
from fireworks_training import (
    AsyncFiretitanServiceClient,
    FiretitanProvisioningConfig,
    FiretitanServiceClient,
    InvalidArgument,
    NotSupported,
)
from fireworks_training._async.control_plane.bodies import (
    deployment_body,
    deployment_query,
    job_body,
    job_query,
)
from fireworks_training._async.resources.plans import Resources
from fireworks_training.config import ProvisioningOptions
from fireworks_training.models import TrainingProfile

ASYNC = Path(fireworks_training.__file__).parent / "_async"

IN_REQUESTS: dict[str, Any] = {
    "base_model": "accounts/a/models/other",
    "lora_rank": 8,
    "max_lora_rank": 8,
    "training_shape_id": "accounts/a/trainingShapes/s",
    "deployment_shape": "accounts/a/deploymentShapes/s",
    "forward_only": True,
    "region": "r",
    "max_context_length": 512,
    "learning_rate": 0.5,
    "custom_image_tag": "t",
    "extra_args": ["--a b"],
    "extra_values": {"a": "b"},
    "deployment_extra_args": ["--a b"],
    "deployment_extra_values": {"a": "b"},
    "trainer_replica_count": 2,
    "replica_count": 2,
    "inactivity_timeout": "3600s",
    "disable_inactivity_cleanup": True,
    "display_name": "n",
    "purpose": "p",
    "managed_by": "m",
    "preemptible": True,
    "use_reservation": False,
    "skip_validations": True,
    "disable_speculative_decoding": True,
    "hot_load_transition_type": "SYNC",
    "snapshot_dtype": "float32",
}
"""A value that must show in the request that makes the job or the deployment."""

CARRIED_OUT = {
    "tokenizer_model": "platform/tokenizers.py",
    "lora_alpha": "training/session.py",
    "trainer_job_id": "resources/plans.py",
    "deployment_id": "resources/plans.py",
    "create_deployment": "resources/plans.py",
    "reference_training_shape_id": "resources/plans.py",
    "reference_trainer_job_id": "resources/plans.py",
    "cleanup_reference_trainer_on_close": "resources/plans.py",
    "reference_required": "resources/provisioner.py",
    "seed": "training/session.py",
    "train_mlp": "training/session.py",
    "train_attn": "training/session.py",
    "train_unembed": "training/session.py",
    "trainer_timeout_s": "resources/plans.py",
    "trainer_pending_timeout_s": "resources/plans.py",
    "deployment_timeout_s": "resources/plans.py",
    "hotload_timeout_s": "weights/deployment.py",
    "reattach_settle_timeout_s": "resources/plans.py",
    "reattach_poll_interval_s": "resources/plans.py",
    "cleanup_trainer_on_close": "resources/plans.py",
    "cleanup_deployment_on_close": "resources/plans.py",
    "wait_for_trainer_before_deployment": "resources/plans.py",
    "dialect": "training/model.py",
}
"""The module, below `_async`, that reads the option."""

REFUSED: dict[str, Any] = {
    "projection_head_dim": 4,
    "reservation_target": "r",
    "weight_sync_transport": "rdma",
    "gradient_accumulation_steps": 2,
}
SAID_TO_BE_IGNORED = ("node_count", "accelerator_type", "accelerator_count")
ALIASES = (
    "model_name",
    "training_shape",
    "training_shape_ref",
    "trainer_id",
    "deployment_replica_count",
)


def config(**options: Any) -> FiretitanProvisioningConfig:
    return FiretitanProvisioningConfig.from_options(
        {"base_model": "accounts/a/models/m", **options}
    )


def requests(**options: Any) -> bytes:
    made = config(**options)
    return orjson.dumps(
        [
            job_body(made, made.display_name or "run"),
            job_query(made, None),
            deployment_body(made, None, "j", {}),
            deployment_query(made),
        ]
    )


def test_each_option_says_where_it_goes() -> None:
    known = {*IN_REQUESTS, *CARRIED_OUT}
    assert {field.name for field in fields(FiretitanProvisioningConfig)} == known
    keywords = {*known, *REFUSED, *SAID_TO_BE_IGNORED, *ALIASES}
    assert set(ProvisioningOptions.__annotations__) == keywords
    assert not IN_REQUESTS.keys() & CARRIED_OUT.keys()


@pytest.mark.parametrize("name", IN_REQUESTS)
def test_an_option_of_a_request_shows_in_it(name: str) -> None:
    assert requests(**{name: IN_REQUESTS[name]}) != requests()


@pytest.mark.parametrize("name", CARRIED_OUT)
def test_an_option_that_is_carried_out_is_read_there(name: str) -> None:
    text = (ASYNC / CARRIED_OUT[name]).read_text("utf-8")
    read = "alpha" if name == "lora_alpha" else name
    # A use as an attribute; a keyword of the same name (`name=...`) is none.
    assert re.search(rf"\b_?config\.{read}\b(?!=[^=])", text)


def test_an_option_that_nobody_reads_is_seen() -> None:
    """The negative control of the test above."""
    text = (ASYNC / "resources/plans.py").read_text("utf-8")
    assert not re.search(r"\b_?config\.train_mlp\b(?!=[^=])", text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused(name: str) -> None:
    with pytest.raises((NotSupported, InvalidArgument), match=name):
        config(**{name: REFUSED[name]})


@pytest.mark.parametrize("name", SAID_TO_BE_IGNORED)
def test_what_the_shape_decides_is_said(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=name):
        config(**{name: 1})


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_learning_rate_is_a_finite_number(rate: float) -> None:
    with pytest.raises(InvalidArgument, match="learning_rate"):
        config(learning_rate=rate)


def test_extra_values_stand_beside_the_configuration_and_arguments_are_split() -> None:
    body = job_body(config(extra_values={"a": "b"}, extra_args=["--x 1", "--y"]), "n")
    assert body["extraValues"] == {"a": "b"}
    assert "extraValues" not in body["trainingConfig"]
    assert body["trainingConfig"]["extraArgs"] == ["--x", "1", "--y"]
    made = deployment_body(config(deployment_extra_args=["--x 1"]), None, "j", {})
    assert made["extraArgs"] == ["--x", "1"]


def test_a_context_length_beside_a_shape_is_the_callers() -> None:
    profile = TrainingProfile("s", "POLICY_TRAINER", max_context_length=2048)
    resources = Resources(profile=profile)
    assert resources.max_context_length(512) == 512
    assert resources.max_context_length(None) == 2048


@pytest.mark.parametrize("service", [AsyncFiretitanServiceClient, FiretitanServiceClient])
def test_the_signature_shows_every_option(service: Any) -> None:
    shown = inspect.signature(service.from_firetitan_config).parameters
    assert set(ProvisioningOptions.__annotations__) < set(shown)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())
    assert (shown["lora_rank"].default, shown["lora_rank"].annotation) == (0, "int")
    assert shown["replica_count"].default == shown["deployment_replica_count"].default == 1
    assert shown["api_key"].default is None
