"""The bodies of the control plane's resources: checks what a creator asks for, shows what is there.

Pure functions over JSON objects; no state and no I/O. Options of the cloud that change nothing here
(accelerators, regions, images) are taken with a notice in `statusMessage`, so that a script written
for the cloud runs; what would change the result is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from fireworks_training.local.gateway.inference.registry import (
    STAND_IN_PREFIX,
    ModelEntry,
    ServingRegistry,
    UnknownModel,
)
from fireworks_training.local.gateway.web.bodies import int_field, object_field, text_field
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.limits import camel, parse_duration
from fireworks_training.local.settings import (
    ACCOUNT,
    DEPLOYMENT_PREFIX,
    DEPLOYMENT_SHAPE,
    JOB_PREFIX,
    RESOURCE_ID_RULE,
    TRAINING_SHAPE,
    is_resource_id,
)
from fireworks_training.local.store.database import Body, ResourceRow

MAX_LORA_RANK = 256
MAX_REPLICAS = 8
SNAPSHOT_DTYPES = ("bfloat16", "float32")
SHAPE_VERSION = "1"
MAX_INACTIVITY_S = 3 * 3600.0

# Cloud options without effect on one machine's CPU.
_JOB_OPTIONS_WITHOUT_EFFECT = (
    "reservationTarget",
    "trainerReplicaCount",
    "nodeCount",
    "preemptible",
)
_TRAINING_OPTIONS_WITHOUT_EFFECT = (
    "acceleratorType",
    "acceleratorCount",
    "region",
    "customImageTag",
    "extraArgs",
    "projectionHeadDim",
)
_JOB_FIELDS = (
    "displayName",
    "purpose",
    "managedBy",
    "hotLoadDeploymentId",
    "forwardOnly",
    "inactivityTimeout",
    "disableInactivityCleanup",
    "extraValues",
    "annotations",
)
_DEPLOYMENT_OPTIONS_WITHOUT_EFFECT = ("acceleratorType", "placement", "extraArgs", "preemptible")
_DEPLOYMENT_FIELDS = (
    "description",
    "displayName",
    "annotations",
    "enableHotLoad",
    "forTraining",
    "hotLoadBucketType",
    "hotLoadTrainerJob",
    "deploymentShape",
    "acceleratorType",
    "placement",
    "extraArgs",
    "extraValues",
    "preemptible",
)
_SHAPE = re.compile(r"accounts/[a-z0-9-]+/(?:trainingShapes|deploymentShapes)/[A-Za-z0-9._-]+")
_VERSION = re.compile(r"/versions/[A-Za-z0-9._-]+$")


@dataclass(slots=True)
class StatusNotices:
    """Collects what a creator should know; shown as `statusMessage`."""

    texts: list[str] = field(default_factory=list[str])

    def add(self, text: str | None) -> None:
        """Take a notice; None adds nothing."""
        if text is not None:
            self.texts.append(text.removeprefix("Warning: "))

    def add_ignored(self, body: Mapping[str, object], names: tuple[str, ...]) -> None:
        """Name the options of `body` that have no effect here."""
        given = [name for name in names if body.get(name) is not None and not _is_plain(body[name])]
        if given:
            self.add(f"without effect on the local platform: {', '.join(given)}")

    def text(self) -> str:
        """Return all notices in the form that clients log as a warning; empty if there is none."""
        return f"Warning: {'; '.join(self.texts)}" if self.texts else ""


def _is_plain(value: object) -> bool:
    """Return whether an option asks for nothing: off, empty, or one of what there is one of."""
    return value is not True and value in ("", [], {}, 0, 1)


# -- fields --------------------------------------------------------------------------------------


def check_id(name: str, what: str) -> str:
    """Return a resource id that may become part of a path; refuse any other."""
    if not is_resource_id(name):
        raise HttpProblem(400, f"{what} {name[:80]!r} is not {RESOURCE_ID_RULE}")
    return name


def check_account(account: str) -> None:
    """Refuse every account but the one there is."""
    if account != ACCOUNT:
        raise HttpProblem(404, f"no account {account[:80]!r}; this platform has one: {ACCOUNT!r}")


def model_field(registry: ServingRegistry, name: str, notices: StatusNotices) -> ModelEntry:
    """Return the model behind `baseModel`."""
    try:
        entry, notice = registry.find_model(name)
    except UnknownModel as error:
        raise HttpProblem(400, f"baseModel: {error}") from None
    notices.add(notice)
    return entry


def shape_field(name: str, local: str, notices: StatusNotices) -> None:
    """Check a shape: the local one, or one of the cloud's for which it stands in."""
    parent = _VERSION.sub("", name)
    if parent == local:
        return
    if not name.startswith(STAND_IN_PREFIX) or _SHAPE.fullmatch(parent) is None:
        raise HttpProblem(400, f"no shape {name[:200]!r}; this platform has {local}")
    notices.add(f"{name} is not available here; {local} stands in for it")


