"""`FireworksClient`: an account's shapes, models and checkpoints, without a trainer.

Blocking calls over the same async core that the service uses: its pool, its retries, its errors.
Rows come back as the dictionaries that the API sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from fireworks_training._async.control_plane.account import WRITE_TIMEOUT, Account
from fireworks_training._async.control_plane.client import (
    PROMOTE_TIMEOUT,
    AsyncControlPlane,
)
from fireworks_training._async.control_plane.names import (
    validate_output_model_id as check_output_model_id,
)
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
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
PAGE_SIZE = 200


class ModelDetailsUnavailableError(RuntimeError):
    """A model's record can't be read.

    Attributes:
        status_code: HTTP status of the answer; 403 or 404 where the key may not see the model.
    """

    def __init__(self, message: str, *, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


def validate_output_model_id(output_model_id: str | None) -> list[str]:
    """What is wrong with the id of a model to be; empty if nothing is.

    A promotion with a bad id would leave its staged files behind, so look before.
    """
    try:
        check_output_model_id(output_model_id or "")
    except InvalidArgument as error:
        return [error.message]
    return []


@dataclass
class TrainingShapeProfile:
    """A version of a training shape, as the control plane resolved it.

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
        base_url: of the control plane.
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
        self._trainer_gateway: str | None = None
        self._closed = False
        self._owner = OwnerLoop(portal=True)
        self._transport = Transport(
            owner=self._owner,
            base_url=self.base_url,
            api_key=api_key,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl is not False,
        )
        # For those who forget `close()`.
        self._forget_exit = at_exit(repr(self), self._transport.close)
        self._account = Account(self._transport)
        self._plane = AsyncControlPlane(self._transport)

    @property
    def account_id(self) -> str:
        """Id of the key's account, looked up once.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return self._run(self._account.id, "account_id")

    # -- models and shapes -------------------------------------------------------------------------

    def model_is_moe(self, model: str) -> bool:
        """Whether a model is a mixture of experts.

        Raises:
            ModelDetailsUnavailableError: its record can't be read.
            InvalidArgument: the record does not say.
        """
        path = f"/v1/{model.lstrip('/')}"
        try:
            row = self._call("GET", path, f"look up {model}")
        except ApiStatusError as error:
            raise ModelDetailsUnavailableError(error.message, status_code=error.status) from error
        details = row.get("baseModelDetails") or row.get("base_model_details") or {}
        moe = cast(Mapping[str, object], details).get("moe")
        if not isinstance(moe, bool):
            raise InvalidArgument(f"the record of {model} does not say whether it is a mixture")
        return moe

    def resolve_training_profile(self, training_shape_id: str) -> TrainingShapeProfile:
        """A training shape at its latest validated version, or at the one it names.

        Raises:
            InvalidArgument: not a full name, or without a validated version.
            NotFound: no such shape.
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
        """Rows of a trainer job's checkpoints, oldest first: `name`, `createTime`,
        `checkpointType`, `promotable`.

        Raises:
            NotFound: no such job.
        """
        keys = ("checkpoints", "rlorTrainerJobCheckpoints")
        return self._rows(f"rlorTrainerJobs/{job_id}/checkpoints", *keys, page_size=page_size)

    def list_training_job_checkpoints(
        self, parent: str, *, page_size: int = PAGE_SIZE
    ) -> list[Row]:
        """Rows of the checkpoints of a managed fine-tuning job.

        Args:
            parent: `accounts/<a>/supervisedFineTuningJobs/<j>` or `accounts/<a>/dpoJobs/<j>`.
        """
        _check_name(parent, ("supervisedFineTuningJobs", "dpoJobs"))
        return self._rows_of(f"/v1/{parent}/checkpoints", "checkpoints", page_size=page_size)

    def list_training_session_checkpoints(
        self, name: str, *, page_size: int = PAGE_SIZE
    ) -> list[Row]:
        """Rows of the checkpoints of a serverless session, `accounts/<a>/trainingSessions/<s>`."""
        _check_name(name, ("trainingSessions",))
        keys = ("trainingSessionCheckpoints", "training_session_checkpoints", "checkpoints")
        return self._rows_of(f"/v1/{name}/checkpoints", *keys, page_size=page_size)

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
        """Make a model of a sampler checkpoint, and wait until it is one; its row.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            job_id, checkpoint_id: its two ids, deprecated in favour of `name`.
            output_model_id: of the new model, see `validate_output_model_id`.
            base_model: full name of the model that was trained.
            hot_load_deployment_id: deprecated; the platform knows where the checkpoint lies.

        Raises:
            InvalidArgument: an id that is missing or not allowed; nothing was sent.
            ApiStatusError, ProvisioningError: the platform refused or failed it.
        """
        account, job, checkpoint = self._checkpoint(name, job_id, checkpoint_id)
        if hot_load_deployment_id is not None:
            _deprecated("hot_load_deployment_id is not needed: leave it out")
            hot_load_deployment_id = f"accounts/{account}/deployments/{hot_load_deployment_id}"
        body = _promotion(account, output_model_id, base_model)
        body["trainer_job_id"] = f"accounts/{account}/rlorTrainerJobs/{job}"
        if hot_load_deployment_id is not None:
            body["hot_load_deployment_id"] = hot_load_deployment_id
        path = f"/v1/accounts/{account}/checkpoints/{checkpoint}:promote"
        return self._promote(path, checkpoint, body)

    def promote_session_checkpoint(self, name: str, output_model_id: str, base_model: str) -> Row:
        """Make a model of a serverless session's checkpoint; the model's row.

        Raises:
            InvalidArgument: not `accounts/<a>/trainingSessions/<s>/checkpoints/<c>`, or a bad id.
        """
        account = _check_name(name, ("trainingSessions",), checkpoint=True)
        body = _promotion(account, output_model_id, base_model)
        answer = self._call("POST", f"/v1/{name}:promote", f"promote {name}", body, PROMOTE_TIMEOUT)
        return cast(Row, answer.get("model") or {})

    def promote_training_job_checkpoint(
        self, name: str, output_model_id: str, base_model: str
    ) -> Row:
        """Make a model of a managed fine-tuning job's checkpoint; the model's row.

        Raises:
            InvalidArgument: not the name of such a checkpoint, or a bad id.
        """
        account = _check_name(name, ("supervisedFineTuningJobs", "dpoJobs"), checkpoint=True)
        body = _promotion(account, output_model_id, base_model)
        return self._promote(f"/v1/{name}:promote", name, body)

    def delete_training_session(self, name: str) -> None:
        """End a serverless session; one that is gone is fine."""
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

    def _promote(self, path: str, what: str, body: Row) -> Row:
        async def work() -> Row:
            answer = await self._start_promotion(path, what, body)
            operation = answer.get("operation")
            model = answer.get("model")
            if isinstance(operation, Mapping):
                named = str(cast(Mapping[str, Any], operation).get("name"))
                ended = await self._plane.wait_for_operation(named)
                model = dict(ended.response) or model
            if not isinstance(model, dict):
                raise ProtocolError(f"{what} was promoted, but the answer names no model")
            row = cast(Row, model)
            row.pop("@type", None)
            return row

        return self._run(work, "promote_checkpoint")

    async def _start_promotion(self, path: str, what: str, body: Row) -> Row:
        asked = {**body, "async_promotion": True}
        for attempt in (asked, body):
            try:
                return await self._account.call(
                    "POST", path, what=f"promote {what}", json=attempt, timeout=PROMOTE_TIMEOUT
                )
            except ApiStatusError as error:
                # An older platform does not know the field, and then promotes while one waits.
                known = error.message.lower().replace("_", "")
                if attempt is body or error.status != 400 or "asyncpromotion" not in known:
                    raise
        raise AssertionError("the second attempt returned or raised")

    # -- plumbing ----------------------------------------------------------------------------------

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]], label: str) -> T:
        if self._closed and label != "close":
            raise ClientClosed(f"this {type(self).__name__} was closed; make another")
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

    def _rows_of(self, path: str, *keys: str, page_size: int) -> list[Row]:
        account, _, collection = path.removeprefix("/v1/accounts/").partition("/")
        if account != self.account_id:
            raise InvalidArgument(f"{path} is not of the key's account, {self.account_id}")
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
    """The managers take no other keywords, and `account_id` no more.

    Raises:
        InvalidArgument, UnknownOption: one was given.
    """
    if "account_id" in options:
        raise InvalidArgument("account_id is found by the API key: leave it out")
    if options:
        raise UnknownOption(f"unknown keywords: {', '.join(sorted(options))}")


def _promotion(account: str, output_model_id: str | None, base_model: str | None) -> Row:
    if not output_model_id or not base_model:
        raise InvalidArgument("output_model_id and base_model are needed")
    check_output_model_id(output_model_id)
    return {
        "output_model": f"accounts/{account}/models/{output_model_id}",
        "base_model": base_model,
    }


def _check_name(name: str, kinds: tuple[str, ...], *, checkpoint: bool = False) -> str:
    """The account in a resource name of one of these kinds."""
    parts = name.split("/")
    right = len(parts) == (6 if checkpoint else 4) and parts[0] == "accounts" and all(parts)
    if not right or parts[2] not in kinds or (checkpoint and parts[4] != "checkpoints"):
        tail = "/checkpoints/<checkpoint>" if checkpoint else ""
        wanted = " or ".join(f"accounts/<account>/{kind}/<id>{tail}" for kind in kinds)
        raise InvalidArgument(f"{name!r} is not {wanted}")
    return parts[1]


def _deprecated(text: str) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=4)
