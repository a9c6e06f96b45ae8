"""`FireworksClient`: an account's shapes, models and checkpoints, without a trainer.

Makes blocking calls over the async core that the service uses: its connections, its retries, its
errors. Gives rows as the dictionaries that the API sent. Knows names and rows; not how a promotion
is asked for or waited for, which is the core's.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, cast

from fireworks_training._async.control_plane.account import PAGE_SIZE, WRITE_TIMEOUT, Account
from fireworks_training._async.control_plane.bodies import promotion_body
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.control_plane.names import (
    validate_output_model_id as check_output_model_id,
)
from fireworks_training._async.control_plane.promotions import PROMOTE_TIMEOUT, start_promotion
from fireworks_training._async.control_plane.rows import CHECKPOINT_LISTS
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._core.lifecycle import Readiness, ReadinessWait
from fireworks_training._portal import at_exit, wait_for
from fireworks_training.errors import (
    ApiStatusError,
    ClientClosed,
    InvalidArgument,
    NotFound,
    ProtocolError,
    UnknownOption,
)

T = TypeVar("T")
Row = dict[str, Any]

DEFAULT_BASE_URL = "https://api.fireworks.ai"
SESSIONS = ("trainingSessions",)
FINE_TUNING_JOBS = ("supervisedFineTuningJobs", "dpoJobs")
"""Collections by the names of the API."""


class ModelDetailsUnavailableError(RuntimeError):
    """Reports that a model's record can't be read.

    Attributes:
        status_code: HTTP status of the answer; 403 or 404 where the key may not see the model.
    """

    def __init__(self, message: str, *, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


def validate_output_model_id(output_model_id: str | None) -> list[str]:
    """List what is wrong with the id of a model to be made; empty if nothing is.

    A promotion with a bad id would leave its staged files behind, so check the id before.
    """
    try:
        check_output_model_id(output_model_id or "")
    except InvalidArgument as error:
        return [error.message]
    return []


@dataclass
class TrainingShapeProfile:
    """Describes a version of a training shape, as the control plane resolved it.

    Attributes:
        training_shape_version: full name of the version.
        max_supported_context_length: tokens.
        deployment_shape_version: full name of the linked version of a deployment shape, or "".
        trainer_mode: "POLICY_TRAINER" (also when empty), "LORA_TRAINER" or "FORWARD_ONLY".
    """

    training_shape_version: str
    trainer_image_tag: str
    max_supported_context_length: int
    node_count: int
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    base_model_weight_precision: str
    pipeline_parallelism: int
    trainer_mode: str = ""

    @property
    def training_shape(self) -> str | None:
        """The shape without its version."""
        return self.training_shape_version.split("/versions/")[0] or None

    @property
    def deployment_shape(self) -> str | None:
        """The linked deployment shape, with its version."""
        return self.deployment_shape_version or None

    @property
    def supports_lora(self) -> bool:
        """Whether the shape is one for adapters."""
        return self.trainer_mode == "LORA_TRAINER"


class FireworksClient:
    """Account-level operations, blocking.

    Args:
        api_key: key of the account.
        base_url: URL of the control plane.
        additional_headers: sent with every request; they win over the SDK's own.
        verify_ssl: False accepts any certificate; None and True check it.
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
    ) -> None:
        self.api_key = api_key
        self.base_url = base_url.rstrip("/")
        self.additional_headers = additional_headers
        self._closed = False
        self._owner = OwnerLoop(portal=True)
        self._transport = Transport(
            owner=self._owner,
            base_url=self.base_url,
            api_key=api_key,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl is not False,
        )
        # Scripts that forget `close()` still give their connections back.
        self._forget_exit = at_exit(repr(self), self._transport.close)
        self._account = Account(self._transport)
        self._plane = AsyncControlPlane(self._transport)

    @property
    def account_id(self) -> str:
        """The id of the key's account, looked up once.

        Raises:
            InvalidArgument: the key belongs to no account, or to several.
        """
        return self._run(self._account.id, "account_id")

    # -- models and shapes -------------------------------------------------------------------------

    def model_is_moe(self, model: str) -> bool:
        """Look up whether a model is a mixture of experts.

        Raises:
            ModelDetailsUnavailableError: the model's record can't be read.
            InvalidArgument: the record does not say.
        """
        path = f"/v1/{model.lstrip('/')}"
        try:
            row = self._call("GET", path, f"look up {model}")
        except ApiStatusError as error:
            raise ModelDetailsUnavailableError(error.message, status_code=error.status) from error
        details: Row = row.get("baseModelDetails") or row.get("base_model_details") or {}
        moe = details.get("moe")
        if not isinstance(moe, bool):
            raise InvalidArgument(f"the record of {model} does not say whether it is a mixture")
        return moe

    def resolve_training_profile(self, training_shape_id: str) -> TrainingShapeProfile:
        """Resolve a training shape to its latest validated version, or to the one it names.

        Raises:
            InvalidArgument: the shape's name is not a full one, or it has no validated version.
            NotFound: there is no such shape.
        """
        found = self._run(lambda: self._plane.training_profile(training_shape_id), "resolve")
        return TrainingShapeProfile(
            training_shape_version=found.name,
            trainer_image_tag=found.trainer_image_tag or "",
            max_supported_context_length=found.max_context_length or 0,
            node_count=found.node_count or 1,
            deployment_shape_version=found.deployment_shape or "",
            deployment_image_tag=found.deployment_image_tag or "",
            accelerator_type=found.accelerator_type or "",
            accelerator_count=found.accelerator_count or 0,
            base_model_weight_precision=found.weight_precision or "",
            pipeline_parallelism=found.pipeline_parallelism,
            trainer_mode=found.trainer_mode,
        )

    # -- checkpoints -------------------------------------------------------------------------------

    def list_checkpoints(self, job_id: str, *, page_size: int = PAGE_SIZE) -> list[Row]:
        """List a trainer job's checkpoints, oldest first: rows with `name`, `createTime`,
        `checkpointType`, `promotable`.

        Raises:
            NotFound: there is no such job.
        """
        path = f"rlorTrainerJobs/{job_id}/checkpoints"
        return self._rows(path, *CHECKPOINT_LISTS, page_size=page_size)

    def list_training_job_checkpoints(
        self, parent: str, *, page_size: int = PAGE_SIZE
    ) -> list[Row]:
        """List the checkpoints of a managed fine-tuning job: rows.

        Args:
            parent: `accounts/<a>/supervisedFineTuningJobs/<j>` or `accounts/<a>/dpoJobs/<j>`.

        Raises:
            InvalidArgument: `parent` is not such a name, or of another account.
        """
        return self._rows_of(parent, FINE_TUNING_JOBS, "checkpoints", page_size=page_size)

    def list_training_session_checkpoints(
        self, name: str, *, page_size: int = PAGE_SIZE
    ) -> list[Row]:
        """List the checkpoints of a serverless session, `accounts/<a>/trainingSessions/<s>`: rows.

        Raises:
            InvalidArgument: `name` is not such a name, or of another account.
        """
        keys = ("trainingSessionCheckpoints", "training_session_checkpoints", "checkpoints")
        return self._rows_of(name, SESSIONS, *keys, page_size=page_size)

    def promote_checkpoint(
        self,
        job_id: str | None = None,
        checkpoint_id: str | None = None,
        output_model_id: str | None = None,
        base_model: str | None = None,
        *,
        name: str | None = None,
        hot_load_deployment_id: str | None = None,
    ) -> Row:
        """Promote a sampler checkpoint to a model, and wait until that is done; the model's row.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            job_id, checkpoint_id: its two ids, deprecated in favour of `name`.
            output_model_id: id of the new model, see `validate_output_model_id`.
            base_model: full name of the model that was trained.
            hot_load_deployment_id: deprecated; the platform knows where the checkpoint lies.

        Raises:
            InvalidArgument: an id is missing or not allowed; nothing was sent.
            ApiStatusError, ProvisioningError: the platform refused or failed the promotion.
        """
        account, job, checkpoint = self._checkpoint(name, job_id, checkpoint_id)
        where = {"trainer_job_id": f"accounts/{account}/rlorTrainerJobs/{job}"}
        if hot_load_deployment_id is not None:
            _deprecated("hot_load_deployment_id is not needed: leave it out")
            where["hot_load_deployment_id"] = (
                f"accounts/{account}/deployments/{hot_load_deployment_id}"
            )
        body = _promotion(account, output_model_id, base_model, **where)
        return self._promote(f"accounts/{account}/checkpoints/{checkpoint}", body)

    def promote_session_checkpoint(self, name: str, output_model_id: str, base_model: str) -> Row:
        """Promote a serverless session's checkpoint to a model; the model's row.

        Raises:
            InvalidArgument: `name` is not `accounts/<a>/trainingSessions/<s>/checkpoints/<c>`, or
                an id is missing or not allowed; nothing was sent.
        """
        account = _check_name(name, SESSIONS, checkpoint=True)
        body = _promotion(account, output_model_id, base_model)
        answer = self._call("POST", f"/v1/{name}:promote", f"promote {name}", body, PROMOTE_TIMEOUT)
        return cast(Row, answer.get("model") or {})

    def promote_training_job_checkpoint(
        self, name: str, output_model_id: str, base_model: str
    ) -> Row:
        """Promote a managed fine-tuning job's checkpoint to a model, and wait; the model's row.

        Raises:
            InvalidArgument: `name` is not the name of such a checkpoint, or an id is missing or
                not allowed; nothing was sent.
        """
        account = _check_name(name, FINE_TUNING_JOBS, checkpoint=True)
        return self._promote(name, _promotion(account, output_model_id, base_model))

    def delete_training_session(self, name: str) -> None:
        """End a serverless session; it is no error if it is gone."""
        self._run(lambda: self._account.delete(f"/v1/{name}"), "delete_training_session")

    def _checkpoint(
        self, name: str | None, job_id: str | None, checkpoint_id: str | None
    ) -> tuple[str, str, str]:
        if name is None:
            if not job_id or not checkpoint_id:
                raise InvalidArgument("give name=, as list_checkpoints has it")
            _deprecated("give name= of the checkpoint, in place of job_id and checkpoint_id")
            return self.account_id, job_id, checkpoint_id
        if checkpoint_id is not None:
            raise InvalidArgument("give name= or checkpoint_id, not both")
        account = _check_name(name, ("rlorTrainerJobs",), checkpoint=True)
        _, _, _, job, _, checkpoint = name.split("/")
        if job_id not in (None, job):
            raise InvalidArgument(f"job_id={job_id!r}, but {name} is a checkpoint of {job!r}")
        return account, job, checkpoint

    def _promote(self, name: str, body: Row) -> Row:
        async def work() -> Row:
            operation, row = await start_promotion(self._account, name, body)
            if operation is not None:
                row = (await self._plane.wait_for_operation(operation)).response or row
            if not row:
                raise ProtocolError(f"{name} was promoted, but the answer names no model")
            return {key: value for key, value in row.items() if key != "@type"}

        return self._run(work, "promote_checkpoint")

    # -- plumbing ----------------------------------------------------------------------------------

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]], label: str) -> T:
        if self._closed and label != "close":
            raise ClientClosed.of(type(self).__name__)
        return wait_for(self._owner.spawn(work, label=label))

    def _call(
        self,
        method: str,
        path: str,
        what: str,
        json: object = None,
        timeout: float = WRITE_TIMEOUT,
    ) -> Row:
        return self._run(
            lambda: self._account.call(method, path, what=what, json=json, timeout=timeout), what
        )

    def _get(self, path: str) -> Row | None:
        try:
            return self._call("GET", path, f"look up {path}")
        except NotFound:
            return None

    def _rows(self, collection: str, *keys: str, page_size: int) -> list[Row]:
        async def rows() -> list[Row]:
            found = await self._account.rows(collection, *keys, page_size=page_size)
            return [dict(row) for row in found]

        return self._run(rows, f"list {collection}")

    def _rows_of(self, name: str, kinds: tuple[str, ...], *keys: str, page_size: int) -> list[Row]:
        """List the checkpoints of a resource of one of these kinds."""
        account = _check_name(name, kinds)
        if account != self.account_id:
            raise InvalidArgument(f"{name} is not of the key's account, {self.account_id}")
        collection = f"{name.removeprefix(f'accounts/{account}/')}/checkpoints"
        return self._rows(collection, *keys, page_size=page_size)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        closed, self._closed = self._closed, True
        if self._owner.bound is not None and not closed:
            self._run(self._transport.close, "close")
            self._owner.release()
        self._forget_exit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"


