"""Closed schemas: the fields that a cloud takes, operation by operation; any other is refused.

They are those that the official client (1.2.30) can send, by its recorded traffic and its bodies'
builders. What a value may be is checked where it always is, by the route; here only names count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

_Names = frozenset[str]


def _names(text: str) -> _Names:
    return frozenset(text.split())


_OPERATION = _names("model_id seq_id type")
_JOB = _names(
    "serviceMode keepAlive dataset useReservation reservationTarget trainerReplicaCount nodeCount"
    " displayName hotLoadDeploymentId extraValues forwardOnly purpose preemptible managedBy"
    " inactivityTimeout disableInactivityCleanup trainingConfig"
)
_TRAINING_CONFIG = _names(
    "baseModel loraRank learningRate projectionHeadDim maxContextLength customImageTag"
    " acceleratorType acceleratorCount region extraArgs"
)
_DEPLOYMENT = _names(
    "baseModel description minReplicaCount maxReplicaCount enableHotLoad forTraining placement"
    " hotLoadBucketType hotLoadTrainerJob hotLoadTransitionType deploymentShape acceleratorType"
    " extraArgs extraValues annotations preemptible"
)
_PROMOTION = _names("output_model trainer_job_id base_model hot_load_deployment_id async_promotion")
_COMPLETION = _names(
    "model prompt n max_tokens temperature top_p top_k min_p stream raw_output logprobs"
    " top_logprobs perf_metrics_in_response seed stop echo echo_last prompt_cache_key images"
    " return_token_ids include_routing_matrix user ignore_eos frequency_penalty presence_penalty"
    " repetition_penalty logit_bias"
)

BODIES: Mapping[str, _Names] = {
    "create_job": _JOB,
    "create_deployment": _DEPLOYMENT,
    "patch_deployment": _names(
        "hotLoadTrainerJob hotLoadTransitionType minReplicaCount maxReplicaCount"
    ),
    "resume_job": _names(""),
    "promote": _PROMOTION,
    "hot_load": _names("identity reset_prompt_cache incremental_snapshot_metadata"),
    "completions": _COMPLETION,
    "create_session": _names("tags user_metadata sdk_version project_id type"),
    "session_heartbeat": _names("session_id type"),
    "client/config": _names("sdk_version"),
    "telemetry": _names("events platform sdk_version session_id"),
    "create_model": _names(
        "session_id model_seq_id base_model lora_config user_metadata projection_head_dim"
        " base_only type"
    ),
    "get_info": _names("model_id type"),
    "unload_model": _names("model_id type"),
    "forward": _OPERATION | {"forward_input", "comms"},
    "forward_backward": _OPERATION | {"forward_backward_input", "comms"},
    "optim_step": _OPERATION | {"adam_params", "grad_accumulation_normalization"},
    "save_weights": _OPERATION | {"path", "ttl_seconds", "overwrite"},
    "load_weights": _OPERATION | {"path", "optimizer", "weights_access_token"},
    "save_weights_for_sampler": _OPERATION
    | _names("path sampling_session_seq_id ttl_seconds checkpoint_type export_precision metadata"),
    "load_adapter": _names("adapter_path model_id seq_id"),
    "retrieve_future": _names("request_id allow_metadata_only"),
}
"""The fields of each body, by operation; one that is not here has no body that is looked at."""

_PASS = _names("data loss_fn loss_fn_config")
NESTED: Mapping[tuple[str, str], _Names] = {
    ("create_job", "trainingConfig"): _TRAINING_CONFIG,
    ("create_deployment", "placement"): _names("region"),
    ("create_model", "lora_config"): _names(
        "rank seed train_unembed train_mlp train_attn alpha init_method"
    ),
    ("forward", "forward_input"): _PASS,
    ("forward_backward", "forward_backward_input"): _PASS,
    ("optim_step", "adam_params"): _names(
        "learning_rate beta1 beta2 eps weight_decay grad_clip_norm"
    ),
    ("hot_load", "incremental_snapshot_metadata"): _names(
        "previous_snapshot_identity compression_format checksum_format"
    ),
}
"""The fields of the objects inside, by operation and field."""

QUERIES: Mapping[str, _Names] = {
    "create_job": _names("deploymentId trainingShape skipValidations rlorTrainerJobId"),
    "create_deployment": _names(
        "deploymentId skipShapeValidation acceptShapelessRisk disableSpeculativeDecoding"
    ),
    "patch_deployment": _names("updateMask"),
}
"""The parameters of each query; elsewhere any is taken."""


def refusal(operation: str, query: Iterable[str], body: object) -> str | None:
    """Return why a cloud would refuse a request; None if it has no field too many.

    Args:
        operation: name of a `requests.CloudOperation`.
        query: names of the query's parameters.
        body: the body, parsed; None where there is none.
    """
    for name in query:
        if name not in QUERIES.get(operation, (name,)):
            return _unknown(name)
    if operation not in BODIES or not isinstance(body, dict):
        return None
    fields = cast("Mapping[str, object]", body)
    for name, value in fields.items():
        if name not in BODIES[operation]:
            return _unknown(name)
        inner = NESTED.get((operation, name))
        if inner is not None and isinstance(value, dict):
            for part in cast("Mapping[str, object]", value):
                if part not in inner:
                    return _unknown(f"{name}.{part}")
    return _wrong_kind(operation, fields)


def _wrong_kind(operation: str, body: Mapping[str, object]) -> str | None:
    """Return why a value is refused that this platform takes in more forms than a cloud does."""
    stop = body.get("stop")
    if operation == "completions" and isinstance(stop, list):
        texts = cast("list[object]", stop)
        if not all(isinstance(text, str) for text in texts):
            return "Input should be a valid string, field: 'stop'"
    return None


def _unknown(name: str) -> str:
    return f"Extra inputs are not permitted, field: '{name[:80]}'"
