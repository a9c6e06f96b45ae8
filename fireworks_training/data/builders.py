"""Builders of datums from tokens: supervised, a completion, a row of several completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fireworks_training.data.values import (
    datum_of,
    finite,
    numbers,
    sampled_logprobs,
    several,
    token_ids,
)
from fireworks_training.errors import InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker

    from fireworks_training.models import SampledCompletion


def supervised_datum(tokens: Sequence[int], weights: Sequence[float]) -> tinker.Datum:
    """Build a datum for cross_entropy from tokens and weights.

    Args:
        tokens: N token ids, prompt and completion; N >= 2.
        weights: N weights, entry t for predicting token t; 0 for the prompt. The first is without
            effect, since nothing predicts the first token.

    Returns:
        A datum of N-1 positions with `target_tokens` and `weights`.

    Raises:
        InvalidDatum: the lengths differ, a weight is not finite, or fewer than two tokens.
    """
    ids = token_ids("tokens", tokens)
    return datum_of(ids, weights=finite("weights", numbers("weights", weights, len(ids))[1:]))


def rl_datum(
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    advantages: float | Sequence[float],
    mask: bool = True,
) -> tinker.Datum:
    """Build a datum for importance_sampling, ppo and their like from a prompt and a completion.

    Args:
        prompt_tokens: P token ids; P >= 1.
        completion_tokens: C token ids; C >= 1.
        logprobs: C natural logprobs of the completion tokens, as they were sampled; at most 0.
        advantages: one for the whole completion, or C of them; numbers of Python, numpy or torch.
            Plain: divide by group or length before, or let `optim_step` normalise, never both
            (`check_normalization` looks).
        mask: without effect, taken for older scripts: the mask is always written.

    Returns:
        A datum of P+C-1 positions with `target_tokens`, `logprobs`, `advantages` and `weights`. The
        weights are the loss mask, 1 for completion tokens and 0 for the prompt: they say which
        tokens count. The other two are 0 on prompt positions.

    Raises:
        InvalidDatum: lengths that differ, an empty prompt or completion, a value that is not
            finite, or a logprob above 0.
    """
    import numpy as np

    del mask
    prompt = token_ids("prompt_tokens", prompt_tokens)
    completion = token_ids("completion_tokens", completion_tokens)
    if not len(prompt) or not len(completion):
        empty = "completion" if len(prompt) else "prompt"
        raise InvalidDatum(f"the {empty} is empty: a datum needs a token of each")
    count = len(completion)
    prompt_part = np.zeros(len(prompt) - 1, np.float32)

    def on_completion(name: str, values: float | Sequence[float]) -> npt.NDArray[np.float32]:
        return finite(name, np.concatenate([prompt_part, numbers(name, values, count)]))

    return datum_of(
        np.concatenate([prompt, completion]),
        logprobs=sampled_logprobs(on_completion("logprobs", several("logprobs", logprobs))),
        advantages=on_completion("advantages", advantages),
        weights=on_completion("weights", 1.0),
    )


def rollout_datum(
    tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    loss_mask: Sequence[bool],
    advantages: float | Sequence[float],
    mask: bool = True,
) -> tinker.Datum:
    """Build a datum for importance_sampling, ppo and their like from a row of several completions.

    A segment of a `TITOTrajectoryArtifact` is such a row: completions of the policy stand between
    prompts, tool results and other tokens that it did not sample.

    Args:
        tokens: N token ids; N >= 2.
        logprobs: N natural logprobs as they were sampled, at most 0; those outside the mask are
            without effect.
        loss_mask: N entries: whether the policy sampled the token; False for the first one.
        advantages: one for all sampled tokens, or N of them, of which those outside the mask are
            without effect; numbers of Python, numpy or torch.
        mask: without effect, taken for older scripts: the mask is always written.

    Returns:
        A datum of N-1 positions with `target_tokens`, `logprobs`, `advantages` and `weights`, which
        are the loss mask: 1 for sampled tokens, 0 for others. The other two are 0 outside it.

    Raises:
        InvalidDatum: lengths that differ, nothing or the first token in the mask, an entry of the
            mask that is neither 0 nor 1; inside it a value that is not finite or a logprob above
            0.
    """
    import numpy as np

    del mask
    ids = token_ids("tokens", tokens)
    shares = numbers("loss_mask", several("loss_mask", loss_mask), len(ids))
    if not np.isin(shares, (0.0, 1.0)).all():
        raise InvalidDatum("'loss_mask' has an entry that is neither 0 nor 1: it says what counts")
    if not shares[1:].any() or shares[0]:
        raise InvalidDatum(
            "'loss_mask' must be true for a token that was sampled, and not for the first, which "
            "nothing predicts"
        )

    def inside(name: str, values: float | Sequence[float]) -> npt.NDArray[np.float32]:
        array = np.where(shares != 0, numbers(name, values, len(ids)), np.float32(0.0))
        return finite(name, array[1:])

    return datum_of(
        ids,
        logprobs=sampled_logprobs(inside("logprobs", several("logprobs", logprobs))),
        advantages=inside("advantages", advantages),
        weights=shares[1:],
    )


def completion_datum(
    completion: SampledCompletion, advantages: float | Sequence[float], *, mask: bool = True
) -> tinker.Datum:
    """Build an `rl_datum` from a completion of a sampler.

    The datum's logprobs are those of the distribution that sampled the tokens, after temperature,
    top-p and top-k: the completion's `sampling_logprobs`. A server that does not report them gives
    `inference_logprobs` only, those of the raw model. At temperature 1 and without top-p and top-k
    both are the same, and these are used; a completion that was sampled otherwise is refused.

    Args:
        completion: sampled with `logprobs=True`.
        advantages, mask: as for `rl_datum`.

    Raises:
        InvalidDatum: as `rl_datum`; or the completion has no logprobs, lacks the sampling logprob
            of some of its tokens, or was sampled at another temperature than 1, or with top-p or
            top-k, at a server that reports none.
    """
    import numpy as np

    logprobs = completion.sampling_logprobs
    if logprobs is None:
        logprobs = completion.inference_logprobs
    if logprobs is None:
        raise InvalidDatum("the completion has no logprobs: sample with logprobs=True")
    if completion.sampling_logprobs is None and completion.full_distribution is False:
        raise InvalidDatum(
            "the completion was sampled with a temperature other than 1, top_p or top_k, and the "
            "server reports no 'sampling_logprobs': the distribution that sampled it is unknown. "
            "Sample at temperature=1, top_p=1 and without top_k; rl_datum takes logprobs of your "
            "own"
        )
    if completion.logprobs_echoed:
        logprobs = logprobs[completion.echoed_prompt_logprob_count :]
    if completion.sampling_logprobs is not None and np.isnan(logprobs).any():
        raise InvalidDatum(
            "the server reported 'sampling_logprobs' for some tokens of the completion only, so "
            "the distribution that sampled the others is unknown: leave the completion out, or "
            "sample at temperature 1 and pass inference_logprobs to rl_datum"
        )
    return rl_datum(
        completion.prompt_tokens,
        completion.completion_tokens,
        logprobs=logprobs,
        advantages=advantages,
        mask=mask,
    )
