"""Request bodies and queries of the control plane, made of a configuration.

Pure functions; options that are not given are left out, so that the platform's defaults hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.models import TrainingProfile


def job_body(config: FiretitanProvisioningConfig, display_name: str) -> dict[str, Any]:
    """Make the body that creates a trainer job."""
    extra = dict(config.extra_values or {})
    if config.snapshot_dtype is not None:
        extra["snapshot_dtype"] = config.snapshot_dtype
    return {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "useReservation": config.use_reservation,
        "displayName": display_name,
        "trainingConfig": {
            "baseModel": config.base_model,
            "loraRank": config.max_lora_rank or config.lora_rank,
            "learningRate": config.learning_rate,
            **present(
                maxContextLength=None if config.training_shape_id else config.max_context_length,
                customImageTag=config.custom_image_tag,
                region=config.region,
                extraArgs=split_at_blanks(config.extra_args),
            ),
        },
        **present(
            trainerReplicaCount=config.trainer_replica_count,
            forwardOnly=config.forward_only,
            purpose=config.purpose,
            managedBy=config.managed_by,
            preemptible=config.preemptible,
            inactivityTimeout=config.inactivity_timeout,
            disableInactivityCleanup=config.disable_inactivity_cleanup,
            extraValues=extra,
        ),
    }


def job_query(
    config: FiretitanProvisioningConfig, profile: TrainingProfile | None
) -> dict[str, str]:
    """Make the query that goes with `job_body`: the shape, without its version unless the caller
    pinned one."""
    query: dict[str, str] = {}
    asked = config.training_shape_id
    if asked is not None:
        version = asked.partition("/versions/")[2]
        pinned = version not in ("", "latest")
        query["trainingShape"] = asked if pinned else (profile.shape if profile else asked)
    if config.skip_validations:
        query["skipValidations"] = "true"
    return query


def deployment_body(
    config: FiretitanProvisioningConfig,
    profile: TrainingProfile | None,
    job: str,
    annotations: Mapping[str, str],
) -> dict[str, Any]:
    """Make the body that creates a deployment, which loads the snapshots of `job` (a full name)."""
    return {
        "baseModel": config.base_model,
        "description": "Fireworks training deployment",
        "minReplicaCount": config.replica_count,
        "maxReplicaCount": config.replica_count,
        "enableHotLoad": True,
        "forTraining": True,
        "hotLoadBucketType": "FW_HOSTED",
        "hotLoadTrainerJob": job,
        "annotations": dict(annotations),
        **present(
            placement={"region": config.region} if config.region else None,
            hotLoadTransitionType=config.hot_load_transition_type,
            deploymentShape=config.deployment_shape
            or (profile.deployment_shape if profile else None),
            extraArgs=split_at_blanks(config.deployment_extra_args),
            extraValues=dict(config.deployment_extra_values or {}),
            preemptible=config.preemptible,
        ),
    }


def deployment_query(config: FiretitanProvisioningConfig) -> dict[str, str]:
    """Make the query that goes with `deployment_body`."""
    return {"disableSpeculativeDecoding": "true"} if config.disable_speculative_decoding else {}


def promotion_body(
    account: str, output_model_id: str, base_model: str, **where: str | None
) -> dict[str, Any]:
    """Make the body that promotes a checkpoint to a model.

    Args:
        where: `trainer_job_id` and `hot_load_deployment_id`, by which the platform finds the
            checkpoint; None leaves one out.
    """
    return {
        "output_model": f"accounts/{account}/models/{output_model_id}",
        "base_model": base_model,
        **present(**where),
    }


def split_at_blanks(arguments: Iterable[str]) -> list[str]:
    """Split command-line arguments that were written together ("--flag value")."""
    return [part for argument in arguments for part in argument.split()]


def present(**fields: Any) -> dict[str, Any]:
    """Leave out the fields that ask for nothing."""
    return {name: value for name, value in fields.items() if value}