def refuse_account_id(options: Mapping[str, object]) -> None:
    """Refuse other keywords of a manager; `account_id`, which older versions took, by its name.

    Raises:
        InvalidArgument, UnknownOption: one was given.
    """
    if "account_id" in options:
        raise InvalidArgument("account_id is found by the API key: leave it out")
    if options:
        raise UnknownOption(f"unknown keywords: {', '.join(sorted(options))}")


def readiness_wait(
    what: str,
    read: Callable[[str], Readiness],
    timeout_s: float,
    poll_interval_s: float,
    *,
    pending_timeout_s: float | None = None,
    resumed: bool = False,
    advice: Mapping[Readiness, str] = MappingProxyType({}),
) -> ReadinessWait:
    """Begin to wait for a resource, now, on the running loop.

    Args:
        read: what a state of the resource means.
        poll_interval_s: the longest time between two looks; the first ones come sooner.
        pending_timeout_s: seconds until the resource has capacity; default `timeout_s`.
        resumed, advice: as of `ReadinessWait`.
    """
    return ReadinessWait(
        what,
        read,
        started=asyncio.get_running_loop().time(),
        budget=timeout_s,
        queue_budget=timeout_s if pending_timeout_s is None else pending_timeout_s,
        resumed=resumed,
        slowest=poll_interval_s,
        advice=advice,
    )


def _promotion(
    account: str, output_model_id: str | None, base_model: str | None, **where: str
) -> Row:
    if not output_model_id or not base_model:
        raise InvalidArgument("output_model_id and base_model are needed")
    check_output_model_id(output_model_id)
    return promotion_body(account, output_model_id, base_model, **where)


def _check_name(name: str, kinds: tuple[str, ...], *, checkpoint: bool = False) -> str:
    """Find the account in a resource name of one of these kinds; other names are refused."""
    parts = name.split("/")
    right = len(parts) == (6 if checkpoint else 4) and parts[0] == "accounts" and all(parts)
    if not right or parts[2] not in kinds or (checkpoint and parts[4] != "checkpoints"):
        tail = "/checkpoints/<checkpoint>" if checkpoint else ""
        wanted = " or ".join(f"accounts/<account>/{kind}/<id>{tail}" for kind in kinds)
        raise InvalidArgument(f"{name!r} is not {wanted}")
    return parts[1]


def _deprecated(text: str) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=4)
