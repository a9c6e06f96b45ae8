"""The operations of a trainer, decoded and checked, and their results, whatever the dialect.

Knows the operations' fields, and refusals. Does not know wire formats, HTTP or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fireworks_training._core.operations import Role
from fireworks_training.local.model.optimizer import AdamSettings, Normalization
from fireworks_training.local.store.tinker_store import Checkpoint


class OperationFailed(Exception):
    """Raised where an operation or a request fails for a reason that the client can act on."""

    def __init__(
        self, message: str, *, category: str = "user", error_class: str = "InvalidRequest"
    ) -> None:
        super().__init__(message)
        self.category = category
        self.error_class = error_class

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Makes a failure of another exception, whose type becomes its class."""
        return cls(str(error), error_class=type(error).__name__)


@dataclass(frozen=True, slots=True)
class Datum:
    """Holds one sequence and the inputs of its loss.

    Attributes:
        tokens: T token ids, int64.
        inputs: T * width entries each, row by row: `target_tokens` int64, everything else float32.
        width: targets a token, where they were given as `[T, width]`; 0 for `[T]`.
    """

    tokens: NDArray[np.int64]
    inputs: Mapping[str, NDArray[np.generic]]
    width: int = 0

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape that targets were given in."""
        return (len(self.tokens), self.width) if self.width else (len(self.tokens),)


@dataclass(frozen=True, slots=True)
class Pass:
    """Asks for a forward pass over `data`, with its gradient if `backward`.

    Attributes:
        top_k: most likely tokens to report at each position; 0 reports none.
    """

    data: Sequence[Datum]
    loss: str
    config: Mapping[str, float]
    backward: bool
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class BackwardRequest:
    """Asks for a backward by the logprobs of an earlier forward, before that is looked up.

    Attributes:
        gradients: d(loss) / d(logprobs) of each datum, flat float32, and its shape if given.
    """

    forward_seq_id: int
    gradients: Sequence[tuple[NDArray[np.generic], tuple[int, ...] | None]]


@dataclass(frozen=True, slots=True)
class Backward:
    """Asks for the backward pass of sum(logprobs * gradients) over the datums of `forward`."""

    forward: Pass
    gradients: Sequence[NDArray[np.float32]]


EmbeddingOutput = Literal["embedding", "projection", "cos_similarity_matrix", "contrastive_loss"]


@dataclass(frozen=True, slots=True)
class EmbeddingPass:
    """Asks for a pass whose output is taken from the last hidden states.

    Attributes:
        data: with `backward`, each datum's inputs hold the gradient of its output, flat, under
            GRADIENT_INPUTS[output] (but for contrastive_loss, which has its own loss).
        output: one of those described in `run.embeddings`.
        pooling: "mean" over a sequence's tokens, or its "last" one.
        queries, negatives, temperature: settings of contrastive_loss.
    """

    data: Sequence[Datum]
    output: EmbeddingOutput
    pooling: Literal["mean", "last"]
    backward: bool
    queries: int = 0
    negatives: int = 0
    temperature: float = 1.0


GRADIENT_INPUTS: Mapping[EmbeddingOutput, str] = {
    "embedding": "embedding_grads",
    "cos_similarity_matrix": "embedding_grads",
    "projection": "projection_grads",
}


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Asks for one step of AdamW on the accumulated gradients."""

    adam: AdamSettings
    normalization: Normalization


@dataclass(frozen=True, slots=True)
class TinkerSave:
    """Names a save for clients of the Tinker API.

    Attributes:
        checkpoint: the checkpoint's name; None for weights of a sampling session.
        ttl_seconds: seconds for which it is kept; None for ever.
        user_metadata: the client's own notes.
        sampling_session: the sampling session that uses it; None for a named checkpoint.
        run: id of the model that is saved.
    """

    checkpoint: Checkpoint | None
    ttl_seconds: int | None
    user_metadata: Mapping[str, str] | None
    sampling_session: str | None
    run: str


@dataclass(frozen=True, slots=True)
class SaveState:
    """Asks for a save of the whole training state.

    Attributes:
        overwrite: replace a state of that name, which the answer reports; False refuses that.
        ttl_seconds: time after which it may be removed; None keeps it.
    """

    name: str
    overwrite: bool = True
    tinker: TinkerSave | None = None
    ttl_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class LoadState:
    """Asks for a load of a saved state.

    Attributes:
        job: job of the state; None = this trainer's.
        optimizer: whether to load moments and random stream as well.
        path: the name that the client gave.
    """

    name: str
    job: str | None
    optimizer: bool
    path: str | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Asks for a load of an adapter: `identity` is a snapshot's, `path` the client's name."""

    identity: str
    path: str


@dataclass(frozen=True, slots=True)
class SaveSnapshot:
    """Asks for a save of a sampler snapshot."""

    name: str
    checkpoint_type: Literal["base", "delta", "merged_base"]
    tinker: TinkerSave | None = None
    ttl_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class DiscardGradients:
    """Asks for the accumulated gradients to be dropped."""


Operation = (
    Pass
    | Backward
    | EmbeddingPass
    | OptimStep
    | SaveState
    | LoadState
    | LoadAdapter
    | SaveSnapshot
    | DiscardGradients
)


@dataclass(frozen=True, slots=True)
class PassOutputs:
    """Holds the output tensors of each datum by name, in the data's order, and the metrics.

    After the only colon in a metric's name stands how the chunks of one call are combined.
    """

    outputs: Sequence[Mapping[str, NDArray[np.generic]]]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """Holds the result of any other operation: a JSON object."""

    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Deferred:
    """Holds the rest of an operation that no longer needs the model.

    `finish` runs in the export thread, beside later operations, and raises OperationFailed.
    """

    finish: Callable[[], Answer]


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """Holds a result as the body of an answer."""

    body: bytes
    content_type: str = "application/json"


class Codec(Protocol):
    """Encodes results in one dialect."""

    def encode(self, result: PassOutputs | Answer) -> EncodedResult: ...


@dataclass(frozen=True, slots=True)
class Submission:
    """Asks for a place in a model's queue.

    Attributes:
        digest: hash of the request's content, whatever the order of its keys.
        operation: the operation to run, or its refusal (which takes the place all the same).
        size: bytes of the request.
        codec: encodes the result.
    """

    model_id: str
    seq_id: int
    digest: bytes
    role: Role
    operation: Operation | BackwardRequest | OperationFailed
    size: int
    codec: Codec
