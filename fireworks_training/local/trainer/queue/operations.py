"""What a trainer can be asked to do, checked and decoded, whatever dialect it came in.

Knows: the operations, what each does to its step, how a refusal looks. Does not know wire formats,
HTTP or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fireworks_training._core.operations import Role
from fireworks_training.local.model.optimizer import AdamSettings, Normalization
from fireworks_training.local.store.tinker_store import Checkpoint


class OperationFailed(Exception):
    """An operation that ran, or a request that was answered, failed for a reason we can name."""

    def __init__(
        self, message: str, *, category: str = "user", error_class: str = "InvalidRequest"
    ) -> None:
        super().__init__(message)
        self.category = category
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence.

    Attributes:
        tokens: T token ids, int64.
        inputs: T * width entries each, row by row: `target_tokens` int64, everything else float32.
        width: targets a token, where they were given as `[T, width]`; 0 where as `[T]`.
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
    """A forward pass over `data`, with its gradient if `backward`.

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
    """A backward by the logprobs of an earlier forward, before that is looked up.

    Attributes:
        gradients: d(loss) / d(logprobs) of each datum, flat float32, and the shape that was told.
    """

    forward_seq_id: int
    gradients: Sequence[tuple[NDArray[np.generic], tuple[int, ...] | None]]


@dataclass(frozen=True, slots=True)
class Backward:
    """The backward pass of sum(logprobs * gradients) over the datums of `forward`."""

    forward: Pass
    gradients: Sequence[NDArray[np.float32]]


EmbeddingOutput = Literal["embedding", "projection", "cos_similarity_matrix", "contrastive_loss"]


@dataclass(frozen=True, slots=True)
class EmbeddingPass:
    """A pass whose output is taken from the last hidden states.

    Attributes:
        data: with `backward`, each datum's inputs hold the gradient of its output, flat, under
            GRADIENT_INPUTS[output] (but for contrastive_loss, which has its own loss).
        output: see `embeddings`.
        pooling: "mean" over a sequence's tokens, or its "last" one.
        queries, negatives, temperature: of contrastive_loss.
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
    adam: AdamSettings
    normalization: Normalization


@dataclass(frozen=True, slots=True)
class TinkerSave:
    """How a save is known to a client of the Tinker API.

    Attributes:
        checkpoint: its name; None for weights of a sampling session.
        ttl_seconds: how long it is kept; None for ever.
        user_metadata: the client's own notes.
        sampling_session: the sampling session that it is for; None for a named checkpoint.
        run: the model that is saved.
    """

    checkpoint: Checkpoint | None
    ttl_seconds: int | None
    user_metadata: Mapping[str, str] | None
    sampling_session: str | None
    run: str


@dataclass(frozen=True, slots=True)
class SaveState:
    """A state of that name is replaced, and the answer says so; `overwrite` False refuses that."""

    name: str
    overwrite: bool = True
    tinker: TinkerSave | None = None


@dataclass(frozen=True, slots=True)
class LoadState:
    """`job` None means this trainer's own states; `path` is the name that the client gave."""

    name: str
    job: str | None
    optimizer: bool
    path: str | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """`identity` is a snapshot's; `path` is the name that the client gave."""

    identity: str
    path: str


@dataclass(frozen=True, slots=True)
class SaveSnapshot:
    name: str
    checkpoint_type: Literal["base", "delta", "merged_base"]
    tinker: TinkerSave | None = None


@dataclass(frozen=True, slots=True)
class DiscardGradients:
    pass


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
    """Output tensors by name for each datum, in their order, and metrics.

    A metric's name ends in what combines the chunks of one call, after the only colon.
    """

    outputs: Sequence[Mapping[str, NDArray[np.generic]]]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of any other operation: a JSON object."""

    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Deferred:
    """An operation that has taken what it needs of the model; `finish` does the rest beside it.

    `finish` raises OperationFailed, and runs in the export thread.
    """

    finish: Callable[[], Answer]


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """A result as it goes over the wire."""

    body: bytes
    content_type: str = "application/json"


class Codec(Protocol):
    """Results to bytes, in one dialect."""

    def encode(self, result: PassOutputs | Answer) -> EncodedResult: ...


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a place in a model's line.

    Attributes:
        digest: of the request's content, whatever the order of its keys.
        operation: what to run, or why it is refused (a refused one takes its place too).
        size: bytes of the request.
        codec: of the result.
    """

    model_id: str
    seq_id: int
    digest: bytes
    role: Role
    operation: Operation | BackwardRequest | OperationFailed
    size: int
    codec: Codec