def dtype_field(values: Mapping[str, object]) -> str | None:
    """Return the `snapshot_dtype` of an `extraValues`; None when it has none."""
    value = values.get("snapshot_dtype")
    if value is None:
        return None
    if value not in SNAPSHOT_DTYPES:
        raise HttpProblem(400, f"snapshot_dtype must be one of {', '.join(SNAPSHOT_DTYPES)}")
    return str(value)


def _delta_field(values: Mapping[str, object]) -> Body:
    """Return the `delta_compression` of an `extraValues`, if a trainer needs it."""
    value = values.get("delta_compression", "fast")
    if value not in ("fast", "small"):
        raise HttpProblem(400, "delta_compression must be one of fast, small")
    return {} if value == "fast" else {"delta_compression": value}


# -- jobs ----------------------------------------------------------------------------------------


def job_body(body: Mapping[str, object], shape: str, registry: ServingRegistry) -> tuple[Body, str]:
    """Check the body of a new job; return what is stored of it, and its notice.

    What is stored is `{"resource": fields to show, "worker": settings of its trainer}`.
    """
    notices = StatusNotices()
    training = object_field(body, "trainingConfig")
    base_model = text_field(training, "baseModel") or text_field(body, "baseModel")
    if not base_model:
        raise HttpProblem(400, "trainingConfig.baseModel is missing")
    entry = model_field(registry, base_model, notices)
    if shape:
        shape_field(shape, TRAINING_SHAPE, notices)
    # The official clients write them beside `trainingConfig`, others inside.
    extra = {**object_field(training, "extraValues"), **object_field(body, "extraValues")}
    context = _context_length(training, entry, base_model, notices)
    lora_rank = int_field(training, "loraRank", 0, MAX_LORA_RANK, default=0)
    seed = int_field(extra, "seed", 0, 2**63 - 1, default=0)
    dtype = dtype_field(extra) or SNAPSHOT_DTYPES[0]
    notices.add_ignored(body, _JOB_OPTIONS_WITHOUT_EFFECT)
    notices.add_ignored(training, _TRAINING_OPTIONS_WITHOUT_EFFECT)
    resource: Body = {name: body[name] for name in _JOB_FIELDS if body.get(name) is not None}
    object_field(body, "annotations")
    resource["serviceMode"] = True
    resource["trainingShape"] = shape or TRAINING_SHAPE
    resource["trainingConfig"] = {
        "baseModel": base_model,
        "loraRank": lora_rank,
        "maxContextLength": context,
        "learningRate": training.get("learningRate"),
        "extraValues": {**extra, "snapshot_dtype": dtype},
    }
    worker: Body = {
        "base_model": entry.name,
        # The contract has one number for both: the rank of the job's model, or with several models
        # the most that one may have.
        "lora_rank": lora_rank,
        "snapshot_dtype": dtype,
        "max_context_length": context,
        "seed": seed,
        **_delta_field(extra),
    }
    stored: Body = {"resource": resource, "worker": worker}
    return {**stored, **_inactivity(body)}, notices.text()


