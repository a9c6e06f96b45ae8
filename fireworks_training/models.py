"""The public value types that `tinker` has no counterpart for, and the version.

They are frozen dataclasses that know their fields and units. Nothing here sends a request; who
reads a value from an answer stands in `_wire` or in `_async.control_plane.rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from fireworks_training._perf_metrics import measured, request_id_of

__version__ = "0.1.0"

FinishReason = Literal["stop", "length", "tool_calls"]
"""Names the reason why a completion ended."""

SnapshotKind = Literal["base", "delta", "lora"]
"""Names the content of a snapshot: all weights, a difference to another one, or an adapter."""

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sampler snapshot, as the trainer wrote it.

    Attributes:
        identity: the name under which a deployment loads it.
        kind: "base" (all weights), "delta" (differences to `predecessor`) or "lora" (an adapter).
            None where the trainer does not say.
        predecessor: identity that a delta is a difference to; None otherwise.
        bytes: size of the stored tensors; None where the trainer does not say.
        sha256: hash over the hashes of all tensors, in name order; None where it does not say.
        timings: seconds of the trainer's work by stage: "hash", "compress" and "write", which
            hold up no operation; None where it does not say.
    """

    identity: str
    kind: SnapshotKind | None = None
    predecessor: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    timings: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class SaveSamplerResult:
    """Names a snapshot that `save_weights_for_sampler_ext` has saved.

    Attributes:
        path: the snapshot's public identity as the trainer answered it, for `model_path=`.
        snapshot_name: the name that was sent for it: the caller's, with the client's suffix. Also
            the identity, on a trainer that adds nothing to it.
    """

    path: str
    snapshot_name: str


