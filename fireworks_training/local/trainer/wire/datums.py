"""Checks of datums and passes against the model and the loss, whatever dialect they came in.

Knows shapes, lengths, the vocabulary, and which inputs and settings a loss takes. Does not know
wire formats: a dialect hands in `RawDatum`s. A refusal names the field and the reason, and never
quotes tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from fireworks_training._wire.training.datums import MASKS, RATIO_MASK
from fireworks_training.local.model.losses import LOSSES, Loss
from fireworks_training.local.trainer.queue.operations import (
    GRADIENT_INPUTS,
    Backward,
    BackwardRequest,
    Datum,
    EmbeddingOutput,
    EmbeddingPass,
    Operation,
    OperationFailed,
    Pass,
)
from fireworks_training.local.trainer.wire.json_fields import count, number

MAX_DATUMS = 1024
MAX_TARGETS = 1 << 24
"""Targets of one request at most: sparse tensors could name more than memory holds."""
MAX_TOP_K = 128

KNOWN_INPUTS = frozenset(
    {name for loss in LOSSES.values() for name in loss.inputs} | {*MASKS, RATIO_MASK}
)
"""Names of inputs that some loss takes."""

NOT_PUBLIC = {"stable_reinforce": "importance_sampling"}
"""Losses that clients name and whose formula is in no public text, with what to send instead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Holds the bounds of a model that a datum has to fit.

    Attributes:
        vocab_size: token ids run from 0 to one less.
        context_length: tokens that a sequence may have.
        lora: whether the model trains an adapter.
        hidden_size: width of the last hidden states.
        projection_head_dim: outputs of the model's projection head; None where it has none.
        tinker_run: id of the model as a training run of the Tinker API; None where it is not one.
    """

    vocab_size: int
    context_length: int
    lora: bool
    hidden_size: int = 0
    projection_head_dim: int | None = None
    tinker_run: str | None = None


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Holds a dense tensor: flat values, int64 or float32, and its shape if one was given."""

    values: NDArray[np.generic]
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class RawDatum:
    """Holds a datum before its checks: token ids, int64, and named tensors."""

    tokens: NDArray[np.int64]
    tensors: Mapping[str, RawTensor]


@dataclass(frozen=True, slots=True)
class RawPass:
    """Holds a pass before its checks; datums are decoded one by one, so a refusal names one."""

    loss: str
    config: Mapping[str, object]
    datums: Sequence[Callable[[], RawDatum]]
    backward: bool


