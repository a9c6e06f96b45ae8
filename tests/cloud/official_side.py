"""The official SDK under the names that the programs use; imported by its interpreter alone."""

from __future__ import annotations

from typing import Any

from fireworks.training.sdk import (  # type: ignore[import-not-found]
    AdamParams,
    Datum,
    DeploymentSampler,
    FiretitanServiceClient,
    ModelInput,
    TensorData,
)

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
    return DeploymentSampler(
        inference_url=url,
        model="accounts/acme/deployments/deployment-1",
        api_key="fw_cloud_harness_key",
        tokenizer=None,
    )


def saved_path(client: Any, name: str) -> str:
    """Save a snapshot; the path to hot load."""
    path: str = client.save_weights_for_sampler_ext(name).path
    return path