@dataclass(frozen=True, slots=True)
class WeightSyncResult:
    """The result of a weight sync: every replica serves `identity`.

    Attributes:
        identity: the snapshot that is live.
        snapshot: the snapshot that the trainer wrote for this sync.
        optimizer_step: optimizer steps of this client before the live snapshot was saved; None for
            a snapshot of another client.
        loaded: identities that were loaded, in order; empty if it was live already.
        superseded: whether a newer snapshot was loaded instead of this sync's.
        drift: mean absolute difference of engine and trainer, nats a token; None if it was not
            asked for, or if other weights were live by then.
        save_s: seconds from the call's turn in the queue until the snapshot was written.
        load_s: seconds from then until every replica served it.
    """

    identity: str
    snapshot: Snapshot
    optimizer_step: int | None = None
    loaded: Sequence[str] = ()
    superseded: bool = False
    drift: float | None = None
    save_s: float = 0.0
    load_s: float = 0.0

    @property
    def version(self) -> str:
        """Alias of `identity` (official SDK's name)."""
        return self.identity


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """The cost of one sampling attempt, as the server and the client saw it. Durations in seconds.

    Server values are None where the server does not report them; `retry_attempt` is 1 for the first
    attempt of a completion. `snapshot_distance` counts the optimizer steps that the service's
    training client had asked for, when the completion ended, since the snapshot that sampled its
    first token was saved. `backend_host`, `deployment` and `pod_template_hash` name what served it.
    """

    num_concurrent_requests: int | None = None
    prefill_queue_duration: float | None = None
    generation_queue_duration: float | None = None
    server_ttft: float | None = None
    cached_prompt_tokens: int | None = None
    prompt_tokens: int | None = None
    server_processing_time: float | None = None
    tokenizer_queue_duration: float | None = None
    tokenizer_duration: float | None = None
    prefill_duration: float | None = None
    generation_duration: float | None = None
    client_ttft: float | None = None
    client_latency: float | None = None
    completion_tokens: int | None = None
    http_status_code: int | None = None
    transport_error: str | None = None
    retry_attempt: int = 1
    request_id: str | None = None
    backend_host: str | None = None
    deployment: str | None = None
    pod_template_hash: str | None = None
    snapshot_identity: str | None = None
    snapshot_distance: int | None = None

    @property
    def error(self) -> str | None:
        """The reason of a failure, such as "HTTP 503"; None if the attempt succeeded."""
        if self.transport_error is not None:
            return self.transport_error
        status = self.http_status_code
        return f"HTTP {status}" if status is not None and status >= 400 else None

    @property
    def response_request_id(self) -> str | None:
        """Alias of `request_id` (official SDK's name)."""
        return self.request_id

    @staticmethod
    def from_headers(
        headers: Mapping[str, object],
        client_ttft: float | None = None,
        http_status_code: int | None = None,
        retry_attempt: int | None = None,
        client_latency: float | None = None,
        completion_tokens: int | None = None,
    ) -> ServerMetrics:
        """Read the figures in the headers of an answer; senseless ones count as not reported.

        Args:
            headers: names in any case, with or without the prefix `fireworks-`.
            client_ttft, client_latency: seconds that the client measured.
            http_status_code: the answer's.
            retry_attempt: counts from 1; None is 1.
            completion_tokens: the number in the answer's usage.
        """
        figures: dict[str, Any] = {}
        measured(headers, figures)
        by_name = {name.lower(): str(value) for name, value in headers.items() if value}
        return ServerMetrics(
            **figures,
            client_ttft=client_ttft,
            http_status_code=http_status_code,
            retry_attempt=1 if retry_attempt is None else retry_attempt,
            client_latency=client_latency,
            completion_tokens=completion_tokens,
            request_id=request_id_of(by_name),
        )


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """One completion of a prompt.

    Attributes:
        text: the completion as text (without the prompt).
        full_tokens: prompt and completion token ids, `prompt_len + completion_len` of them.
        prompt_len: tokens of the prompt.
        finish_reason: "stop", "length" or "tool_calls".
        completion_len: tokens of the completion.
        inference_logprobs: natural log probabilities of the raw model, one for each completion
            token (with `echo`: one for each position after the first); None if not asked for.
        sampling_logprobs: those of the distribution that was sampled from (after temperature, top-p
            and top-k); None if not asked for or not reported.
        logprobs_echoed: whether the two arrays start with prompt positions.
        echoed_prompt_logprob_count: how many entries of them belong to the prompt.
        top_logprobs: for each completion token `{token id: logprob}`; None if not asked for.
        prompt_index: place of the conversation in the list that was passed, from 0.
        sample_index: place among the `n` samples of its prompt, from 0.
        snapshot_identity: the snapshot that sampled the last token; None if not reported.
        snapshot_identity_first: the snapshot that sampled the first token.
        snapshot_switch_index: completion token where it changed; None if it did not.
        metrics: cost of the successful attempt.
        full_distribution: whether the model's own distribution was sampled (temperature 1, top-p 1,
            no top-k), so that both kinds of logprobs are the same; None where that is not known,
            in completions that a sampler did not make.
    """

    text: str
    full_tokens: Sequence[int]
    prompt_len: int
    finish_reason: FinishReason
    completion_len: int
    inference_logprobs: Sequence[float] | None = None
    sampling_logprobs: Sequence[float] | None = None
    logprobs_echoed: bool = False
    echoed_prompt_logprob_count: int = 0
    top_logprobs: Sequence[Mapping[int, float]] | None = None
    prompt_index: int = 0
    sample_index: int = 0
    snapshot_identity: str | None = None
    snapshot_identity_first: str | None = None
    snapshot_switch_index: int | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics, repr=False)
    full_distribution: bool | None = field(default=None, repr=False)

    @property
    def prompt_tokens(self) -> Sequence[int]:
        """Token ids of the prompt."""
        return self.full_tokens[: self.prompt_len]

    @property
    def completion_tokens(self) -> Sequence[int]:
        """Token ids of the completion."""
        return self.full_tokens[self.prompt_len :]

    @property
    def inference_topk_token_ids(self) -> list[list[int]] | None:
        """The token ids of `top_logprobs`, a row a completion token."""
        return None if self.top_logprobs is None else [list(row) for row in self.top_logprobs]

    @property
    def inference_topk_logprobs(self) -> list[list[float]] | None:
        """The logprobs of `top_logprobs`, a row a completion token."""
        rows = self.top_logprobs
        return None if rows is None else [list(row.values()) for row in rows]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The growth of a streamed completion since the last delta; it may join several network pieces.

    Attributes:
        text: the new text.
        tokens: ids of the new tokens; empty unless `logprobs=True` (servers send them along).
        logprobs: natural log probabilities of the raw model, one for each of `tokens`.
        sampling_logprobs: those of the distribution that was sampled from; NaN where not reported.
    """

    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    sampling_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class SampledServerAttempt:
    """One HTTP attempt at a completion.

    Attributes:
        index: counts from 0.
        outcome: "succeeded", "retryable_error", "failed" or "cancelled".
        status_code: HTTP status, where there was one.
        error_kind: as in `SamplingRequestError.final_error_kind`; None if it succeeded.
        response_request_id: the server's id of the request.
        upstream_response_id: the id in the stream's chunks.
        server_metrics: cost of the attempt; None if it was cancelled.
    """

    index: int
    outcome: Literal["succeeded", "retryable_error", "failed", "cancelled"]
    status_code: int | None = None
    error_kind: str | None = None
    response_request_id: str | None = None
    upstream_response_id: str | None = None
    server_metrics: ServerMetrics | None = None


@dataclass(frozen=True, slots=True)
class SampledRequestResult:
    """One completion, and how its request went.

    Attributes:
        completions: the completion; empty if it was longer than `max_seq_len`.
        server_metrics: cost of the successful attempt.
        logical_request_id: sent as `X-Request-Id` by all attempts.
        attempts: HTTP attempts, the successful one included.
        wall_seconds: seconds from the call's start to its result, waits for a slot included.
        upstream_response_id: id in the stream's chunks, where the server sends one.
        server_attempts: the attempts, in order.
    """

    completions: Sequence[SampledCompletion]
    server_metrics: ServerMetrics | None
    logical_request_id: str
    attempts: int
    wall_seconds: float
    upstream_response_id: str | None = None
    server_attempts: Sequence[SampledServerAttempt] = ()


@dataclass(frozen=True, slots=True)
class TrainingProfile:
    """A training shape, resolved to a version.

    Attributes:
        name: full name of the shape version.
        trainer_mode: "POLICY_TRAINER", "LORA_TRAINER" or "FORWARD_ONLY".
        max_context_length: tokens; None where the shape does not say.
        deployment_shape: the deployment shape version linked to it, or None.
        node_count: machines of a trainer; None where the shape does not say.
        accelerator_type: kind of accelerator; None where the shape does not say.
        accelerator_count: accelerators of a machine; None where the shape does not say.
        trainer_image_tag, deployment_image_tag: tags of the images; None where the shape does not
            say.
        weight_precision: precision of the base model's weights; None where the shape does not say.
        pipeline_parallelism: stages that the trainer splits the layers into, at least 1.
    """

    name: str
    trainer_mode: str = "POLICY_TRAINER"
    max_context_length: int | None = None
    deployment_shape: str | None = None
    node_count: int | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    trainer_image_tag: str | None = None
    deployment_image_tag: str | None = None
    weight_precision: str | None = None
    pipeline_parallelism: int = 1

    @property
    def shape(self) -> str:
        """The name of the shape, without the version."""
        return self.name.split("/versions/")[0]


@dataclass(frozen=True, slots=True)
class TrainerJobInfo:
    """A trainer job as the control plane reports it.

    Attributes:
        name: full resource name.
        state: `JOB_STATE_...`.
        message: reason of the state, or a warning about the request that made it.
        max_context_length: tokens; None where the platform does not say.
        display_name: as its creator named it.
        base_model: full resource name, or None.
        lora_rank: 0 for all parameters; None where the platform does not say.
        create_time: RFC 3339, as reported; None where the platform does not say.
    """

    name: str
    state: str
    message: str = ""
    max_context_length: int | None = None
    display_name: str = ""
    base_model: str | None = None
    lora_rank: int | None = None
    create_time: str | None = None

    @property
    def job_id(self) -> str:
        """Last segment of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class DeploymentInfo:
    """A deployment as the control plane reports it.

    Attributes:
        name: full resource name; the model string to sample it by.
        state: "CREATING", "READY", "UPDATING", "FAILED", "DELETING" or "DELETED".
        message: reason of the state, or a warning about the request that made it.
        base_model, deployment_shape, hot_load_trainer_job: full resource names, or None.
        hot_load_transition_type: "ASYNC" or "SYNC"; None where the platform does not say.
        hot_load_bucket_url: URL of its snapshots; None where the platform does not say.
        replica_count: replicas that run now; None where the platform does not say.
        min_replica_count, max_replica_count: bounds of its scaling.
        annotations: its creator's notes.
        create_time: RFC 3339, as reported; None where the platform does not say.
    """

    name: str
    state: str
    message: str = ""
    base_model: str | None = None
    deployment_shape: str | None = None
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: str | None = None
    hot_load_bucket_url: str | None = None
    replica_count: int | None = None
    min_replica_count: int | None = None
    max_replica_count: int | None = None
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    create_time: str | None = None

    @property
    def inference_model(self) -> str:
        """Alias of `name`: the model string to sample it by."""
        return self.name

    @property
    def deployment_shape_version(self) -> str | None:
        """Alias of `deployment_shape` (official SDK's name)."""
        return self.deployment_shape

    @property
    def deployment_id(self) -> str:
        """Last segment of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as the control plane reports it.

    Attributes:
        name: full resource name.
        state: "READY" once it can be used.
        kind: such as "HF_BASE_MODEL" or "HF_PEFT_ADDON".
        moe: whether it is a mixture of experts.
        context_length: tokens; None where the platform does not say.
        message: a warning about it, or empty.
    """

    name: str
    state: str = ""
    kind: str = ""
    moe: bool = False
    context_length: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A saved state or a sampler snapshot as the control plane lists it.

    Attributes:
        name: full resource name; what `promote_checkpoint` takes.
        checkpoint_type: `CHECKPOINT_TYPE_...`, as reported.
        promotable: whether it can become a model.
        create_time, update_time: RFC 3339, as reported.
        predecessor: of a delta snapshot, the identity that it is a difference to, where the
            platform lists it.
        expire_time: RFC 3339, when the platform may remove it; None keeps it.
    """

    name: str
    checkpoint_type: str = ""
    promotable: bool = False
    create_time: str | None = None
    update_time: str | None = None
    predecessor: str | None = None
    expire_time: str | None = None

    @property
    def checkpoint_id(self) -> str:
        """Last segment of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class OperationInfo:
    """A long-running operation of the control plane.

    Attributes:
        name: full resource name.
        done: whether it has ended.
        message: its progress, or the reason why it failed.
        failed: whether it ended with an error.
        response: its result, as reported; empty before the end.
    """

    name: str
    done: bool
    message: str = ""
    failed: bool = False
    response: Mapping[str, object] = field(default_factory=dict[str, object], repr=False)


