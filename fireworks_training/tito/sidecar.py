"""Runs the sidecar: a server that agents use like OpenAI's API, and that keeps their exact tokens.

It owns the server and what all trajectories share; one event loop runs all of it. The trajectories
themselves are held by `turns.registry`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training.errors import ClientClosed, InvalidArgument
from fireworks_training.tito.evidence.journal import Journal, TITOEventObserver
from fireworks_training.tito.rendering.renderers import TITORenderer
from fireworks_training.tito.turns.backend import (
    Backend,
    Classifier,
    ExactTokenSampler,
)
from fireworks_training.tito.turns.registry import TrajectoryRegistry
from fireworks_training.tito.turns.trajectory import Trajectory
from fireworks_training.tito.values.errors import safe_text
from fireworks_training.tito.values.records import (
    TITOMalformedAnswers,
    TITOPromptMode,
    TITOTrajectoryArtifact,
    TITOTrajectoryEndpoint,
    TrajectoryDriftPolicy,
)

if TYPE_CHECKING:
    from aiohttp import web

    from fireworks_training._async.sampling.sampler import DeploymentSampler
    from fireworks_training.tito.evidence.failure_traces import (
        FailureTraces,
        TITOFailureTraceConfig,
    )

STOP_GRACE = 1.0
"""Seconds for open requests when the server stops; their trajectories have ended by then."""

_OWN_HEADERS = frozenset(
    {"authorization", "x-api-key", "x-request-id", "x-fireworks-session-id"}
    | {"x-multi-turn-session-id", "x-session-affinity"}
)

logger = logging.getLogger("fireworks_training.tito")


class TITOSidecar:
    """Serves agents an OpenAI-compatible endpoint, and keeps the exact tokens of their calls.

        async with TITOSidecar.from_deployment_sampler(
            sampler,
            renderer=ChatTemplateRenderer(tokenizer),
            max_context_tokens=2048,
            max_output_tokens=256,
        ) as sidecar:
            endpoint = await sidecar.create_trajectory_async()
            ...  # the agent uses endpoint.openai_base_url and endpoint.api_key
            artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)

    Each trajectory has a key of its own, which opens nothing else. Prompts are sent as token ids,
    and what was sampled stays as it was sampled: no text is tokenized to be trained on as a
    completion. Each turn either continues the tokens so far, or realigns (what the agent's history
    renders otherwise is masked), or starts a new segment. `artifact.segments` have `tokens`,
    `logprobs` and `loss_mask`, for `rollout_datum`.

    Args:
        sampler: samples token ids; `from_deployment_sampler` takes the usual one.
        renderer: turns conversations into tokens and back: `ChatTemplateRenderer`, or your own.
        max_context_tokens: tokens of a prompt and its completion together.
        max_output_tokens: tokens of a completion at most, whatever the agent asks for.
        call_classifier: gives "policy" for a request, or "auxiliary" for calls that are answered
            and no part of the trajectory (titles, summaries).
        sampling_defaults: options of every call, which the agent can't change.
        backend_headers_snapshot: HTTP headers of every sampling.
        observer: receives events, such as a `TITOLocalDebugSink`; closed with the sidecar.
        failure_trace_config: where failed trajectories are kept on disk; None keeps none.
        default_drift_policy: the policy of trajectories without one of their own.
        prompt_mode: "full_history" renders all messages each time and compares the tokens;
            "incremental" renders new messages and appends them to the exact tokens.
        malformed_answers: what becomes of an answer that the renderer can't parse, such as a tool
            call that is no JSON or was cut off. "content": the agent gets its text, its tokens stay
            in the row, and the turn says so (`parser_fallback`); "discard": an error (422), after
            which the trajectory has failed.
        keepalive_seconds: pause between comments on a stream that waits for its answer.
        bind_address: an address of this host; the loopback one unless containers must reach it.

    Raises:
        InvalidArgument: a limit, the renderer, the mode, the address or an option is not allowed.
    """

    def __init__(
        self,
        sampler: ExactTokenSampler,
        *,
        renderer: TITORenderer,
        max_context_tokens: int,
        max_output_tokens: int,
        call_classifier: Classifier | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        backend_headers_snapshot: Mapping[str, str] | None = None,
        observer: TITOEventObserver | None = None,
        failure_trace_config: TITOFailureTraceConfig | None = None,
        default_drift_policy: TrajectoryDriftPolicy | None = None,
        prompt_mode: TITOPromptMode = "full_history",
        malformed_answers: TITOMalformedAnswers = "content",
        keepalive_seconds: float = 5.0,
        bind_address: str = "127.0.0.1",
    ) -> None:
        self._address = _specific(bind_address)
        if not keepalive_seconds > 0:
            raise InvalidArgument(f"keepalive_seconds must be over 0, got {keepalive_seconds}")
        self._journal = Journal(observer)
        self._backend = Backend(
            sampler,
            renderer,
            max_context_tokens=max_context_tokens,
            max_output_tokens=max_output_tokens,
            call_classifier=call_classifier,
            sampling_defaults=sampling_defaults or {},
            headers=backend_headers_snapshot or {},
            prompt_mode=prompt_mode,
            malformed_answers=malformed_answers,
            journal=self._journal,
        )
        self._traces = _traces(failure_trace_config)
        self._policy = default_drift_policy
        self.keepalive_seconds = keepalive_seconds
        self._trajectories = TrajectoryRegistry(self._backend, self._traces)
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def from_deployment_sampler(
        cls,
        sampler: DeploymentSampler,
        *,
        renderer: TITORenderer,
        max_context_tokens: int,
        max_output_tokens: int,
        call_classifier: Classifier | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        observer: TITOEventObserver | None = None,
        failure_trace_config: TITOFailureTraceConfig | None = None,
        keepalive_seconds: float = 5.0,
        default_drift_policy: TrajectoryDriftPolicy | None = None,
        prompt_mode: TITOPromptMode = "full_history",
        malformed_answers: TITOMalformedAnswers = "content",
        bind_address: str = "127.0.0.1",
    ) -> Self:
        """Make a sidecar that samples through a deployment's sampler, which the caller keeps.

        Later changes of the sampler's headers have no effect. The arguments are those of the class.

        Raises:
            InvalidArgument: an argument is not allowed; or the sampler has a header that marks the
                caller or calls that belong together, which the sidecar sets for each trajectory.
        """
        headers = {name.lower(): value for name, value in sampler.additional_headers.items()}
        if taken := sorted(_OWN_HEADERS & headers.keys()):
            raise InvalidArgument(
                f"the sampler's additional_headers set {', '.join(taken)} for all trajectories: "
                "make it without them"
            )
        return cls(
            sampler,
            renderer=renderer,
            max_context_tokens=max_context_tokens,
            max_output_tokens=max_output_tokens,
            call_classifier=call_classifier,
            sampling_defaults=sampling_defaults,
            backend_headers_snapshot=headers,
            observer=observer,
            failure_trace_config=failure_trace_config,
            keepalive_seconds=keepalive_seconds,
            default_drift_policy=default_drift_policy,
            prompt_mode=prompt_mode,
            malformed_answers=malformed_answers,
            bind_address=bind_address,
        )

    # -- the server --------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port it listens on; 0 while it does not."""
        return self._port

    async def start(self, port: int = 0) -> None:
        """Listen; does nothing if the sidecar is started already.

        Args:
            port: 0 takes a free port.

        Raises:
            ClientClosed: the sidecar was closed.
            OSError: the address or port is not available.
        """
        if self._closing is not None:
            raise ClientClosed.of("sidecar")
        if self._runner is not None:
            return
        from aiohttp import web

        from fireworks_training.tito.server import application

        app = application(self._trajectories, lambda: self.keepalive_seconds)
        # An agent that leaves cancels its call, so that the deployment stops generating.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=STOP_GRACE
        )
        self._runner = runner
        try:
            await runner.setup()
            await web.TCPSite(runner, self._address, port).start()
        except BaseException:
            self._runner = None
            await runner.cleanup()
            raise
        self._port = int(runner.addresses[0][1])

    async def close(self) -> None:
        """End open trajectories as "abandoned", cancel their calls, and stop listening. Idempotent.

        When cancelled, it still closes everything before it raises the cancellation.

        Raises:
            TITOError: the observer failed to take an end (507); everything is closed.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        elif self._closing.done():
            return
        closing = log_if_slow(self._closing, lambda: "the sidecar closes")
        await finish_in_spite_of_cancellation(closing)

    async def _close(self) -> None:
        ids = self._trajectories.open_ids
        if ids:
            logger.warning("%d trajectories were open: abandoned", len(ids))
        end, reason = self._trajectories.end, "sidecar_shutdown"
        ends = (end(trajectory_id, "abandoned", reason, cancel=True) for trajectory_id in ids)
        outcomes = await asyncio.gather(*ends, return_exceptions=True)
        try:
            if self._runner is not None:
                await self._runner.cleanup()
                self._port = 0
        finally:
            self._backend.close()
            await self._journal.close()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except Exception as error:
            if exc is None:
                raise
            # The exception on its way matters more.
            logger.warning("the sidecar did not close in order: %s", safe_text(error))

    # -- trajectories ------------------------------------------------------------------------------

    def create_trajectory(
        self,
        *,
        trajectory_id: str | None = None,
        serving_affinity_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        drift_policy: TrajectoryDriftPolicy | None = None,
    ) -> TITOTrajectoryEndpoint:
        """Make a trajectory. With an observer this blocks, unlike `create_trajectory_async`.

        Args:
            trajectory_id: letters, digits, `_`, `.` and `-`, 128 at most; random unless given.
            serving_affinity_key: a key that keeps the calls on one replica, for its prompt cache;
                trajectories of one prompt may share it.
            metadata: JSON for the artifact.
            drift_policy: overrides the sidecar's.

        Raises:
            ClientClosed: the sidecar is not started, or closed.
            InvalidArgument: the id is taken, or malformed.
            TITOError: too many trajectories are open (429); or the observer failed (507).
        """
        made = self._make(trajectory_id, serving_affinity_key, metadata, drift_policy)
        with self._opening(made):
            self._journal.record_blocking("trajectory_open", made.trajectory_id, made.opening())
        return self._endpoint(made.trajectory_id)

    async def create_trajectory_async(
        self,
        *,
        trajectory_id: str | None = None,
        serving_affinity_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        drift_policy: TrajectoryDriftPolicy | None = None,
    ) -> TITOTrajectoryEndpoint:
        """Make a trajectory as `create_trajectory` does, without blocking the loop."""
        made = self._make(trajectory_id, serving_affinity_key, metadata, drift_policy)
        with self._opening(made):
            await self._journal.record("trajectory_open", made.trajectory_id, made.opening())
        return self._endpoint(made.trajectory_id)

    async def finish_trajectory(self, trajectory_id: str) -> TITOTrajectoryArtifact:
        """End a trajectory whose agent is done.

        Raises:
            TITOError: unknown (404), ended before (410), or a call is under way (409).
        """
        return await self._trajectories.end(trajectory_id, "completed", None, cancel=False)

    async def abandon_trajectory(
        self, trajectory_id: str, reason: str = "caller_abandoned"
    ) -> TITOTrajectoryArtifact:
        """End a trajectory in its middle; calls under way are cancelled.

        Raises:
            TITOError: unknown (404), or ended before (410).
        """
        return await self._trajectories.end(trajectory_id, "abandoned", reason, cancel=True)

    async def fail_trajectory(self, trajectory_id: str, reason: str) -> TITOTrajectoryArtifact:
        """End a trajectory that went wrong, such as one whose agent crashed; calls are cancelled.

        Raises:
            TITOError: unknown (404), or ended before (410).
        """
        return await self._trajectories.end(trajectory_id, "failed", reason, cancel=True)

    def dump_failure_trace(
        self,
        artifact: TITOTrajectoryArtifact | None,
        error: BaseException,
        *,
        code: str,
        source_trace: Path | None = None,
        source_trace_root: Path | None = None,
    ) -> str | None:
        """Keep an artifact that the rollout rejected, within the bounds of `failure_trace_config`.

        Blocks on files: in a coroutine call it by `asyncio.to_thread`. The arguments are those of
        `dump_tito_failure_trace`.

        Returns:
            The file's path; None where no configuration was given, or no room is left.
        """
        if self._traces is None:
            return None
        return self._traces.dump(artifact, error, code, source_trace, source_trace_root)

    # -- inside ------------------------------------------------------------------------------------

    def _make(
        self,
        trajectory_id: str | None,
        affinity: str | None,
        metadata: Mapping[str, Any] | None,
        policy: TrajectoryDriftPolicy | None,
    ) -> Trajectory:
        if not self._port or self._closing is not None:
            raise ClientClosed("start the sidecar before creating a trajectory, or `async with` it")
        return self._trajectories.make(trajectory_id, affinity, metadata, policy or self._policy)

    @contextmanager
    def _opening(self, made: Trajectory) -> Generator[None]:
        """Remove a trajectory that could not be opened, since nobody will get it."""
        try:
            yield
        except BaseException:
            self._trajectories.forget(made.trajectory_id)
            raise
        if self._closing is not None:
            raise ClientClosed("the sidecar was closed while the trajectory was made")

    def _endpoint(self, trajectory_id: str) -> TITOTrajectoryEndpoint:
        key = self._trajectories.key_of(trajectory_id)
        assert key is not None
        host = f"[{self._address}]" if ":" in self._address else self._address
        base = f"http://{host}:{self._port}/trajectories/{trajectory_id}/v1"
        return TITOTrajectoryEndpoint(trajectory_id, base, key)


def _traces(config: TITOFailureTraceConfig | None) -> FailureTraces | None:
    if config is None:
        return None
    from fireworks_training.tito.evidence.failure_traces import FailureTraces

    return FailureTraces(config)


def _specific(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        raise InvalidArgument(f"bind_address must be an IP address, got {address!r}") from None
    if found.is_unspecified or found.is_multicast:
        raise InvalidArgument(
            f"bind_address must be one address of this host, got {address!r}: an endpoint with "
            "prompts is not offered on every interface"
        )
    return str(found)
