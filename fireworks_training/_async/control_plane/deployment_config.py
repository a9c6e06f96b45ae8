"""The create request of a deployment, from its `DeploymentConfig`.

Knows the control plane's spelling of the fields; what they mean and which contradict each other is
in `options`.
"""

from __future__ import annotations

from typing import Any

from fireworks_training._async.control_plane.bodies import present, split_at_blanks
from fireworks_training.options import DeploymentConfig


def create_body(config: DeploymentConfig) -> dict[str, Any]:
    """Build the JSON body of the create request."""
    return {
        "baseModel": config.base_model,
        "description": config.description or "Fireworks training deployment",
        "minReplicaCount": config.min_replica_count,
        "maxReplicaCount": config.max_replica_count,
        "enableHotLoad": config.enable_hot_load,
        "forTraining": config.for_training,
        **present(
            placement={"region": config.region} if config.region else None,
            hotLoadBucketType=config.hot_load_bucket_type,
            hotLoadTrainerJob=config.hot_load_trainer_job,
            hotLoadTransitionType=config.hot_load_transition_type,
            deploymentShape=config.deployment_shape,
            acceleratorType=None if config.deployment_shape else config.accelerator_type,
            extraArgs=split_at_blanks(config.extra_args or ()),
            extraValues=config.extra_values,
            annotations=config.annotations,
            preemptible=config.preemptible,
        ),
    }


def create_query(config: DeploymentConfig) -> dict[str, str]:
    """Build the query parameters of the create request."""
    wanted = {
        "skipShapeValidation": config.skip_shape_validation,
        "acceptShapelessRisk": config.accept_shapeless_risk,
        "disableSpeculativeDecoding": config.disable_speculative_decoding,
    }
    return {name: "true" for name, yes in wanted.items() if yes}
