"""Our SDK under the names that the programs use."""

from __future__ import annotations

from typing import Any

from tinker import AdamParams, Datum, ModelInput, TensorData

from fireworks_training import DeploymentSampler, FiretitanServiceClient

__all__ = [
    "AdamParams",
    "Datum",
    "FiretitanServiceClient",
    "ModelInput",
    "TensorData",
    "sampler",
    "saved_path",
]


def sampler(url: str) -> Any:
    """A sampler of the deployment, without a tokenizer."""
    return DeploymentSampler(url, "accounts/acme/deployments/deployment-1", "fw_cloud_harness_key")


def saved_path(client: Any, name: str) -> str:
    """Save a snapshot; the path to hot load."""
    path: str = client.save_weights_for_sampler_ext(name).path
    return path
