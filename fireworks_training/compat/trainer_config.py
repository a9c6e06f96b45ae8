"""`TrainerJobConfig`: describes a trainer job to be created, and makes the request for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from fireworks_training._async.control_plane.bodies import present
from fireworks_training.compat.client import Row
from fireworks_training.errors import InvalidArgument

MAX_INACTIVITY_S = 3 * 3600.0
MAX_DISPLAY_NAME = 63
_SHAPE_OWNED = ("accelerator_type", "accelerator_count", "node_count")


@dataclass
class TrainerJobConfig:
    """Describes a trainer job to be created.

    With `training_shape_ref` the shape decides on accelerators and nodes; with
    `auto_select_training_shape` the platform chooses a shape; with neither, all is as given here
    and the server checks no shape.
    """

    base_model: str
    lora_rank: int = 0
    projection_head_dim: int | None = None
    max_context_length: int | None = None
    learning_rate: float = 1e-5
    gradient_accumulation_steps: int | None = None
    node_count: int | None = None
    trainer_replica_count: int | None = None
    display_name: str | None = None
    hot_load_deployment_id: str | None = None
    region: str | None = None
    custom_image_tag: str | None = None
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    training_shape_ref: str | None = None
    forward_only: bool = False
    auto_select_training_shape: bool = False
    inactivity_timeout: timedelta | str | None = None
    disable_inactivity_cleanup: bool = False
    skip_validations: bool = False
    purpose: str | None = None
    preemptible: bool = False
    managed_by: str | None = None
    requested_job_id: str | None = None
    use_reservation: bool = True
    reservation_target: str | None = None

    def validate(self) -> None:
        """Refuse a description that no server would take; `create` calls this.

        Raises:
            InvalidArgument: something is wrong; the message has a line for each such thing.
        """
        wrong = [text for text in (*self._wrong_values(), *self._wrong_with_shape()) if text]
        if wrong:
            raise InvalidArgument("\n".join(wrong))

    def _wrong_values(self) -> list[str]:
        head = self.projection_head_dim
        wrong: list[str] = []
        if not self.base_model:
            wrong.append("base_model is missing")
        if head is not None and (isinstance(head, bool) or head < 0):
            wrong.append("projection_head_dim must be a whole number from 0")
        if self.gradient_accumulation_steps not in (None, 1):
            wrong.append(
                "gradient_accumulation_steps must be 1: call forward_backward several times before"
                " one optim_step"
            )
        if len(self.display_name or "") > MAX_DISPLAY_NAME:
            wrong.append(f"display_name may have {MAX_DISPLAY_NAME} characters")
        if self.inactivity_timeout is not None:
            try:
                seconds = float(duration(self.inactivity_timeout)[:-1])
            except InvalidArgument as error:
                wrong.append(error.message)
            else:
                if seconds > MAX_INACTIVITY_S:
                    wrong.append("inactivity_timeout may be 3 hours")
        return wrong

    def _wrong_with_shape(self) -> list[str]:
        ref = self.training_shape_ref
        if not ref and not self.auto_select_training_shape:
            return []
        wrong = [
            f"{name} belongs to the shape: leave it out"
            for name in _SHAPE_OWNED
            if getattr(self, name)
        ]
        if ref and self.auto_select_training_shape:
            wrong.append("give training_shape_ref or auto_select_training_shape, not both")
        return wrong

    @property
    def _is_manual(self) -> bool:
        """Whether no shape decides on accelerators and nodes."""
        return not self.training_shape_ref and not self.auto_select_training_shape

    def body(self) -> Row:
        """Make the body of the request that creates the job."""
        manual = self._is_manual
        training: Row = {
            "baseModel": self.base_model,
            "loraRank": self.lora_rank,
            "learningRate": self.learning_rate,
            **present(
                projectionHeadDim=self.projection_head_dim,
                maxContextLength=None if self.training_shape_ref else self.max_context_length,
                customImageTag=self.custom_image_tag,
                region=self.region,
                extraArgs=[part for arg in self.extra_args or [] for part in arg.split()],
                acceleratorType=self.accelerator_type if manual else None,
                acceleratorCount=self.accelerator_count if manual else None,
            ),
        }
        timeout = self.inactivity_timeout
        body: Row = {
            "serviceMode": True,
            "keepAlive": False,
            "dataset": "",
            "useReservation": self.use_reservation and not self.reservation_target,
            "trainingConfig": training,
            **present(
                reservationTarget=self.reservation_target,
                trainerReplicaCount=self.trainer_replica_count,
                displayName=self.display_name,
                hotLoadDeploymentId=self.hot_load_deployment_id,
                extraValues=dict(self.extra_values or {}),
                forwardOnly=self.forward_only,
                purpose=self.purpose,
                preemptible=self.preemptible,
                managedBy=self.managed_by,
                inactivityTimeout=None if timeout is None else duration(timeout),
                disableInactivityCleanup=self.disable_inactivity_cleanup,
            ),
        }
        if manual:
            body["nodeCount"] = self.node_count or 1
        return body

    def query(self) -> dict[str, str]:
        """Make the query of the same request."""
        query: dict[str, str] = {}
        if self.hot_load_deployment_id:
            query["deploymentId"] = self.hot_load_deployment_id
        if self.training_shape_ref:
            query["trainingShape"] = self.training_shape_ref
        if self._is_manual or (self.training_shape_ref and self.skip_validations):
            query["skipValidations"] = "true"
        return query


def duration(value: timedelta | str) -> str:
    """Spell a duration as the API does, `"1800s"`.

    Raises:
        InvalidArgument: `value` is a string of another form, or below zero.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else None
    if isinstance(value, str) and value.endswith("s"):
        try:
            seconds = float(value[:-1])
        except ValueError:
            seconds = None
    if seconds is None or not 0 <= seconds < float("inf"):
        raise InvalidArgument(
            f'inactivity_timeout={value!r}: give a timedelta, or text such as "1800s"'
        )
    return f"{seconds:g}s" if seconds != int(seconds) else f"{int(seconds)}s"