@dataclass(frozen=True, slots=True)
class Observation(Generic[RowT]):
    """The state of a trainer job or a deployment at one look, as a long poll returns it.

    Pass it as `since=` to the next look: where the platform can wait, that look is answered when
    the state differs from this one.

    Attributes:
        row: the resource; None if it is not there.
        tag: the platform's name for this state; None where it gives none.
        held_s: seconds for which the platform held its answer back until the state changed; None
            where it answers at once: wait yourself before the next look.
    """

    row: RowT | None
    tag: str | None = None
    held_s: float | None = None


@dataclass(frozen=True, slots=True)
class HeldResource:
    """A trainer job or a deployment that some run of this user holds or has left.

    Attributes:
        kind: "trainer" or "deployment".
        resource_id: its id.
        account, base_url: account and platform that it belongs to.
        run: name of the run.
        standing: "intent" (its creation was asked for, and no answer noted), "created", "adopted"
            (it was found) or "kept" (left on purpose at the end).
        age_s: seconds since the run first asked for it.
        owner_pid: process of the run.
        owner_alive: whether that process still runs; None for one of another machine.
        state: state that the platform reports now; None where it was not asked, or has none.
        message: reason of the state.
        replicas: running replicas of a deployment; None where it is not known.
        outcome: the step that was or would be taken: "leave", "remove", "removed", "close" (the
            resource is gone already), "closed" or "failed".
        reason: reason of the outcome, for people.
    """

    kind: Literal["trainer", "deployment"]
    resource_id: str
    account: str
    base_url: str
    run: str
    standing: Literal["intent", "created", "adopted", "kept"]
    age_s: float
    owner_pid: int
    owner_alive: bool | None
    state: str | None = None
    message: str = ""
    replicas: int | None = None
    outcome: Literal["leave", "remove", "removed", "close", "closed", "failed"] = "leave"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """The weights that one replica of a deployment holds, and the load under way.

    Attributes:
        identity: the snapshot it serves, or its one adapter; None before the first hot load.
        ready: whether it serves requests.
        stage: its loading stage, as reported.
        target: the snapshot that `stage` is about.
        error: reason why the load of `target` failed, where `stage` is "error".
        timings: seconds of the last load by stage: "prepare" (read, apply, verify, beside the
            decoding) and "swap"; None where it is not reported.
        adapters: identities of the adapters that it has loaded, which may stay side by side.
    """

    identity: str | None
    ready: bool
    stage: str | None = None
    target: str | None = None
    error: str | None = None
    timings: Mapping[str, float] | None = None
    adapters: tuple[str, ...] = ()
