"""Checks the keywords of `from_firetitan_config`: a trainer and a deployment, as options.

It knows which keywords exist, which exclude each other and which this version refuses; it does not
know how they are carried out.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ForwardRef, Literal, TypedDict, cast

from fireworks_training._checks import integer, number, one_of
from fireworks_training.errors import InvalidArgument, NotSupported, UnknownOption

logger = logging.getLogger("fireworks_training.config")

RESOURCE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

TransitionType = Literal["ASYNC", "SYNC"]
CleanUp = Literal["delete", "scale_to_zero"]
SnapshotDtype = Literal["bfloat16", "float32"]
WireDialect = Literal["json", "protobuf"]


class ProvisioningOptions(TypedDict, total=False):
    """Types the keywords of `from_firetitan_config`, as `FiretitanProvisioningConfig` has them."""

    base_model: str
    model_name: str
    tokenizer_model: str | None
    lora_rank: int
    lora_alpha: int | None
    max_lora_rank: int | None
    projection_head_dim: int | None
    training_shape_id: str | None
    training_shape: str | None
    training_shape_ref: str | None
    reference_training_shape_id: str | None
    reference_trainer_job_id: str | None
    cleanup_reference_trainer_on_close: bool
    reference_required: bool
    deployment_shape: str | None
    trainer_job_id: str | None
    trainer_id: str | None
    deployment_id: str | None
    create_deployment: bool
    forward_only: bool
    region: str | None
    max_context_length: int | None
    learning_rate: float
    gradient_accumulation_steps: int
    seed: int | None
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    node_count: int | None
    accelerator_type: str | None
    accelerator_count: int | None
    custom_image_tag: str | None
    extra_args: list[str] | None
    extra_values: dict[str, str] | None
    deployment_extra_args: list[str] | None
    deployment_extra_values: dict[str, str] | None
    trainer_replica_count: int | None
    replica_count: int | None
    deployment_replica_count: int | None
    trainer_timeout_s: float
    trainer_pending_timeout_s: float
    inactivity_timeout: str | None
    disable_inactivity_cleanup: bool
    deployment_timeout_s: float
    hotload_timeout_s: float
    reattach_settle_timeout_s: float
    reattach_poll_interval_s: float
    cleanup_trainer_on_close: bool
    cleanup_deployment_on_close: CleanUp | None
    display_name: str | None
    purpose: str | None
    managed_by: str | None
    preemptible: bool
    skip_validations: bool
    disable_speculative_decoding: bool
    hot_load_transition_type: str | None
    use_reservation: bool
    reservation_target: str | None
    wait_for_trainer_before_deployment: bool
    weight_sync_transport: str | None
    snapshot_dtype: SnapshotDtype | None
    dialect: WireDialect | None


_ALIASES = {
    "model_name": "base_model",
    "training_shape": "training_shape_id",
    "training_shape_ref": "training_shape_id",
    "trainer_id": "trainer_job_id",
    "deployment_replica_count": "replica_count",
}
_SHAPE_OWNED = ("node_count", "accelerator_type", "accelerator_count")
_REFUSED: dict[str, str] = {
    "projection_head_dim": "projection heads are not supported yet",
    "reservation_target": "reservations are not supported",
    "weight_sync_transport": "RDMA publication is not supported; leave it out for hot load",
}


_INTEGERS = {
    "lora_rank": 0,
    "lora_alpha": 1,
    "max_lora_rank": 1,
    "max_context_length": 1,
    "seed": -(1 << 63),
    "trainer_replica_count": 1,
    "replica_count": 1,
}
"""Integers of a configuration, and the least that each may be."""

_SECONDS = (
    "trainer_timeout_s",
    "trainer_pending_timeout_s",
    "deployment_timeout_s",
    "hotload_timeout_s",
    "reattach_settle_timeout_s",
    "reattach_poll_interval_s",
)


@dataclass(frozen=True, kw_only=True)
class FiretitanProvisioningConfig:
    """Describes one trainer and one deployment, as the caller wants them.

    Attributes:
        base_model: resource name of the model (alias `model_name`). Required.
        tokenizer_model: name or folder of the tokenizer; None takes the one the platform serves.
        lora_rank: 0 trains all parameters, more trains an adapter of that rank.
        lora_alpha: scale of the adapter; None is 32. Only with `lora_rank > 0`.
        max_lora_rank: many adapters on one trainer, each of a rank up to this, one a
            `create_training_client(lora_rank=...)`; None is one model. Excludes `lora_rank` and
            `lora_alpha`.
        training_shape_id: name of the training shape (aliases `training_shape`,
            `training_shape_ref`); None lets the control plane choose.
        deployment_shape: name of the deployment shape; None takes the one of the training shape.
        trainer_job_id: reuse this trainer job (alias `trainer_id`), resumed if it has stopped; one
            that does not exist is created under this id.
        deployment_id: reuse this deployment; one that does not exist is created under this id.
        create_deployment: False trains without a deployment.
        forward_only: the trainer computes logprobs only.
        reference_training_shape_id, reference_trainer_job_id: give a reference model a trainer of
            its own, of this shape, or this job (which is resumed if it has stopped).
        cleanup_reference_trainer_on_close: delete the reference trainer that this service made.
        reference_required: start a separate reference trainer together with the rest.
        max_context_length: tokens of a sequence; what the service reports, also beside a training
            shape, which decides what the trainer itself takes. None takes the shape's.
        learning_rate: shown with the job; the rate of each step comes with `optim_step`.
        seed: seed of the adapter's initialisation; None lets the trainer choose.
        train_mlp, train_attn, train_unembed: which layers an adapter covers.
        trainer_replica_count, region, custom_image_tag, extra_args, extra_values, purpose,
            managed_by, preemptible, use_reservation, skip_validations, inactivity_timeout,
            disable_inactivity_cleanup, display_name: passed on to the trainer job. Arguments with
            blanks are split there. `use_reservation=False` leaves reserved capacity alone.
        deployment_extra_args, deployment_extra_values, disable_speculative_decoding: passed on to
            the deployment.
        replica_count: replicas of the deployment (alias `deployment_replica_count`), at least 1.
        trainer_timeout_s: seconds from placement to ready.
        trainer_pending_timeout_s: seconds to wait for capacity.
        deployment_timeout_s: seconds for the deployment to become ready.
        hotload_timeout_s: seconds for every replica to report a snapshot.
        reattach_settle_timeout_s: seconds for a deployment that was found to become ready before it
            is pointed to this trainer, and the same again to settle afterwards.
        reattach_poll_interval_s: the longest pause between two looks meanwhile, in seconds.
        cleanup_trainer_on_close: delete the trainer job if this service created it.
        cleanup_deployment_on_close: "delete" or "scale_to_zero" the deployment if this service
            created it; None leaves it.
        hot_load_transition_type: "ASYNC" or "SYNC", any case; None is the platform's own.
        wait_for_trainer_before_deployment: create them one after the other.
        snapshot_dtype: type of weights and snapshots; "float32" turns the rounding off. Local
            platform only.
        dialect: wire format of the trainer's data plane: "json" (Fireworks) or "protobuf" (Tinker);
            None takes protobuf where the trainer offers it, else JSON.
    """

    base_model: str
    tokenizer_model: str | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    max_lora_rank: int | None = None
    training_shape_id: str | None = None
    deployment_shape: str | None = None
    trainer_job_id: str | None = None
    deployment_id: str | None = None
    create_deployment: bool = True
    forward_only: bool = False
    reference_training_shape_id: str | None = None
    reference_trainer_job_id: str | None = None
    cleanup_reference_trainer_on_close: bool = True
    reference_required: bool = False
    region: str | None = None
    max_context_length: int | None = None
    learning_rate: float = 1e-5
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    custom_image_tag: str | None = None
    extra_args: tuple[str, ...] = ()
    extra_values: Mapping[str, str] | None = None
    deployment_extra_args: tuple[str, ...] = ()
    deployment_extra_values: Mapping[str, str] | None = None
    trainer_replica_count: int | None = None
    replica_count: int = 1
    trainer_timeout_s: float = 3600.0
    trainer_pending_timeout_s: float = 172_800.0
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool = False
    deployment_timeout_s: float = 5400.0
    hotload_timeout_s: float = 600.0
    reattach_settle_timeout_s: float = 600.0
    reattach_poll_interval_s: float = 5.0
    cleanup_trainer_on_close: bool = False
    cleanup_deployment_on_close: CleanUp | None = None
    display_name: str | None = None
    purpose: str | None = None
    managed_by: str | None = None
    preemptible: bool = False
    use_reservation: bool = True
    skip_validations: bool = False
    disable_speculative_decoding: bool = False
    hot_load_transition_type: TransitionType | None = None
    wait_for_trainer_before_deployment: bool = False
    snapshot_dtype: SnapshotDtype | None = None
    dialect: WireDialect | None = None

    def __post_init__(self) -> None:
        if not self.base_model:
            raise InvalidArgument("base_model is required: the resource name of the model to train")
        self._check_numbers()
        if self.max_lora_rank is not None and (self.lora_rank or self.lora_alpha is not None):
            raise InvalidArgument(
                "max_lora_rank excludes lora_rank and lora_alpha: each model gets its own from "
                "create_training_client"
            )
        if self.lora_alpha is not None and self.lora_rank == 0:
            raise InvalidArgument(
                "lora_alpha is given but lora_rank is 0 (full-parameter): give lora_rank, or leave "
                "lora_alpha out"
            )
        for name in ("trainer_job_id", "deployment_id", "reference_trainer_job_id"):
            value = getattr(self, name)
            if value is not None and not RESOURCE_ID.fullmatch(value):
                raise InvalidArgument(
                    f"{name}={value!r}: an id has 1 to 63 characters of a-z, 0-9 and '-', and "
                    "neither starts nor ends with '-'"
                )
        one_of("hot_load_transition_type", self.hot_load_transition_type, (None, "ASYNC", "SYNC"))
        one_of(
            "cleanup_deployment_on_close",
            self.cleanup_deployment_on_close,
            (None, "delete", "scale_to_zero"),
        )
        one_of("snapshot_dtype", self.snapshot_dtype, (None, "bfloat16", "float32"))
        one_of("dialect", self.dialect, (None, "json", "protobuf"))
        if self.display_name is not None and len(self.display_name) >= 64:
            raise InvalidArgument(
                f"display_name has {len(self.display_name)} characters; at most 63 are allowed"
            )

    def _check_numbers(self) -> None:
        """Check each number, and keep it as Python's own where numpy or torch brought it."""
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name in ("lora_rank", "replica_count"):
                object.__setattr__(self, name, integer(name, value, least))
        for name in _SECONDS:
            seconds = number(name, getattr(self, name), 0)
            if seconds == 0:
                raise InvalidArgument(f"{name} must be more than 0 seconds")
            object.__setattr__(self, name, seconds)
        rate = number("learning_rate", self.learning_rate, 0)
        object.__setattr__(self, "learning_rate", rate)

    @property
    def alpha(self) -> int:
        """The adapter's effective scale."""
        return 32 if self.lora_alpha is None else self.lora_alpha

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> FiretitanProvisioningConfig:
        """Check the keywords of `from_firetitan_config` and make the configuration.

        Raises:
            UnknownOption: a keyword that does not exist.
            InvalidArgument: a value out of range, or a keyword together with its alias.
            NotSupported: a keyword that this version refuses.
        """
        known = {field.name for field in fields(cls)}
        _refuse_unknown(options, known | set(ProvisioningOptions.__annotations__))
        chosen = _without_aliases(options)
        for name, reason in _REFUSED.items():
            if chosen.pop(name, None):
                raise NotSupported(f"{name}: {reason}")
        if chosen.pop("gradient_accumulation_steps", 1) != 1:
            raise InvalidArgument(
                "gradient_accumulation_steps must be 1: accumulate by calling forward_backward "
                "several times before one optim_step"
            )
        for name in _SHAPE_OWNED:
            if chosen.pop(name, None) is not None:
                warnings.warn(
                    f"{name} is ignored: the training shape decides it",
                    DeprecationWarning,
                    stacklevel=4,
                )
        if chosen.get("replica_count", 1) in (0, None):
            logger.warning("replica_count=%s: one replica is used", chosen["replica_count"])
            chosen["replica_count"] = 1
        transition = chosen.get("hot_load_transition_type")
        if isinstance(transition, str):
            chosen["hot_load_transition_type"] = transition.upper()
        for name in ("extra_args", "deployment_extra_args"):
            if name in chosen:
                chosen[name] = tuple(chosen[name] or ())
        for name in ("reference_training_shape_id", "reference_trainer_job_id"):
            chosen[name] = chosen.get(name) or None
        if "base_model" not in chosen:
            raise InvalidArgument("base_model is required: the resource name of the model to train")
        return cls(**chosen)

    @classmethod
    def for_tinker_server(
        cls,
        *,
        lora_rank: int | None,
        max_lora_rank: int | None,
        dialect: WireDialect = "protobuf",
        **options: Any,
    ) -> FiretitanProvisioningConfig:
        """The configuration of a service on a server that has the Tinker API and nothing else.

        Args:
            lora_rank: of the adapter; default 32, or with `max_lora_rank` each client's own.
            dialect: how passes are written.
            max_lora_rank, options: fields of the configuration.

        Raises:
            InvalidArgument: a rank below 1.
        """
        if lora_rank is None:
            lora_rank = 32 if max_lora_rank is None else 0
        elif lora_rank < 1:
            raise InvalidArgument(f"lora_rank={lora_rank}: a Tinker server trains adapters, from 1")
        return cls(
            lora_rank=lora_rank,
            max_lora_rank=max_lora_rank,
            create_deployment=False,
            dialect=dialect,
            **options,
        )


