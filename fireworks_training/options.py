"""The options that public methods take: sampling options, literals, callbacks, a new deployment.

Annotate your own functions with these types when they pass options on. This module knows the names,
types and units of options; the methods that take them check their values. Options of a service are
in `config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, TypedDict

from fireworks_training._checks import integer
from fireworks_training.errors import InvalidArgument

if TYPE_CHECKING:
    import tinker
    import torch

# -- sampling --------------------------------------------------------------------------------------

Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages of a conversation: `[{"role": "user", "content": "..."}, ...]`."""


class Tokenizer(Protocol):
    """A tokenizer as a sampler needs it; those of `transformers` fit."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Turns messages into token ids."""
        ...

    @property
    def decode(self) -> Callable[..., Any]:
        """Turns token ids into text."""
        ...


class SamplingOptions(TypedDict, total=False):
    """Names the options of a sampling call beyond `n`, `max_tokens`, `temperature`, `max_seq_len`.

        options: SamplingOptions = {"top_p": 0.9, "stop": ["\\n"], "logprobs": True}
        sampler.sample_with_tokens(messages, n=8, **options)

    All are optional, an option that is None counts as not given, and one at the value where it does
    nothing (a penalty of 0) is not sent, since not every server knows each field. Numbers may be
    those of numpy and torch. Each is checked at the call:
    an unknown name raises `UnknownOption` with the near ones, a value out of range
    `InvalidArgument`.

    Keys:
        top_p: nucleus mass in (0, 1]; default 1, sent always (a server's own default would bias
            the samples).
        top_k: only the k likeliest tokens; 0 or -1, the default, is off.
        min_p: least probability relative to the likeliest token, 0 to 1.
        seed: integer. Completion i of the call (the first prompt's first) is drawn with `seed + i`:
            with one seed for all, the draws of different prompts would go together.
        stop: a string, strings, or token ids that end a completion. `[]` ignores the model's own
            end of text.
        ignore_eos: do not end at the model's own end of text.
        min_tokens: sample no end before this many tokens.
        logprobs: return natural log probabilities; default False.
        top_logprobs: return also those of this many likeliest tokens; needs `logprobs=True`.
        echo: treat the prompt as part of the answer, for its logprobs.
        echo_last: treat only this many tokens at the prompt's end so.
        frequency_penalty, presence_penalty: -2 to 2.
        repetition_penalty: over 0; 1 is off.
        logit_bias: `{token id: bias}`; an id may be text, as in JSON.
        response_format: as the server documents it.
        user: session affinity; give each trajectory its own.
        prompt_cache_key: cache affinity.
        http_timeout: seconds without anything of an answer (keep-alives are nothing of it) after
            which an attempt counts as lost; default 600.
        return_partial: with True, completions that failed for good are left out of the result, and
            logged; the call fails only if none came. Default False: the call fails with the first
            failure, whose `completions` are those that came.
        raw_output: True, for scripts of the official SDK: the token ids are always asked for.
        sampling_context: labels in error messages and logs, among session, run, checkpoint, step,
            group, item; never sent.
        timeout_diagnostic_context: the same as `sampling_context`, under the official SDK's name.
        additional_headers_snapshot: HTTP headers of this call.
    """

    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str] | Sequence[int] | None
    ignore_eos: bool
    min_tokens: int
    logprobs: bool
    top_logprobs: int
    echo: bool
    echo_last: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float]
    response_format: Mapping[str, Any]
    user: str
    prompt_cache_key: str
    http_timeout: float
    return_partial: bool
    raw_output: bool
    sampling_context: Mapping[str, object]
    timeout_diagnostic_context: Mapping[str, object]
    additional_headers_snapshot: Mapping[str, str]


class RetryConfig(Protocol):
    """Types the `retry_config` of a sampling client: tinker's own class, by the fields that count.

        from tinker.lib.retry_handler import RetryConfig

        service.create_sampling_client(path, retry_config=RetryConfig(progress_timeout=600))

    Nothing else is accepted at run time. What is retried stays the sampler's: 408, 429, 500, 502,
    503, 504, and failures of the network.

    Attributes:
        max_connections: requests in flight at most, if it is not tinker's default, by a window of
            the client's own; the default and None leave it to the service's.
        progress_timeout: a request is tried again for so many seconds; and when no call of the
            client has ended for so long, all fail with `DeploymentSamplerTimeoutError`.
        retry_delay_base, retry_delay_max: delays in seconds double from the first to the second. A
            server's Retry-After, up to 30 s, is a floor.
        jitter_factor: share of a delay, 0 to 1, by which it may be shortened at random.
        enable_retry_logic: False makes one attempt. A deployment that loads a snapshot is waited
            for all the same.
        enable_stuck_detection: must be True; set a large `progress_timeout` instead.
        retryable_exceptions: must be tinker's default: an error's status decides.
    """

    @property
    def max_connections(self) -> int | None: ...
    @property
    def progress_timeout(self) -> float: ...
    @property
    def retry_delay_base(self) -> float: ...
    @property
    def retry_delay_max(self) -> float: ...
    @property
    def jitter_factor(self) -> float: ...
    @property
    def enable_retry_logic(self) -> bool: ...
    @property
    def enable_stuck_detection(self) -> bool: ...
    @property
    def retryable_exceptions(self) -> tuple[type[Exception], ...]: ...