def _inactivity(body: Mapping[str, object]) -> Body:
    """Return `{"inactivity_s": seconds}`, None for never; empty when the job leaves it to the
    platform."""
    if body.get("disableInactivityCleanup") is True:
        return {"inactivity_s": None}
    asked = body.get("inactivityTimeout")
    if asked is None:
        return {}
    duration = parse_duration(asked)
    if duration is None or not 0 < duration <= MAX_INACTIVITY_S:
        raise HttpProblem(
            400, f'inactivityTimeout must be "<seconds>s", up to {MAX_INACTIVITY_S:.0f}s'
        )
    return {"inactivity_s": duration}


def _context_length(
    training: Mapping[str, object], entry: ModelEntry, asked_model: str, notices: StatusNotices
) -> int:
    most = entry.max_context_length
    asked = int_field(training, "maxContextLength", 1, 1 << 24, default=most)
    if asked <= most:
        return asked
    if asked_model == entry.name:
        raise HttpProblem(400, f"maxContextLength must be at most {most} for {entry.name}")
    notices.add(f"maxContextLength is {most} instead of {asked}: {entry.name} has no more")
    return most


def show_job(row: ResourceRow) -> Body:
    """Return a job as the API shows it."""
    return {
        "name": f"{JOB_PREFIX}{row.id}",
        "state": row.state,
        "statusMessage": row.message,
        "createTime": row.created,
        "updateTime": row.updated,
        **cast(Body, row.body["resource"]),
    }


# -- deployments ---------------------------------------------------------------------------------


def deployment_body(body: Mapping[str, object], registry: ServingRegistry) -> tuple[Body, str]:
    """Check the body of a new deployment; return what is stored of it, and its notice.

    What is stored is `{"resource": fields to show, "model": name of the model really served,
    "awake": replicas to start when a request wakes it}`.
    """
    notices = StatusNotices()
    base_model = text_field(body, "baseModel")
    if not base_model:
        raise HttpProblem(400, "baseModel is missing")
    entry = model_field(registry, base_model, notices)
    shape = text_field(body, "deploymentShape")
    if shape:
        shape_field(shape, DEPLOYMENT_SHAPE, notices)
    dtype_field(object_field(body, "extraValues"))
    notices.add_ignored(body, _DEPLOYMENT_OPTIONS_WITHOUT_EFFECT)
    resource: Body = {name: body[name] for name in _DEPLOYMENT_FIELDS if body.get(name) is not None}
    resource["baseModel"] = base_model
    least, most = replica_fields(body, 0, 1)
    resource["minReplicaCount"], resource["maxReplicaCount"] = least, most
    resource["hotLoadTransitionType"] = transition_field(body, "ASYNC")
    check_trainer_job(text_field(body, "hotLoadTrainerJob"))
    return {"resource": resource, "model": entry.name, "awake": max(1, most)}, notices.text()


def replica_fields(body: Mapping[str, object], low: int, high: int) -> tuple[int, int]:
    """Return the minimum and maximum of replicas; `low` and `high` are the defaults."""
    least = int_field(body, "minReplicaCount", 0, MAX_REPLICAS, default=low)
    most = int_field(body, "maxReplicaCount", 0, MAX_REPLICAS, default=max(high, least))
    if least > most:
        raise HttpProblem(400, f"minReplicaCount {least} is above maxReplicaCount {most}")
    return least, most


def transition_field(body: Mapping[str, object], default: str) -> str:
    """Return how a hot load treats the streams in flight."""
    value = text_field(body, "hotLoadTransitionType", default).upper() or default
    if value not in ("ASYNC", "SYNC"):
        raise HttpProblem(400, "hotLoadTransitionType must be ASYNC or SYNC")
    return value


def check_trainer_job(name: str) -> None:
    """Check the resource name of a trainer job, or an empty text; the job may be created later."""
    id_ = name.removeprefix(JOB_PREFIX)
    if name and (id_ == name or not is_resource_id(id_)):
        raise HttpProblem(400, f"hotLoadTrainerJob must be {JOB_PREFIX}<id>")


