"""Checks of datums before a step: logprobs that are misaligned, sums that are divided twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fireworks_training._checks import number
from fireworks_training.errors import InvalidArgument, InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker

    from fireworks_training.models import SampledCompletion

logger = logging.getLogger(__name__)

SHIFTS = (-2, -1, 1, 2)
"""Lists the misalignments that `check_alignment` looks for, in tokens."""

CLEARLY = 4.0
"""A shifted comparison counts as a misalignment if it is this many times nearer."""

EXACTLY = 0.01
"""How near to 1 a sum of advantages must be to have been divided by a count beyond doubt."""

AVERAGED = 2.0
"""Weights whose magnitudes sum to at most this, over many tokens, have been divided by a count."""


def check_alignment(
    data: Sequence[tinker.Datum],
    outputs: Sequence[Mapping[str, tinker.TensorData]],
    *,
    tolerance: float = 0.1,
    completions: Sequence[SampledCompletion] | None = None,
) -> float:
    """Compare the logprobs that datums carry with those that the trainer computed for them.

    A trainer that still has the weights that sampled computes the same logprobs. When they differ,
    and would agree if the datum's were moved by a token or two, the arrays are misaligned: the
    most common silent error of hand-made datums.

    Args:
        data: datums with `logprobs`. Positions that do not count (`weights` of 0, or without
            weights a logprob of 0) are left out. The trainer computes the raw model's logprobs:
            datums that were sampled at another temperature than 1, or with top-p or top-k, differ
            from them by nature, so pass `completions` too.
        outputs: `loss_fn_outputs` of a forward or forward_backward of these datums.
        completions: those that the datums were made of, in their order: their
            `inference_logprobs`, of the raw model, are compared in place of the datums' own.
        tolerance: mean difference that is taken for the same, natural log.

    Returns:
        The mean absolute difference over all tokens compared.

    Raises:
        InvalidDatum: a datum is misaligned; says which, and by how many tokens.
        InvalidArgument: another number of outputs or completions than of datums, or no datum has
            logprobs.
    """
    import numpy as np

    number("tolerance", tolerance, least=0.0)
    if len(data) != len(outputs):
        raise InvalidArgument(f"{len(outputs)} outputs for {len(data)} datums: pass both of a pass")
    if completions is not None and len(completions) != len(data):
        raise InvalidArgument(
            f"{len(completions)} completions for {len(data)} datums: pass those of the datums"
        )
    total, count = 0.0, 0
    for index, (datum, output) in enumerate(zip(data, outputs, strict=True)):
        given = datum.loss_fn_inputs.get("logprobs")
        if given is None:
            continue
        sampled, computed = given.to_numpy().ravel(), output["logprobs"].to_numpy().ravel()
        counts = datum.loss_fn_inputs.get("weights", given)
        active = np.flatnonzero(counts.to_numpy())
        if completions is not None:
            sampled = _raw_logprobs(completions[index], len(sampled), index)
        if not active.size:
            continue
        apart = _apart(sampled, computed, active, 0)
        total, count = total + apart * active.size, count + active.size
        if apart <= tolerance or active.size < 3:
            continue
        shift = min(SHIFTS, key=lambda by: _apart(sampled, computed, active, by))
        if _apart(sampled, computed, active, shift) * CLEARLY < apart:
            raise InvalidDatum(
                f"datum {index}: its logprobs are {apart:.2g} from the trainer's on average, and "
                f"agree when moved by {shift:+d}: they are misaligned. Build it with rl_datum or "
                "completion_datum, which own the shift",
                index=index,
            )
    if not count:
        raise InvalidArgument("no datum has logprobs to compare")
    return total / count


def check_normalization(
    data: Sequence[tinker.Datum], grad_accumulation_normalization: str | None
) -> None:
    """Check that a step would not be divided by its tokens or sequences twice.

    Losses are plain sums. Divide in the datums' weights or advantages (or in a custom loss), or
    pass `grad_accumulation_normalization` to `optim_step`; both together make the step too small by
    the number of tokens, and neither makes it too large.

    Args:
        data: all datums of the step.
        grad_accumulation_normalization: what `optim_step` will get; None is "none".

    Small advantages are no error by themselves: where sums are about 1 and the cause is not plain,
    the log has a warning.

    Raises:
        InvalidArgument: the weights sum to about 1 over all tokens, or over each datum's, or the
            magnitudes of the advantages to exactly 1, and `optim_step` would divide them again; or
            it would divide by other tokens than those that were sampled, since a row with
            advantages has no `weights`, or its weights count its prompt. Says what to change.
    """
    import numpy as np

    if grad_accumulation_normalization in (None, "none"):
        return
    sizes: list[float] = []
    tokens: list[int] = []
    plain = True
    for index, datum in enumerate(data):
        inputs = datum.loss_fn_inputs
        if grad_accumulation_normalization == "num_loss_tokens":
            _check_divisor(inputs, index)
        shares = np.ones(inputs["target_tokens"].to_numpy().shape)
        for name in ("weights", "advantages"):
            if name in inputs:
                shares = shares * inputs[name].to_numpy()
        if "weights" in inputs:
            plain = plain and bool(np.isin(inputs["weights"].to_numpy(), (0.0, 1.0)).all())
        sizes.append(float(np.abs(shares).sum()))
        tokens.append(int(np.count_nonzero(shares)))
    many = max(16, 4 * len(sizes))
    if sum(tokens) >= many and 0 < sum(sizes) <= AVERAGED:
        what, over, near = "all tokens of the step", sum(tokens), [sum(sizes)]
    elif min(tokens, default=0) >= 8 and 0 < max(sizes) <= AVERAGED:
        what, over, near = "each datum's tokens", max(tokens), sizes
    else:
        return
    message = (
        f"the magnitudes of weights and advantages sum to about 1 over {what}: they have been "
        f"divided by a count already (up to {over} tokens), and optim_step would divide once more "
        f"({grad_accumulation_normalization=}). Pass grad_accumulation_normalization=None, or give "
        "plain weights and advantages"
    )
    if plain and not all(abs(size - 1) <= EXACTLY for size in near):
        logger.warning("if these are no small rewards: %s", message)
        return
    raise InvalidArgument(message)


def _check_divisor(inputs: Mapping[str, tinker.TensorData], index: int) -> None:
    """Refuse a row with advantages for which a count of loss tokens takes its prompt in."""
    import numpy as np

    if "advantages" not in inputs:
        return
    if "weights" not in inputs:
        raise InvalidArgument(
            f"datum {index} has advantages and no 'weights': a trainer that counts every position "
            "would divide by its prompt's tokens too (num_loss_tokens). Build it with rl_datum, "
            "completion_datum or rollout_datum, or add weights: 1 for sampled tokens, else 0"
        )
    silent = inputs["advantages"].to_numpy() == 0
    if "logprobs" in inputs:
        silent = silent & (inputs["logprobs"].to_numpy() == 0)
    first = int(np.argmin(silent)) if not silent.all() else 0
    if first and inputs["weights"].to_numpy()[:first].any():
        raise InvalidArgument(
            f"datum {index}: its 'weights' count its first {first} positions, which have neither "
            "a logprob nor an advantage (a prompt): num_loss_tokens would divide by them. Make "
            "their weights 0"
        )


def _raw_logprobs(completion: SampledCompletion, length: int, index: int) -> npt.NDArray[Any]:
    import numpy as np

    raw = completion.inference_logprobs
    if raw is None:
        raise InvalidArgument(f"completion {index} has no inference_logprobs to compare")
    if completion.logprobs_echoed:
        raw = raw[completion.echoed_prompt_logprob_count :]
    placed = np.zeros(length, np.float64)
    placed[length - len(raw) :] = raw
    return placed


def _apart(
    sampled: npt.NDArray[np.floating[Any]],
    computed: npt.NDArray[np.floating[Any]],
    active: npt.NDArray[np.intp],
    shift: int,
) -> float:
    """Compute the mean difference of active entries from the trainer's, `shift` positions on."""
    moved = active + shift
    inside = (moved >= 0) & (moved < len(computed))
    if not inside.any():
        return math.inf
    differences = abs(sampled[active[inside]] - computed[moved[inside]])
    return float(differences.mean())
