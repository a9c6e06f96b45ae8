"""A session with a trainer: opened once for each service, kept alive, and the models made in it.

The trainer's answer to the making of a model lists what it can do; `Capabilities` is that answer,
read once. The heartbeat runs on the portal's loop, over a connection pool of its own: users block
their own loops in reward functions, and a trainer that hears nothing for minutes unloads the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._async.training.client_config import ClientConfig, read_client_config
from fireworks_training._async.training.data_plane import DataPlane, was_refused
from fireworks_training._core.patience import NOT_FOUND
from fireworks_training._core.waits.reports import ReportSchedule
from fireworks_training._outcome import Outcome
from fireworks_training._wire.training import bodies
from fireworks_training.config import FiretitanProvisioningConfig, session_tags
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    FireworksTrainingError,
    OperationError,
    ProtocolError,
    TrainerLost,
)
from fireworks_training.futures import APIFuture

HEARTBEAT_PERIOD = 10.0
"""Seconds between heartbeats."""

LOOK_AGAIN_AFTER = 1.0
"""Seconds between two looks at a session that may be gone."""

LOOK_TIMEOUT = 10.0
"""Seconds that the state of the job may take to be read; then it says nothing."""

logger = logging.getLogger("fireworks_training.trainer")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features of a trainer, as its answer to the making of a model lists them.

    Attributes:
        model_id: the model made.
        comms: "v1" or "v2" of the JSON dialect.
        wire: the dialects it takes; empty where it lists none.
        step_protocol: whether it enforces atomic steps.
        snapshot_protocol: whether its saves describe the snapshots they wrote.
        state_options: whether a save may overwrite, and be given a time to live.
        backward: whether it takes a backward that refers to an earlier forward.
        batch_polls: whether one poll gives all finished results of a model.
        features: the other `supports_...` flags, by name.
    """

    model_id: str
    comms: str = "v1"
    wire: tuple[str, ...] = ()
    step_protocol: bool = False
    snapshot_protocol: bool = False
    state_options: bool = False
    backward: bool = False
    batch_polls: bool = False
    features: Mapping[str, bool] = field(default_factory=dict[str, bool])

    def supports(self, feature: str) -> bool | None:
        """Whether the trainer supports a feature; None where its answer has no such flag."""
        return self.features.get(f"supports_{feature}")

    @classmethod
    def read(cls, payload: Mapping[str, Any]) -> Capabilities:
        """Read the result of create_model; what is absent or malformed counts as not offered."""
        model_id = payload.get("model_id")
        if not isinstance(model_id, str) or not model_id:
            raise ProtocolError("the trainer made a model but named no model_id")
        wire = payload.get("wire")
        return cls(
            model_id=model_id,
            comms="v2" if payload.get("comms") == "v2" else "v1",
            wire=tuple(map(str, cast(list[object], wire))) if isinstance(wire, list) else (),
            step_protocol=payload.get("step_protocol") == 1,
            snapshot_protocol=payload.get("snapshot_protocol") == 1,
            state_options=payload.get("state_options") == 1,
            backward=payload.get("supports_backward") is True,
            batch_polls=payload.get("retrieve_futures") == 1,
            features={
                name: value
                for name, value in payload.items()
                if name.startswith("supports_") and isinstance(value, bool)
            },
        )