_PATCHABLE = (
    "minReplicaCount",
    "maxReplicaCount",
    "hotLoadTrainerJob",
    "hotLoadTransitionType",
    "displayName",
    "description",
    "annotations",
)


def deployment_patch(stored: Body, body: Mapping[str, object], mask: str) -> Body:
    """Return the stored body after a PATCH; without a mask every field of the body counts."""
    names = [camel(name.strip()) for name in mask.split(",") if name] or list(body)
    for name in names:
        if name not in _PATCHABLE:
            raise HttpProblem(400, f"{name!r} can't be changed; these can: {', '.join(_PATCHABLE)}")
    changes = {name: body.get(name) for name in names}
    resource = dict(cast(Body, stored["resource"]))
    # A maximum given alone pulls the minimum down with it, so that it can't contradict.
    if "maxReplicaCount" in changes and "minReplicaCount" not in changes:
        most = int_field(changes, "maxReplicaCount", 0, MAX_REPLICAS, default=1)
        resource["minReplicaCount"] = min(cast(int, resource["minReplicaCount"]), most)
    merged = {**resource, **changes}
    defaults = cast(int, resource["minReplicaCount"]), cast(int, resource["maxReplicaCount"])
    least, most = replica_fields(merged, *defaults)
    merged["minReplicaCount"], merged["maxReplicaCount"] = least, most
    merged["hotLoadTransitionType"] = transition_field(merged, "ASYNC")
    check_trainer_job(text_field(merged, "hotLoadTrainerJob"))
    awake = most or cast(int, stored["awake"])
    resource = {name: value for name, value in merged.items() if value is not None}
    return {**stored, "resource": resource, "awake": awake}


def show_deployment(row: ResourceRow, replicas: int) -> Body:
    """Return a deployment as the API shows it."""
    name = f"{DEPLOYMENT_PREFIX}{row.id}"
    return {
        "name": name,
        "state": row.state,
        "statusMessage": row.message,
        "status": {"code": "OK" if row.state != "FAILED" else "INTERNAL", "message": row.message},
        "createTime": row.created,
        "updateTime": row.updated,
        "replicaCount": replicas,
        "hotLoadBucketUrl": f"local://{name}",
        **cast(Body, row.body["resource"]),
    }


# -- models and shapes ---------------------------------------------------------------------------


def show_model(
    name: str, entry: ModelEntry, notice: str | None, promoted: ResourceRow | None = None
) -> Body:
    """Return a model as the API shows it; `promoted` is its row, if it was made of a snapshot."""
    made: Body = {}
    if promoted is not None:
        made = {"createTime": promoted.created, "kind": promoted.body["kind"]}
        if "peftDetails" in promoted.body:
            made["peftDetails"] = promoted.body["peftDetails"]
    return {
        "name": name,
        "displayName": entry.name.rsplit("/", 1)[-1],
        "kind": "HF_BASE_MODEL",
        "state": "READY",
        "statusMessage": notice or "",
        "contextLength": entry.max_context_length,
        "supportsLora": True,
        "baseModelDetails": {"moe": False, "supportsFireattention": False},
        **made,
    }


def show_shape(name: str, notice: str) -> Body:
    """Return a training shape as the API shows it."""
    return {"name": name, "state": "READY", "statusMessage": notice}


def show_shape_version(shape: str, version: str, context_length: int, notice: str) -> Body:
    """Return a version of a training shape; there is one."""
    return {
        "name": f"{shape}/versions/{version}",
        "latestValidated": True,
        "validated": True,
        "public": True,
        "statusMessage": notice,
        "snapshot": {
            "trainerImageTag": "local",
            "maxSupportedContextLength": context_length,
            "nodeCount": 1,
            "deploymentShapeVersion": f"{DEPLOYMENT_SHAPE}/versions/{SHAPE_VERSION}",
            "deploymentImageTag": "local",
            "acceleratorType": "CPU",
            "acceleratorCount": 1,
            "baseModelWeightPrecision": "BFLOAT16",
            "trainerMode": "POLICY_TRAINER",
            "trainerShardingScheme": {"pipelineParallelism": 1},
        },
    }