def _refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
            raise UnknownOption(f"unknown keyword {name!r}: {hint}")


def _without_aliases(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name, value in options.items():
        canonical = _ALIASES.get(name, name)
        if canonical in spelt:
            raise InvalidArgument(
                f"{spelt[canonical]!r} and {name!r} mean the same: give one of them"
            )
        spelt[canonical] = name
        chosen[canonical] = value
    return chosen


def show_options(service: type) -> None:
    """Let `inspect.signature`, and so an editor, show each keyword of `from_firetitan_config`.

    Args:
        service: a class whose `from_firetitan_config` ends in `**options`; it stays as it is where
            it has none of its own.
    """
    method = service.__dict__.get("from_firetitan_config")
    if not isinstance(method, classmethod):
        return
    function = cast(Any, method).__func__
    plain = inspect.signature(function)
    defaults = {
        field.name: field.default
        for field in fields(FiretitanProvisioningConfig)
        if field.default is not MISSING
    }
    parameters = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, kind in ProvisioningOptions.__annotations__.items():
        written = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        default = defaults.get(_ALIASES.get(name, name))
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=written
            )
        )
    function.__signature__ = plain.replace(parameters=parameters)


def cast_options(options: ProvisioningOptions) -> Mapping[str, Any]:
    """Type the keywords as a plain mapping."""
    return cast(Mapping[str, Any], options)
