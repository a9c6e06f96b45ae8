"""Gives a rollout its sampler, its seed, its place in the run, and an endpoint for agents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fireworks_training.errors import InvalidArgument
from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.rollouts.episodes import snapshots_of, turn_key
from fireworks_training.rollouts.law import seed_of

if TYPE_CHECKING:
    from fireworks_training import DeploymentSampler, TITOSidecar, TITOTrajectoryArtifact


@dataclass(slots=True)
class AttemptNotes:
    """Notes what one attempt of a rollout sampled.

    Attributes:
        tokens: completion tokens received.
        snapshots: identities that sampled them.
        turns: completions of the agents' endpoint, by `turn_key`.
    """

    tokens: int = 0
    snapshots: set[str | None] = field(default_factory=set[str | None])
    turns: dict[str, SampledCompletion] = field(default_factory=dict[str, SampledCompletion])

    def note(self, completions: Sequence[SampledCompletion]) -> None:
        """Count what a call drew."""
        for completion in completions:
            self.tokens += completion.completion_len
            self.snapshots.update(snapshots_of(completion))

    def note_turn(self, completions: Sequence[SampledCompletion]) -> None:
        """Count what a call of the agents' endpoint drew, and keep its snapshots."""
        self.note(completions)
        for completion in completions:
            self.turns[turn_key(completion.prompt_tokens, completion)] = completion


class RolloutCall:
    """A sampling call of a rollout: await it, or `.result()` it in a plain rollout's thread."""

    def __init__(self, call: Any, attempt: AttemptNotes) -> None:
        self._call, self._attempt = call, attempt

    def __await__(self) -> Generator[Any, Any, list[SampledCompletion]]:
        completions: list[SampledCompletion] = yield from self._call.__await__()
        self._attempt.note(completions)
        return completions

    def result(self, timeout: float | None = None) -> list[SampledCompletion]:
        """Wait in this thread for the completions; `timeout` in seconds, None for no limit."""
        completions: list[SampledCompletion] = self._call.result(timeout)
        self._attempt.note(completions)
        return completions


class RolloutSampler:
    """Samples for one rollout, with logprobs and seeds of its own, and counts the tokens.

    Attributes:
        sampler: the deployment's own; what is drawn from it directly is counted only if returned.
    """

    def __init__(self, sampler: DeploymentSampler, attempt: AttemptNotes, seed: int) -> None:
        self.sampler, self._attempt, self._seed, self._calls = sampler, attempt, seed, 0

    def sample_with_tokens(self, messages: Any, n: int = 1, **options: Any) -> RolloutCall:
        """Sample `n` completions of a conversation.

        Arguments and errors are those of `DeploymentSampler.sample_with_tokens`; `logprobs` is True
        and `seed` follows from the run's seed, group, member and call, unless given.
        """
        call = self.sampler.sample_with_tokens(messages, n, **self._with_defaults(options))
        return RolloutCall(call, self._attempt)

    def sample_with_prompt_tokens(self, ids: Any, n: int = 1, **options: Any) -> RolloutCall:
        """Sample `n` completions of a prompt of token ids; else as `sample_with_tokens`."""
        call = self.sampler.sample_with_prompt_tokens(ids, n, **self._with_defaults(options))
        return RolloutCall(call, self._attempt)

    def _with_defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        return {"logprobs": True, "seed": seed_of(self._seed, self._calls), **options}


class EndpointSampler:
    """Samples for the agents' endpoint, and notes each call at the attempt of its trajectory."""

    def __init__(self, sampler: DeploymentSampler) -> None:
        self._sampler = sampler
        self.attempts: dict[str, AttemptNotes] = {}  # by the trajectory's affinity key

    @property
    def model(self) -> str:
        """Model string for the answers."""
        return self._sampler.model

    @property
    def sample_with_prompt_tokens_result(self) -> Callable[..., Awaitable[SampledRequestResult]]:
        """Samples one completion of token ids."""
        return self._sample

    async def _sample(self, ids: Sequence[int], **options: Any) -> SampledRequestResult:
        result = await self._sampler.sample_with_prompt_tokens_result(ids, **options)
        attempt = self.attempts.get(str(options.get("prompt_cache_key")))
        if attempt is not None:
            attempt.note_turn(result.completions)
        return result


class AgentEndpoint:
    """An OpenAI-compatible endpoint for the agent of one rollout; an async context manager.

    Attributes:
        base_url, api_key: for an OpenAI client; they open this trajectory alone.
        artifact: after the block: the tokens as they were sampled, to return from the rollout.
    """

    def __init__(
        self, sidecar: TITOSidecar, sampler: EndpointSampler, attempt: AttemptNotes
    ) -> None:
        self._sidecar, self._sampler, self._attempt = sidecar, sampler, attempt
        self._id = self._key = ""
        self.base_url = self.api_key = ""
        self.artifact: TITOTrajectoryArtifact | None = None

    async def __aenter__(self) -> AgentEndpoint:
        import uuid

        self._key = uuid.uuid4().hex
        self._sampler.attempts[self._key] = self._attempt
        try:
            made = await self._sidecar.create_trajectory_async(serving_affinity_key=self._key)
        except BaseException:
            del self._sampler.attempts[self._key]
            raise
        self._id, self.base_url, self.api_key = (
            made.trajectory_id,
            made.openai_base_url,
            made.api_key,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.artifact = await self._sidecar.finish_trajectory(self._id)
            else:
                self.artifact = await self._sidecar.fail_trajectory(self._id, "rollout_failed")
        finally:
            del self._sampler.attempts[self._key]


@dataclass(slots=True)
class RolloutContext:
    """What a rollout is given beside its task.

    Attributes:
        sampler: samples at the weights that serve.
        seed: from 0 to 2^31 - 1, of this group and member; the same when the run is repeated.
        group: number of the group, from 0 in submission order.
        member: place in the group, from 0.
        attempt: of this rollout, from 1.
    """

    sampler: RolloutSampler
    seed: int
    group: int
    member: int
    attempt: int
    _noted: AttemptNotes = field(repr=False)
    _endpoints: tuple[TITOSidecar, EndpointSampler] | None = field(default=None, repr=False)

    def endpoint(self) -> AgentEndpoint:
        """Open an OpenAI-compatible endpoint for this rollout's agent: `async with ... as e:`.

        Raises:
            InvalidArgument: the pool was made without `endpoint=`.
        """
        if self._endpoints is None:
            raise InvalidArgument(
                "this pool serves no endpoint: make it with endpoint={'max_context_tokens': ..., "
                "'max_output_tokens': ...}"
            )
        return AgentEndpoint(*self._endpoints, self._noted)
