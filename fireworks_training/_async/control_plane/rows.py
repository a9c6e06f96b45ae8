"""Reads the control plane's JSON rows into the public value types.

Knows both spellings that servers use (camelCase and snake_case) and the places where they put a
status message. What is absent stays None. A row without a name, and a field of another kind than it
should have, is a `ProtocolError`: a resource is never judged by what was guessed of it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
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

_DIGITS = re.compile(r"-?[0-9]{1,18}")

CHECKPOINT_LISTS = ("checkpoints", "rlorTrainerJobCheckpoints")
"""Names under which servers list the checkpoints of a trainer job."""


@contextmanager
def naming(route: str) -> Generator[None]:
    """Name the route in the `ProtocolError` of an answer that was read inside.

    Raises:
        ProtocolError: as the block raised it, with the route.
    """
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(f"{route}: {error.message}", request_id=error.request_id) from error


def read_list(answer: Row, *keys: str, what: str) -> list[Row]:
    """Read the rows of a list; an absent or empty one, and an explicit null, hold none.

    Args:
        keys: the names under which a server may list the rows.
        what: names the request in messages.

    Raises:
        ProtocolError: it is no list, or a row is no object.
    """
    for key in keys:
        rows = answer.get(key)
        if not rows:
            continue
        if not isinstance(rows, list):
            raise ProtocolError(f"{what}: the server's {key!r} is a {type(rows).__name__}, no list")
        for row in cast(list[object], rows):
            if not isinstance(row, dict):
                raise ProtocolError(
                    f"{what}: a row of the server's {key!r} is a {type(row).__name__}, no object"
                )
        return cast(list[Row], rows)
    return []


def read_profile(row: Row, shape: str) -> TrainingProfile:
    """Read a version of a training shape."""
    snapshot = _object(row, "snapshot")
    sharding = _object(snapshot, "trainerShardingScheme")
    return TrainingProfile(
        name=_text(row, "name") or shape,
        trainer_mode=_text(snapshot, "trainerMode") or "POLICY_TRAINER",
        max_context_length=_integer(snapshot, "maxSupportedContextLength") or None,
        deployment_shape=_text(snapshot, "deploymentShapeVersion"),
        node_count=_integer(snapshot, "nodeCount") or None,
        accelerator_type=_text(snapshot, "acceleratorType"),
        accelerator_count=_integer(snapshot, "acceleratorCount") or None,
        trainer_image_tag=_text(snapshot, "trainerImageTag"),
        deployment_image_tag=_text(snapshot, "deploymentImageTag"),
        weight_precision=_text(snapshot, "baseModelWeightPrecision"),
        pipeline_parallelism=_integer(sharding, "pipelineParallelism") or 1,
    )


def read_job(row: Row) -> TrainerJobInfo:
    """Read a trainer job."""
    config = _object(row, "trainingConfig")
    return TrainerJobInfo(
        name=read_name(row),
        state=_text(row, "state") or "",
        message=_message(row),
        max_context_length=_integer(config, "maxContextLength"),
        display_name=_text(row, "displayName") or "",
        base_model=_text(config, "baseModel"),
        lora_rank=_integer(config, "loraRank"),
        create_time=_text(row, "createTime"),
    )


def read_deployment(row: Row) -> DeploymentInfo:
    """Read a deployment."""

    def either(camel: str, snake: str) -> str | None:
        return _text(row, camel) or _text(row, snake)

    return DeploymentInfo(
        name=read_name(row),
        state=_text(row, "state") or "",
        message=_message(row),
        base_model=either("baseModel", "base_model"),
        deployment_shape=either("deploymentShape", "deployment_shape"),
        hot_load_trainer_job=either("hotLoadTrainerJob", "hot_load_trainer_job"),
        hot_load_transition_type=either("hotLoadTransitionType", "hot_load_transition_type"),
        hot_load_bucket_url=either("hotLoadBucketUrl", "hot_load_bucket_url"),
        replica_count=_integer(row, "replicaCount"),
        min_replica_count=_integer(row, "minReplicaCount"),
        max_replica_count=_integer(row, "maxReplicaCount"),
        annotations={str(k): str(v) for k, v in _object(row, "annotations").items()},
        create_time=_text(row, "createTime"),
    )


def read_model(row: Row) -> ModelInfo:
    """Read a model."""
    return ModelInfo(
        name=read_name(row),
        state=_text(row, "state") or "",
        kind=_text(row, "kind") or "",
        moe=bool(_object(row, "baseModelDetails").get("moe")),
        context_length=_integer(row, "contextLength") or None,
        message=_message(row),
    )


def read_checkpoint(row: Row) -> CheckpointInfo:
    """Read a checkpoint of a trainer job."""
    return CheckpointInfo(
        name=read_name(row),
        checkpoint_type=_text(row, "checkpointType") or "",
        promotable=row.get("promotable") is True,
        create_time=_text(row, "createTime"),
        update_time=_text(row, "updateTime"),
        predecessor=_text(row, "predecessor"),
        expire_time=_text(row, "expireTime"),
    )


def read_operation(row: Row) -> OperationInfo:
    """Read a long-running operation."""
    error = _object(row, "error")
    return OperationInfo(
        name=read_name(row),
        done=row.get("done") is True,
        message=_text(error, "message") or _text(_object(row, "metadata"), "statusMessage") or "",
        failed=bool(error),
        response=_object(row, "response"),
    )


def read_name(row: Row) -> str:
    """Read a row's full resource name.

    Raises:
        ProtocolError: it has none.
    """
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError("the control plane described a resource without a name")
    return name


def _object(row: Row, name: str) -> Row:
    value = row.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return cast(Row, value)


def _text(row: Row, name: str) -> str | None:
    """Read a text; an empty one counts as absent."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _integer(row: Row, name: str) -> int | None:
    """Read an integer, also in the digits by which protobuf's JSON writes 64-bit ones."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "an integer")
    return value


def _wrong(name: str, value: object, wanted: str) -> ProtocolError:
    return ProtocolError(
        f"the control plane described a resource whose {name!r} is a {type(value).__name__}, "
        f"not {wanted}"
    )


def _message(row: Row) -> str:
    """Read a status message, for people: of any other kind it is left out."""
    status = row.get("status")
    inner = cast(Row, status).get("message") if isinstance(status, Mapping) else None
    found = (row.get("statusMessage"), row.get("message"), inner)
    return next((text for text in found if isinstance(text, str) and text), "")