# -- training --------------------------------------------------------------------------------------


class LossFunction(Protocol):
    """A loss of your own for `forward_backward_custom`; runs in a thread of its own."""

    def __call__(
        self, data: Sequence[tinker.Datum], outputs: list[torch.Tensor], /
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Compute the loss of a pass.

        Args:
            data: the datums, as they were passed.
            outputs: a float32 leaf tensor for each datum: the logprob of each target, in the shape
                of its target_tokens, or the `output` that was asked for.

        Returns:
            A scalar tensor that depends on `outputs`, and metrics by name.
        """
        ...


LossName = Literal[
    "cross_entropy",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "dapo",
    "gspo",
    "dppo",
    "reinforce",
    "stable_reinforce",
]
"""Names of the built-in losses, of which a trainer may lack some."""

LossConfig: TypeAlias = Mapping[str, Any] | None
"""Options of a built-in loss by name; None leaves them to the trainer."""

Output = Literal["logprobs", "embedding", "projection", "cos_similarity_matrix"]
"""Names the model output that a custom loss is computed from."""

Pooling = Literal["mean", "last"]
"""Names how the hidden states of a datum become its embedding: by their mean, or the last one."""

Normalization = Literal["num_loss_tokens", "num_sequences", "none"]
"""Names the count that an optimizer step divides accumulated gradients by."""

GradNorms = Literal["off", "basic", "detailed"] | bool
"""Chooses the gradient norms that a step reports; False is "off" and True is "basic"."""

# -- snapshots and deployments ---------------------------------------------------------------------

CheckpointType = Literal["base", "delta", "merged_base"]
"""Names the kind of a sampler snapshot: whole, a difference, or whole with the adapter merged."""

OnDrift = Literal["warn", "raise"]
"""Chooses what a weight sync does when engine and trainer differ by more than the drift bound."""

_TRANSITIONS = ("ASYNC", "SYNC")


def transition(value: str | None) -> str | None:
    """Normalize a hot load transition type to "ASYNC", "SYNC", or None for the platform's choice.

    Raises:
        InvalidArgument: it is something else.
    """
    name = (value or "").strip().upper()
    if name and name not in _TRANSITIONS:
        raise InvalidArgument(f"hot_load_transition_type={value!r}: {' or '.join(_TRANSITIONS)}")
    return name or None


@dataclass
class DeploymentConfig:
    """Describes a deployment to create; name and fields are the official SDK's.

    With `deployment_shape` the shape decides on the accelerator; without one, `accelerator_type`
    does, and `accept_shapeless_risk` says that this is meant.

    Attributes:
        deployment_id: last segment of its name, unique in the account.
        base_model: full resource name of the model that it serves at first.
        deployment_shape: full name of the shape or shape version; None: without one.
        expected_deployment_shape: if given, `deployment_shape` must be exactly this one.
        region: place of the accelerators; None leaves it to the platform.
        min_replica_count, max_replica_count: bounds of its scaling.
        hot_load_bucket_type: owner of the bucket that it loads snapshots from.
        hot_load_trainer_job: full name of the trainer job whose snapshots it loads.
        enable_hot_load: whether it can load snapshots at all.
        hot_load_transition_type: "ASYNC" or "SYNC"; None leaves it to the platform.
        extra_args: further arguments of its server.
        extra_values: further values of its template, by name.
        annotations: its creator's notes, by name.
        for_training: lets the platform delete it with its trainer.
        preemptible: lets the platform take its accelerators away.

    Raises:
        InvalidArgument: the transition type is unknown, or a count of replicas is none.
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
        self.min_replica_count = integer("min_replica_count", self.min_replica_count, 0)
        self.max_replica_count = integer("max_replica_count", self.max_replica_count, 0)

    @classmethod
    def from_training_profile(
        cls, *, deployment_id: str, base_model: str, profile: object, **kwargs: Any
    ) -> Self:
        """Describe a deployment with the shape that a training profile is linked to.

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
        """Refuse fields that contradict each other; creating the deployment calls it.

        Raises:
            InvalidArgument: the shape is not the expected one, or is given and declined at once.
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