def dense_from_csr(
    values: NDArray[np.generic],
    crow: NDArray[np.int64],
    columns: NDArray[np.int64],
    shape: Sequence[int],
    name: str,
) -> RawTensor:
    """Write out a sparse `[rows, columns]` tensor, zeros where nothing is listed."""
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > MAX_TARGETS:
        raise OperationFailed(
            f"{name} is sparse: its shape must have two dimensions and at most {MAX_TARGETS} cells"
        )
    counts = np.diff(crow)
    if (
        len(crow) != shape[0] + 1
        or crow[0] != 0
        or (counts < 0).any()
        or not crow[-1] == len(columns) == len(values)
        or (len(columns) and not 0 <= columns.min() <= columns.max() < shape[1])
    ):
        raise OperationFailed(f"{name} is sparse, and its indices do not fit its shape")
    dense = np.zeros((shape[0], shape[1]), values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return RawTensor(dense.reshape(-1), (shape[0], shape[1]))


# -- passes --------------------------------------------------------------------------------------


def make_pass(raw: RawPass, limits: ModelLimits) -> Operation:
    """Check a pass, and make the operation of it.

    Raises:
        OperationFailed: a field does not fit the model or the loss.
    """
    if raw.loss in NOT_PUBLIC:
        raise OperationFailed(
            f"loss {raw.loss!r} is not offered here, since its formula is not public: pass"
            f" loss_fn={NOT_PUBLIC[raw.loss]!r}"
        )
    if raw.loss not in LOSSES:
        raise OperationFailed(f"loss {raw.loss[:40]!r} is unknown; there are {', '.join(LOSSES)}")
    if raw.config.get("output", "logprobs") != "logprobs":
        return _embedding_pass(raw, limits)
    loss = LOSSES[raw.loss]
    top_k = count(raw.config, "top_k", 0, min(MAX_TOP_K, limits.vocab_size))
    if top_k and raw.backward:
        raise OperationFailed("top_k goes with forward only")
    allowed = (*loss.config, *(("top_k",) if not raw.backward else ()))
    rest = {key: value for key, value in raw.config.items() if key not in _WITHOUT_EFFECT}
    settings = _settings(rest, loss.config, allowed, f"loss {raw.loss!r}")
    if settings.get("clip_low_threshold", 0) > settings.get("clip_high_threshold", math.inf):
        raise OperationFailed("clip_low_threshold must not be above clip_high_threshold")
    if settings.get("ratio_log_cap", 0) < 0:
        raise OperationFailed("ratio_log_cap must be at least 0")
    datums = _each(raw, lambda datum: _checked(datum, loss, raw.loss, limits))
    return Pass(datums, raw.loss, settings, raw.backward, top_k)


_WITHOUT_EFFECT = ("output",)
"""Settings that change nothing: an output of "logprobs" is what a pass has anyway."""


def _settings(
    config: Mapping[str, object],
    defaults: Mapping[str, float],
    allowed: Sequence[str],
    what: str,
) -> dict[str, float]:
    unknown = sorted(key for key in config if key not in allowed)
    if unknown:
        takes = ", ".join(allowed) or "no settings"
        raise OperationFailed(
            f"{what} does not know loss_fn_config {', '.join(map(repr, unknown[:5]))}; it"
            f" takes {takes}"
        )
    return {key: number(config, key, default) for key, default in defaults.items()}


def _each(raw: RawPass, check: Callable[[RawDatum], Datum]) -> list[Datum]:
    if not 1 <= len(raw.datums) <= MAX_DATUMS:
        raise OperationFailed(f"data must be a list of 1 to {MAX_DATUMS} datums")
    datums: list[Datum] = []
    targets = 0
    for index, decode in enumerate(raw.datums):
        try:
            datums.append(check(decode()))
        except OperationFailed as error:
            raise OperationFailed(f"datum {index}: {error}") from None
        targets += len(datums[-1].inputs.get("target_tokens", ()))
        if targets > MAX_TARGETS:  # before the next is written out
            raise OperationFailed(f"a request may have {MAX_TARGETS} targets: send fewer datums")
    return datums


def make_backward(request: BackwardRequest, forward: Pass) -> Backward:
    """Make a backward by the logprobs of `forward`, whose shapes its gradients must have.

    Raises:
        OperationFailed: they do not fit, or are not finite.
    """
    if len(request.gradients) != len(forward.data):
        raise OperationFailed(
            f"gradients has {len(request.gradients)} entries; the forward pass had"
            f" {len(forward.data)} datums"
        )
    gradients: list[NDArray[np.float32]] = []
    pairs = zip(request.gradients, forward.data, strict=True)
    for index, ((values, shape), datum) in enumerate(pairs):
        try:
            fitting = _fitting(RawTensor(values, shape), "its gradient", datum.target_shape)
        except OperationFailed as error:
            raise OperationFailed(f"datum {index}: {error}") from None
        gradients.append(fitting.astype(np.float32, copy=False))
    return Backward(forward, gradients)


# -- datums of a loss over targets ---------------------------------------------------------------


def _checked(datum: RawDatum, loss: Loss, loss_name: str, limits: ModelLimits) -> Datum:
    tokens = _check_tokens(datum.tokens, limits)
    given = datum.tensors
    missing = [name for name in ("target_tokens", *loss.required) if name not in given]
    if missing:
        raise OperationFailed(f"loss {loss_name!r} needs loss_fn_inputs {', '.join(missing)}")
    _check_unused(given, (*loss.inputs, *MASKS), loss_name)
    width = _width(given["target_tokens"], len(tokens), loss, loss_name, limits)
    shape = (len(tokens), width) if width else (len(tokens),)
    used = [name for name in given if name in (*loss.inputs, *_masks(loss))]
    inputs = {name: _fitting(given[name], name, shape) for name in used}
    _check_vocabulary(cast("NDArray[np.int64]", inputs["target_tokens"]), "target_tokens", limits)
    weights = _weights(inputs, loss, shape)
    kept = {name: inputs[name] for name in ("target_tokens", *loss.required)}
    return Datum(tokens, {**kept, "weights": weights}, width)


def _masks(loss: Loss) -> tuple[str, ...]:
    return (*MASKS, RATIO_MASK) if loss.ratio_mask else MASKS


def _weights(
    inputs: Mapping[str, NDArray[np.generic]], loss: Loss, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Find the weight of each target: which ones count is said by a mask, or by the row itself.

    Raises:
        OperationFailed: two masks name different targets, or nothing says that any target counts.
    """
    given = [name for name in _masks(loss) if name in inputs]
    for other in given[1:]:
        if ((inputs[other] != 0) != (inputs[given[0]] != 0)).any():
            raise OperationFailed(
                f"{given[0]} and {other} contradict each other: one counts tokens that the other"
                " leaves out. Send one of them, or make them 0 at the same positions"
            )
    if given:
        weights: NDArray[np.float32] = inputs[given[0]].astype(np.float32, copy=False)
        return weights
    if "advantages" not in inputs:
        return np.ones(math.prod(shape), np.float32)
    counts = inputs["advantages"] != 0
    if "logprobs" in inputs:
        counts = counts | (inputs["logprobs"] != 0)
    if not counts.any():
        raise OperationFailed(
            "it has no weights, and neither advantages nor logprobs is other than 0 anywhere, so"
            " no token counts: send weights, 1 for each sampled token and 0 for the others"
        )
    note_once(
        "a row without weights: a position counts where advantages or logprobs is not 0. Send"
        " weights to say it (the SDK's datum builders do)"
    )
    return np.asarray(counts, np.float32)


@lru_cache(maxsize=256)
def note_once(text: str) -> None:
    """Log a warning, once in the life of this trainer."""
    logger.warning("%s", text)


def _width(targets: RawTensor, length: int, loss: Loss, loss_name: str, limits: ModelLimits) -> int:
    shape = targets.shape
    if shape is None or len(shape) != 2 or shape[0] != length:
        return 0
    if not loss.many_targets:
        raise OperationFailed(
            f"loss {loss_name!r} takes one target a token, and target_tokens has shape"
            f" {list(shape)}; it must be [{length}]"
        )
    if not 1 <= shape[1] <= limits.vocab_size:
        raise OperationFailed(
            f"target_tokens has shape {list(shape)}; a token may have 1 to {limits.vocab_size}"
            " targets"
        )
    return shape[1]


def _check_unused(given: Mapping[str, object], used: Sequence[str], loss_name: str) -> None:
    """Note inputs that the loss leaves unused; refuse one that looks like a misspelt input of it.

    Datums are made once for several losses, and other trainers ignore what a loss does not need.
    """
    for name in sorted(given.keys() - set(used) - {RATIO_MASK}):
        meant = None if name in KNOWN_INPUTS else get_close_matches(name, used, 1, 0.8)
        if meant:
            raise OperationFailed(
                f"loss {loss_name!r} does not know {name[:40]!r}: did you mean {meant[0]!r}?"
            )
        note_once(f"loss {loss_name!r} does not use {name[:40]!r}: it is ignored")


def _check_names(given: Iterable[str], allowed: Sequence[str], loss_name: str) -> None:
    unknown = sorted(name for name in given if name not in allowed)
    if unknown:
        raise OperationFailed(
            f"loss {loss_name!r} does not know {', '.join(map(repr, unknown[:5]))}; it takes"
            f" {', '.join(sorted(allowed))}"
        )


def _check_tokens(ids: NDArray[np.int64], limits: ModelLimits) -> NDArray[np.int64]:
    if not 1 <= len(ids) <= limits.context_length:
        raise OperationFailed(
            f"it has {len(ids)} tokens; this trainer takes 1 to {limits.context_length}"
        )
    _check_vocabulary(ids, "tokens", limits)
    return ids


def _check_vocabulary(ids: NDArray[np.int64], name: str, limits: ModelLimits) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= limits.vocab_size:
        raise OperationFailed(
            f"{name} has ids outside the model's vocabulary of {limits.vocab_size}: tokenize with"
            " service.get_tokenizer()"
        )


def _fitting(tensor: RawTensor, name: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    given = None if tensor.shape is None else list(tensor.shape)
    if len(tensor.values) != math.prod(shape) or given not in (None, list(shape)):
        raise OperationFailed(
            f"{name} has {len(tensor.values)} entries of shape {given}; it must have shape"
            f" {list(shape)}, to fit {shape[0]} tokens"
        )
    if not np.isfinite(tensor.values).all():
        raise OperationFailed(f"{name} has entries that are not finite numbers")
    return tensor.values


# -- passes over hidden states -------------------------------------------------------------------

_OUTPUTS: tuple[EmbeddingOutput, ...] = (
    "embedding",
    "projection",
    "cos_similarity_matrix",
    "contrastive_loss",
)
Pooling = Literal["mean", "last"]
_POOLINGS: tuple[Pooling, ...] = ("mean", "last")
_CONTRASTIVE = ("num_queries", "temperature", "num_extra_negatives")


def _embedding_pass(raw: RawPass, limits: ModelLimits) -> EmbeddingPass:
    config = raw.config
    if raw.loss != "cross_entropy":
        raise OperationFailed("output goes with loss_fn 'cross_entropy' only")
    wanted = config["output"]
    output: EmbeddingOutput | None = next((known for known in _OUTPUTS if known == wanted), None)
    pooling: Pooling | None = next(
        (known for known in _POOLINGS if known == config.get("pooling", "mean")), None
    )
    if output is None or pooling is None:
        raise OperationFailed(
            f"output must be one of logprobs, {', '.join(_OUTPUTS)}, and pooling mean or last"
        )
    if output == "projection" and limits.projection_head_dim is None:
        raise OperationFailed(
            "this model has no projection head: create it with projection_head_dim"
        )
    contrastive = output == "contrastive_loss"
    if contrastive and not raw.backward:
        raise OperationFailed("output 'contrastive_loss' goes with forward_backward only")
    allowed = ("output", "pooling", *(_CONTRASTIVE if contrastive else ()))
    _settings(config, {}, allowed, f"output {output!r}")
    datums = _each(raw, lambda datum: _embedded(datum, output, raw, limits))
    queries = count(config, "num_queries", 0, MAX_DATUMS) if contrastive else 0
    negatives = count(config, "num_extra_negatives", 0, MAX_DATUMS) if contrastive else 0
    if contrastive and (queries < 1 or len(datums) != 2 * queries + negatives):
        raise OperationFailed(
            f"contrastive_loss takes 2 * num_queries + num_extra_negatives datums, at least 2; it"
            f" got {len(datums)} with {queries} queries and {negatives} extra negatives"
        )
    temperature = number(config, "temperature", 1.0)
    if temperature <= 0:
        raise OperationFailed("temperature must be above 0")
    return EmbeddingPass(datums, output, pooling, raw.backward, queries, negatives, temperature)


def _embedded(datum: RawDatum, output: EmbeddingOutput, raw: RawPass, limits: ModelLimits) -> Datum:
    """Check a datum of an embedding pass: its inputs are the gradient of its output, or nothing.

    Targets and weights may be there, since data is made once for all outputs; nothing reads them.
    """
    tokens = _check_tokens(datum.tokens, limits)
    name = GRADIENT_INPUTS.get(output)
    wanted = (name,) if name is not None and raw.backward else ()
    known = ("target_tokens", "weights", *wanted)
    _check_names(
        {n: t for n, t in datum.tensors.items() if n not in KNOWN_INPUTS}, known, f"output={output}"
    )
    if not wanted:
        return Datum(tokens, {})
    shape: tuple[int, ...] = {
        "embedding": (limits.hidden_size,),
        "projection": (len(tokens), limits.projection_head_dim or 0),
        "cos_similarity_matrix": (len(raw.datums),),
    }[output]
    if wanted[0] not in datum.tensors:
        raise OperationFailed(f"the backward pass of output {output!r} needs {wanted[0]}")
    return Datum(tokens, {wanted[0]: _fitting(datum.tensors[wanted[0]], wanted[0], shape)})