class TrainerSession:
    """Opens one session, keeps it alive, and makes models in it.

    Args:
        transport: the service's pool.
        make_transport: makes another transport with the same headers, for the heartbeat.
        trainer_url: of the trainer, without `/api/v1`.
        tinker_only: whether it is a Tinker server, which refuses fields that only Fireworks'
            trainers have.
        job_ended: asks the control plane whether the job has ended; why, or None.
    """

    def __init__(
        self,
        transport: Transport,
        make_transport: Callable[[OwnerLoop], Transport],
        trainer_url: str,
        *,
        tinker_only: bool = False,
        job_ended: Callable[[], Awaitable[str | None]] | None = None,
    ) -> None:
        self.tinker_only = tinker_only
        # The control plane said that this trainer runs; a Tinker server is a stranger at first.
        self.plane = DataPlane(transport, trainer_url, known=not tinker_only)
        self.session_id = ""
        self.client_config = ClientConfig()
        self._make_transport = make_transport
        self._trainer_url = trainer_url
        self._heartbeat: Heartbeat | None = None
        self._job_ended = job_ended
        self._look: asyncio.Task[str | None] | None = None
        self._models = 0
        self._unsettled: dict[bytes, int] = {}  # models that may be there: their numbers

    async def open(self, user_metadata: Mapping[str, str] | None) -> None:
        """Open the session and start its heartbeat."""
        self.client_config = await read_client_config(self.plane)
        answer = await self.plane.call(
            "create_session",
            bodies.create_session(session_tags(), user_metadata or {}),
            what="open a trainer session",
        )
        session_id = answer.get("session_id")
        if not isinstance(session_id, str) or not session_id:
            raise ProtocolError("the trainer opened a session but named no session_id")
        for level, name in ((20, "info_message"), (30, "warning_message"), (40, "error_message")):
            if answer.get(name):
                logger.log(level, "the trainer says: %s", answer[name])
        self.session_id = session_id
        self._heartbeat = Heartbeat(self._make_transport, self._trainer_url, session_id)
        self._heartbeat.start()

    async def create_model(
        self,
        config: FiretitanProvisioningConfig,
        *,
        base_only: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Capabilities:
        """Make a model; a repeated submit makes no second one.

        Nor does a call after one that was cancelled, or got no answer: it asks for the same model
        again, which may be there.

        Args:
            base_only: the base model without an adapter, beside the models that train one.
            user_metadata: noted with the model.

        Raises:
            TrainerLost: the trainer's process is gone.
            RequestFailed: the trainer could not make it.
            ApiError: refused, or no answer.
        """
        lora: dict[str, Any] = {
            "rank": config.lora_rank,
            "train_mlp": config.train_mlp,
            "train_attn": config.train_attn,
            "train_unembed": config.train_unembed,
        }
        if config.lora_rank and not self.tinker_only:
            lora["alpha"] = config.alpha
        if config.seed is not None:
            lora["seed"] = config.seed
        wanted = bodies.create_model(
            self.session_id,
            config.base_model,
            None if base_only else lora,
            base_only=base_only,
            user_metadata=user_metadata,
        )
        model_seq_id = self._unsettled.setdefault(wanted, self._models)
        self._models = max(self._models, model_seq_id + 1)
        body = bodies.with_model_seq_id(wanted, model_seq_id)
        try:
            request_id = await self.plane.submit(
                "create_model", body, what="create the model", look=self.look
            )
            answer = await log_if_slow(
                self.plane.result(request_id, what="create the model", look=self.look),
                lambda: "the trainer makes the model",
            )
        except BaseException as error:
            if isinstance(error, OperationError) or was_refused(error):
                del self._unsettled[wanted]
            if isinstance(error, ApiStatusError) and error.status in NOT_FOUND:
                await self.look(error)
            raise
        del self._unsettled[wanted]
        if isinstance(answer, bytes):
            raise ProtocolError("the trainer answered protobuf where JSON is due")
        return Capabilities.read(answer)

    async def look(self, error: ApiError) -> None:
        """Look at the state of the job after a failure that does not say whether the trainer lives.

        Raises:
            TrainerLost: the job has ended.
        """
        if (reason := await self.job_ended()) is not None:
            raise TrainerLost(f"the trainer is gone: {reason}", cause=error) from error

    async def job_ended(self) -> str | None:
        """Why the job has ended; None where it has not, or that can't be told now.

        One look is made at a time, for all requests that ask meanwhile.
        """
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._state_of_job(), name="has the job ended")
        return await asyncio.shield(self._look)

    async def _state_of_job(self) -> str | None:
        if self._job_ended is not None:
            with contextlib.suppress(FireworksTrainingError, TimeoutError):
                async with asyncio.timeout(LOOK_TIMEOUT):
                    return await self._job_ended()
        return None

    async def gone(self) -> str | None:
        """Look a second time, elsewhere, whether the trainer is gone.

        Returns:
            Why it is: by the state of its job, else by the session, asked twice; None where
            neither says so.
        """
        reason = await self.job_ended()
        if reason is not None:
            return reason
        for pause in (0.0, LOOK_AGAIN_AFTER):
            await asyncio.sleep(pause)
            try:
                await self.plane.beat(self.session_id)
            except ApiStatusError as error:
                if error.status not in NOT_FOUND:
                    return None
                reason = f"its session is gone, too: {error.message}"
            except ApiError:
                return None
            else:
                return None
        return reason

    async def close(self) -> None:
        """Stop the heartbeat; idempotent. The session ends with its job."""
        look, self._look = self._look, None
        if look is not None:
            look.cancel()
            await asyncio.wait([look])
        if self._heartbeat is not None:
            heartbeat, self._heartbeat = self._heartbeat, None
            await heartbeat.stop()


class Heartbeat:
    """Sends the heartbeats of one session, from `start()` to `stop()`.

    Args:
        make_transport: makes a transport for the loop that it is given.
        trainer_url: of the trainer, without `/api/v1`.
        session_id: the session.
    """

    def __init__(
        self,
        make_transport: Callable[[OwnerLoop], Transport],
        trainer_url: str,
        session_id: str,
        *,
        period: float = HEARTBEAT_PERIOD,
    ) -> None:
        self._owner = OwnerLoop(portal=True)
        self._transport = make_transport(self._owner)
        self._plane = DataPlane(self._transport, trainer_url)
        self._session_id = session_id
        self._period = period
        self._running: Outcome[None] | None = None

    def start(self) -> None:
        """Begin to send heartbeats; from any thread."""
        self._running = self._owner.spawn(self._beat, label="heartbeat")

    async def stop(self) -> None:
        """Stop, and close the heartbeat's connections; from any loop. Idempotent."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.request_cancel()
        await finish_in_spite_of_cancellation(self._ended(running))

    async def _ended(self, running: Outcome[None]) -> None:
        with contextlib.suppress(FireworksTrainingError):
            await APIFuture(running)
        # Giving the portal back may end its thread, which is waited for off this loop.
        await in_thread(self._owner.release)

    async def _beat(self) -> None:
        """Beat until cancelled; failures are logged after 30 s and at doubling intervals."""
        clock = asyncio.get_running_loop().time
        failing, logged = ReportSchedule(clock()), False
        async with self._transport:
            while True:
                await asyncio.sleep(self._period)
                try:
                    await self._plane.beat(self._session_id)
                except FireworksTrainingError as error:
                    due = failing.take_if_due(clock())
                    if due or (was_refused(error) and not logged):  # a refusal is logged at once
                        logged = True
                        logger.warning(
                            "the trainer has taken no heartbeat for %.0f s: %s",
                            failing.age(clock()),
                            error,
                        )
                else:
                    failing, logged = ReportSchedule(clock()), False
