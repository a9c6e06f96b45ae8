"""Datum builders that own the shift by one, so that no caller has to.

A causal model predicts token t+1 from the tokens up to t: of a sequence of N tokens the model input
is the first N-1, the targets are the last N-1, and every per-token array is that of the target.
The builders take arrays in the caller's terms (one entry a token) and check their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fireworks_training.errors import InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker


def supervised_datum(tokens: Sequence[int], weights: Sequence[float]) -> tinker.Datum:
    """A datum for cross_entropy.

    Args:
        tokens: N token ids, prompt and completion; N >= 2.
        weights: N weights, entry t for predicting token t; 0 for the prompt. The first is without
            effect, since nothing predicts the first token.

    Returns:
        A datum of N-1 positions with `target_tokens` and `weights`.

    Raises:
        InvalidDatum: the lengths differ, or there are fewer than two tokens.
    """
    import numpy as np

    _check_length("weights", weights, len(tokens))
    return _datum(tokens, weights=np.asarray(weights[1:], np.float32))


def rl_datum(
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    advantages: float | Sequence[float],
    mask: bool = False,
) -> tinker.Datum:
    """A datum for importance_sampling, ppo and their like.

    Args:
        prompt_tokens: P token ids; P >= 1.
        completion_tokens: C token ids; C >= 1.
        logprobs: C logprobs of the completion tokens, as they were sampled.
        advantages: one for the whole completion, or C of them. Plain: divide by group or length
            before, or let `optim_step` normalise, never both.
        mask: add `weights`, 1 for completion tokens and 0 for the prompt (custom losses want it).

    Returns:
        A datum of P+C-1 positions with `target_tokens`, `logprobs` and `advantages`; both arrays
        are 0 on prompt positions.

    Raises:
        InvalidDatum: lengths that differ, or an empty prompt or completion.
    """
    import numpy as np

    if not prompt_tokens or not completion_tokens:
        empty = "completion" if prompt_tokens else "prompt"
        raise InvalidDatum(f"the {empty} is empty: a datum needs a token of each")
    count = len(completion_tokens)
    _check_length("logprobs", logprobs, count)
    if not isinstance(advantages, (int, float)):
        _check_length("advantages", advantages, count)
    length = len(prompt_tokens) + count - 1

    def on_completion(values: float | Sequence[float]) -> npt.NDArray[np.float32]:
        array = np.zeros(length, np.float32)
        array[-count:] = values
        return array

    arrays = {"logprobs": on_completion(logprobs), "advantages": on_completion(advantages)}
    if mask:
        arrays["weights"] = on_completion(1.0)
    return _datum([*prompt_tokens, *completion_tokens], **arrays)


def _datum(tokens: Sequence[int], **arrays: npt.NDArray[np.float32]) -> tinker.Datum:
    import numpy as np
    import tinker

    if len(tokens) < 2:
        raise InvalidDatum(f"{len(tokens)} token: a datum needs two, one to predict the other from")
    targets = np.asarray(tokens[1:], np.int64)
    inputs: dict[str, npt.NDArray[Any]] = {"target_tokens": targets, **arrays}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([int(token) for token in tokens[:-1]]),
        loss_fn_inputs={
            name: tinker.TensorData.from_numpy(array) for name, array in inputs.items()
        },
    )


def _check_length(name: str, values: Sequence[float], length: int) -> None:
    if len(values) != length:
        raise InvalidDatum(
            f"{name!r} has {len(values)} entries for {length} tokens: one a token is needed"
        )
