"""`DeploymentConfig`: describes a deployment to be created, and makes the request for it.

The name and the fields are those of the official SDK; `compat` hands it on to its users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from fireworks_training._async.control_plane.bodies import present
from fireworks_training.errors import InvalidArgument

_TRANSITIONS = ("ASYNC", "SYNC")


def transition(value: str | None) -> str | None:
    """Normalise a transition type to "ASYNC" or "SYNC"; None leaves the choice to the platform.

    Raises:
        InvalidArgument: `value` is something else.
    """
    name = (value or "").strip().upper()
    if name and name not in _TRANSITIONS:
        raise InvalidArgument(f"hot_load_transition_type={value!r}: {' or '.join(_TRANSITIONS)}")
    return name or None


@dataclass
class DeploymentConfig:
    """Describes a deployment to be created.

    With `deployment_shape` the shape decides on the accelerator; without one, `accelerator_type`
    does, and `accept_shapeless_risk` says that this is meant.

    Attributes:
        hot_load_trainer_job: full name of the trainer job whose snapshots are loaded.
        for_training: whether the platform may delete the deployment with its trainer.
        expected_deployment_shape: if given, `deployment_shape` must be exactly this one.
    """

    deployment_id: str
    base_model: str
    description: str | None = None
    deployment_shape: str | None = None
    expected_deployment_shape: str | None = None
    region: str | None = None
    min_replica_count: int = 0
    max_replica_count: int = 1
    accelerator_type: str = "NVIDIA_H200_141GB"
    hot_load_bucket_type: str | None = "FW_HOSTED"
    hot_load_trainer_job: str | None = None
    enable_hot_load: bool = True
    hot_load_transition_type: str | None = None
    skip_shape_validation: bool = False
    accept_shapeless_risk: bool = False
    disable_speculative_decoding: bool = False
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    for_training: bool = False
    preemptible: bool = False

    def __post_init__(self) -> None:
        self.hot_load_transition_type = transition(self.hot_load_transition_type)

    @classmethod
    def from_training_profile(
        cls, *, deployment_id: str, base_model: str, profile: object, **kwargs: Any
    ) -> Self:
        """Describe a deployment with the deployment shape that a training profile is linked to.

        Raises:
            InvalidArgument: the profile is linked to none.
        """
        shape = getattr(profile, "deployment_shape", None)
        if not shape:
            raise InvalidArgument("the training profile is linked to no deployment shape")
        return cls(
            deployment_id=deployment_id,
            base_model=base_model,
            deployment_shape=shape,
            expected_deployment_shape=shape,
            **kwargs,
        )

    def validate(self) -> None:
        """Refuse a description that contradicts itself; creating a deployment calls this.

        Raises:
            InvalidArgument: the shape is not the expected one, or is both given and declined.
        """
        shape = (self.deployment_shape or "").strip()
        if shape and self.accept_shapeless_risk:
            raise InvalidArgument("give deployment_shape or accept_shapeless_risk, not both")
        expected = (self.expected_deployment_shape or "").strip()
        if expected and shape != expected:
            raise InvalidArgument(
                f"deployment_shape={shape!r}, but the training profile is linked to {expected!r}:"
                " use DeploymentConfig.from_training_profile"
            )

    def body(self) -> dict[str, Any]:
        """Make the body of the request that creates the deployment."""
        return {
            "baseModel": self.base_model,
            "description": self.description or "Fireworks training deployment",
            "minReplicaCount": self.min_replica_count,
            "maxReplicaCount": self.max_replica_count,
            "enableHotLoad": self.enable_hot_load,
            "forTraining": self.for_training,
            **present(
                placement={"region": self.region} if self.region else None,
                hotLoadBucketType=self.hot_load_bucket_type,
                hotLoadTrainerJob=self.hot_load_trainer_job,
                hotLoadTransitionType=self.hot_load_transition_type,
                deploymentShape=self.deployment_shape,
                acceleratorType=None if self.deployment_shape else self.accelerator_type,
                extraArgs=[part for arg in self.extra_args or [] for part in arg.split()],
                extraValues=self.extra_values,
                annotations=self.annotations,
                preemptible=self.preemptible,
            ),
        }

    def query(self) -> dict[str, str]:
        """Make the query of the same request."""
        wanted = {
            "skipShapeValidation": self.skip_shape_validation,
            "acceptShapelessRisk": self.accept_shapeless_risk,
            "disableSpeculativeDecoding": self.disable_speculative_decoding,
        }
        return {name: "true" for name, yes in wanted.items() if yes}
