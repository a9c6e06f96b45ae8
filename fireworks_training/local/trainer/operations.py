"""What a trainer can be asked to do, checked and decoded, whatever dialect it came in.

Knows: the operations, what each does to its step, how a refusal looks. Does not know wire formats,
HTTP or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fireworks_training.local.optimizer import AdamSettings, Normalization
from fireworks_training.local.trainer.line import Role


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
        inputs: T entries each: `target_tokens` int64, everything else float32.
    """

    tokens: NDArray[np.int64]
    inputs: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass over `data`, with its gradient if `backward`."""

    data: Sequence[Datum]
    loss: str
    config: Mapping[str, float]
    backward: bool


@dataclass(frozen=True, slots=True)
class OptimStep:
    adam: AdamSettings
    normalization: Normalization


@dataclass(frozen=True, slots=True)
class SaveState:
    name: str


@dataclass(frozen=True, slots=True)
class LoadState:
    """`job` None means this trainer's own states."""

    name: str
    job: str | None
    optimizer: bool


@dataclass(frozen=True, slots=True)
class SaveSnapshot:
    name: str
    checkpoint_type: Literal["base", "delta"]


@dataclass(frozen=True, slots=True)
class DiscardGradients:
    pass


Operation = Pass | OptimStep | SaveState | LoadState | SaveSnapshot | DiscardGradients


@dataclass(frozen=True, slots=True)
class PassResult:
    """`logprobs` has T float32 entries for each datum, in their order."""

    logprobs: Sequence[NDArray[np.float32]]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of any other operation: a JSON object."""

    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result as it goes over the wire."""

    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a place in a model's line.

    Attributes:
        digest: of the request's content, whatever the order of its keys.
        operation: what to run, or why it is refused (a refused one takes its place too).
        size: bytes of the request.
    """

    model_id: str
    seq_id: int
    digest: bytes
    role: Role
    operation: Operation | OperationFailed
    size: int = field(default=0)
