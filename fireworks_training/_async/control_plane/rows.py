"""Reads the control plane's JSON rows into the public value types.

Knows both spellings that servers use (camelCase and snake_case) and the places where they put a
status message. What is absent stays None; only a row without a name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fireworks_training.errors import ProtocolError
from fireworks_training.models import (
    CheckpointInfo,
    DeploymentInfo,
    ModelInfo,
    OperationInfo,
    TrainerJobInfo,
    TrainingProfile,
)

Row = Mapping[str, Any]

CHECKPOINT_LISTS = ("checkpoints", "rlorTrainerJobCheckpoints")
"""Names under which servers list the checkpoints of a trainer job."""


def read_profile(row: Row, shape: str) -> TrainingProfile:
    """Read a version of a training shape."""
    snapshot = _object(row, "snapshot")
    sharding = _object(snapshot, "trainerShardingScheme")
    return TrainingProfile(
        name=str(row.get("name") or shape),
        trainer_mode=str(snapshot.get("trainerMode") or "POLICY_TRAINER"),
        max_context_length=snapshot.get("maxSupportedContextLength") or None,
        deployment_shape=snapshot.get("deploymentShapeVersion") or None,
        node_count=snapshot.get("nodeCount") or None,
        accelerator_type=snapshot.get("acceleratorType") or None,
        accelerator_count=snapshot.get("acceleratorCount") or None,
        trainer_image_tag=snapshot.get("trainerImageTag") or None,
        deployment_image_tag=snapshot.get("deploymentImageTag") or None,
        weight_precision=snapshot.get("baseModelWeightPrecision") or None,
        pipeline_parallelism=int(sharding.get("pipelineParallelism") or 1),
    )


def read_job(row: Row) -> TrainerJobInfo:
    """Read a trainer job."""
    config = _object(row, "trainingConfig")
    return TrainerJobInfo(
        name=_name(row),
        state=str(row.get("state", "")),
        message=_message(row),
        max_context_length=config.get("maxContextLength"),
        display_name=str(row.get("displayName") or ""),
        base_model=config.get("baseModel") or None,
        lora_rank=config.get("loraRank"),
        create_time=row.get("createTime") or None,
    )


def read_deployment(row: Row) -> DeploymentInfo:
    """Read a deployment."""

    def either(camel: str, snake: str) -> str | None:
        return row.get(camel) or row.get(snake) or None

    return DeploymentInfo(
        name=_name(row),
        state=str(row.get("state", "")),
        message=_message(row),
        base_model=either("baseModel", "base_model"),
        deployment_shape=either("deploymentShape", "deployment_shape"),
        hot_load_trainer_job=either("hotLoadTrainerJob", "hot_load_trainer_job"),
        hot_load_transition_type=either("hotLoadTransitionType", "hot_load_transition_type"),
        hot_load_bucket_url=either("hotLoadBucketUrl", "hot_load_bucket_url"),
        replica_count=row.get("replicaCount"),
        min_replica_count=row.get("minReplicaCount"),
        max_replica_count=row.get("maxReplicaCount"),
        annotations={str(k): str(v) for k, v in _object(row, "annotations").items()},
        create_time=row.get("createTime") or None,
    )


def read_model(row: Row) -> ModelInfo:
    """Read a model."""
    return ModelInfo(
        name=_name(row),
        state=str(row.get("state") or ""),
        kind=str(row.get("kind") or ""),
        moe=bool(_object(row, "baseModelDetails").get("moe")),
        context_length=row.get("contextLength") or None,
        message=_message(row),
    )


def read_checkpoint(row: Row) -> CheckpointInfo:
    """Read a checkpoint of a trainer job."""
    return CheckpointInfo(
        name=_name(row),
        checkpoint_type=str(row.get("checkpointType") or ""),
        promotable=row.get("promotable") is True,
        create_time=row.get("createTime") or None,
        update_time=row.get("updateTime") or None,
    )


def read_operation(row: Row) -> OperationInfo:
    """Read a long-running operation."""
    error = _object(row, "error")
    progress = _object(row, "metadata").get("statusMessage")
    return OperationInfo(
        name=_name(row),
        done=row.get("done") is True,
        message=str(error.get("message") or progress or ""),
        failed=bool(error),
        response=_object(row, "response"),
    )


def _object(row: Row, name: str) -> Row:
    value = row.get(name)
    return cast(Row, value) if isinstance(value, Mapping) else {}


def _name(row: Row) -> str:
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError("the control plane described a resource without a name")
    return name


def _message(row: Row) -> str:
    inner = _object(row, "status").get("message")
    return str(row.get("statusMessage") or row.get("message") or inner or "")
